"""Larger models: a ViT-L/14 with eight experts, and a language model in bfloat16 with three."""

from __future__ import annotations

import sys

from benchmarks import synthetic
from benchmarks.measure import Laboratory
from benchmarks.members import RANK, SCALE, Members, measure_merge, measure_spectra
from benchmarks.record import GB, Sheet
from benchmarks.synthetic import Model


def vit_large(laboratory: Laboratory, sheet: Sheet) -> None:
    """Eight experts of ViT-L/14 size, float32, one file each."""
    model = synthetic.vit(128, 2, 32, 64) if laboratory.quick else synthetic.vit_l_14()
    _all(laboratory, sheet, model, tasks=8, most_memory=None)


def decoder(laboratory: Laboratory, sheet: Sheet) -> None:
    """A decoder's shapes: sharded, in bfloat16, 1.1 billion parameters, three experts."""
    model = synthetic.decoder_1b()
    if laboratory.quick:
        model = synthetic.decoder(128, 352, 2, 1000, 32, 1 << 20)
    _all(laboratory, sheet, model, tasks=3, most_memory=3)


def _all(
    laboratory: Laboratory, sheet: Sheet, model: Model, tasks: int, most_memory: float | None
) -> None:
    """The model is inspected, one layer of it analysed, and it is merged."""
    members = Members.make(laboratory, model, "decaying", tasks)
    laboratory.fresh_cache()
    inspect = [sys.executable, "-m", "mergescope", "inspect", str(members.suite), "--headers-only"]
    seen = laboratory.command(inspect, 3)
    note = f"{model.nbytes / model.dtype.itemsize / GB:.2f} G parameters, {tasks} experts and base"
    sheet.seconds("inspect --headers-only", seen.seconds, note)
    layer = measure_spectra(laboratory, members, [members.block()])
    note = f"{layer.answer['matrices']} matrices; the model has {members.depth} layers"
    sheet.seconds("spectra of one layer", [layer.answer["seconds"]], note)
    average = measure_merge(laboratory, members, "average", {}, fresh=True, cold=True)
    sheet.seconds("average, cold files, nothing stored", average.seconds)
    parameters = {"rank": RANK, "scale": SCALE}
    cart = measure_merge(laboratory, members, "cart", parameters, fresh=True, cold=True)
    sheet.seconds("CART, cold files, nothing stored", cart.seconds)
    sheet.cost("CART against the average", cart.best / average.best)
    peak = max(run.anonymous for run in (seen, layer, average, cart))
    sheet.memory("peak memory", peak, at_most=most_memory)

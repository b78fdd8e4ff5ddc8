"""A language model's shapes: sharded, in bfloat16, 1.1 billion parameters, three experts."""

from __future__ import annotations

import sys

from benchmarks import synthetic
from benchmarks.measure import Laboratory
from benchmarks.members import RANK, SCALE, Members, merged, spectra_of
from benchmarks.record import GB, Sheet

TASKS = 3


def decoder(laboratory: Laboratory, sheet: Sheet) -> None:
    """The decoder is inspected, one layer of it analysed, and it is merged."""
    model = synthetic.decoder_1b()
    if laboratory.quick:
        model = synthetic.decoder(128, 352, 2, 1000, 32, 1 << 20)
    members = Members.made(laboratory, model, "decaying", TASKS)
    laboratory.fresh_cache()
    inspect = [sys.executable, "-m", "mergescope", "inspect", str(members.suite), "--headers-only"]
    seen = laboratory.command(inspect, 3)
    note = f"{model.nbytes / model.dtype.itemsize / GB:.2f} G parameters, {TASKS} experts and base"
    sheet.seconds("inspect --headers-only", seen.seconds, note)
    layer = spectra_of(laboratory, members, [members.block()])
    note = f"{layer.answer['matrices']} matrices; the model has {members.depth} layers"
    sheet.seconds("spectra of one layer", [layer.answer["seconds"]], note)
    average = merged(laboratory, members, "average", {}, fresh=True, cold=True)
    sheet.seconds("average, cold files, nothing stored", average.seconds)
    parameters = {"rank": RANK, "scale": SCALE}
    cart = merged(laboratory, members, "cart", parameters, fresh=True, cold=True)
    sheet.seconds("CART, cold files, nothing stored", cart.seconds)
    sheet.cost("CART against the average", cart.best / average.best)
    peak = max(run.anonymous for run in (seen, layer, average, cart))
    sheet.memory("peak memory", peak, at_most=3)

"""Eight experts of ViT-B/32 size: streaming, CART, spectra, TIES, and a peer on the same files."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np

from benchmarks import synthetic
from benchmarks.measure import FailedError, Laboratory, Measurement, remove, warm
from benchmarks.members import RANK, SCALE, Members, measure_copy, measure_merge, measure_spectra
from benchmarks.record import GB, Sheet
from benchmarks.synthetic import Spectrum

TASKS = 8
OTHER_SETTINGS = ((0.04, 0.5), (0.12, 1.5))
DENSITY = 0.2


def experts(laboratory: Laboratory, spectrum: Spectrum) -> Members:
    """The suite that is merged."""
    model = synthetic.vit(96, 2, 32, 64) if laboratory.quick else synthetic.vit_b_32()
    return Members.make(laboratory, model, spectrum, TASKS)


def streaming(laboratory: Laboratory, sheet: Sheet) -> None:
    """Average and Task Arithmetic against a plain copy of the same bytes."""
    members = experts(laboratory, "decaying")
    merges: dict[str, tuple[dict[str, Any], bool]] = {
        "average": ({}, False),
        "task_arithmetic": ({"scale": 0.3}, True),
    }
    peak = 0
    for cold in (True, False):
        state = "cold files" if cold else "files in memory"
        for method, (parameters, with_base) in merges.items():
            files = [*members.experts, *(members.base if with_base else [])]
            plain = measure_copy(laboratory, members, files, cold, repeats=2)
            run = measure_merge(
                laboratory, members, method, parameters, fresh=cold, cold=cold, repeats=2
            )
            peak = max(peak, run.anonymous)
            moved = sum(file.stat().st_size for file in files) + members.model.nbytes
            note = f"{moved / GB:.2f} GB read and written"
            if cold:
                note += f"; {run.cached:.0%} of the pages in memory before; digests not yet known"
            sheet.seconds(f"{state}: copy for {method}", plain.seconds)
            sheet.rate(f"{state}: copy for {method}, rate", moved, plain.seconds)
            sheet.seconds(f"{state}: {method}", run.seconds, note)
            sheet.rate(f"{state}: {method}, rate", moved, run.seconds)
            sheet.speedup(f"{state}: {method} against the copy", plain.best / run.best, 0.6)
    sheet.memory("peak memory", peak, at_most=0.7)
    idle = laboratory.run("benchmarks.jobs:idle", {})
    sheet.memory("memory of a process that only imports", idle.anonymous)


def cart(laboratory: Laboratory, sheet: Sheet) -> None:
    """CART against the authors' route and against the average, from cold files and again."""
    # A flat spectrum is the harder of the two.
    for spectrum in ("flat",) if laboratory.quick else get_args(Spectrum):
        members = experts(laboratory, spectrum)
        authors = _authors(laboratory, sheet, members, f"{spectrum}: ")
        first = _first_merge(laboratory, sheet, members, f"{spectrum}: ")
        sheet.speedup(f"{spectrum}: CART against the authors' route", authors / first.best, 5)
        _second_merges(laboratory, sheet, members, f"{spectrum}: ", first)


def _authors(laboratory: Laboratory, sheet: Sheet, members: Members, label: str) -> float:
    """Seconds of an SVD of every matrix as stored; of a sample, scaled up, unless complete."""
    output = laboratory.work / "authors.safetensors"
    arguments = {
        "suite": str(members.suite),
        "rank": RANK,
        "scale": SCALE,
        "blocks": [] if laboratory.complete else [members.block()],
        "output": str(output),
    }
    run = laboratory.run("benchmarks.jobs:authors", arguments, cold=members.experts)
    remove(output)
    found = run.answer
    whole = run.best + found["seconds"] * (found["all"] / found["entries"] - 1)
    share = found["entries"] / found["all"]
    note = "" if share == 1 else f"{share:.1%} of the entries decomposed, the others scaled up"
    sheet.seconds(f"{label}authors' route, cold files", [whole], note)
    return whole


def _first_merge(laboratory: Laboratory, sheet: Sheet, members: Members, label: str) -> Measurement:
    """CART from cold files with nothing stored, and how exact its file is."""
    parameters = {"rank": RANK, "scale": SCALE}
    run = measure_merge(laboratory, members, "cart", parameters, fresh=True, cold=True, repeats=2)
    sheet.seconds(f"{label}CART, cold files, nothing stored", run.seconds)
    arguments = {
        "suite": str(members.suite),
        "merged": str(laboratory.work / "output" / "model.safetensors"),
        "names": [members.matrices[0], members.matrices[-1]],
        **parameters,
    }
    error = laboratory.run("benchmarks.jobs:update_error", arguments).answer
    note = "of the written file, against a float64 SVD; larger of two matrices"
    what = f"{label}relative error of the update"
    sheet.add(what, error, "", "lower", at_most=1e-4, note=note)
    places = (laboratory.cache / "factors").rglob("*")
    sheet.memory(f"{label}factors on disk", sum(f.stat().st_size for f in places if f.is_file()))
    return run


def _second_merges(
    laboratory: Laboratory, sheet: Sheet, members: Members, label: str, first: Measurement
) -> None:
    """CART at other settings from stored factors; the averages that both are measured by."""
    known = measure_merge(laboratory, members, "average", {}, fresh=False, cold=False, repeats=2)
    sheet.seconds(f"{label}average, files in memory, digests known", known.seconds)
    peak = first.anonymous
    for rank, scale in OTHER_SETTINGS:
        parameters = {"rank": rank, "scale": scale}
        run = measure_merge(laboratory, members, "cart", parameters, fresh=False, cold=False)
        peak = max(peak, run.anonymous)
        what = f"{label}CART again at rank {rank}"
        sheet.seconds(what, run.seconds, f"factors stored at rank {RANK}")
        sheet.cost(f"{what} against that average", run.best / known.best, 3)
    average = measure_merge(laboratory, members, "average", {}, fresh=True, cold=True, repeats=2)
    sheet.seconds(f"{label}average, cold files, nothing stored", average.seconds)
    sheet.cost(f"{label}CART against that average", first.best / average.best, 4)
    sheet.memory(f"{label}peak memory of CART", peak, at_most=0.7)


def spectra(laboratory: Laboratory, sheet: Sheet) -> None:
    """Spectra of all matrices and tasks against svdvals, matrix by matrix."""
    members = experts(laboratory, "decaying")
    ours = measure_spectra(laboratory, members, [])
    found = ours.answer
    arguments = {
        "suite": str(members.suite),
        "prefixes": [members.block()],
        "shown": members.matrices[0],
    }
    plain = laboratory.run("benchmarks.jobs:plain_spectra", arguments).answer
    scaled = plain["seconds"] * found["matrices"] / plain["matrices"]
    note = f"{plain['matrices']} matrices, scaled up to {found['matrices']}"
    sheet.seconds("svdvals in float32, matrix by matrix", [scaled], note)
    sheet.seconds("all spectra", [found["seconds"]], "files in memory, nothing stored")
    sheet.speedup("against svdvals", scaled / found["seconds"], 4)
    exact, sigma = np.array(plain["sigma"]), np.array(found["sigma"])
    off = np.abs(sigma[: exact.size] - exact)
    note = "one matrix, against float64"
    sheet.add("largest error of σ, of σ_1", float(off.max() / exact[0]), "", "lower", note=note)
    relative = float((off[:-1] / exact[:-1]).max())  # the last one of a centred set may be zero
    sheet.add("largest error of σ, of itself", relative, "", "lower", note=note)
    sheet.memory("peak memory", ours.anonymous)


def ties(laboratory: Laboratory, sheet: Sheet) -> None:
    """TIES' thresholds over the whole model against a full sort."""
    members = experts(laboratory, "decaying")
    warm([*members.experts, *members.base])
    tasks = ["task1", "task2"]
    arguments = {"suite": str(members.suite), "tasks": tasks, "density": DENSITY}
    found = laboratory.run("benchmarks.jobs:ties_thresholds", arguments).answer
    note = f"{len(tasks)} tasks of {found['entries'] / 1e6:.1f} M entries, reading included"
    sheet.seconds("torch.sort of all magnitudes", [found["sort"]], note)
    sheet.seconds("thresholds over the whole model", [found["seconds"]], note)
    sheet.speedup("against the sort", found["sort"] / found["seconds"], 5)
    sheet.add("masks equal (1: yes)", float(found["equal"]), "", "higher", at_least=1)


PEER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "average": ({}, {"merge_method": "linear", "weight": 1.0}),
    "task_arithmetic": ({"scale": 0.3}, {"merge_method": "task_arithmetic", "weight": 0.3}),
    "ties": (
        {"density": DENSITY, "trim": "tensor", "scale": 1.0},
        {"merge_method": "ties", "weight": 1.0, "density": DENSITY},
    ),
}


def mergekit(laboratory: Laboratory, sheet: Sheet) -> None:
    """Average, Task Arithmetic and TIES against mergekit-pytorch on the same files."""
    if laboratory.mergekit is None:
        raise FailedError("no Python with mergekit; see benchmarks/README.md")
    members = experts(laboratory, "decaying")
    output, kept = laboratory.work / "output", laboratory.work / "theirs"
    extra = {"base": str(members.base[0]), "config": str(laboratory.work / "mergekit.yaml")}
    for method in ("ties",) if laboratory.quick else PEER:
        parameters, options = PEER[method]
        theirs = measure_merge(
            laboratory, members, method, options, fresh=False, cold=False, repeats=2,
            job="benchmarks.peer:merge", python=laboratory.mergekit, extra=extra,
        )  # fmt: skip
        remove(kept)
        output.rename(kept)
        ours = measure_merge(
            laboratory, members, method, parameters, fresh=True, cold=False, repeats=2
        )
        pair = {"first": str(output), "second": str(kept)}
        distance = laboratory.run("benchmarks.jobs:output_distance", pair).answer
        sheet.seconds(
            f"{method}: mergekit", theirs.seconds, f"and {theirs.imports:.1f} s of imports"
        )
        note = f"and {ours.imports:.1f} s of imports; digests of all files included"
        sheet.seconds(f"{method}: MergeScope", ours.seconds, note)
        sheet.cost(f"{method}: time against mergekit's", ours.best / theirs.best, 0.8)
        sheet.memory(f"{method}: mergekit's peak memory", theirs.anonymous)
        sheet.memory(f"{method}: peak memory", ours.anonymous, round(theirs.anonymous / GB, 3))
        sheet.add(f"{method}: relative distance of the outputs", distance, "", "neither")
    remove(kept)

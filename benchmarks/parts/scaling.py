"""How cost grows with a model and its suite, what executors gain, and how soon a command starts."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import synthetic
from benchmarks.measure import Laboratory
from benchmarks.members import RANK, SCALE, Members
from benchmarks.record import Sheet

EXECUTORS = ("serial", "threads:2", "processes:2", "ray:2")


@dataclass(frozen=True)
class Sizes:
    """One merge whose cost is measured."""

    tasks: int = 3
    side: int = 512
    layers: int = 2
    rank: float = RANK


def series(quick: bool) -> dict[str, tuple[list[float], list[Sizes], str]]:
    """What grows: its values, the merges, and the exponent that is expected."""
    side, layers = (64, 2) if quick else (512, 4)
    tasks = [2, 4, 8] if quick else [2, 4, 8, 12, 20]
    sides = [64, 128, 256] if quick else [256, 512, 1024, 2048, 4096]
    depths = [2, 4, 8] if quick else [2, 4, 8, 16]
    ranks = [0.05, 0.1, 0.2, 0.4]
    middle = 2 * side
    return {
        "tasks": ([*map(float, tasks)], [Sizes(t, side, layers) for t in tasks], "1"),
        "matrix side": (
            [*map(float, sides)],
            [Sizes(side=s) for s in sides],
            "2 (reading) to 3 (decomposing)",
        ),
        "layers": ([*map(float, depths)], [Sizes(side=side, layers=n) for n in depths], "1"),
        "rank": (ranks, [Sizes(side=middle, rank=k) for k in ranks], "0 (exact) to 1 (iterative)"),
    }


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of log y over log x, by least squares."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def merge_times(
    suites: list[str], ranks: list[float], executors: list[str], repeats: list[int]
) -> list[dict[str, Any]]:
    """CART of small suites from files in memory, nothing decomposed before: a job.

    Args:
        suites, ranks, executors, repeats: of each merge; lists of one length.

    Returns:
        Of each merge the seconds of its repeats and the digest of the weights that it wrote.
    """
    from merge_core.executors.choose import choose_executor
    from merge_core.factors.store import FactorStore
    from merge_core.merging.recipe import make_recipe
    from merge_core.output.model_folder import merge_to_folder
    from merge_core.suites.suite import load_suite

    def once(suite: str, rank: float, where: str) -> tuple[float, str]:
        values = {"rank": rank, "scale": SCALE}
        recipe = make_recipe({"suite": suite, "method": "cart", "parameters": values})
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            start = time.perf_counter()
            store = FactorStore(folder / "factors")
            merge_to_folder(
                recipe, load_suite(suite), folder / "merged", store, executor=choose_executor(where)
            )
            seconds = time.perf_counter() - start
            written = (folder / "merged" / "model.safetensors").read_bytes()
        return seconds, sha256(written).hexdigest()

    once(suites[0], ranks[0], executors[0])  # the first use of anything takes longer
    results = []
    for suite, rank, where, times in zip(suites, ranks, executors, repeats, strict=True):
        loaded = load_suite(suite)
        loaded.members_digest(loaded.tasks, with_base=True)  # reads the files, and is remembered
        runs = [once(suite, rank, where) for _ in range(times)]
        results.append({"seconds": [s for s, _ in runs], "digest": runs[-1][1]})
    return results


def growth(laboratory: Laboratory, sheet: Sheet) -> None:
    """CART's cost over tasks, matrix side, layers and rank, as measured exponents."""
    measured = series(laboratory.quick)
    merges = [merge for _, points, _ in measured.values() for merge in points]
    suites = [
        Members.make(laboratory, synthetic.plain(m.side, m.layers), "decaying", m.tasks).suite
        for m in merges
    ]
    arguments = {
        "suites": [str(suite) for suite in suites],
        "ranks": [m.rank for m in merges],
        "executors": ["threads"] * len(merges),
        # Large matrices take long, and vary little.
        "repeats": [1 if laboratory.quick or m.side > 2048 else 2 for m in merges],
    }
    laboratory.fresh_cache()
    answers = iter(laboratory.run("benchmarks.parts.scaling:merge_times", arguments).answer)
    for name, (x, points, expected) in measured.items():
        y = []
        for value, _ in zip(x, points, strict=True):
            seconds = next(answers)["seconds"]
            sheet.seconds(f"{name} {value:g}", seconds)
            y.append(min(seconds))
        note = f"expected {expected}; over the last two points {exponent(x[-2:], y[-2:]):.2f}"
        sheet.add(f"exponent over {name}", exponent(x, y), "", "neither", note=note)


def executors(laboratory: Laboratory, sheet: Sheet) -> None:
    """The same CART merge by each executor: seconds, and whether the bytes are the same."""
    model = synthetic.vit(64, 2, 32, 32) if laboratory.quick else synthetic.vit(768, 4, 32, 512)
    suite = Members.make(laboratory, model, "decaying", 4).suite
    count = len(EXECUTORS)
    arguments = {
        "suites": [str(suite)] * count,
        "ranks": [RANK] * count,
        "executors": list(EXECUTORS),
        "repeats": [1 if laboratory.quick else 2] * count,
    }
    laboratory.fresh_cache()
    answer = laboratory.run("benchmarks.parts.scaling:merge_times", arguments).answer
    serial = min(answer[0]["seconds"])
    for name, found in zip(EXECUTORS, answer, strict=True):
        starts = "" if name in ("serial", "threads:2") else "its workers' start included"
        sheet.seconds(name, found["seconds"], starts)
        if name != "serial":
            sheet.speedup(f"{name} against serial", serial / min(found["seconds"]))
    same = len({found["digest"] for found in answer}) == 1
    sheet.add("weights identical to the last byte (1: yes)", float(same), "", "higher", at_least=1)


def startup(laboratory: Laboratory, sheet: Sheet) -> None:
    """How long the command line takes to say something."""
    program = [sys.executable, "-m", "mergescope"]
    help_text = laboratory.command([*program, "--help"], 5)
    sheet.add("mergescope --help", help_text.best, "s", "lower", at_most=0.5)
    laboratory.fresh_cache()
    command = [*program, "inspect", "vision", "--headers-only"]
    sheet.seconds(
        "mergescope inspect vision --headers-only", laboratory.command(command, 5).seconds
    )
    torch = laboratory.command([sys.executable, "-c", "import torch"], 5)
    sheet.seconds("of which 'import torch' alone takes", torch.seconds)

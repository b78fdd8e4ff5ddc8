"""What a busy neighbour costs: the same work alone and beside another process that computes."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from benchmarks import synthetic
from benchmarks.measure import ROOT, Laboratory, remove, warm
from benchmarks.members import RANK, SCALE, Members
from benchmarks.record import Sheet

# Of its two processors two threads have 4/3 beside a neighbour: 1.5 times longer is fair.
AT_MOST = 2.0
REPEATS = 3
BEGINS = 3.0
BUSY = "import torch; torch.set_num_threads(1); A = torch.randn(512, 512)\nwhile True: A @ A"


@contextmanager
def neighbour(laboratory: Laboratory) -> Iterator[None]:
    """A process that keeps one processor busy."""
    environment = replace(laboratory, threads=1).environment()
    process = subprocess.Popen([sys.executable, "-c", BUSY], cwd=ROOT, env=environment)
    try:
        time.sleep(BEGINS)
        yield
    finally:
        process.kill()
        process.wait()


def rank_from_weights(suite: str) -> None:
    """What ``mergescope select-rank --mode weights`` computes, nothing decomposed before: a job."""
    from analysis.rank_selection.space import search_space
    from analysis.rank_selection.weight_proxies import recommend_from_weights
    from benchmarks.jobs import groups_of

    recommend_from_weights(groups_of(suite), search_space("cart", suite))


def interference(suite: str) -> None:
    """Interference over rank, cosines and sign conflicts of the whole model: a job."""
    from analysis.spectral.interference import (
        cosine_similarity,
        interference_over_rank,
        sign_conflict,
    )
    from benchmarks.jobs import groups_of

    groups = groups_of(suite)
    interference_over_rank(groups, "average", [0.02, 0.08, 0.32, 1.0])
    cosine_similarity(groups, "base")
    sign_conflict(groups, "base")


def beside_a_neighbour(laboratory: Laboratory, sheet: Sheet) -> None:
    """Rank from weights, interference and CART of a 22 M encoder, alone and beside a neighbour."""
    model = synthetic.vit(64, 2, 32, 32) if laboratory.quick else synthetic.vit(384, 12, 16, 384)
    members = Members.make(laboratory, model, "decaying", 8)
    suite, output = str(members.suite), laboratory.work / "output"
    parameters = {"rank": RANK, "scale": SCALE}
    merge = {"suite": suite, "method": "cart", "parameters": parameters, "output": str(output)}
    jobs: dict[str, tuple[str, dict[str, Any]]] = {
        "rank from weights": ("benchmarks.parts.neighbour:rank_from_weights", {"suite": suite}),
        "interference": ("benchmarks.parts.neighbour:interference", {"suite": suite}),
        "CART": ("benchmarks.jobs:merge", merge),
    }

    def before() -> None:
        remove(output)
        laboratory.fresh_cache()
        warm([*members.experts, *members.base])

    def median(threads: int, job: str, arguments: dict[str, Any]) -> float:
        place = replace(laboratory, threads=threads)
        run = place.run(job, arguments, repeats=REPEATS, before=before)
        return statistics.median(run.seconds)

    for name, (job, arguments) in jobs.items():
        single = median(1, job, arguments)
        alone = median(laboratory.threads, job, arguments)
        with neighbour(laboratory):
            beside = median(laboratory.threads, job, arguments)
        note = f"median of {REPEATS}"
        sheet.add(f"{name}: one thread, alone", single, "s", "lower", note=note)
        sheet.add(f"{name}: alone", alone, "s", "lower", note=note)
        sheet.add(f"{name}: beside a neighbour", beside, "s", "lower", note=note)
        sheet.cost(f"{name}: beside a neighbour against alone", beside / alone, AT_MOST)
    remove(output)

"""Processor seconds of the methods that take longest, and of what is asked of a suite at once."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from benchmarks import synthetic
from benchmarks.measure import Laboratory, warm, weights_below
from benchmarks.members import Members
from benchmarks.record import Sheet

# The suite that is measured where this names one; eight synthetic 22 M encoders where it does not.
SUITE = "MERGESCOPE_BENCH_SUITE"
SLOW = (
    "emr",
    "pcb",
    "knots",
    "iso_cts",
    "tall_masks",
    "wudi",
    "tsv_m",
    "cart",
    "karcher",
    "average",
)
REPEATS = 2
RANKED = ("cart", "task_arithmetic")
MOST_SECONDS = {"recommendation": 4.0, "inspect": 2.0}


def merge_in_memory(suite: str, method: str) -> float:
    """Seconds of this thread for a method's models of all tasks, nothing decomposed before: a job.

    The experts are in memory, and everything runs on one thread, so that a busy machine changes
    little. A method that gives one model per task makes all of them.
    """
    from merge_core.executors.base import one_thread
    from merge_core.factors.store import FactorStore
    from merge_core.merging.engine import MergeSession
    from merge_core.merging.recipe import make_recipe
    from merge_core.suites.suite import load_suite

    session = MergeSession(load_suite(suite), None, FactorStore())
    for group in session.groups:
        _ = group.members, group.base
    tasks = session.groups.tasks
    recipe = make_recipe({"suite": suite, "tasks": tasks, "method": method})
    start = time.thread_time()
    with one_thread(workers=1):
        for task in tasks if recipe.declaration.indexed else (None,):
            session.merge(recipe, task=task)
    return time.thread_time() - start


def recommend(suite: str, method: str, every: bool) -> float:
    """Seconds, imports apart, for the recommended rule's setting from weights alone: a job.

    With `every`, for what all rules pick.
    """
    from analysis.rank_selection.select import SelectionOptions, select_rank
    from analysis.rank_selection.space import search_space
    from merge_core.factors.store import FactorStore
    from merge_core.merging.engine import MergeSession
    from merge_core.suites.suite import load_suite

    start = time.perf_counter()
    session = MergeSession(load_suite(suite), None, FactorStore())
    space = search_space(method, suite, session.groups.tasks)
    options = SelectionOptions("weights", report=False, only_rule=not every)
    select_rank(space, session, None, options)
    return time.perf_counter() - start


def slow_methods(laboratory: Laboratory, sheet: Sheet) -> None:
    """Methods by processor time; a recommendation from weights, factors stored; ``inspect``."""
    suite, files = _suite(laboratory)

    def fresh() -> None:
        laboratory.fresh_cache()
        warm(files)

    for method in SLOW:
        job, arguments = f"{__name__}:merge_in_memory", {"suite": suite, "method": method}
        taken = []
        for _ in range(1 if laboratory.quick else REPEATS):
            run = laboratory.run(job, arguments, before=fresh)
            taken.append(float(run.answer))
        sheet.seconds(f"{method}: processor", taken, "one thread, nothing decomposed before")
    for method in RANKED:
        for every in (False, True):
            what = "all rules" if every else "the recommended rule"
            asked = {"suite": suite, "method": method, "every": every}
            job = f"{__name__}:recommend"
            laboratory.run(job, asked)  # leaves the factors
            taken = [float(laboratory.run(job, asked).answer) for _ in range(REPEATS)]
            note = "" if every else f"at most {MOST_SECONDS['recommendation']:g} s asked for cart"
            sheet.seconds(f"{method} from weights, {what}, factors stored", taken, note)
    command = [sys.executable, "-m", "mergescope", "inspect", suite]
    laboratory.command(command)
    told = laboratory.command(command, REPEATS)
    note = f"whole process; at most {MOST_SECONDS['inspect']:g} s asked"
    sheet.seconds("inspect", told.seconds, note)


def _suite(laboratory: Laboratory) -> tuple[str, list[Path]]:
    """The suite that is measured, and its files."""
    if named := os.environ.get(SUITE):
        return named, weights_below(Path(named).parent)
    model = synthetic.vit(64, 2, 32, 32) if laboratory.quick else synthetic.vit(384, 12, 16, 384)
    members = Members.make(laboratory, model, "decaying", 8)
    return str(members.suite), [*members.experts, *members.base]

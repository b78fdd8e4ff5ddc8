"""Frames that a suite ships, so that the dashboard's default views compute nothing.

Run ``python -m data.precompute`` after the bundled suites, the evidence for the rules or the
meaning of a question changed. Frames are known by the content of weights and data, so stale ones
are never used, only useless.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import get_args

from analysis.comparison.scaling import draw_subsets, task_counts
from analysis.evaluation.evaluator import Evaluator
from analysis.frames.entries import Asked, Frames, Kept
from analysis.frames.flips import first_flips_if_known
from analysis.frames.from_outputs import OutputFrames
from analysis.frames.record import record_bytes
from analysis.frames.recording import Recorder, usual_answers
from analysis.frames.scaling import scaling
from analysis.frames.store import FrameStore
from analysis.frames.usual import SEARCHED, SUBSETS
from analysis.rank_selection.rule import Mode
from analysis.rank_selection.select import SelectionOptions
from analysis.rank_selection.space import search_space
from merge_core.factors.store import FactorStore
from merge_core.files import write_atomically
from merge_core.merging.engine import MergeSession
from merge_core.progress import Progress
from merge_core.suites.bundled import FRAMES_NAME, bundled_name, bundled_suites
from merge_core.suites.recorded import suite_card
from merge_core.suites.suite import Suite, load_suite


def precompute(reference: str, progress: Progress | None = None) -> Path:
    """Ask what the default views show, and write the answers beside the suite.

    Of a suite with presets these are the views of the first one, and the first result of the
    others.

    Args:
        reference: the name of a bundled suite, or a suite.yaml with a base whose folder may be
            written.
        progress: reports what is asked.

    Returns:
        The path of the file.

    Raises:
        MergeScopeError: the suite cannot be evaluated.
    """
    suite = load_suite(reference)
    progress, frames, factors = progress or Progress(), FrameStore(), FactorStore()
    first, *others = [suite.restrict([name]) for name in suite.spec.presets] or [suite]
    name = bundled_name(suite.path) or reference
    answers: list[tuple[str, tuple[Asked, Kept]]] = []
    for part in (first, *others):
        recorder = Recorder(frames)
        _ask_accuracies(part, name, recorder, factors, progress, every_view=part is first)
        answers += recorder.answers.items()
    answers += [
        (asked.key, (asked, kept))
        for asked, kept in usual_answers(first, name, frames, factors, progress)
    ]
    target = suite.root / FRAMES_NAME
    write_atomically(target, record_bytes(suite_card(first, measured=True), dict(answers).values()))
    target.chmod(0o644)  # a suite is for everyone
    return target


def _ask_accuracies(
    suite: Suite,
    name: str,
    frames: Frames,
    factors: FactorStore,
    progress: Progress,
    every_view: bool,
) -> None:
    """The searches that take long, the first result, and the accuracy over the number of tasks."""
    tasks, evaluator = suite.tasks, Evaluator(suite)
    session = MergeSession(suite, tasks, factors)
    outputs = OutputFrames(name, suite, tasks, frames, lambda: session, lambda: evaluator)
    for method in SEARCHED if every_view else ("cart", "task_arithmetic"):
        space = search_space(method, name, tasks)
        modes: tuple[Mode, ...] = get_args(Mode) if every_view else ("labels",)
        for mode in modes:
            outputs.select(space, SelectionOptions(mode, every_proxy=every_view), progress)
    outputs.first_result(outputs.first_recipes())
    first_flips_if_known(outputs)
    scaling(outputs, [tasks], factors, progress)  # as beside a suite of another size
    if every_view:
        drawn = draw_subsets(tasks, task_counts(len(tasks)), SUBSETS[0])
        scaling(outputs, drawn, factors, progress)


def _show(started: float, done: int, total: int, label: str) -> None:
    sys.stderr.write(f"\r\x1b[2K{time.monotonic() - started:6.0f} s  {done}/{total} {label:60.60}")
    sys.stderr.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", default=list(bundled_suites()))
    begun = time.monotonic()
    for each in parser.parse_args().suites:
        path = precompute(each, Progress(lambda *what: _show(begun, *what)))
        sys.stdout.write(f"\r{path}\n")

"""What is asked of subsets of a suite's tasks: accuracy over their number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis.comparison.scaling import METHODS, accuracy_over_tasks
from analysis.frames.asking import ask, ask_if_known, refuse
from analysis.frames.entries import frame_question
from analysis.frames.from_outputs import OutputFrames
from analysis.frames.from_weights import method_arguments
from analysis.frames.results import default_recipe
from analysis.rank_selection.evidence.shipped import evidence_digest
from merge_core.factors.store import FactorStore
from merge_core.progress import Progress

SCALING = frame_question("accuracy.scaling", 2, "the accuracy over the number of tasks")
Subsets = Sequence[tuple[str, ...]]


def scaling(
    outputs: OutputFrames, subsets: Subsets, factors: FactorStore, progress: Progress | None = None
) -> pd.DataFrame:
    """See :func:`analysis.comparison.scaling.accuracy_over_tasks`; on the test split.

    Args:
        outputs: of all tasks of which there are subsets.
        subsets: of its tasks.
        factors: where factors are kept.
        progress: told after each merge; cancels between two.

    Example:
        >>> from analysis.evaluation.evaluator import Evaluator
        >>> from analysis.frames.store import FrameStore
        >>> suite = load_suite("vision")
        >>> session = lambda: MergeSession(suite, suite.tasks, FactorStore())
        >>> evaluator = lambda: Evaluator(suite)
        >>> outputs = OutputFrames("vision", suite, suite.tasks, FrameStore(), session, evaluator)
        >>> frame = scaling(outputs, [("digits", "dots")], FactorStore())
        >>> frame["count"].unique().tolist()
        [2]
    """
    return ask(
        outputs.frames,
        SCALING,
        outputs.inputs,
        _arguments(outputs, subsets),
        lambda: accuracy_over_tasks(
            outputs.reference,
            outputs.suite,
            subsets,
            outputs.evaluator,
            factors,
            progress=progress,
        ),
    )


def scaling_if_known(outputs: OutputFrames, subsets: Subsets) -> pd.DataFrame | None:
    """The same where it was computed before, else None.

    Raises:
        NotRecorded: it was not, and cannot be.

    Example:
        >>> from analysis.evaluation.evaluator import Evaluator
        >>> from analysis.frames.store import FrameStore
        >>> suite = load_suite("vision")
        >>> session = lambda: MergeSession(suite, suite.tasks, FactorStore())
        >>> evaluator = lambda: Evaluator(suite)
        >>> outputs = OutputFrames("vision", suite, suite.tasks, FrameStore(), session, evaluator)
        >>> scaling_if_known(outputs, [("lines", "dots")]) is None
        True
    """
    asked = _arguments(outputs, subsets)
    known = ask_if_known(outputs.frames, SCALING, outputs.inputs, asked, lambda: None)
    if known is None:
        refuse(outputs.frames, SCALING, outputs.inputs, asked)
    return known


def _arguments(outputs: OutputFrames, subsets: Subsets) -> dict[str, Any]:
    """The subsets, the methods at their revisions, and the evidence that decides on the rule."""
    starts = [default_recipe(name, outputs.reference, outputs.tasks) for name in METHODS]
    return {
        "subsets": [list(subset) for subset in subsets],
        "methods": [method_arguments(start) for start in starts],
        "evidence": evidence_digest(),
    }

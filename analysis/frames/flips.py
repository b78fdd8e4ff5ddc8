"""What is asked of two merges of a suite: the inputs on which they differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd

from analysis.evaluation.flips import flipped_inputs
from analysis.frames.asking import ask_if_known
from analysis.frames.entries import frame_question
from analysis.frames.from_outputs import OutputFrames
from analysis.frames.from_weights import method_arguments
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import Recipe

FLIPS = frame_question("accuracy.flips", 1, "the inputs on which two merges differ")


def flips_if_known(
    outputs: OutputFrames, before: Recipe, after: Recipe, session: Callable[[], MergeSession]
) -> pd.DataFrame | None:
    """See :func:`analysis.evaluation.flips.flipped_inputs`; on the test split.

    Args:
        outputs: of the merges' tasks.
        before, after: the two merges.
        session: gives their members, where something is computed.

    Returns:
        None where it would take a forward pass, and of language models: their texts have no
        classes to be named.

    Example:
        >>> from analysis.evaluation.evaluator import Evaluator
        >>> from analysis.frames.store import FrameStore
        >>> suite = load_suite("vision").restrict(["dots"])
        >>> session = lambda: MergeSession(suite, suite.tasks, FactorStore())
        >>> evaluator = lambda: Evaluator(suite)
        >>> outputs = OutputFrames("vision", suite, suite.tasks, FrameStore(), session, evaluator)
        >>> cart = make_recipe({"suite": "vision", "tasks": ["dots"], "method": "cart"})
        >>> flips_if_known(outputs, cart, cart, session) is None  # nothing is stored
        True
    """
    if outputs.suite.speaks:
        return None

    def compute() -> pd.DataFrame | None:
        evaluator = outputs.evaluator
        if not all(evaluator.knows(each, session(), "test") for each in (before, after)):
            return None
        return flipped_inputs(before, after, session(), evaluator)

    return ask_if_known(outputs.frames, FLIPS, outputs.inputs, _arguments(before, after), compute)


def _arguments(before: Recipe, after: Recipe) -> dict[str, Any]:
    return {"before": method_arguments(before), "after": method_arguments(after), "split": "test"}

"""What is asked of two merges of a suite: the inputs on which they differ."""

from __future__ import annotations

from typing import Any

import pandas as pd

from analysis.evaluation.flips import flipped_inputs
from analysis.frames.asking import ask_if_known
from analysis.frames.entries import frame_question
from analysis.frames.from_outputs import OutputFrames
from analysis.frames.from_weights import method_arguments
from merge_core.merging.recipe import Recipe

FLIPS = frame_question("accuracy.flips", 1, "the inputs on which two merges differ")


def flips_if_known(outputs: OutputFrames, before: Recipe, after: Recipe) -> pd.DataFrame | None:
    """See :func:`analysis.evaluation.flips.flipped_inputs`; on the test split.

    Args:
        outputs: of the merges' tasks.
        before, after: the two merges.

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
        >>> flips_if_known(outputs, cart, cart) is None  # nothing is stored
        True
    """
    if outputs.suite.speaks:
        return None

    def compute() -> pd.DataFrame | None:
        evaluator = outputs.evaluator
        if not all(evaluator.knows(each, outputs.session, "test") for each in (before, after)):
            return None
        return flipped_inputs(before, after, outputs.session, evaluator)

    return ask_if_known(outputs.frames, FLIPS, outputs.inputs, _arguments(before, after), compute)


def first_flips_if_known(outputs: OutputFrames) -> pd.DataFrame | None:
    """The same of average and CART as they stand in the first result, where that is known.

    Args:
        outputs: of the tasks of the first result.

    Example:
        >>> from analysis.evaluation.evaluator import Evaluator
        >>> from analysis.frames.store import FrameStore
        >>> suite = load_suite("vision").restrict(["dots"])
        >>> session = lambda: MergeSession(suite, suite.tasks, FactorStore())
        >>> evaluator = lambda: Evaluator(suite)
        >>> outputs = OutputFrames("vision", suite, suite.tasks, FrameStore(), session, evaluator)
        >>> first_flips_if_known(outputs) is None  # nothing is stored
        True
    """
    found = outputs.first_result_if_known()
    if found is None:
        return None
    recipes = {title: recipe for title, (recipe, _) in found[0].items()}
    return flips_if_known(outputs, recipes["Weight average"], recipes["CART"])


def _arguments(before: Recipe, after: Recipe) -> dict[str, Any]:
    return {"before": method_arguments(before), "after": method_arguments(after), "split": "test"}

"""How many predictions a lower precision changes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.evaluation.evaluator import Evaluator
from analysis.outputs.inputs import Split
from analysis.outputs.prediction_store import CLASSES


def precision_words(
    evaluator: Evaluator, tasks: Sequence[str], split: Split, limit: int | None = None
) -> str | None:
    """What share of the experts' and the base's predictions the precision changes, in words.

    Both are evaluated in float32 too, where that was not done before.

    Args:
        evaluator: whose precision it is.
        tasks: whose inputs count; each task's own expert.
        split: ``val`` or ``test``.
        limit: only the first so many inputs of each task.

    Returns:
        A sentence; None in float32.

    Raises:
        MergeScopeError: unreadable or unfit weights, heads or data.

    Example:
        >>> precision_words(Evaluator(load_suite("vision")), ["digits"], "val") is None
        True
    """
    if evaluator.precision == "float32":
        return None
    exact = Evaluator(evaluator.suite, evaluator.outputs.predictions)
    images = evaluator.outputs.images(tasks, split, limit)
    experts = [each.measure_experts(images, split) for each in (evaluator, exact)]
    shares = [f"{_share(experts, tasks):.2%} of the experts' predictions"]
    base = evaluator.suite.base
    if base is not None:
        both = [each.measure_member(base, images, split) for each in (evaluator, exact)]
        shares.append(f"{_share(both, tasks):.2%} of the base's")
    count = sum(len(numbers) for numbers in images.values())
    return f"{evaluator.precision} changes {' and '.join(shares)} ({count:,} each) against float32."


def _share(found: Sequence[dict[str, dict[str, np.ndarray]]], tasks: Sequence[str]) -> float:
    first, second = found
    changed = [first[task][CLASSES] != second[task][CLASSES] for task in tasks]
    return float(np.concatenate(changed).mean())

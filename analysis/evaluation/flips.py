"""Inputs on which two merges differ: those that one puts right, and those that it spoils."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.evaluation.evaluator import Evaluator
from analysis.outputs.inputs import Split
from analysis.outputs.prediction_store import CLASSES
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import Recipe
from merge_core.progress import Progress

KINDS = ("righted", "spoilt")


def flipped_inputs(
    before: Recipe,
    after: Recipe,
    session: MergeSession,
    evaluator: Evaluator,
    split: Split = "test",
    progress: Progress | None = None,
) -> pd.DataFrame:
    """How many inputs of each task one merge puts right that another gets wrong, and the reverse.

    Args:
        before, after: the two merges.
        session: their members.
        evaluator: of the same suite, with labelled inputs.
        split: ``test`` for reporting.
        progress: reports inputs run; cancels between two batches.

    Returns:
        Two rows per task: task, kind (``righted``: wrong before and right after; ``spoilt``: right
        before and wrong after), count (inputs of that kind), inputs (of the task), place (of the
        first of that kind among the task's inputs, −1 without one), truth, before and after
        (names of classes at that place, empty without one).

    Raises:
        MergeScopeError: unfit inputs, or inputs without labels.
        Cancelled: by `progress`.

    Example:
        >>> suite = load_suite("vision").restrict(["digits", "dots", "lines"])
        >>> session = MergeSession(suite, suite.tasks, FactorStore())
        >>> average, cart = (make_recipe({"method": name}) for name in ("average", "cart"))
        >>> frame = flipped_inputs(average, cart, session, Evaluator(suite))
        >>> frame["kind"].tolist()[:2], frame["inputs"].unique().tolist()
        (['righted', 'spoilt'], [250])
    """
    tasks = session.groups.tasks
    hits = [
        evaluator.recipe_hits(each, session, split, progress=progress) for each in (before, after)
    ]
    images = evaluator.outputs.images(tasks, split)
    said = [
        evaluator.measure_recipe(each, session, images, split, progress=progress)
        for each in (before, after)
    ]
    rows = []
    for task in tasks:
        first, then = (hit[task] for hit in hits)
        labelled = evaluator.outputs.raw_inputs(task, split)
        names, truths = labelled.class_names, labelled.labels[images[task]]
        for kind, where in zip(KINDS, (~first & then, first & ~then), strict=True):
            places = np.flatnonzero(where)
            row: dict[str, object] = {
                "task": task,
                "kind": kind,
                "count": len(places),
                "inputs": len(where),
                "place": -1,
                "truth": "",
                "before": "",
                "after": "",
            }
            if len(places):
                at = int(places[0])
                classes = [truths[at], *(each[task][CLASSES][at] for each in said)]
                row["place"] = int(images[task][at])
                row |= dict(
                    zip(("truth", "before", "after"), (names[int(c)] for c in classes), strict=True)
                )
            rows.append(row)
    return pd.DataFrame(rows)

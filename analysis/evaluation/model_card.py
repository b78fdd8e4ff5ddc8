"""Accuracies of a merged model as its model card states them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from analysis.evaluation.evaluator import Evaluator
from analysis.metrics import metric_of
from analysis.outputs.inputs import Split
from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.files import write_atomically
from merge_core.output.model_card import Result, model_card
from merge_core.output.provenance import Provenance, rebuild_recipe
from merge_core.suites.suite import Suite


def results_of(frame: pd.DataFrame, split: Split) -> list[Result]:
    """What a card says, from a frame of accuracies, or of another metric.

    Args:
        frame: of :meth:`Evaluator.recipe`, one row a task.
        split: which it was measured on.

    Example:
        >>> from analysis.accuracy import accuracy_frame
        >>> (result,) = results_of(accuracy_frame({"digits": np.array([True, False])}), "test")
        >>> result.task, result.value, result.examples
        ('digits', 0.5, 2)
    """
    metric = metric_of(frame).column
    kind = "text-generation" if metric == "cross_entropy" else "image-classification"
    return [
        Result(str(task), split, float(value), float(low), float(high), int(images), kind, metric)
        for task, value, low, high, images in frame[
            ["task", metric, "low", "high", "images"]
        ].itertuples(index=False)
    ]


def write_card(
    folder: Path, about: Provenance, suite: Suite, split: Split, limit: int | None = None
) -> pd.DataFrame:
    """Evaluate a merged model as it lies on disk, and write its card anew with the accuracies.

    Args:
        folder: as :func:`merge_core.output.model_folder.merge_to_folder` wrote it.
        about: what it says of itself (:func:`merge_core.output.provenance.read_provenance`).
        suite: the suite that it was merged from.
        split: which of the suite's data to take.
        limit: only the first so many examples of each task.

    Returns:
        As :meth:`Evaluator.checkpoint`.

    Raises:
        RecipeError: the suite's members are no longer those that were merged.
        SuiteError: the suite cannot be evaluated.
        CheckpointError: the folder holds no merged model.
        OutputError: the card cannot be written.

    Example:
        >>> from merge_core.output.model_folder import merge_to_folder
        >>> from merge_core.output.provenance import read_provenance
        >>> suite = load_suite("vision")
        >>> recipe = make_recipe({"method": "average", "tasks": ["dots"]})
        >>> folder = merge_to_folder(recipe, suite, Path("merged"))
        >>> write_card(folder, read_provenance(folder), suite, "test", limit=10)["images"].tolist()
        [10]
    """
    rebuild_recipe(about, suite, about.recipe.suite)
    evaluator = Evaluator(suite)
    tasks = list(about.inputs)
    if about.recipe.declaration.indexed:
        parts = [evaluator.checkpoint(Checkpoint(folder / t), [t], split, limit) for t in tasks]
        frame = pd.concat(parts, ignore_index=True)
    else:
        frame = evaluator.checkpoint(Checkpoint(folder), tasks, split, limit)
    card = model_card(about.recipe, suite, about, results_of(frame, split))
    write_atomically(folder / "README.md", card.encode())
    return frame

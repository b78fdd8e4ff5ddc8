"""Accuracy of a suite's members and merges, with its sampling error.

Evaluation mode, frozen heads, fixed splits. Choices are made on the validation split; the test
split is for reporting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import norm
from torch import Tensor

from analysis.inputs import Head, Split, load_head, load_inputs, normalised
from analysis.learning import learn
from analysis.model import Backbone
from analysis.predictions import SHIPPED_NAME, PredictionStore, prediction_key
from merge_core.checkpoint import Checkpoint
from merge_core.engine import MergeSession, written_dtype
from merge_core.errors import SuiteError
from merge_core.files import digest_of
from merge_core.progress import Progress
from merge_core.recipe import Recipe
from merge_core.suite import Suite

CONFIDENCE = 0.95


def wilson_interval(correct: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % Wilson score interval of a proportion.

    Args:
        correct: successes, any shape.
        images: trials, same shape, at least 1.

    Returns:
        Lower and upper bounds in [0, 1].

    Source: Wilson, JASA 22 (1927), 209.
    """
    z = norm.ppf(0.5 + CONFIDENCE / 2)
    p = correct / images
    centre = (p + z**2 / (2 * images)) / (1 + z**2 / images)
    half = z / (1 + z**2 / images) * np.sqrt(p * (1 - p) / images + z**2 / (4 * images**2))
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def accuracy_frame(correct: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Per-task accuracy from per-image hits.

    Args:
        correct: task to a boolean vector, one entry per image.

    Returns:
        Columns task, correct, images, accuracy, low, high (shares; Wilson 95 %).
    """
    frame = pd.DataFrame(
        {
            "task": list(correct),
            "correct": [int(hits.sum()) for hits in correct.values()],
            "images": [len(hits) for hits in correct.values()],
        }
    )
    frame["accuracy"] = frame["correct"] / frame["images"]
    frame["low"], frame["high"] = wilson_interval(
        frame["correct"].to_numpy(), frame["images"].to_numpy()
    )
    return frame


def mean_accuracy(frame: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """The mean over tasks, every task counting alike, with a 95 % normal interval.

    The tasks' images are independent samples, so the variance of the mean is
    Σ p_t (1 − p_t) / n_t / T². It speaks of these T tasks, not of other ones.

    Args:
        frame: of :func:`accuracy_frame`, possibly with further columns.
        by: columns that tell the settings apart.

    Returns:
        Columns `by`, accuracy, low, high, one row per setting.
    """
    work = frame.assign(
        variance=frame["accuracy"] * (1 - frame["accuracy"]) / frame["images"], tasks=1
    )
    keys: list[Any] = list(by) or [np.zeros(len(work), dtype=int)]
    grouped = work.groupby(keys, sort=False, dropna=False)
    result = grouped.agg(
        accuracy=("accuracy", "mean"), variance=("variance", "sum"), tasks=("tasks", "sum")
    ).reset_index(drop=not by)
    half = norm.ppf(0.5 + CONFIDENCE / 2) * np.sqrt(result["variance"]) / result["tasks"]
    result["low"] = (result["accuracy"] - half).clip(0, 1)
    result["high"] = (result["accuracy"] + half).clip(0, 1)
    return result.drop(columns=["variance", "tasks"])


class Evaluator:
    """Evaluates weights of one suite; models, inputs and predictions are kept.

    Args:
        suite: a suite with architecture, heads and data.
        predictions: where predictions are kept (with the suite's own store by default).

    Raises:
        SuiteError: the suite cannot be evaluated.
    """

    def __init__(self, suite: Suite, predictions: PredictionStore | None = None) -> None:
        if suite.why_not_evaluated is not None:
            raise SuiteError(
                f"The suite {suite.name!r} can be analysed and merged but not evaluated: "
                f"{suite.why_not_evaluated}."
            )
        self.suite = suite
        self.predictions = predictions or PredictionStore(shipped=(suite.root / SHIPPED_NAME,))
        self._inputs: dict[tuple[str, Split, int | None], tuple[Tensor, np.ndarray]] = {}
        self._heads: dict[str, Head] = {}
        self._digests: dict[str, str] = {}
        self._learned: tuple[str, Any] = ("", None)
        self.forward_images = 0

    @cached_property
    def backbone(self) -> Backbone:
        """The suite's architecture."""
        return Backbone(self.suite)

    def inputs(self, task: str, split: Split, limit: int | None) -> tuple[Tensor, np.ndarray]:
        """Normalised images (N x 3 x H x W) and labels (N) of a task.

        Raises:
            SuiteError: missing or malformed data.
        """
        key = (task, split, limit)
        if key not in self._inputs:
            raw = load_inputs(self.suite, task, split, limit)
            self._inputs[key] = (normalised(raw.images, self.suite, task), raw.labels)
        return self._inputs[key]

    def head(self, task: str) -> Head:
        """A task's head.

        Raises:
            SuiteError: missing or malformed head.
        """
        if task not in self._heads:
            self._heads[task] = load_head(self.suite, task)
        return self._heads[task]

    def predict(
        self, weights: Mapping[str, Tensor], task: str, split: Split, limit: int | None = None
    ) -> np.ndarray:
        """Predicted classes (int64, N).

        Raises:
            SuiteError: weights, head or data that do not fit; non-finite logits.
        """
        images, labels = self.inputs(task, split, limit)
        head = self.head(task)
        features = self.backbone.features(weights, images)
        if features.shape[-1] != head.weight.shape[1] or int(labels.max()) >= len(head.weight):
            raise SuiteError(
                f"The head of task {task!r} ({len(head.weight)} classes of width "
                f"{head.weight.shape[1]}) fits neither features of width {features.shape[-1]} "
                f"nor labels up to {int(labels.max())}."
            )
        logits = head.logits(features)
        if not bool(torch.isfinite(logits).all()):
            raise SuiteError(
                f"The model gives non-finite outputs on task {task!r}; choose a smaller scale."
            )
        self.forward_images += len(images)
        return logits.argmax(dim=1).numpy()

    def hits(
        self,
        digest: str,
        weights: Callable[[], Mapping[str, Tensor]],
        task: str,
        split: Split,
        limit: int | None = None,
    ) -> np.ndarray:
        """Which images are classified correctly (bool, N), from the store where known.

        Args:
            digest: content digest of the weights.
            weights: gives the weights; called only if the predictions are not known.
            task, split, limit: which images.
        """
        _, labels = self.inputs(task, split, limit)
        key = prediction_key(digest, self._data_digest(task), split, limit)
        predicted = self.predictions.get(key)
        if predicted is None or len(predicted) != len(labels):
            predicted = self.predict(weights(), task, split, limit)
            self.predictions.put(key, predicted)
        return predicted == labels

    def knows(
        self, recipe: Recipe, session: MergeSession, split: Split = "val", limit: int | None = None
    ) -> bool:
        """Whether a merge's predictions on all its tasks are stored already."""
        return self._stored(self._digest(recipe, session), session.groups.tasks, split, limit)

    def knows_member(
        self,
        checkpoint: Checkpoint,
        tasks: Sequence[str],
        split: Split = "val",
        limit: int | None = None,
    ) -> bool:
        """Whether a member's predictions on these tasks are stored already."""
        return self._stored(checkpoint.digest, tasks, split, limit)

    def checkpoint(
        self,
        checkpoint: Checkpoint,
        tasks: Sequence[str],
        split: Split = "val",
        limit: int | None = None,
    ) -> pd.DataFrame:
        """Accuracy of a member's checkpoint on some tasks (see :func:`accuracy_frame`).

        Raises:
            MergeScopeError: unreadable or unfit weights, heads or data.
        """
        weights = cache(lambda: {name: checkpoint.tensor(name) for name in checkpoint})
        return accuracy_frame(
            {t: self.hits(checkpoint.digest, weights, t, split, limit) for t in tasks}
        )

    def learned(
        self, recipe: Recipe, session: MergeSession, progress: Progress | None = None
    ) -> Any:
        """What a recipe's method learns from data (:func:`analysis.learning.learn`).

        The last recipe's is kept: it can be as large as all experts together.

        Raises:
            MergeScopeError: unfit inputs.
            Cancelled: between two steps.
        """
        if recipe.declaration.learns is None:
            return None
        digest, state = self._learned
        wanted = self._digest(recipe, session)
        if digest != wanted:
            state = learn(self, recipe, session, progress)
            self._learned = (wanted, state)
        return state

    def recipe_hits(
        self,
        recipe: Recipe,
        session: MergeSession,
        split: Split = "val",
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> dict[str, np.ndarray]:
        """Which images of each of its tasks a merge, as it would be written, classifies correctly.

        What its method learns from data is learnt only if predictions are missing.

        Raises:
            MergeScopeError: unfit inputs.
            Cancelled: between two tasks, or between two steps of learning.
        """
        progress = progress or Progress()
        tasks = session.groups.tasks
        indexed = recipe.declaration.indexed
        learned = partial(self.learned, recipe, session, progress)
        joint = cache(lambda: _as_written(recipe, session, None, learned))
        digest = self._digest(recipe, session)
        hits = {}
        for done, task in enumerate(tasks):
            progress.step(done, len(tasks), f"{recipe.method} on {task}")
            model = partial(_as_written, recipe, session, task, learned) if indexed else joint
            hits[task] = self.hits(digest, model, task, split, limit)
        progress.step(len(tasks), len(tasks), recipe.method)
        return hits

    def recipe(
        self,
        recipe: Recipe,
        session: MergeSession,
        split: Split = "val",
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> pd.DataFrame:
        """Accuracy of a merge on its tasks (see :func:`accuracy_frame`).

        Raises:
            MergeScopeError: unfit inputs.
            Cancelled: between two tasks.
        """
        return accuracy_frame(self.recipe_hits(recipe, session, split, limit, progress))

    def experts(
        self, tasks: Sequence[str], split: Split = "val", limit: int | None = None
    ) -> pd.DataFrame:
        """Accuracy of each expert on its own task."""
        parts = [self.checkpoint(self.suite.expert(t), [t], split, limit) for t in tasks]
        return pd.concat(parts, ignore_index=True)

    def _stored(self, digest: str, tasks: Sequence[str], split: Split, limit: int | None) -> bool:
        keys = [prediction_key(digest, self._data_digest(t), split, limit) for t in tasks]
        return all(self.predictions.get(key) is not None for key in keys)

    def _digest(self, recipe: Recipe, session: MergeSession) -> str:
        """Of what determines the merged weights: data, too, where the method learns from them."""
        digest = recipe.digest(self.suite)
        if recipe.declaration.learns is None:
            return digest
        return digest_of(digest, *(self._data_digest(task) for task in session.groups.tasks))

    def _data_digest(self, task: str) -> str:
        if task not in self._digests:
            self._digests[task] = self.suite.data_digest(task)
        return self._digests[task]


def _as_written(
    recipe: Recipe, session: MergeSession, task: str | None, learned: Callable[[], Any]
) -> dict[str, Tensor]:
    """The merged weights, rounded to the dtypes that a file of them would have."""
    stored = {group.name: group.info.dtype for group in session.groups}
    return {
        name: value.to(written_dtype(recipe, stored[name]))
        for name, value in session.merge(recipe, task=task, learned=learned()).items()
    }

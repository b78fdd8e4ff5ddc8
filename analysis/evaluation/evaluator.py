"""Accuracy of a suite's members and merges, with its sampling error.

Evaluation mode, frozen heads, fixed splits. Choices are made on the validation split; the test
split is for reporting.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from analysis.accuracy import accuracy_frame
from analysis.data_sources.source import UNLABELLED
from analysis.evaluation.ahead import Ahead
from analysis.learning.learn import learn
from analysis.outputs.inputs import SPLIT_NAMES, Split
from analysis.outputs.prediction_store import CLASSES, PredictionStore
from analysis.outputs.suite_outputs import Images, Measurements, Precision, SuiteOutputs
from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.devices import current_device
from merge_core.errors import SuiteError
from merge_core.files import digest_of
from merge_core.merging.engine import MergeSession, written_dtype
from merge_core.merging.recipe import Recipe
from merge_core.progress import Progress
from merge_core.suites.suite import Suite


class Evaluator:
    """Evaluates members and merges of one suite.

    Args:
        suite: a suite with architecture, heads and data.
        predictions: where outputs are kept (with the suite's own store by default).
        stored_only: refuse to run the model (see :class:`SuiteOutputs`).
        precision: in which networks compute.

    Attributes:
        outputs: runs the models, and keeps what they gave.

    Raises:
        SuiteError: the suite cannot be evaluated.

    Example:
        >>> suite = load_suite("vision")
        >>> session = MergeSession(suite, suite.tasks, FactorStore())
        >>> frame = Evaluator(suite).recipe(make_recipe({"method": "average"}), session, "test")
        >>> frame["task"].tolist() == list(suite.tasks), frame["images"].unique().tolist()
        (True, [250])
    """

    def __init__(
        self,
        suite: Suite,
        predictions: PredictionStore | None = None,
        stored_only: bool = False,
        precision: Precision = "float32",
    ) -> None:
        self.suite = suite
        self.precision = precision
        self.outputs = SuiteOutputs(suite, predictions, stored_only, precision)
        self._learned: tuple[str, Any] = ("", None)
        self._ahead = Ahead()

    def stored_only(self) -> Evaluator:
        """An evaluator of the same suite and store that gives what is stored or raises NotStored.

        For views that must not start to compute.
        """
        return Evaluator(self.suite, self.outputs.predictions, True, self.precision)

    def knows(
        self, recipe: Recipe, session: MergeSession, split: Split = "val", limit: int | None = None
    ) -> bool:
        """Whether a merge's predictions on all its tasks are stored already."""
        return self._has_outputs(self._digest(recipe, session), session.groups.tasks, split, limit)

    def knows_member(
        self,
        checkpoint: Checkpoint,
        tasks: Sequence[str],
        split: Split = "val",
        limit: int | None = None,
    ) -> bool:
        """Whether a member's predictions on these tasks are stored already."""
        return self._has_outputs(checkpoint.digest, tasks, split, limit)

    def checkpoint(
        self,
        checkpoint: Checkpoint,
        tasks: Sequence[str],
        split: Split = "val",
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> pd.DataFrame:
        """Accuracy of a member's checkpoint on some tasks (see :func:`accuracy_frame`).

        Raises:
            MergeScopeError: unreadable or unfit weights, heads or data.
            Cancelled: between two batches.
        """
        images = self.outputs.images(tasks, split, limit, progress)
        outputs = self.measure_member(checkpoint, images, split, progress=progress)
        return accuracy_frame(self._hits(outputs, images, split, limit))

    def experts(
        self,
        tasks: Sequence[str],
        split: Split = "val",
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> pd.DataFrame:
        """Accuracy of each expert on its own task.

        Raises:
            MergeScopeError: unreadable or unfit weights, heads or data.
            Cancelled: between two batches.
        """
        parts = [self.checkpoint(self.suite.expert(t), [t], split, limit, progress) for t in tasks]
        return pd.concat(parts, ignore_index=True)

    def measure_member(
        self,
        checkpoint: Checkpoint,
        images: Images,
        split: Split = "val",
        measures: Collection[str] = (CLASSES,),
        progress: Progress | None = None,
    ) -> Measurements:
        """What a member gives for images of some tasks (see :meth:`SuiteOutputs.measure`).

        Raises:
            MergeScopeError: unreadable or unfit weights, heads or data.
            Cancelled: between two batches.
        """

        def weights() -> dict[str, Tensor]:
            return {name: checkpoint.tensor(name) for name in checkpoint}

        return self.outputs.measure(checkpoint.digest, weights, images, split, measures, progress)

    def measure_experts(
        self, images: Images, split: Split = "val", measures: Collection[str] = (CLASSES,)
    ) -> Measurements:
        """What each task's own expert gives for its images: pseudo-labels, for one.

        Raises:
            MergeScopeError: unreadable or unfit weights, heads or data.
        """
        parts = [
            self.measure_member(self.suite.expert(task), {task: mine}, split, measures)
            for task, mine in images.items()
        ]
        return {task: values for part in parts for task, values in part.items()}

    def learn(self, recipe: Recipe, session: MergeSession, progress: Progress | None = None) -> Any:
        """What a recipe's method learns from data (:func:`analysis.learning.learn.learn`).

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
            state = learn(self.outputs, recipe, session, progress)
            self._learned = (wanted, state)
        return state

    def expect(
        self,
        recipe: Recipe,
        session: MergeSession,
        images: Images,
        split: Split = "val",
        measures: Collection[str] = (CLASSES,),
    ) -> None:
        """Say which merge is measured after the next one.

        On an accelerator its weights are made meanwhile. The CPU is busy with the forward passes
        themselves; nor is anything made ahead that is stored, or learns from data.

        Args:
            recipe: what will be merged.
            session: its members.
            images: what it will be measured on.
            split: ``val`` or ``test``.
            measures: what of it.
        """
        method = recipe.declaration
        if not current_device().accelerates or method.indexed or method.learns is not None:
            return
        digest = self._digest(recipe, session)
        if not self.outputs.is_stored(digest, images, split, measures):
            make = partial(_merge_as_written, recipe, session, None, lambda: None)
            self._ahead.expect(digest, make)

    def measure_recipe(
        self,
        recipe: Recipe,
        session: MergeSession,
        images: Images,
        split: Split = "val",
        measures: Collection[str] = (CLASSES,),
        progress: Progress | None = None,
    ) -> Measurements:
        """What a merge, as it would be written, gives for images of its tasks.

        What its method learns from data is learnt only if something has to be run.

        Args:
            recipe: what is merged.
            session: its members.
            images: tasks of the session to numbers of images (see :meth:`SuiteOutputs.measure`).
            split: ``val`` or ``test``.
            measures: names of :data:`analysis.outputs.measures.MEASURES`.
            progress: reports images run, and steps of learning.

        Raises:
            MergeScopeError: unfit inputs.
            Cancelled: between two batches, or between two steps of learning.
        """
        digest = self._digest(recipe, session)
        learned = partial(self.learn, recipe, session, progress)
        if not recipe.declaration.indexed:
            make = partial(_merge_as_written, recipe, session, None, learned)
            model = partial(self._ahead.take, digest, make)
            return self.outputs.measure(digest, model, images, split, measures, progress)
        progress = progress or Progress()
        outputs: Measurements = {}
        for done, (task, mine) in enumerate(images.items()):
            progress.step(done, len(images), task)
            model = partial(_merge_as_written, recipe, session, task, learned)
            inner = Progress(cancel=progress.cancel)
            outputs |= self.outputs.measure(digest, model, {task: mine}, split, measures, inner)
        progress.step(len(images), len(images), "done")
        return outputs

    def recipe_hits(
        self,
        recipe: Recipe,
        session: MergeSession,
        split: Split = "val",
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> dict[str, np.ndarray]:
        """Which images (bool, N) of each of its tasks a merge classifies correctly.

        Raises:
            MergeScopeError: unfit inputs.
            Cancelled: between two batches, or between two steps of learning.
        """
        images = self.outputs.images(session.groups.tasks, split, limit, progress)
        outputs = self.measure_recipe(recipe, session, images, split, progress=progress)
        return self._hits(outputs, images, split, limit)

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
            Cancelled: between two batches, or between two steps of learning.
        """
        return accuracy_frame(self.recipe_hits(recipe, session, split, limit, progress))

    def _hits(
        self, outputs: Measurements, images: Images, split: Split, limit: int | None
    ) -> dict[str, np.ndarray]:
        hits = {}
        for task, numbers in images.items():
            labels = self.outputs.raw_inputs(task, split, limit).labels[numbers]
            if int(labels.min()) == UNLABELLED:
                raise SuiteError(
                    f"The {SPLIT_NAMES[split]} {self.suite.inputs} of task {task!r} have no "
                    f"labels, so no accuracy can be measured. Add {split}_labels to its data; "
                    "rank and scale can be chosen without labels."
                )
            if int(labels.max()) >= len(self.outputs.head(task).weight):
                raise SuiteError(
                    self.outputs.misfit_message(task, f"labels up to {int(labels.max())}")
                )
            hits[task] = outputs[task][CLASSES] == labels
        return hits

    def _has_outputs(
        self, digest: str, tasks: Sequence[str], split: Split, limit: int | None
    ) -> bool:
        return self.outputs.is_stored(digest, self.outputs.images(tasks, split, limit), split)

    def _digest(self, recipe: Recipe, session: MergeSession) -> str:
        """Of what determines the merged weights: data, too, where the method learns from them."""
        digest = recipe.digest(self.suite)
        if recipe.declaration.learns is None:
            return digest
        return digest_of(digest, *(self.outputs.data_digest(task) for task in session.groups.tasks))


def _merge_as_written(
    recipe: Recipe, session: MergeSession, task: str | None, learned: Callable[[], Any]
) -> dict[str, Tensor]:
    """The merged weights, rounded to the dtypes that a file of them would have."""
    stored = session.groups.dtypes
    return {
        name: value.to(written_dtype(recipe, stored[name]))
        for name, value in session.merge(recipe, task=task, learned=learned()).items()
    }

"""A suite's members and merges measured: accuracy, or cross-entropy, with its sampling error.

Evaluation mode, frozen heads, fixed splits. Choices are made on the validation split; the test
split is for reporting.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from analysis.evaluation.ahead import Ahead
from analysis.language.outputs import open_outputs
from analysis.learning.learn import learn
from analysis.metrics import Metric
from analysis.outputs.inputs import Split
from analysis.outputs.prediction_store import CLASSES, PredictionStore
from analysis.outputs.suite_outputs import Images, Measurements, Precision, SuiteOutputs, Weights
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
        self.outputs: SuiteOutputs = open_outputs(suite, predictions, stored_only, precision)
        self._learned: tuple[str, Any] = ("", None)
        self._ahead = Ahead()

    @property
    def metric(self) -> Metric:
        """What models are measured by."""
        return self.outputs.metric

    @property
    def _scored(self) -> tuple[str, ...]:
        return (self.metric.measure,)

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
        """A member's checkpoint measured on some tasks (see :meth:`SuiteOutputs.frame`).

        Raises:
            MergeScopeError: unreadable or unfit weights, heads or data.
            Cancelled: between two batches.
        """
        images = self.outputs.images(tasks, split, limit, progress)
        outputs = self.measure_member(checkpoint, images, split, self._scored, progress)
        return self.outputs.frame(
            self.outputs.unit_scores(outputs, images, split, limit), split, limit
        )

    def experts(
        self,
        tasks: Sequence[str],
        split: Split = "val",
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> pd.DataFrame:
        """Each expert measured on its own task.

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

        def weights() -> Iterator[tuple[str, Tensor]]:
            return ((name, checkpoint.tensor(name)) for name in checkpoint)

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
        if self.suite.speaks:
            raise SuiteError(
                f"{recipe.declaration.title} learns from the inputs of classifiers, and "
                f"{self.suite.name!r} is a suite of language models. Take a method that learns "
                "nothing from data."
            )
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
        if not self._makes_ahead or method.indexed or method.learns is not None:
            return
        digest = self._digest(recipe, session)
        if not self.outputs.is_stored(digest, images, split, measures):
            stream = partial(_merge_as_written, recipe, session, None, lambda: None)
            self._ahead.expect(digest, lambda: dict(stream()))

    @property
    def _makes_ahead(self) -> bool:
        """Whether whole merges are made while others run; language models are made in pieces."""
        return current_device().accelerates and not self.suite.speaks

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
            model: Callable[[], Weights] = partial(
                _merge_as_written, recipe, session, None, learned
            )
            if self._makes_ahead:
                stream = model
                model = partial(self._ahead.take, digest, lambda: dict(stream()))
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

        Of language models see :meth:`analysis.language.outputs.TextOutputs.unit_scores`.

        Raises:
            MergeScopeError: unfit inputs.
            Cancelled: between two batches, or between two steps of learning.
        """
        images = self.outputs.images(session.groups.tasks, split, limit, progress)
        outputs = self.measure_recipe(recipe, session, images, split, self._scored, progress)
        return self.outputs.unit_scores(outputs, images, split, limit)

    def recipe(
        self,
        recipe: Recipe,
        session: MergeSession,
        split: Split = "val",
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> pd.DataFrame:
        """A merge measured on its tasks (see :meth:`SuiteOutputs.frame`).

        Raises:
            MergeScopeError: unfit inputs.
            Cancelled: between two batches, or between two steps of learning.
        """
        hits = self.recipe_hits(recipe, session, split, limit, progress)
        return self.outputs.frame(hits, split, limit)

    def _has_outputs(
        self, digest: str, tasks: Sequence[str], split: Split, limit: int | None
    ) -> bool:
        images = self.outputs.images(tasks, split, limit)
        return self.outputs.is_stored(digest, images, split, self._scored)

    def _digest(self, recipe: Recipe, session: MergeSession) -> str:
        """Of what determines the merged weights: data, too, where the method learns from them."""
        digest = recipe.digest(self.suite)
        if recipe.declaration.learns is None:
            return digest
        return digest_of(digest, *(self.outputs.data_digest(task) for task in session.groups.tasks))


def _merge_as_written(
    recipe: Recipe, session: MergeSession, task: str | None, learned: Callable[[], Any]
) -> Iterator[tuple[str, Tensor]]:
    """The merged weights, one by one, rounded to the dtypes that a file of them would have."""
    stored = session.groups.dtypes
    merged: tuple[Tensor, Tensor] | None = None
    for name, value in session.stream(recipe, task=task, learned=learned()):
        written = written_dtype(recipe, stored[name])
        if merged is None or merged[0] is not value or merged[1].dtype != written:
            merged = (value, value.to(written))  # one tensor may have several names
        yield name, merged[1]

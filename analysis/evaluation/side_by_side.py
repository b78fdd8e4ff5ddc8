"""Many merges evaluated side by side, each on a worker that merges and runs the images."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from analysis.evaluation.evaluator import Evaluator
from analysis.outputs.inputs import Split
from analysis.outputs.suite_outputs import Images, Measurements, Precision
from merge_core.executors.base import Executor
from merge_core.factors.factorise import StoredGroups
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import Recipe
from merge_core.progress import Progress
from merge_core.suites.suite import load_suite


def evaluate_side_by_side(
    recipes: Sequence[Recipe],
    session: MergeSession,
    evaluator: Evaluator,
    executor: Executor,
    measures: Collection[str],
    split: Split = "val",
    progress: Progress | None = None,
) -> int:
    """Evaluate merges on all images of their tasks; what comes back is stored as it comes.

    Args:
        recipes: of one suite and task set, each giving one model from weights alone.
        session: of those tasks.
        evaluator: where outputs are kept; what it knows is not run again.
        executor: where merges are made and run, each by one torch thread.
        measures: names of :data:`analysis.outputs.measures.MEASURES`.
        split: ``val`` or ``test``.
        progress: told after each merge; cancels between two.

    Returns:
        How many merges were run.

    Raises:
        MergeScopeError: unfit inputs; workers that die again and again.
        Cancelled: by `progress`; what was stored stays.
    """
    progress = progress or Progress()
    images = evaluator.outputs.images(session.groups.tasks, split)
    unknown = [
        recipe
        for recipe in recipes
        if not evaluator.outputs.is_stored(recipe.digest(evaluator.suite), images, split, measures)
    ]
    stored = StoredGroups.of(session.groups)
    evaluate = _Evaluate(stored, tuple(measures), split, evaluator.precision)
    results = executor.map(evaluate, unknown, progress.cancel)
    for done, recipe in enumerate(unknown, start=1):
        outputs = next(results)
        evaluator.outputs.keep(recipe.digest(evaluator.suite), images, split, outputs)
        progress.step(done, len(unknown), "settings")
    return len(unknown)


@dataclass(frozen=True)
class _Evaluate:
    """Evaluates a recipe in a worker that has the files, but not the caller's memory."""

    stored: StoredGroups
    measures: tuple[str, ...]
    split: Split
    precision: Precision

    def __call__(self, recipe: Recipe) -> Measurements:
        session, evaluator, images = self._open()
        return evaluator.measure_recipe(recipe, session, images, self.split, self.measures)

    def _open(self) -> tuple[MergeSession, Evaluator, Images]:
        """Opened once in each worker: neither is meant for two threads at once."""
        held = getattr(_WORKER, "held", None)
        if held is None or held[0] != self:
            suite = load_suite(self.stored.suite)
            session = MergeSession(suite, self.stored.tasks, self.stored.store())
            evaluator = Evaluator(suite, precision=self.precision)
            images = evaluator.outputs.images(session.groups.tasks, self.split)
            held = _WORKER.held = (self, (session, evaluator, images))
        opened: tuple[MergeSession, Evaluator, Images] = held[1]
        return opened


_WORKER = threading.local()

"""The merge itself: parameter by parameter, in float32 at least, cast once at the end."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from merge_core.compatibility.compare import refuse_incompatible
from merge_core.errors import RecipeError, SuiteError
from merge_core.executors.base import Executor, one_thread
from merge_core.executors.local import Serial, Threads
from merge_core.factors.factorise import StoredGroups
from merge_core.factors.store import FactorStore
from merge_core.merging.recipe import Recipe, check_parameters
from merge_core.methods import get_postprocessor, methods
from merge_core.methods.declaration import Run
from merge_core.progress import Progress
from merge_core.suites.preflight import preflight
from merge_core.suites.suite import Suite
from merge_core.task_vectors import TensorGroup, TensorGroups

HELD_BYTES = 2 << 30
# Settings of which is remembered what a method measured over the whole model.
MEASURED = 8


def check_fits(suite: Suite, tasks: tuple[str, ...]) -> None:
    """Refuse experts that do not fit together.

    Raises:
        SuiteError: keys missing, shapes that differ, or another network under the same shapes.

    Example:
        >>> check_fits(load_suite("vision"), ("digits", "letters"))
    """
    suite.members(tasks)  # says of a member that cannot be read why
    blocking = preflight(suite, tasks).blocking
    if blocking:
        first = blocking[0]
        more = f" ({len(blocking) - 1} more such differences)" if len(blocking) > 1 else ""
        raise SuiteError(
            f"The experts do not fit together: in {first.member!r}, parameter "
            f"{first.parameter!r}: {first.kind}, {first.detail}{more}. All members must come "
            "from one architecture; see 'mergescope inspect'."
        )
    refuse_incompatible(suite, tasks)


def check_recipe(suite: Suite, recipe: Recipe) -> None:
    """Refuse a recipe that its suite cannot serve: no base, or too many or too few experts.

    Raises:
        SuiteError: no base where one is needed, an unknown task, or another number of tasks.

    Example:
        >>> check_recipe(load_suite("vision"), make_recipe({"method": "slerp"}))
        Traceback (most recent call last):
        merge_core.errors.SuiteError: SLERP merges 2 experts, not 20. Choose 2 tasks.
    """
    method, tasks = recipe.declaration, suite.select(recipe.tasks)
    if recipe.needs_base and suite.base is None:
        free = ", ".join(name for name, m in methods().items() if not m.needs_base())
        raise SuiteError(
            f"{method.title} needs the base that the experts were fine-tuned from, and the suite "
            f"{suite.name!r} names none. Add 'base:' to suite.yaml, or take a method that needs "
            f"none ({free})."
        )
    if method.tasks is not None and len(tasks) != method.tasks:
        raise SuiteError(
            f"{method.title} merges {method.tasks} experts, not {len(tasks)}. Choose "
            f"{method.tasks} tasks."
        )
    if unknown := set(recipe.weights) - set(tasks):
        raise SuiteError(f"The recipe gives a weight to {min(unknown)!r}, which is not merged.")


def written_dtype(recipe: Recipe, stored: torch.dtype) -> torch.dtype:
    """The dtype in which a parameter of the output is written.

    Args:
        recipe: whose `dtype` asks for one, or keeps the input's.
        stored: the dtype of the experts' parameter; integers stay as they are.

    Example:
        >>> recipe = make_recipe({"method": "average", "dtype": "float16"})
        >>> written_dtype(recipe, torch.float32), written_dtype(recipe, torch.int64)
        (torch.float16, torch.int64)
    """
    if recipe.dtype == "input" or not stored.is_floating_point:
        return stored
    chosen: torch.dtype = getattr(torch, recipe.dtype)
    return chosen


def merge_parameters(
    recipe: Recipe,
    groups: TensorGroups,
    progress: Progress | None = None,
    task: str | None = None,
    learned: Any = None,
    executor: Executor | None = None,
    names: Collection[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Merge one parameter after another, or several side by side.

    Args:
        recipe: what to do; its tasks must be those of `groups`.
        groups: the parameters.
        progress: reports each parameter, and cancels between two.
        task: whose model, for a method that gives one per task.
        learned: what a method that needs data has learnt from it.
        executor: where parameters are merged; in this thread when None.
        names: of the parameters that are wanted (all when None).

    Yields:
        Name and merged tensor, in the working dtype (float32, or float64 for such weights);
        buffers as they are in the base, else in most experts.

    Raises:
        RecipeError: a task where there is one model for all, or none where there is one each;
            nothing learnt where data are needed.
        MergeScopeError: unreadable or unfit inputs, or workers that die.
        Cancelled: between two parameters.

    Example:
        >>> groups = TensorGroups(load_suite("vision"), ["digits", "dots"], FactorStore())
        >>> recipe = make_recipe({"method": "average", "tasks": groups.tasks})
        >>> [name for name, _ in merge_parameters(recipe, groups, names=["cls_token"])]
        ['cls_token']
    """
    progress = progress or Progress()
    _rule(recipe, groups.tasks, task)  # refuses what does not go together before the work
    method = recipe.declaration
    if method.learns is not None:
        if learned is None:
            raise RecipeError(
                f"{method.title} learns from the suite's data before it merges. Use "
                "'mergescope merge' or the dashboard, with a suite that can be evaluated."
            )
        run = replace(recipe.run(groups.tasks), state=learned)
    else:
        run = prepare(recipe, groups, progress)
    where = executor or Serial()

    def output_names(group: TensorGroup) -> list[str]:
        under = (group.name, *groups.manifest.also_written.get(group.name, ()))
        return [name for name in under if names is None or name in names]

    wanted = [group for group in groups.members if output_names(group)]
    results: Iterator[Tensor]
    if where.shares_memory:

        def merge_here(group: TensorGroup) -> Tensor:
            return _merge_parameter(group, recipe, run, task, groups.keep)

        results = where.map(merge_here, wanted, progress.cancel)
    else:
        there = _Merge(StoredGroups.of(groups), recipe, run, task)
        results = where.map(there, [group.name for group in wanted], progress.cancel)
    for done, group in enumerate(wanted, len(groups) - len(wanted)):
        progress.step(done, len(groups), group.name)
        merged = next(results)
        for name in output_names(group):
            yield name, merged
    progress.step(len(groups), len(groups), "merged")


def prepare(recipe: Recipe, groups: TensorGroups, progress: Progress | None = None) -> Run:
    """A recipe's run with what its method measures over the whole model before it merges.

    That is measured once for all models of a method that gives one per task, and for all settings
    that differ in their scale: the parameters keep the last of it.

    Args:
        recipe: of a method that does not learn from data.
        groups: the parameters.
        progress: reports each parameter of each pass, and cancels between two.

    Raises:
        MergeScopeError: unreadable or unfit inputs.
        Cancelled: between two parameters.

    Example:
        >>> groups = TensorGroups(load_suite("vision"), ["digits", "dots"], FactorStore())
        >>> recipe = make_recipe({"method": "emr", "tasks": groups.tasks})
        >>> run = prepare(recipe, groups)
        >>> len(run.state.factors), prepare(recipe, groups).state is run.state
        (2, True)
    """
    method, run = recipe.declaration, recipe.run(groups.tasks)
    if method.prepare is None:
        return run
    parameters = recipe.checked_parameters
    asked = parameters.model_dump_json(exclude={"scale"})
    key = (method.name, asked, run.origin, run.weights, run.seed)
    known = groups.measured
    state = known.get(key)
    if state is None:
        with one_thread():
            state = method.prepare(groups, parameters, run, progress or Progress())
        known[key] = state
        for oldest in list(known)[:-MEASURED]:
            known.pop(oldest, None)
    return replace(run, state=state)


@torch.no_grad()
def _merge_parameter(
    group: TensorGroup, recipe: Recipe, run: Run, task: str | None, keep: bool
) -> Tensor:
    """One parameter of the output; what was read for it is forgotten unless `keep`."""
    try:
        if group.is_buffer:
            return group.buffer
        merge = _rule(recipe, group.tasks, task)
        return _postprocess(recipe, group, merge(group, recipe.parameters_of(group.name), run), run)
    finally:
        if not keep:
            group.release()


@dataclass(frozen=True)
class _Merge:
    """Merges a parameter by its name, in a worker that shares files, not memory."""

    stored: StoredGroups
    recipe: Recipe
    run: Run
    task: str | None

    def __call__(self, name: str) -> Tensor:
        return _merge_parameter(
            self.stored.parameter(name), self.recipe, self.run, self.task, keep=False
        )


def _rule(
    recipe: Recipe, tasks: tuple[str, ...], task: str | None
) -> Callable[[TensorGroup, Any, Run], Tensor]:
    """How one parameter is merged: for all tasks, or for the one that is asked for."""
    method = recipe.declaration
    if method.merge is not None and task is None:
        return method.merge
    if method.merge_for is None:
        raise RecipeError(f"{method.title} gives one model for all tasks; name no task.")
    if task not in tasks:
        raise RecipeError(
            f"{method.title} gives one model per task. Name one of {', '.join(tasks)}."
        )
    merge_for, index = method.merge_for, tasks.index(task)
    return lambda group, parameters, run: merge_for(group, parameters, run, index)


def _postprocess(recipe: Recipe, group: TensorGroup, merged: Tensor, run: Run) -> Tensor:
    """The merged tensor after the recipe's chain, which acts on updates of weight matrices."""
    if not recipe.then or not group.decomposed:
        return merged
    origin = group.origin(run.origin)
    update = merged - origin
    for step in recipe.then:
        post = get_postprocessor(step.method)
        update = post.apply(group, update, check_parameters(post, step.parameters), run)
    return origin + update


class MergeSession:
    """Merges of one suite and task set, for many settings in a row.

    Weights that were read stay in memory if all members together take at most
    :data:`HELD_BYTES` there; larger suites are read again for each merge.

    Args:
        suite: the suite.
        tasks: chosen tasks (all when None).
        store: where factors are kept.

    Raises:
        SuiteError: unknown tasks, or experts that do not fit together.

    Example:
        >>> session = MergeSession(load_suite("vision"), ("digits", "dots"), FactorStore())
        >>> merged = session.merge(make_recipe({"method": "average", "tasks": ("digits", "dots")}))
        >>> merged.keys() == set(session.suite.expert("digits"))
        True
    """

    def __init__(self, suite: Suite, tasks: tuple[str, ...] | None, store: FactorStore) -> None:
        self.suite = suite
        chosen = suite.select(tasks)
        check_fits(suite, chosen)
        members = len(chosen) + (suite.base is not None)
        size = 4 * members * sum(info.numel for info in suite.manifest(chosen).infos.values())
        self.groups = TensorGroups(suite, chosen, store, keep=size <= HELD_BYTES)

    @torch.no_grad()
    @one_thread()
    def merge(
        self,
        recipe: Recipe,
        progress: Progress | None = None,
        task: str | None = None,
        learned: Any = None,
    ) -> dict[str, Tensor]:
        """The merged state dict (its `suite` and `tasks` must be this session's).

        Args:
            recipe: what to do.
            progress: reports each parameter, and cancels between two.
            task: whose model, for a method that gives one per task.
            learned: what a method that needs data has learnt from it.

        Raises:
            MergeScopeError: unfit inputs.
        """
        # Copies: an averaged tensor would otherwise share memory with one that the session holds.
        tensors = self.stream(recipe, progress, task, learned)
        return {name: value.clone() for name, value in tensors}

    def stream(
        self,
        recipe: Recipe,
        progress: Progress | None = None,
        task: str | None = None,
        learned: Any = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """The merged tensors one by one, as :meth:`merge` has them; not to be written to.

        Raises:
            MergeScopeError: unfit inputs.
        """
        if self.suite.select(recipe.tasks) != self.groups.tasks:
            raise SuiteError("The recipe's tasks are not the ones that this session holds.")
        check_recipe(self.suite, recipe)
        # A small model is merged before a second thread has begun.
        where = Serial() if self.groups.keep else Threads()
        yield from merge_parameters(recipe, self.groups, progress, task, learned, where)
        if self.suite.base is not None:
            for name in self.groups.manifest.kept:
                yield name, self.suite.base.tensor(name).float()

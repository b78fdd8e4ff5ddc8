"""What is asked of a suite's outputs: accuracies, and the choice of a setting."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import pandas as pd

from analysis.comparison.first_result import (
    first_recipes,
    first_result,
    knows_first_result,
    suggest_recipe,
)
from analysis.comparison.run import Comparison, adapt_recipe, run_comparison
from analysis.evaluation.evaluator import Evaluator
from analysis.frames.asking import ask, ask_if_known, refuse
from analysis.frames.entries import Frames, Kept, Question, frame_question
from analysis.frames.from_weights import members_inputs, method_arguments, space_arguments
from analysis.frames.results import (
    FirstResult,
    default_recipe,
    join_comparisons,
    pack_comparison,
    pack_first,
    pack_recipe,
    pack_selection,
    unpack_comparison,
    unpack_first,
    unpack_recipe,
    unpack_selection,
)
from analysis.frames.usual import BUDGETS, SCALES
from analysis.outputs.inputs import Split
from analysis.outputs.suite_outputs import NotStored
from analysis.rank_selection.allocation import compare_with_uniform
from analysis.rank_selection.evidence.shipped import evidence_digest
from analysis.rank_selection.select import (
    Selection,
    SelectionOptions,
    select_rank,
    stored_selection,
    task_curves,
)
from analysis.rank_selection.space import SearchSpace
from merge_core.files import digest_of
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import Recipe
from merge_core.progress import Progress
from merge_core.suites.suite import Suite

EXPERTS = frame_question("accuracy.experts", 1, "the accuracy of the experts")
RECIPE = frame_question("accuracy.recipe", 1, "the accuracy")
TASK_CURVES = frame_question("rank.task_curves", 1, "the accuracy of each task over the rank")
STORAGE = frame_question("rank.storage", 1, "the comparison of ranks per layer")


class OutputFrames:
    """Frames about a suite's outputs on its chosen tasks, read where they are kept.

    Args:
        reference: how recipes name the suite.
        suite: a suite that can be evaluated, or what a record says of one.
        tasks: chosen tasks, in the suite's order.
        frames: where frames are kept.
        session: gives the merges, for what has to be computed.
        evaluator: gives the evaluation, for what has to be computed.
        evaluated: whether outputs count; if not, only what reads weights alone is asked.
    """

    def __init__(
        self,
        reference: str,
        suite: Suite,
        tasks: Sequence[str],
        frames: Frames,
        session: Callable[[], MergeSession],
        evaluator: Callable[[], Evaluator],
        evaluated: bool = True,
    ) -> None:
        self.reference = reference
        self.suite = suite
        self.tasks = tuple(tasks)
        self.frames = frames
        self._session = session
        self._evaluator = evaluator
        self.evaluated = evaluated

    @cached_property
    def inputs(self) -> str:
        """Digest of what all of these frames depend on: members, data, heads, architecture."""
        parts = [members_inputs(self.suite, self.tasks)]
        if self.evaluated:
            parts += [self.suite.data_digest(task) for task in self.tasks]
        return digest_of("outputs-1", *parts)

    @property
    def session(self) -> MergeSession:
        """The merges.

        Raises:
            SuiteError: the experts do not fit together.
        """
        return self._session()

    @property
    def evaluator(self) -> Evaluator:
        """The evaluation.

        Raises:
            SuiteError: the suite cannot be evaluated.
        """
        return self._evaluator()

    @property
    def _chooser(self) -> Evaluator | None:
        """What a choice of a setting may look at."""
        return self._evaluator() if self.evaluated else None

    def experts(self, split: Split, progress: Progress | None = None) -> pd.DataFrame:
        """Accuracy of each expert on its own task."""
        return ask(
            self.frames,
            EXPERTS,
            self.inputs,
            {"split": split},
            lambda: self.evaluator.experts(self.tasks, split, progress=progress),
        )

    def knows_experts(self, split: Split) -> bool:
        """Whether :meth:`experts` takes no forward pass, or says why it cannot be asked."""

        def compute() -> pd.DataFrame | None:
            experts = {task: self.suite.expert(task) for task in self.tasks}
            if not all(self.evaluator.knows_member(e, [t], split) for t, e in experts.items()):
                return None
            return self.evaluator.experts(self.tasks, split)

        known = ask_if_known(self.frames, EXPERTS, self.inputs, {"split": split}, compute)
        return known is not None or not self.frames.computes

    def recipe(
        self, recipe: Recipe, split: Split, progress: Progress | None = None
    ) -> pd.DataFrame:
        """Accuracy of a merge on its tasks, which are these."""
        return ask(
            self.frames,
            RECIPE,
            self.inputs,
            self._of_recipe(recipe, split),
            lambda: self.evaluator.recipe(recipe, self.session, split, progress=progress),
        )

    def knows_recipe(self, recipe: Recipe, split: Split) -> bool:
        """Whether :meth:`recipe` takes no forward pass, or says why it cannot be asked."""

        def compute() -> pd.DataFrame | None:
            if not self.evaluator.knows(recipe, self.session, split):
                return None
            return self.evaluator.recipe(recipe, self.session, split)

        asked = self._of_recipe(recipe, split)
        known = ask_if_known(self.frames, RECIPE, self.inputs, asked, compute)
        return known is not None or not self.frames.computes

    def suggestion(self, space: SearchSpace, live: bool = True) -> Recipe | None:
        """The setting that the stored search recommends; None where none is stored.

        Args:
            space: the method, among which settings.
            live: look into stored outputs too, which takes a while for large models.
        """

        def compute() -> Recipe | None:
            if not live:
                return None
            method = space.base.method
            recipe, chosen = suggest_recipe(method, self.reference, self.session, self.evaluator)
            return recipe if chosen else None

        question: Question[Recipe] = Question(
            "rank.suggestion",
            1,
            "the recommended setting",
            lambda recipe: Kept(values={"recipe": pack_recipe(recipe)}),
            lambda kept: unpack_recipe(kept.values["recipe"], self.reference, self.tasks),
        )
        return ask_if_known(self.frames, question, self.inputs, space_arguments(space), compute)

    def first_result_if_known(self) -> FirstResult | None:
        """Base, experts and three merges, where that takes no forward pass.

        It is kept once each setting of it was chosen: no later search makes another one then.
        """
        known = ask_if_known(self.frames, self._first(), self.inputs, {}, self._settled_first)
        if known is not None or not self.frames.computes:
            return known
        recipes = self.first_recipes()
        if not knows_first_result(recipes, self.session, self.evaluator):
            return None
        return recipes, self.first_result(recipes)

    def expect_first_result(self) -> None:
        """Refuse a first result that is not there and cannot be made.

        Raises:
            NotRecorded: it is not in the record.
        """
        refuse(self.frames, self._first(), self.inputs, {})

    def _settled_first(self) -> FirstResult | None:
        recipes = self.first_recipes()
        if not all(chosen for _, chosen in recipes.values()):
            return None
        if not knows_first_result(recipes, self.session, self.evaluator):
            return None
        return recipes, self.first_result(recipes)

    def first_recipes(self) -> dict[str, tuple[Recipe, bool]]:
        """The recipes of the first result, at the best settings known now."""
        return first_recipes(self.reference, self.session, self.evaluator)

    def first_result(
        self, recipes: dict[str, tuple[Recipe, bool]], progress: Progress | None = None
    ) -> pd.DataFrame:
        """See :func:`analysis.comparison.first_result.first_result`."""
        return first_result(recipes, self.session, self.evaluator, progress=progress)

    def select(
        self, space: SearchSpace, options: SelectionOptions, progress: Progress | None = None
    ) -> Selection:
        """See :func:`analysis.rank_selection.select.select_rank`.

        Where only the rule's pick is asked for, an answer with those of all rules is one as well.
        """
        if (known := self._with_all_picks(space, options)) is not None:
            return known
        return ask(
            self.frames,
            self._selection(space, options),
            self.inputs,
            _of_selection(space, options),
            lambda: select_rank(space, self.session, self._chooser, options, progress=progress),
        )

    def select_if_known(
        self, space: SearchSpace, options: SelectionOptions, live: bool = True
    ) -> Selection | None:
        """The same where it takes no forward pass, else None.

        Args:
            space, options: as in :meth:`select`.
            live: look into stored outputs too, which takes a while for large models.
        """

        def compute() -> Selection | None:
            if not live:
                return None
            return stored_selection(space, self.session, self._chooser, options)

        if (known := self._with_all_picks(space, options)) is not None:
            return known
        return ask_if_known(
            self.frames,
            self._selection(space, options),
            self.inputs,
            _of_selection(space, options),
            compute,
        )

    def expect_selection(self, space: SearchSpace, options: SelectionOptions) -> None:
        """Refuse a selection that is not there and cannot be made.

        Raises:
            NotRecorded: it is not in the record.
        """
        if self._with_all_picks(space, options) is None:
            question = self._selection(space, options)
            refuse(self.frames, question, self.inputs, _of_selection(space, options))

    def _with_all_picks(self, space: SearchSpace, options: SelectionOptions) -> Selection | None:
        """The kept answer that has the picks of all rules, where only the rule's is asked for."""
        if not options.only_rule:
            return None
        whole = replace(options, only_rule=False)
        question, asked = self._selection(space, whole), _of_selection(space, whole)
        return ask_if_known(self.frames, question, self.inputs, asked, lambda: None)

    def task_curves(self, selection: Selection) -> pd.DataFrame:
        """See :func:`analysis.rank_selection.select.task_curves`."""
        settings = selection.curve[["rank", "scale", "images"]].astype(float)
        curve = [
            [None if math.isnan(x) else x for x in row] for row in settings.to_numpy().tolist()
        ]
        return ask(
            self.frames,
            TASK_CURVES,
            self.inputs,
            {**space_arguments(selection.space), "curve": curve},
            lambda: task_curves(selection, self.session, self.evaluator),
        )

    def storage(self, selection: Selection, progress: Progress | None = None) -> pd.DataFrame:
        """Ranks per layer against the uniform one, around a recommended setting."""
        return ask(
            self.frames,
            STORAGE,
            self.inputs,
            _of_storage(selection),
            lambda: _compare_storage(selection, self.session, self.evaluator, progress),
        )

    def storage_if_known(self, selection: Selection) -> pd.DataFrame | None:
        """The same where it takes no forward pass, else None."""

        def compute() -> pd.DataFrame | None:
            try:
                evaluator = self.evaluator.stored_only()
                return _compare_storage(selection, self.session, evaluator, None)
            except NotStored:
                return None

        return ask_if_known(self.frames, STORAGE, self.inputs, _of_storage(selection), compute)

    def expect_storage(self, selection: Selection) -> None:
        """Refuse a comparison of ranks per layer that is not there and cannot be made.

        Raises:
            NotRecorded: it is not in the record.
        """
        refuse(self.frames, STORAGE, self.inputs, _of_storage(selection))

    def compare_if_known(
        self,
        names: Sequence[str],
        budget: int,
        own: Sequence[Recipe] = (),
        tuned: Sequence[Recipe] = (),
    ) -> Comparison | None:
        """The comparison, where each method and recipe of it was compared before."""
        parts = [
            ask_if_known(self.frames, self._comparison(), self.inputs, arguments, lambda: None)
            for arguments, *_ in self._of_comparison(names, budget, own, tuned)
        ]
        known = [part for part in parts if part is not None]
        return join_comparisons(known) if parts and len(known) == len(parts) else None

    def expect_comparison(
        self,
        names: Sequence[str],
        budget: int,
        own: Sequence[Recipe] = (),
        tuned: Sequence[Recipe] = (),
    ) -> None:
        """Refuse a comparison a part of which is not there and cannot be made.

        Raises:
            NotRecorded: it is not in the record.
        """
        for arguments, *_ in self._of_comparison(names, budget, own, tuned):
            refuse(self.frames, self._comparison(), self.inputs, arguments)

    def compare(
        self,
        names: Sequence[str],
        budget: int,
        own: Sequence[Recipe] = (),
        tuned: Sequence[Recipe] = (),
        progress: Progress | None = None,
    ) -> Comparison:
        """See :func:`analysis.comparison.run.run_comparison`; what was compared before is read."""
        progress = progress or Progress()
        asked = self._of_comparison(names, budget, own, tuned)
        parts = []
        for done, (arguments, method, given) in enumerate(asked):
            progress.step(done, len(asked), arguments["method"])
            compute = partial(
                self._compare, method, budget, given, Progress(cancel=progress.cancel)
            )
            parts.append(ask(self.frames, self._comparison(), self.inputs, arguments, compute))
        progress.step(len(asked), len(asked), "compared")
        return join_comparisons(parts)

    def _compare(
        self,
        method: list[str],
        budget: int,
        given: Mapping[str, list[Recipe]],
        progress: Progress,
    ) -> Comparison:
        return run_comparison(
            self.reference,
            method,
            self.session,
            self.evaluator,
            budget,
            progress=progress,
            own=given.get("own", ()),
            tuned=given.get("tuned", ()),
        )

    def _of_recipe(self, recipe: Recipe, split: Split) -> dict[str, Any]:
        return {**method_arguments(recipe), "split": split}

    def _of_comparison(
        self, names: Sequence[str], budget: int, own: Sequence[Recipe], tuned: Sequence[Recipe]
    ) -> list[tuple[dict[str, Any], list[str], dict[str, list[Recipe]]]]:
        """What each part of a comparison is asked by, its method, and the recipes given for it.

        What merges alike counts once (see :func:`analysis.comparison.run.run_comparison`).
        """
        starts = {name: default_recipe(name, self.reference, self.tasks) for name in names}
        found: list[tuple[dict[str, Any], list[str], dict[str, list[Recipe]]]] = [
            ({**method_arguments(start), "budget": budget}, [name], {})
            for name, start in starts.items()
        ]
        seen = list(starts.values()) if budget == 1 else []
        for kind, recipes in (("tuned", tuned), ("own", own)):
            for recipe in (adapt_recipe(each, self.reference, self.tasks) for each in recipes):
                if recipe not in seen:
                    seen.append(recipe)
                    found.append(({**method_arguments(recipe), kind: True}, [], {kind: [recipe]}))
        return found

    def _first(self) -> Question[FirstResult]:
        return Question(
            "accuracy.first_result",
            1,
            "the first result",
            pack_first,
            lambda kept: unpack_first(kept, self.reference, self.tasks),
        )

    def _selection(self, space: SearchSpace, options: SelectionOptions) -> Question[Selection]:
        return Question(
            "rank.selection",
            2,
            "the choice of rank and scale",
            pack_selection,
            lambda kept: unpack_selection(kept, space, options),
        )

    def _comparison(self) -> Question[Comparison]:
        return Question(
            "accuracy.comparison",
            1,
            "the comparison",
            pack_comparison,
            lambda kept: unpack_comparison(kept, self.reference, self.tasks),
        )


def _of_selection(space: SearchSpace, options: SelectionOptions) -> dict[str, Any]:
    """What a choice of a setting is asked by; the evidence decides which rule recommends."""
    narrow = {"only_rule": True} if options.only_rule else {}
    return {
        **space_arguments(space),
        **narrow,
        "mode": options.mode,
        "full_grid": options.exhaustive,
        "every_proxy": options.every_proxy,
        "report": options.report,
        "order": options.seed,
        "evidence": evidence_digest(),
    }


def _of_storage(selection: Selection) -> dict[str, Any]:
    """What ranks per layer are compared by: around which setting, among which."""
    return {**space_arguments(selection.space), "chosen": dict(selection.recipe.parameters)}


def _compare_storage(
    selection: Selection,
    session: MergeSession,
    evaluator: Evaluator,
    progress: Progress | None,
) -> pd.DataFrame:
    """Allocated ranks against the uniform one, around the recommended setting."""
    shares = [min(1.0, budget * selection.rank) for budget in BUDGETS]
    highest = max(selection.space.scales)
    scales = list(dict.fromkeys(min(factor * selection.scale, highest) for factor in SCALES))
    return compare_with_uniform(
        selection.space, session, evaluator, shares, scales, progress=progress
    )

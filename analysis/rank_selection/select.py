"""Choice of rank and scale: from labels, from inputs alone, or from weights alone."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import numpy as np
import pandas as pd

from analysis.evaluation.evaluator import Evaluator
from analysis.evaluation.side_by_side import evaluate_side_by_side
from analysis.metrics import ACCURACY, METRICS, Metric, metric_of
from analysis.outputs.inputs import Split, has_labels
from analysis.outputs.suite_outputs import NotStored
from analysis.rank_selection.adaptive import Search, adaptive_search, exhaustive_search
from analysis.rank_selection.input_proxies import INPUT_PROXIES, recommend_from_inputs
from analysis.rank_selection.rule import NEEDS, Mode, choose_rule, explain, language_rule
from analysis.rank_selection.scores import SCORES
from analysis.rank_selection.space import SearchSpace, edge_words
from analysis.rank_selection.weight_proxies import (
    PROXIES,
    defined_for,
    recommend_from_weights,
)
from merge_core.errors import RecipeError
from merge_core.executors.base import Executor
from merge_core.factors.low_rank import count_directions
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import Recipe
from merge_core.methods import methods
from merge_core.progress import Progress
from merge_core.suites.data_spec import MetricName
from merge_core.suites.suite import Suite


@dataclass(frozen=True)
class SelectionOptions:
    """What may be looked at to choose a setting, and how thoroughly.

    Attributes:
        mode: ``labels``, ``inputs`` or ``weights``.
        full_grid: evaluate every setting on every image instead of searching adaptively; nothing
            is searched in mode ``weights``.
        every_proxy: find the picks of all proxies from inputs too, each by a search of its own.
        report: evaluate the recommended recipe, in the end: on the test split (and in modes
            that read no label on the validation split too), where there are labels.
        seed: of the images that the adaptive search begins with.
        only_rule: leave out what the other rules that need weights alone pick: the choice does not
            need it, and :func:`with_weight_picks` adds it.

    Example:
        >>> SelectionOptions("labels", full_grid=True).exhaustive
        True
    """

    mode: Mode
    full_grid: bool = False
    every_proxy: bool = False
    report: bool = True
    seed: int = 0
    only_rule: bool = False

    @property
    def exhaustive(self) -> bool:
        """Whether every setting is evaluated on every image."""
        return self.full_grid and self.mode != "weights"


@dataclass(frozen=True)
class Selection:
    """A recommended rank and scale, with the evidence for it.

    Attributes:
        mode: what was looked at.
        full_grid: whether every setting was evaluated on every image.
        space: among which settings.
        recipe: the recommended recipe.
        rank, scale: its values; NaN where the method has none.
        rule: the proxy, or the search, that chose it.
        why: one sentence.
        accuracy: mean over tasks on the validation split with low and high (of the suite's metric,
            by its name), or None where there is nothing to evaluate. Only in mode ``labels`` was it
            looked at for choosing.
        report: of each task on the test split, of the recommended recipe, or None.
        points: what was evaluated, a row per setting: rank, scale, images (per task), score, low,
            high, expected, expected_low, expected_high, tied (see
            :class:`analysis.rank_selection.adaptive.Search`); the score of a metric where less is
            better in its own unit, all others the higher the better.
        curve: the best of them at each rank (at each scale for methods without a rank).
        score: what the score is.
        picks: a row per proxy: proxy, title, mode, rank, scale, why, source, at_edge (what is to be
            said of a setting at the end of an axis; empty inside the grid), accuracy or another
            metric (NaN where it was not measured).
        asked_images: images that the choice took, run now or known before.
        grid_images: images that the full grid takes.
        forward_images: images run now, report included.
        seconds: of this run.
        low_rank_bytes: of the kept directions, k(m + n + 1) numbers per task and matrix; None for
            methods without a rank.
        model_bytes: of the merged model.
    """

    mode: Mode
    full_grid: bool
    space: SearchSpace
    recipe: Recipe
    rank: float
    scale: float
    rule: str
    why: str
    accuracy: pd.Series | None
    report: pd.DataFrame | None
    points: pd.DataFrame
    curve: pd.DataFrame
    score: str
    picks: pd.DataFrame
    asked_images: int
    grid_images: int
    forward_images: int
    seconds: float
    low_rank_bytes: int | None
    model_bytes: int

    @property
    def at_edge(self) -> str:
        """What is to be said where the recommendation lies at the end of an axis, else empty."""
        return str(self.picks.loc[self.picks["proxy"] == self.rule, "at_edge"].iloc[0])

    @property
    def tied(self) -> pd.DataFrame:
        """The evaluated points that these images do not tell from the recommended one."""
        return self.points[self.points["tied"].astype(bool)]


def selectable_methods(suite: Suite, tasks: Sequence[str]) -> dict[str, str]:
    """Methods of which rank or scale can be chosen here: name to title.

    They make one model of these tasks from weights alone.

    Example:
        >>> suite = load_suite("vision")
        >>> selectable_methods(suite, suite.tasks)["cart"]
        'CART'
    """
    return {
        name: method.title
        for name, method in methods().items()
        if {spec.name for spec in method.specs} & {"rank", "scale"}
        and (suite.base is not None or not method.needs_base())
        and method.tasks in (None, len(tasks))
        and not method.indexed
        and method.learns is None
    }


def select_rank(
    space: SearchSpace,
    session: MergeSession,
    evaluator: Evaluator | None,
    options: SelectionOptions,
    *,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> Selection:
    """Choose rank and scale of a method, by the rule that the evidence supports for the mode.

    Args:
        space: the settings; its recipe is of the session's tasks.
        session: the merges.
        evaluator: the evaluation; None for suites that cannot be evaluated (mode ``weights``).
        options: what may be looked at, and how thoroughly.
        progress: reports, and cancels between two units; what was evaluated is kept.
        executor: where the settings of a full grid are evaluated, several at once; here, one
            after another, when None. An adaptive search decides after each, so it uses none.

    Raises:
        RecipeError: a mode that needs an evaluator without one, or one in which this method has
            no rule; an executor without a full grid.
        MergeScopeError: unfit inputs.
        Cancelled: by `progress`.

    Example:
        >>> from analysis.rank_selection.space import search_space
        >>> suite = load_suite("vision")
        >>> session = MergeSession(suite, ["digits", "dots"], FactorStore())
        >>> space = search_space("task_arithmetic", "vision", session.groups.tasks)
        >>> selection = select_rank(space, session, None, SelectionOptions("weights"))
        >>> selection.recipe.parameters["scale"] == selection.scale, selection.forward_images
        (True, 0)
    """
    _check(session, evaluator, options, executor)
    start, before = time.monotonic(), evaluator.outputs.forward_images if evaluator else 0
    choice = _Choice(space, session, evaluator, options, progress or Progress())
    choice.progress.step(0, 1, "starting")
    rule = choice.rule()
    search = choice.search(rule, executor)
    picks = choice.picks(rule, search)
    chosen = picks[picks["proxy"] == rule].iloc[0]
    rank, scale = _round_to_digits(chosen["rank"]), _round_to_digits(chosen["scale"])
    recipe = recipe_at(space, rank, scale)
    accuracy, report = choice.accuracies(recipe)
    metric = ACCURACY if evaluator is None else evaluator.metric
    points = oriented(search.points, rule) if search else _no_points()
    return Selection(
        mode=options.mode,
        full_grid=options.exhaustive,
        space=space,
        recipe=recipe,
        rank=rank,
        scale=scale,
        rule=rule,
        why=explain(
            options.mode,
            options.exhaustive,
            space.base.method,
            chosen,
            int(points["tied"].sum()),
            metric,
        ),
        accuracy=accuracy,
        report=report,
        points=points,
        curve=oriented(search.curve, rule) if search else _no_points(),
        score=rule if search else metric.rule,
        picks=_with_metric(picks, points if rule == metric.rule else _no_points(), metric),
        asked_images=search.asked_images if search else 0,
        grid_images=search.grid_images if search else 0,
        forward_images=evaluator.outputs.forward_images - before if evaluator else 0,
        seconds=time.monotonic() - start,
        low_rank_bytes=_low_rank_bytes(recipe, session) if space.ranks else None,
        model_bytes=session.suite.expert(session.groups.tasks[0]).nbytes,
    )


def stored_selection(
    space: SearchSpace,
    session: MergeSession,
    evaluator: Evaluator | None,
    options: SelectionOptions,
) -> Selection | None:
    """:func:`select_rank` from stored outputs alone, or None if an image would have to be run.

    Example:
        >>> from analysis.rank_selection.space import search_space
        >>> suite = load_suite("vision")
        >>> session, evaluator = MergeSession(suite, ["dots"], FactorStore()), Evaluator(suite)
        >>> space = search_space("ties", "vision", ["dots"], scales=[0.5])
        >>> stored_selection(space, session, evaluator, SelectionOptions("labels")) is None
        True
    """
    stored = None if evaluator is None else evaluator.stored_only()
    try:
        return select_rank(space, session, stored, options)
    except NotStored:
        return None


def with_weight_picks(selection: Selection, picks: pd.DataFrame) -> Selection:
    """A selection that lists what all rules pick that need weights alone.

    Args:
        selection: with the pick of the rule that recommends, at least.
        picks: of :func:`analysis.rank_selection.weight_proxies.recommend_from_weights`, for the
            same settings.

    Example:
        >>> from analysis.rank_selection.space import search_space
        >>> session = MergeSession(load_suite("vision"), ("digits", "dots"), FactorStore())
        >>> space = search_space("task_arithmetic", "vision", session.groups.tasks)
        >>> options = SelectionOptions("weights", only_rule=True)
        >>> selection = select_rank(space, session, None, options)
        >>> found = recommend_from_weights(session.groups, space)
        >>> whole = select_rank(space, session, None, SelectionOptions("weights"))
        >>> len(selection.picks), with_weight_picks(selection, found).picks.equals(whole.picks)
        (1, True)
    """
    metric = metric_of(selection.picks)
    others = selection.picks[selection.picks["mode"] != "weights"].drop(columns=metric.column)
    both = pd.concat([others, picks.assign(mode="weights")], ignore_index=True)
    both = both.astype({"rank": float, "scale": float})
    points = selection.points if selection.score == metric.rule else _no_points()
    return replace(selection, picks=_with_metric(both, points, metric))


def task_curves(selection: Selection, session: MergeSession, evaluator: Evaluator) -> pd.DataFrame:
    """The metric of each task at the points of the curve that were evaluated on every image.

    Returns:
        Columns rank, scale, those of :meth:`Evaluator.recipe`, and normalised: the accuracy as a
        share of the expert's (see :meth:`analysis.metrics.Metric.relative`).

    Raises:
        MergeScopeError: unfit inputs.

    Example:
        >>> from analysis.rank_selection.space import search_space
        >>> suite = load_suite("vision")
        >>> session, evaluator = MergeSession(suite, ["dots"], FactorStore()), Evaluator(suite)
        >>> space = search_space("ties", "vision", ["dots"], scales=[0.5, 1.0])
        >>> options = SelectionOptions("labels", full_grid=True, report=False)
        >>> selection = select_rank(space, session, evaluator, options)
        >>> task_curves(selection, session, evaluator)[["task", "scale"]].values.tolist()
        [['dots', 0.5], ['dots', 1.0]]
    """
    metric = evaluator.metric
    experts = evaluator.experts(session.groups.tasks).set_index("task")[metric.column]
    parts = []
    for row in selection.curve.to_dict("records"):
        if row["images"] == selection.curve["images"].max():
            recipe = recipe_at(selection.space, row["rank"], row["scale"])
            frame = evaluator.recipe(recipe, session)
            parts.append(frame.assign(rank=row["rank"], scale=row["scale"]))
    frame = pd.concat(parts, ignore_index=True)
    own = frame["task"].map(experts)
    return frame.assign(normalised=metric.relative(frame[metric.column], own))


def recipe_at(space: SearchSpace, rank: float, scale: float) -> Recipe:
    """The recipe of a row of a frame, in which numbers of directions have become floats.

    Args:
        space: the settings.
        rank: one of the space's, or a share in (0, 1]; NaN where the method has none.
        scale: NaN where the method has none.

    Example:
        >>> from analysis.rank_selection.space import search_space
        >>> recipe_at(search_space("cart", "vision", ranks=[4, 16]), 16.0, 2.0).parameters
        {'rank': 16, 'scale': 2.0}
    """
    known = next((each for each in space.ranks if each == rank), rank)
    return space.recipe(None if math.isnan(rank) else known, None if math.isnan(scale) else scale)


def setting_words(rank: float, scale: float) -> str:
    """A setting in words; NaN is left out.

    Example:
        >>> setting_words(0.08, 2.0), setting_words(16.0, math.nan)
        ('rank 0.08 (8 %), scale 2', 'rank 16')
    """
    parts = []
    if not math.isnan(rank):
        parts.append(f"rank {rank:.3g}" + (f" ({100 * rank:.3g} %)" if rank <= 1 else ""))
    if not math.isnan(scale):
        parts.append(f"scale {scale:.3g}")
    return ", ".join(parts)


def _check(
    session: MergeSession,
    evaluator: Evaluator | None,
    options: SelectionOptions,
    executor: Executor | None,
) -> None:
    """Refuse a mode that the suite cannot serve, and an executor that has nothing to do.

    Raises:
        RecipeError: either.
    """
    if evaluator is None and options.mode != "weights":
        raise RecipeError(
            f"Mode {options.mode!r} needs {NEEDS[options.mode]}, and the suite "
            f"{session.suite.name!r} cannot be evaluated: {session.suite.why_not_evaluated}. Take "
            "the mode 'weights'."
        )
    if executor is not None and not options.exhaustive:
        raise RecipeError(
            "Only the settings of a full grid are independent pieces that an executor can take. "
            "Ask for the full grid, or leave the executor out."
        )


@dataclass(frozen=True)
class _Choice:
    """The steps of one choice, which share what they choose among and what they may look at."""

    space: SearchSpace
    session: MergeSession
    evaluator: Evaluator | None
    options: SelectionOptions
    progress: Progress

    @cached_property
    def quiet(self) -> Progress:
        """Cancels, but reports nothing."""
        return Progress(cancel=self.progress.cancel)

    @cached_property
    def from_weights(self) -> pd.DataFrame:
        """The picks of all proxies that need weights alone; of one where that suffices."""
        mode, method = self.options.mode, self.space.base.method
        groups = self.session.groups
        defined = [name for name in PROXIES if defined_for(name, method)]
        if self.options.only_rule and mode == "weights" and defined:
            rule = choose_rule(mode, method, defined)
            found = recommend_from_weights(groups, self.space, self.progress, only=rule)
            if len(found):
                return found
        progress = self.progress if mode == "weights" else self.quiet
        return recommend_from_weights(groups, self.space, progress)

    def rule(self) -> str:
        """The proxy that the evidence supports for the mode."""
        mode = self.options.mode
        metric = ACCURACY if self.evaluator is None else self.evaluator.metric
        if mode != "weights" and metric.lower_is_better:
            return language_rule(mode, metric.rule)
        proxies = self.from_weights["proxy"].tolist() if mode == "weights" else []
        return choose_rule(mode, self.space.base.method, proxies)

    def search(self, rule: str, executor: Executor | None) -> Search | None:
        """The best setting by a score of images; None where none may be looked at."""
        if self.evaluator is None or self.options.mode == "weights":
            return None
        if executor is not None:
            evaluate_side_by_side(
                self.space.recipes(),
                self.session,
                self.evaluator,
                executor,
                SCORES[rule].measures,
                progress=self.progress,
            )
        find = exhaustive_search if self.options.full_grid else adaptive_search
        return find(
            self.space,
            self.session,
            self.evaluator,
            rule,
            seed=self.options.seed,
            progress=self.progress,
        )

    def picks(self, rule: str, search: Search | None) -> pd.DataFrame:
        """A row per proxy: the rule's own, those that read inputs if asked for, and the rest."""
        parts = []
        if search is not None:
            parts.append(_pick_of_search(rule, search).assign(mode=self.options.mode))
        if self.evaluator is not None and self.options.every_proxy:
            found = recommend_from_inputs(
                self.space,
                self.session,
                self.evaluator,
                self.options.seed,
                "val",
                [name for name in INPUT_PROXIES if name != rule],  # those that it has
                self.progress,
            )
            parts.append(found.drop(columns="images").assign(mode="inputs"))
        for i, found in enumerate(parts):
            settings = zip(found["rank"], found["scale"], strict=True)
            parts[i] = found.assign(at_edge=[edge_words(self.space, *each) for each in settings])
        if self.options.mode == "weights" or not self.options.only_rule:
            parts.append(self.from_weights.assign(mode="weights"))
        return pd.concat(parts, ignore_index=True).astype({"rank": float, "scale": float})

    def accuracies(self, recipe: Recipe) -> tuple[pd.Series | None, pd.DataFrame | None]:
        """Mean accuracy on the validation split and every task's on the test split.

        None where there is nothing to evaluate, or where it was not asked for.
        """
        if self.evaluator is None:
            return None, None
        mean, tested = None, None
        asked = self.options.report
        if self.options.mode == "labels" or (asked and _has_labels(self.session, "val")):
            frame = self.evaluator.recipe(recipe, self.session, progress=self.quiet)
            mean = self.evaluator.metric.mean_over_tasks(frame, ()).iloc[0]
        if asked and _has_labels(self.session, "test"):
            tested = self.evaluator.recipe(recipe, self.session, "test", progress=self.quiet)
        return mean, tested


def _has_labels(session: MergeSession, split: Split) -> bool:
    return all(has_labels(session.suite, task, split) for task in session.groups.tasks)


def _round_to_digits(value: float) -> float:
    """Three digits: what can be read, written in a link and told apart."""
    return float(f"{value:.3g}")


def _pick_of_search(rule: str, search: Search) -> pd.DataFrame:
    score = SCORES[rule]
    row = {
        "proxy": rule,
        "title": score.title,
        "rank": search.rank,
        "scale": search.scale,
        "why": score.why,
        "source": score.source,
    }
    return pd.DataFrame([row])


def _no_points() -> pd.DataFrame:
    expected = ["expected", "expected_low", "expected_high"]
    columns = ["rank", "scale", "images", "score", "low", "high", *expected, "tied"]
    return pd.DataFrame({name: pd.Series(dtype=float) for name in columns}).astype({"tied": bool})


def oriented(points: pd.DataFrame, score: str) -> pd.DataFrame:
    """Points of a search, whose scores are the higher the better, in the score's own sense.

    Example:
        >>> points = pd.DataFrame({"score": [-2.5], "low": [-3.0], "high": [-2.0]})
        >>> points = points.assign(expected=-2.4, expected_low=-2.8, expected_high=-2.0)
        >>> oriented(points, "cross_entropy")[["score", "low", "high"]].values.tolist()
        [[2.5, 2.0, 3.0]]
    """
    metric = METRICS.get(cast("MetricName", score))
    if metric is None or not metric.lower_is_better:
        return points
    turned = {name: -points[name] for name in ("score", "expected")}
    for start in ("", "expected_"):
        turned |= {f"{start}low": -points[f"{start}high"], f"{start}high": -points[f"{start}low"]}
    return points.assign(**turned)


def _with_metric(picks: pd.DataFrame, points: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """Picks with the metric where that very setting was evaluated on every image."""
    whole = points[points["images"] == points["images"].max()]
    accuracy = []
    for row in picks.to_dict("records"):
        same = np.ones(len(whole), dtype=bool)
        for name in ("rank", "scale"):
            same &= np.isclose(whole[name], row[name], equal_nan=True)
        found = whole["score"][same].to_numpy()
        accuracy.append(float(found[metric.best(found)]) if same.any() else math.nan)
    return picks.assign(**{metric.column: accuracy})


def _low_rank_bytes(recipe: Recipe, session: MergeSession) -> int:
    """Σ k(m + n + 1) numbers per task over the decomposed matrices, in their stored dtype."""
    total = 0
    for group in session.groups:
        if group.decomposed:
            m, n = group.info.matrix_shape
            k = count_directions(recipe.parameters["rank"], min(m, n))
            total += len(group.tasks) * k * (m + n + 1) * group.info.dtype.itemsize
    return total

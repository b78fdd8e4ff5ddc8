"""The one door to rank and scale: from labels, from inputs alone, or from weights alone."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from analysis.accuracy import mean_accuracy
from analysis.evaluation.evaluator import Evaluator
from analysis.evaluation.side_by_side import evaluate_side_by_side
from analysis.outputs.inputs import Split, has_labels
from analysis.outputs.suite_outputs import NotStored
from analysis.rank_selection.adaptive import Search, adaptive_search, exhaustive_search
from analysis.rank_selection.input_proxies import INPUT_PROXIES, recommend_from_inputs
from analysis.rank_selection.regret import evidence, recommended_proxy, summary
from analysis.rank_selection.scores import SCORES
from analysis.rank_selection.space import SearchSpace
from analysis.rank_selection.weight_proxies import recommend_from_weights
from merge_core.errors import RecipeError
from merge_core.executors.base import Executor
from merge_core.factors.low_rank import count_directions
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import Recipe
from merge_core.methods import get_method, methods
from merge_core.progress import Progress
from merge_core.suites.suite import Suite

Mode = Literal["labels", "inputs", "weights"]
NEEDS: dict[Mode, str] = {
    "labels": "labelled validation images",
    "inputs": "validation images without labels",
    "weights": "the checkpoints alone",
}


@dataclass(frozen=True)
class Selection:
    """A recommended rank and scale, and everything that speaks for it.

    Attributes:
        mode: what was looked at.
        full_grid: whether every setting was evaluated on every image.
        space: among which settings.
        recipe: the recommended recipe.
        rank, scale: its values; NaN where the method has none.
        rule: the proxy, or the search, that chose it.
        why: one sentence.
        accuracy: mean over tasks on the validation split with low and high, or None where there
            is nothing to evaluate. Only in mode ``labels`` was it looked at for choosing.
        report: per-task accuracy on the test split of the recommended recipe, or None.
        points: what was evaluated, a row per setting: rank, scale, images (per task), score, low,
            high, expected, expected_low, expected_high, tied (see
            :class:`analysis.rank_selection.adaptive.Search`).
        curve: the best of them at each rank (at each scale for methods without a rank).
        score: what the score is.
        picks: a row per proxy: proxy, title, mode, rank, scale, why, source, accuracy (NaN where
            it was not measured).
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
    def tied(self) -> pd.DataFrame:
        """The evaluated points that these images do not tell from the recommended one."""
        return self.points[self.points["tied"].astype(bool)]


def selectable(suite: Suite, tasks: Sequence[str]) -> dict[str, str]:
    """Methods of which rank or scale can be chosen here: name to title.

    They make one model of these tasks from weights alone.
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
    mode: Mode,
    *,
    seed: int = 0,
    full_grid: bool = False,
    every_proxy: bool = False,
    report: bool = True,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> Selection:
    """Choose rank and scale of a method, by the rule that the evidence supports for the mode.

    Args:
        space: the settings; its recipe is of the session's tasks.
        session: the merges.
        evaluator: the evaluation; None for suites that cannot be evaluated (mode ``weights``).
        mode: what may be looked at: ``labels``, ``inputs`` or ``weights``.
        seed: of the images that the adaptive search begins with.
        full_grid: evaluate every setting on every image instead of searching adaptively.
        every_proxy: find the picks of all proxies from inputs too, each by a search of its own.
        report: evaluate the recommended recipe, in the end: on the test split (and in modes
            that read no label on the validation split too), where there are labels.
        progress: reports, and cancels between two units; what was evaluated is kept.
        executor: where the settings of a full grid are evaluated, several at once; here, one
            after another, when None. An adaptive search decides after each, so it uses none.

    Raises:
        RecipeError: a mode that needs an evaluator without one, or one in which this method has
            no rule; an executor without a full grid.
        MergeScopeError: unfit inputs.
        Cancelled: by `progress`.
    """
    if evaluator is None and mode != "weights":
        raise RecipeError(
            f"Mode {mode!r} needs {NEEDS[mode]}, and the suite {session.suite.name!r} cannot be "
            f"evaluated: {session.suite.why_not_evaluated}. Take the mode 'weights'."
        )
    if executor is not None and not (full_grid and mode != "weights"):
        raise RecipeError(
            "Only the settings of a full grid are independent pieces that an executor can take. "
            "Ask for the full grid, or leave the executor out."
        )
    progress = progress or Progress()
    inner = Progress(cancel=progress.cancel)
    start, before = time.monotonic(), evaluator.outputs.forward_images if evaluator else 0
    progress.step(0, 1, "starting")
    weights, search, parts = None, None, []
    full_grid = full_grid and mode != "weights"
    if mode == "weights":
        weights = recommend_from_weights(session.groups, space, inner)
    rule = _rule(mode, space.base.method, [] if weights is None else weights["proxy"].tolist())
    if evaluator is not None and mode != "weights":
        if executor is not None:
            evaluate_side_by_side(
                space.recipes(),
                session,
                evaluator,
                executor,
                SCORES[rule].measures,
                progress=progress,
            )
        find = exhaustive_search if full_grid else adaptive_search
        search = find(space, session, evaluator, rule, seed=seed, progress=progress)
        parts.append(_searched(rule, search).assign(mode=mode))
    if evaluator is not None and every_proxy:
        others = [name for name in INPUT_PROXIES if name != rule]
        found = recommend_from_inputs(space, session, evaluator, seed, "val", others, progress)
        parts.append(found.drop(columns="images").assign(mode="inputs"))
    if weights is None:
        weights = recommend_from_weights(session.groups, space, inner)
    parts.append(weights.assign(mode="weights"))
    picks = pd.concat(parts, ignore_index=True).astype({"rank": float, "scale": float})
    chosen = picks[picks["proxy"] == rule].iloc[0]
    rank, scale = _digits(chosen["rank"]), _digits(chosen["scale"])
    recipe = recipe_at(space, rank, scale)
    accuracy, tested = None, None
    if evaluator is not None and (mode == "labels" or (report and _labelled(session, "val"))):
        accuracy = mean_accuracy(evaluator.recipe(recipe, session, progress=inner)).iloc[0]
    if evaluator is not None and report and _labelled(session, "test"):
        tested = evaluator.recipe(recipe, session, "test", progress=inner)
    points = search.points if search else _no_points()
    return Selection(
        mode=mode,
        full_grid=full_grid,
        space=space,
        recipe=recipe,
        rank=rank,
        scale=scale,
        rule=rule,
        why=_why(mode, space.base.method, chosen, search, full_grid),
        accuracy=accuracy,
        report=tested,
        points=points,
        curve=search.curve if search else _no_points(),
        score=rule if search else "accuracy",
        picks=_with_accuracy(picks, points if rule == "accuracy" else _no_points()),
        asked_images=search.asked_images if search else 0,
        grid_images=search.grid_images if search else 0,
        forward_images=evaluator.outputs.forward_images - before if evaluator else 0,
        seconds=time.monotonic() - start,
        low_rank_bytes=_low_rank_bytes(recipe, session) if space.ranks else None,
        model_bytes=session.suite.expert(session.groups.tasks[0]).nbytes,
    )


def known_selection(
    space: SearchSpace,
    session: MergeSession,
    evaluator: Evaluator | None,
    mode: Mode,
    *,
    seed: int = 0,
    full_grid: bool = False,
    every_proxy: bool = False,
) -> Selection | None:
    """:func:`select_rank` from stored outputs alone, or None if an image would have to be run."""
    stored = None if evaluator is None else evaluator.stored_only()
    try:
        return select_rank(
            space, session, stored, mode, seed=seed, full_grid=full_grid, every_proxy=every_proxy
        )
    except NotStored:
        return None


def task_curves(selection: Selection, session: MergeSession, evaluator: Evaluator) -> pd.DataFrame:
    """Accuracy of each task at the points of the curve that were evaluated on every image.

    Returns:
        Columns rank, scale, task, correct, images, accuracy, low, high, and normalised: the
        accuracy as a share of the expert's.

    Raises:
        MergeScopeError: unfit inputs.
    """
    experts = evaluator.experts(session.groups.tasks).set_index("task")["accuracy"]
    parts = []
    for row in selection.curve.to_dict("records"):
        if row["images"] == selection.curve["images"].max():
            recipe = recipe_at(selection.space, row["rank"], row["scale"])
            frame = evaluator.recipe(recipe, session)
            parts.append(frame.assign(rank=row["rank"], scale=row["scale"]))
    frame = pd.concat(parts, ignore_index=True)
    return frame.assign(normalised=frame["accuracy"] / frame["task"].map(experts))


def recipe_at(space: SearchSpace, rank: float, scale: float) -> Recipe:
    """The recipe of a row of a frame, in which numbers of directions have become floats.

    Args:
        space: the settings.
        rank: one of the space's, or a share in (0, 1]; NaN where the method has none.
        scale: NaN where the method has none.
    """
    known = next((each for each in space.ranks if each == rank), rank)
    return space.recipe(None if math.isnan(rank) else known, None if math.isnan(scale) else scale)


def setting_words(rank: float, scale: float) -> str:
    """A setting in words; NaN is left out."""
    parts = []
    if not math.isnan(rank):
        parts.append(f"rank {rank:.3g}" + (f" ({100 * rank:.3g} %)" if rank <= 1 else ""))
    if not math.isnan(scale):
        parts.append(f"scale {scale:.3g}")
    return ", ".join(parts)


def _labelled(session: MergeSession, split: Split) -> bool:
    return all(has_labels(session.suite, task, split) for task in session.groups.tasks)


def _digits(value: float) -> float:
    """Three digits: what can be read, written in a link and told apart."""
    return float(f"{value:.3g}")


def _searched(rule: str, search: Search) -> pd.DataFrame:
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


def _with_accuracy(picks: pd.DataFrame, points: pd.DataFrame) -> pd.DataFrame:
    """Picks with the accuracy where that very setting was evaluated on every image."""
    whole = points[points["images"] == points["images"].max()]
    accuracy = []
    for row in picks.to_dict("records"):
        same = np.ones(len(whole), dtype=bool)
        for name in ("rank", "scale"):
            same &= np.isclose(whole[name], row[name], equal_nan=True)
        accuracy.append(float(whole["score"][same].max()) if same.any() else math.nan)
    return picks.assign(accuracy=accuracy)


def _low_rank_bytes(recipe: Recipe, session: MergeSession) -> int:
    """Σ k(m + n + 1) numbers per task over the decomposed matrices, in their stored dtype."""
    total = 0
    for group in session.groups:
        if group.decomposed:
            m, n = group.info.matrix_shape
            k = count_directions(recipe.parameters["rank"], min(m, n))
            total += len(group.tasks) * k * (m + n + 1) * group.info.dtype.itemsize
    return total


def _cases(method: str) -> pd.DataFrame:
    """The evidence of a method; of all methods where it was never measured."""
    table = evidence()
    own = table[table["method"] == method]
    return table if own.empty else own


def _rule(mode: Mode, method: str, from_weights: Sequence[str]) -> str:
    """The proxy that the evidence supports; for a method never measured, over all methods.

    Raises:
        RecipeError: no rule of that mode gives this merge a setting.
    """
    cases = _cases(method)
    possible = cases[(cases["mode"] != "weights") | cases["proxy"].isin(from_weights)]
    try:
        return recommended_proxy(mode, None, possible)
    except RecipeError as error:
        raise RecipeError(
            f"No rule gives {get_method(method).title} of these tasks a setting from "
            f"{NEEDS[mode]}; choose another mode."
        ) from error


def _points(regret: float) -> str:
    """A loss in words; a setting off the grid can be better than the grid's best."""
    return "nothing" if regret < 0.0005 else f"{100 * regret:.1f} points"


def _why(mode: Mode, method: str, chosen: pd.Series, search: Search | None, full: bool) -> str:
    """One sentence or two: the rule, and its regret in the evidence."""
    cases = _cases(method)
    table = summary(cases)
    mine = table[(table["mode"] == mode) & (table["proxy"] == chosen["proxy"])]
    row = mine[(mine["search"] == "grid") == full].iloc[0]
    where = "" if method in set(cases["method"]) else " of other methods"
    regret = (
        f"lost {_points(row['mean'])} of accuracy against the best setting on average and "
        f"{_points(row['worst'])} at worst, over {row['cases']} sets of tasks{where}"
    )
    if mode == "labels":
        tied = int(search.points["tied"].sum()) - 1 if search else 0
        return (
            "This setting has the highest accuracy on the labelled validation images among those "
            f"evaluated on all of them; these images do not tell {tied} others from it. In the "
            f"evidence such a choice {regret}."
        )
    needs = "images without labels" if mode == "inputs" else "nothing but weights"
    return (
        f"{chosen['title']} chose it, the rule that lost least in the evidence of those that need "
        f"{needs}: it {regret}."
    )

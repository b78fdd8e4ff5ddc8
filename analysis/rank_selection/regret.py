"""What a recommended rank and scale loses against the best, measured on one set of tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.accuracy import Difference, Hits, difference
from analysis.evaluation.evaluator import Evaluator
from analysis.outputs.inputs import Split
from analysis.rank_selection.adaptive import adaptive_search, exhaustive_search
from analysis.rank_selection.evidence.shipped import TIED
from analysis.rank_selection.input_proxies import INPUT_PROXIES, recommend_from_inputs
from analysis.rank_selection.scores import SCORES, measures_of, scores_at
from analysis.rank_selection.space import SearchSpace
from analysis.rank_selection.weight_proxies import CONTENDERS, recommend_from_weights
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import Recipe
from merge_core.progress import Progress

FIXED: dict[str, tuple[float, float]] = {"fixed_4": (0.04, 1.5), "fixed_8": (0.08, 5.0)}
"""Settings (rank, scale) that look at nothing, for comparison; of methods with both."""
FEW_IMAGES = (10, 25, 50, 100)
DRAWS = 20
SETTINGS = ["rank", "scale", "best_rank", "best_scale", *TIED]
ALL_SCORES: tuple[str, ...] = ("accuracy", *INPUT_PROXIES)

GridScores = dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Pick:
    """A recommended setting.

    Attributes:
        mode: ``labels``, ``inputs``, ``weights`` or ``default``.
        proxy: the score or rule that recommends it.
        search: ``grid`` (every setting on every image), ``adaptive``, or ``rule`` (none).
        rank, scale: None where the method has none.
        images: forward images that the recommendation took.
    """

    mode: str
    proxy: str
    search: str
    rank: float | int | None
    scale: float | None
    images: int


def grid_scores(
    space: SearchSpace,
    session: MergeSession,
    evaluator: Evaluator,
    scores: Sequence[str] = ALL_SCORES,
    split: Split = "val",
    progress: Progress | None = None,
) -> GridScores:
    """Every score of every setting on every image, from one pass per setting.

    Args:
        space: the settings, in the order of :meth:`SearchSpace.recipes`.
        session: the merges.
        evaluator: where outputs are kept.
        scores: names of :data:`analysis.rank_selection.scores.SCORES`.
        split: which images.
        progress: reports each setting.

    Returns:
        Score to task to values (settings x images).

    Raises:
        MergeScopeError: unfit inputs.
        Cancelled: between two batches; what was run is kept.
    """
    progress = progress or Progress()
    images = evaluator.outputs.images(session.groups.tasks, split)
    recipes = space.recipes()
    found = []
    for done, recipe in enumerate(recipes):
        progress.step(done, len(recipes), f"{recipe.method}, setting {done + 1}")
        inner = Progress(cancel=progress.cancel)
        for following in recipes[done + 1 : done + 2]:
            evaluator.expect(following, session, images, split, measures_of(scores))
        found.append(scores_at(scores, recipe, session, evaluator, images, split, inner))
    progress.step(len(recipes), len(recipes), space.base.method)
    return {
        score: {task: np.stack([each[score][task] for each in found]) for task in images}
        for score in scores
    }


def best_setting(values: Mapping[str, np.ndarray]) -> int:
    """The setting of the highest mean score over tasks; of several alike the first.

    The first has the lowest rank, which is the cheapest to store, and of those the smallest
    scale.

    Args:
        values: task to settings x images.

    Returns:
        Its row.

    Example:
        >>> best_setting({"digits": np.array([[0.0, 1.0], [1.0, 1.0], [1.0, 1.0]])})
        1
    """
    mean = np.mean([each.mean(axis=1) for each in values.values()], axis=0)
    # Means of the same hits summed in another order differ in the last bits.
    return int(np.flatnonzero(mean >= mean.max() - 1e-9)[0])


def regret_table(
    subset: str,
    space: SearchSpace,
    session: MergeSession,
    evaluator: Evaluator,
    seed: int = 0,
    brief: bool = False,
    progress: Progress | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What every proxy recommends for one method on one set of tasks, and what it loses.

    Best is the setting of the space with the highest validation accuracy. It is chosen on the
    images on which `regret` is measured, so `regret` counts that luck in its favour and
    `test_regret` (of the same two settings on the test split) does not: it may be negative.

    Args:
        subset: what the set of tasks is called.
        space: the settings; ranks as shares.
        session: the merges.
        evaluator: where outputs are kept.
        seed: of the adaptive searches.
        brief: of the rules that read weights, measure only :data:`CONTENDERS`.
        progress: reports settings.

    Returns:
        One row per recommendation: suite, subset, tasks (how many), method, mode, proxy, search,
        images (see :class:`Pick`), rank, scale, accuracy, test_accuracy (there), best_rank,
        best_scale, best, test_best (accuracy at the best setting), regret, low, high,
        test_regret, test_low, test_high (shares; paired 95 % intervals), tied_rank_low,
        tied_rank_high, tied_scale_low, tied_scale_high (range of the settings that the
        validation images do not tell from the best; NaN where the method has no such axis).

        And the effect of few inputs (see :func:`regret_by_images`), with suite, subset, tasks and
        method.

    Raises:
        MergeScopeError: unfit inputs.
        Cancelled: between two batches; what was run is kept.
    """
    progress = progress or Progress()
    values = grid_scores(space, session, evaluator, progress=progress)
    recipes = space.recipes()
    case = {
        "suite": session.suite.name,
        "subset": subset,
        "tasks": len(session.groups.tasks),
        "method": space.base.method,
    }
    best = recipes[best_setting(values["accuracy"])]
    top = _measure(best, session, evaluator)
    context = {**case, **_tied_range(space, session, evaluator)}
    chosen = [
        *rule_picks(space, session, brief, progress),
        *score_picks(space, session, evaluator, values, seed, progress),
    ]
    table = _measured(chosen, best, top, context, space, session, evaluator, progress)
    few = regret_by_images(values)
    few = pd.DataFrame([{**case, **row} for row in few.to_dict("records")])
    return table, few


def rule_regret(
    known: pd.DataFrame,
    space: SearchSpace,
    session: MergeSession,
    evaluator: Evaluator,
    brief: bool = False,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """What the recommendations that evaluate nothing lose, where the best setting is known.

    A rule that still recommends what it did keeps its row: nothing is run for it.

    Args:
        known: rows of :func:`regret_table` of this method on these tasks.
        space: the settings that it was measured on.
        session: the merges.
        evaluator: where outputs are kept.
        brief: see :func:`regret_table`.
        progress: reports recommendations.

    Returns:
        The rows of modes ``default`` and ``weights``, as :func:`regret_table` gives them.

    Raises:
        MergeScopeError: unfit inputs.
        Cancelled: between two batches; what was run is kept.
    """
    first = known.iloc[0]
    context = {column: first[column] for column in ("suite", "subset", "tasks", "method", *TIED)}
    best = space.recipe(*(_none_if_missing(first[axis]) for axis in ("best_rank", "best_scale")))
    chosen = rule_picks(space, session, brief, progress)
    before = known[known["search"] == "rule"].set_index("proxy")
    new = [pick for pick in chosen if not _is_known(pick, before)]
    parts = []
    if new:
        top = _measure(best, session, evaluator)
        parts = [_measured(new, best, top, context, space, session, evaluator, progress)]
    same = [pick.proxy for pick in chosen if _is_known(pick, before)]
    found = pd.concat([*parts, before.loc[same].reset_index()]).set_index("proxy")
    order = found.loc[[pick.proxy for pick in chosen]].reset_index()
    return order[list(known)].astype(dict.fromkeys(SETTINGS, float))


def _is_known(pick: Pick, before: pd.DataFrame) -> bool:
    """Whether the rows by proxy have one of this very setting, to the digits written."""
    if pick.proxy not in before.index:
        return False
    row = before.loc[pick.proxy]
    return all(
        np.isclose(np.nan if asked is None else asked, row[axis], rtol=1e-4, equal_nan=True)
        for axis, asked in (("rank", pick.rank), ("scale", pick.scale))
    )


def _measured(
    chosen: Sequence[Pick],
    best: Recipe,
    top: dict[str, Hits],
    context: Mapping[str, Any],
    space: SearchSpace,
    session: MergeSession,
    evaluator: Evaluator,
    progress: Progress | None,
) -> pd.DataFrame:
    """The rows of :func:`regret_table` of these recommendations."""
    progress = progress or Progress()
    rows = []
    for done, pick in enumerate(chosen):
        progress.step(done, len(chosen), f"{pick.mode}: {pick.proxy}")
        recipe = space.recipe(pick.rank, pick.scale)
        there = _measure(recipe, session, evaluator)
        rows.append(
            {
                **context,
                **vars(pick),
                "accuracy": _mean(there["val"]),
                "test_accuracy": _mean(there["test"]),
                "best_rank": best.parameters.get("rank"),
                "best_scale": best.parameters.get("scale"),
                "best": _mean(top["val"]),
                "test_best": _mean(top["test"]),
                **_loss(top["val"], there["val"], "", recipe == best),
                **_loss(top["test"], there["test"], "test_", recipe == best),
            }
        )
    return pd.DataFrame(rows).astype(dict.fromkeys(SETTINGS, float))


def rule_picks(
    space: SearchSpace,
    session: MergeSession,
    brief: bool = False,
    progress: Progress | None = None,
) -> list[Pick]:
    """The recommendations that evaluate nothing: defaults, fixed settings and those of weights.

    Args:
        space: the settings.
        session: the merges.
        brief: of those of weights, only :data:`CONTENDERS`.
        progress: cancels.

    Raises:
        MergeScopeError: unfit inputs.
        Cancelled: between two matrices.
    """
    inner = Progress(cancel=(progress or Progress()).cancel)
    own = space.base.checked_parameters
    rank, scale = getattr(own, "rank", None), getattr(own, "scale", None)
    found = [Pick("default", "default", "rule", rank, scale, 0)]
    if space.ranks and space.scales:
        found += [Pick("default", name, "rule", *setting, 0) for name, setting in FIXED.items()]
    weights = recommend_from_weights(session.groups, space, progress=inner)
    for row in weights.to_dict("records"):
        if not brief or row["proxy"] in CONTENDERS:
            setting = (_none_if_missing(row["rank"]), _none_if_missing(row["scale"]))
            found.append(Pick("weights", row["proxy"], "rule", *setting, 0))
    return found


def score_picks(
    space: SearchSpace,
    session: MergeSession,
    evaluator: Evaluator,
    values: GridScores,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Pick]:
    """The recommendations of inputs and labels, of the whole grid and of adaptive searches.

    Args:
        space: the settings.
        session: the merges.
        evaluator: where outputs are kept.
        values: of :func:`grid_scores`.
        seed: of the adaptive searches.
        progress: cancels.

    Raises:
        MergeScopeError: unfit inputs.
        Cancelled: inside a search.
    """
    inner = Progress(cancel=(progress or Progress()).cancel)
    recipes = space.recipes()
    found = []
    whole = sum(each.size for each in values["accuracy"].values())
    for name, each in values.items():
        mode = "labels" if SCORES[name].reference == "labels" else "inputs"
        chosen = recipes[best_setting(each)].parameters
        found.append(Pick(mode, name, "grid", chosen.get("rank"), chosen.get("scale"), whole))
    search = adaptive_search(space, session, evaluator, seed=seed, progress=inner)
    setting = (_none_if_missing(search.rank), _none_if_missing(search.scale))
    found.append(Pick("labels", "accuracy", "adaptive", *setting, search.asked_images))
    inputs = recommend_from_inputs(space, session, evaluator, seed, progress=inner)
    for row in inputs.to_dict("records"):
        setting = (_none_if_missing(row["rank"]), _none_if_missing(row["scale"]))
        found.append(Pick("inputs", row["proxy"], "adaptive", *setting, row["images"]))
    return found


def regret_by_images(
    values: GridScores, images: Sequence[int] = FEW_IMAGES, draws: int = DRAWS
) -> pd.DataFrame:
    """What is lost where only some inputs per task are scored, on every setting.

    Args:
        values: of :func:`grid_scores`, with accuracy.
        images: numbers per task; those that a task has no more of are left out.
        draws: random sets of images for each number (seeded).

    Returns:
        One row per score and number: proxy, images, draws, mean, worst (validation accuracy at
        the best setting minus at the chosen one, shares; over draws).

    Example:
        >>> scores = {"digits": np.stack([np.ones(30), np.zeros(30)])}
        >>> regret_by_images({"accuracy": scores}, images=[10])["worst"].tolist()
        [0.0]
    """
    accuracy = np.mean([hits.mean(axis=1) for hits in values["accuracy"].values()], axis=0)
    sizes = {task: hits.shape[1] for task, hits in values["accuracy"].items()}
    rows = []
    for number in (n for n in images if n < min(sizes.values())):
        losses: dict[str, list[float]] = {name: [] for name in values}
        for draw in range(draws):
            source = np.random.default_rng([number, draw])
            drawn = {task: source.permutation(size)[:number] for task, size in sizes.items()}
            for name, each in values.items():
                part = {task: scores[:, drawn[task]] for task, scores in each.items()}
                losses[name].append(accuracy.max() - accuracy[best_setting(part)])
        rows += [
            (name, number, draws, float(np.mean(each)), float(np.max(each)))
            for name, each in losses.items()
        ]
    return pd.DataFrame(rows, columns=["proxy", "images", "draws", "mean", "worst"])


def _none_if_missing(value: Any) -> Any:
    return None if pd.isna(value) else value


def _measure(recipe: Recipe, session: MergeSession, evaluator: Evaluator) -> dict[str, Hits]:
    return {
        "val": evaluator.recipe_hits(recipe, session, "val"),
        "test": evaluator.recipe_hits(recipe, session, "test"),
    }


def _mean(hits: Hits) -> float:
    return float(np.mean([each.mean() for each in hits.values()]))


def _loss(best: Hits, pick: Hits, prefix: str, same: bool) -> dict[str, float]:
    loss = Difference(0.0, 0.0, 0.0, 1.0) if same else difference(best, pick)
    return {
        f"{prefix}regret": loss.gap,
        f"{prefix}low": loss.low,
        f"{prefix}high": loss.high,
    }


def _tied_range(
    space: SearchSpace, session: MergeSession, evaluator: Evaluator
) -> dict[str, float]:
    points = exhaustive_search(space, session, evaluator).points
    tied = points[points["tied"].astype(bool)]
    return {
        f"tied_{axis}_{side}": getattr(tied[axis], how)()
        for axis in ("rank", "scale")
        for side, how in (("low", "min"), ("high", "max"))
    }

"""What a recommended rank and scale loses against the best: the evidence for the defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.accuracy import Difference, Hits, difference
from analysis.evaluation.evaluator import Evaluator
from analysis.outputs.inputs import Split
from analysis.rank_selection.adaptive import adaptive_search, exhaustive_search
from analysis.rank_selection.input_proxies import INPUT_PROXIES, recommend_from_inputs
from analysis.rank_selection.scores import SCORES, scores_at
from analysis.rank_selection.space import SearchSpace
from analysis.rank_selection.weight_proxies import recommend_from_weights
from merge_core.errors import RecipeError
from merge_core.files import digest_of
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import Recipe
from merge_core.progress import Progress

EVIDENCE = Path(__file__).with_name("evidence.csv")
EVIDENCE_IMAGES = Path(__file__).with_name("evidence_images.csv")
FEW_IMAGES = (10, 25, 50, 100)
DRAWS = 20
TIED = ["tied_rank_low", "tied_rank_high", "tied_scale_low", "tied_scale_high"]
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
    rows = []
    chosen = picks(space, session, evaluator, values, seed, progress)
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
    few = regret_by_images(values)
    table = pd.DataFrame(rows)
    few = pd.DataFrame([{**case, **row} for row in few.to_dict("records")])
    return table.astype(dict.fromkeys(SETTINGS, float)), few


def picks(
    space: SearchSpace,
    session: MergeSession,
    evaluator: Evaluator,
    values: GridScores,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Pick]:
    """Every recommendation: of the method's own defaults, weights, inputs and labels.

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
    own = space.base.checked_parameters
    rank, scale = getattr(own, "rank", None), getattr(own, "scale", None)
    found = [Pick("default", "default", "rule", rank, scale, 0)]
    weights = recommend_from_weights(session.groups, space, progress=inner)
    for row in weights.to_dict("records"):
        setting = (_none_if_missing(row["rank"]), _none_if_missing(row["scale"]))
        found.append(Pick("weights", row["proxy"], "rule", *setting, 0))
    recipes = space.recipes()
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


def evidence() -> pd.DataFrame:
    """The shipped regret table (see :func:`regret_table`), made by ``python -m data.evidence``.

    Example:
        >>> sorted(evidence()["mode"].unique())
        ['default', 'inputs', 'labels', 'weights']
    """
    return _read(EVIDENCE).copy()


@cache
def evidence_digest() -> str:
    """Digest (hex) of the shipped regret table, which decides what each mode recommends.

    Example:
        >>> len(evidence_digest())
        64
    """
    return digest_of(EVIDENCE.read_bytes())


def evidence_images() -> pd.DataFrame:
    """The shipped effect of few inputs (see :func:`regret_by_images`), with the cases' columns.

    Example:
        >>> {"proxy", "images", "mean", "worst"} <= set(evidence_images())
        True
    """
    return _read(EVIDENCE_IMAGES).copy()


@cache
def _read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype={"subset": str})


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Regret of each proxy over the cases in which it was measured.

    Args:
        table: of :func:`regret_table`, of one or several cases.

    Returns:
        One row per mode, proxy and search: cases, mean, worst (validation), test_mean,
        test_worst (shares), lost (share of cases in which the pick is worse on the test split
        beyond its interval), images (mean); ascending in worst within a mode.

    Example:
        >>> table = summary(evidence())
        >>> bool((table["mean"] <= table["worst"]).all())
        True
    """
    grouped = table.assign(lost=table["test_low"] > 0).groupby(["mode", "proxy", "search"])
    frame = grouped.agg(
        cases=("regret", "size"),
        mean=("regret", "mean"),
        worst=("regret", "max"),
        test_mean=("test_regret", "mean"),
        test_worst=("test_regret", "max"),
        lost=("lost", "mean"),
        images=("images", "mean"),
    ).reset_index()
    order = ["mode", "worst", "mean", "proxy"]
    return frame.sort_values(order, ignore_index=True)


def recommend_proxy(mode: str, method: str | None = None, table: pd.DataFrame | None = None) -> str:
    """The proxy of a mode with the lowest worst regret, then the lowest mean one.

    What is asked of a recommendation is to be good on every set of tasks. Regret is that of
    validation: the test split has no part in a choice. A proxy counts only if it was measured in
    every case, and in the search that is in use (adaptive where there is one).

    Args:
        mode: ``labels``, ``inputs`` or ``weights``.
        method: only cases of this method count; all when None.
        table: the evidence; :func:`evidence` when None.

    Raises:
        RecipeError: no proxy was measured in all these cases.

    Source: minimax regret, Savage, JASA 46 (1951), 55.

    Example:
        >>> recommend_proxy("labels")
        'accuracy'
    """
    table = evidence() if table is None else table
    if method is not None:
        table = table[table["method"] == method]
    cases = len(table[["suite", "subset", "method"]].drop_duplicates())
    measured = summary(table[(table["mode"] == mode) & (table["search"] != "grid")])
    everywhere = measured[measured["cases"] == cases]
    if everywhere.empty:
        raise RecipeError(
            f"No rule of mode {mode!r} has been measured for {method or 'every method'}; choose "
            "another mode."
        )
    return str(everywhere["proxy"].iloc[0])


def tasks_effect(table: pd.DataFrame) -> pd.DataFrame:
    """The best rank and scale of each case, by number of tasks.

    Args:
        table: of :func:`regret_table`, of several cases.

    Returns:
        One row per case: suite, method, tasks, subset, best_rank, best_scale, best (accuracy),
        tied_rank_low, tied_rank_high, tied_scale_low, tied_scale_high.

    Example:
        >>> frame = tasks_effect(evidence())
        >>> bool((frame["best_rank"].dropna() <= 1).all())
        True
    """
    columns = ["suite", "method", "tasks", "subset", "best_rank", "best_scale", "best"]
    columns += TIED
    rows = table[columns].drop_duplicates()
    return rows.sort_values(["suite", "method", "tasks", "subset"], ignore_index=True)


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

"""Any set of recipes on one suite: what each reaches, costs, and which differences are real."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.stats import norm, qmc

from analysis.costs import cost
from analysis.evaluation import CONFIDENCE, Evaluator, accuracy_frame, mean_accuracy
from analysis.inputs import Split
from analysis.learners.lesson import SPLIT
from merge_core.engine import MergeSession
from merge_core.methods.declaration import ParameterSpec
from merge_core.progress import Progress
from merge_core.recipe import Recipe, make_recipe

# Shares of directions that tuning draws from, on a log scale.
RANK_RANGE = (0.01, 1.0)

Hits = Mapping[str, np.ndarray]


def compare(
    recipes: Mapping[str, Recipe],
    session: MergeSession,
    evaluator: Evaluator,
    split: Split = "test",
    limit: int | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, dict[str, np.ndarray]], pd.DataFrame]:
    """Evaluate recipes on the same images.

    Args:
        recipes: by label.
        session: the merges; its tasks are taken.
        evaluator: where predictions are kept.
        split: ``test`` for reporting.
        limit: only the first so many images of each task.
        progress: reports each recipe, and cancels between two.

    Returns:
        Which images each recipe classifies correctly (label to task to booleans), and one row
        per recipe: label, seconds, peak_mb, storage_mb (see :class:`analysis.costs.Cost`).

    Raises:
        MergeScopeError: unfit inputs.
        Cancelled: between two recipes, or inside a long one.
    """
    progress = progress or Progress()
    hits: dict[str, dict[str, np.ndarray]] = {}
    rows = []
    for done, (label, recipe) in enumerate(recipes.items()):
        progress.step(done, len(recipes), label)
        inner = Progress(cancel=progress.cancel)
        rows.append({"label": label, **asdict(cost(recipe, session, evaluator, inner))})
        hits[label] = evaluator.recipe_hits(recipe, session, split, limit, inner)
    progress.step(len(recipes), len(recipes), "compared")
    return hits, pd.DataFrame(rows, columns=["label", "seconds", "peak_mb", "storage_mb"])


def task_frame(hits: Mapping[str, Hits]) -> pd.DataFrame:
    """Accuracy of each label on each task.

    Returns:
        Columns label and those of :func:`analysis.evaluation.accuracy_frame`.
    """
    parts = [accuracy_frame(each).assign(label=label) for label, each in hits.items()]
    return pd.concat(parts, ignore_index=True)


def summary(frame: pd.DataFrame, experts: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
    """One row per label: average, normalised average, worst task and cost.

    Args:
        frame: of :func:`task_frame`.
        experts: of :meth:`Evaluator.experts` on the same images.
        costs: of :func:`compare`.

    Returns:
        Columns label, accuracy, low, high (mean over tasks, 95 %), normalised (mean over tasks of
        accuracy / the expert's; NaN where an expert gets nothing right), worst_task, worst,
        seconds, peak_mb, storage_mb.
    """
    own = experts.set_index("task")["accuracy"].replace(0, np.nan)
    relative = frame.assign(normalised=frame["accuracy"] / frame["task"].map(own))
    lowest = frame.loc[frame.groupby("label", sort=False)["accuracy"].idxmin()]
    return (
        mean_accuracy(frame, ["label"])
        .merge(
            relative.groupby("label", sort=False)["normalised"].agg(lambda x: x.mean(skipna=False)),
            on="label",
        )
        .merge(
            lowest[["label", "task", "accuracy"]].rename(
                columns={"task": "worst_task", "accuracy": "worst"}
            ),
            on="label",
        )
        .merge(costs, on="label", how="left")
    )


def difference(first: Hits, second: Hits) -> tuple[float, float]:
    """Mean over tasks of first − second accuracy, and its standard error, from the same images.

    The per-image differences of a task are independent draws of one variable in {−1, 0, 1}, so
    the variance of the mean over T tasks is Σ_t var_t / n_t / T².

    Args:
        first: task to booleans, one per image.
        second: the same tasks and images.

    Returns:
        The difference and its standard error, as shares.
    """
    gaps = [first[task].astype(float) - second[task].astype(float) for task in first]
    variance = sum(gap.var(ddof=1) / len(gap) if len(gap) > 1 else 0.0 for gap in gaps)
    return float(np.mean([gap.mean() for gap in gaps])), math.sqrt(variance) / len(gaps)


def paired(hits: Mapping[str, Hits]) -> pd.DataFrame:
    """All pairwise differences, and which of them are real.

    A difference counts as real if its z-test stays below 5 % after Holm's correction for the
    number of pairs.

    Returns:
        One row per unordered pair: first, second, difference (shares), low, high (95 %, of this
        pair alone), p, real.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979), 65.
    """
    z = norm.ppf(0.5 + CONFIDENCE / 2)
    rows = []
    for first, second in combinations(hits, 2):
        gap, error = difference(hits[first], hits[second])
        p = 2 * norm.sf(abs(gap) / error) if error > 0 else float(gap == 0)
        rows.append((first, second, gap, gap - z * error, gap + z * error, p))
    columns = ["first", "second", "difference", "low", "high", "p"]
    frame = pd.DataFrame(rows, columns=columns)
    order = np.argsort(frame["p"].to_numpy(), kind="stable")
    steps = (len(frame) - np.arange(len(frame))) * frame["p"].to_numpy()[order]
    adjusted = np.empty(len(frame))
    adjusted[order] = np.maximum.accumulate(steps)
    return frame.assign(real=adjusted < 1 - CONFIDENCE)


def candidates(base: Recipe, budget: int, seed: int = 0) -> list[Recipe]:
    """Settings to try: the recipe's own, then points spread evenly over the declared ranges.

    Numbers and ranks follow a scrambled Sobol sequence (ranks on a log scale of their share),
    over the range that the dashboard's sliders offer; choices stay as they are.

    Args:
        base: a recipe.
        budget: how many settings, at least 1.
        seed: of the sequence.

    Returns:
        At most `budget` different recipes; one where the method has nothing to tune.

    Source: Sobol', USSR Computational Mathematics 7 (1967), 86; Owen's scrambling.
    """
    specs = [spec for spec in base.declaration.specs if spec.kind != "choice"]
    if not specs or budget < 2:
        return [base]
    exponent = math.ceil(math.log2(budget))
    points = qmc.Sobol(len(specs), rng=np.random.default_rng(seed)).random_base2(exponent)
    found = [base]
    for point in points[: budget - 1]:
        values = {spec.name: _value(spec, share) for spec, share in zip(specs, point, strict=True)}
        recipe = base.with_parameters(**values)
        if recipe not in found:
            found.append(recipe)
    return found


def _value(spec: ParameterSpec, share: float) -> float | int:
    if spec.kind == "rank":
        low, high = np.log(RANK_RANGE)
        return round(float(np.exp(low + share * (high - low))), 4)
    value = spec.low + share * (spec.high - spec.low)
    return round(value) if spec.kind == "integer" else round(value, 3)


def tuned(
    base: Recipe,
    session: MergeSession,
    evaluator: Evaluator,
    budget: int,
    seed: int = 0,
    limit: int | None = None,
    progress: Progress | None = None,
) -> tuple[Recipe, pd.DataFrame]:
    """The best of a method's settings on the validation split.

    Args:
        base: the recipe at its own setting, which is among those tried.
        session: the merges.
        evaluator: where predictions are kept.
        budget: settings tried; every method gets the same.
        seed: of the settings.
        limit: only the first so many images of each task.
        progress: reports each setting.

    Returns:
        The best recipe (the first of several alike), and one row per setting: its parameters
        (JSON), accuracy, low, high.

    Raises:
        MergeScopeError: unfit inputs.
        Cancelled: between two settings.
    """
    progress = progress or Progress()
    tried = candidates(base, budget, seed)
    rows = []
    for done, recipe in enumerate(tried):
        progress.step(done, len(tried), f"{recipe.method}, setting {done + 1}")
        inner = Progress(cancel=progress.cancel)
        row = mean_accuracy(evaluator.recipe(recipe, session, "val", limit, inner)).iloc[0]
        rows.append({"parameters": json.dumps(recipe.parameters), **row})
    progress.step(len(tried), len(tried), base.method)
    frame = pd.DataFrame(rows)
    return tried[int(frame["accuracy"].to_numpy().argmax())], frame


def seed_counts(recipe: Recipe, evaluator: Evaluator, tasks: Sequence[str]) -> bool:
    """Whether another seed would give another merge on these data.

    A method that learns from a number of `examples` draws them only where a task has more.

    Args:
        recipe: the setting.
        evaluator: gives the images that methods learn from.
        tasks: that are merged.
    """
    if not recipe.declaration.draws:
        return False
    examples = recipe.parameters.get("examples", 0)
    return any(len(evaluator.raw_inputs(task, SPLIT).labels) > examples for task in tasks)


def seeded(recipe: Recipe, seeds: int) -> list[Recipe]:
    """The recipe under several seeds, from its own one on."""
    document = recipe.model_dump()
    return [make_recipe({**document, "seed": recipe.seed + i}) for i in range(seeds)]

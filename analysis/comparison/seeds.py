"""The seeds of a method as one row with a range, for showing methods and not their seeds."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from analysis.metrics import metric_of
from merge_core.merging.recipe import Recipe


def titles_without_seeds(recipes: Mapping[str, Recipe]) -> dict[str, str]:
    """What each label of a comparison is called where its method's seeds are one.

    Args:
        recipes: of :class:`analysis.comparison.run.Comparison`.

    Example:
        >>> pair = [make_recipe({"method": "dare_ties", "seed": seed}) for seed in (0, 1)]
        >>> seeds = {f"DARE, seed {recipe.seed}": recipe for recipe in pair}
        >>> titles_without_seeds(seeds)
        {'DARE, seed 0': 'DARE', 'DARE, seed 1': 'DARE'}
    """
    return {label: label.removesuffix(f", seed {r.seed}") for label, r in recipes.items()}


def join_seeds(summary: pd.DataFrame, recipes: Mapping[str, Recipe]) -> pd.DataFrame:
    """One row a method: means over its seeds, and the range that they span.

    Args:
        summary: of :func:`analysis.comparison.run.run_comparison`, a row for each seed.
        recipes: label to recipe.

    Returns:
        The summary, the best first, with accuracy, low, high, normalised and costs as means over
        seeds, worst and worst_task of the seed in which that is worst, and columns seeds (their
        number), least and most (accuracy over seeds; the accuracy itself where there is one).

    Example:
        >>> pair = [make_recipe({"method": "dare_ties", "seed": seed}) for seed in (0, 1)]
        >>> seeds = {f"DARE, seed {recipe.seed}": recipe for recipe in pair}
        >>> columns = {"accuracy": [0.5, 0.7], "worst": [0.3, 0.2], "worst_task": ["dots", "cars"]}
        >>> frame = join_seeds(pd.DataFrame({"label": list(seeds), **columns}), seeds)
        >>> frame[["label", "seeds", "least", "most", "worst_task"]].values.tolist()
        [['DARE', 2, 0.5, 0.7, 'cars']]
    """
    titles, metric = titles_without_seeds(recipes), metric_of(summary)
    rows = []
    for title, part in summary.groupby(summary["label"].map(titles), sort=False):
        lowest = part.iloc[int((metric.sign * part["worst"].to_numpy()).argmin())]
        means = part.mean(numeric_only=True)
        row = {**lowest.to_dict(), **means.to_dict()}
        row |= {"label": title, "worst": lowest["worst"], "seeds": len(part)}
        row |= {"least": part[metric.column].min(), "most": part[metric.column].max()}
        rows.append(row)
    frame = pd.DataFrame(rows, columns=[*summary.columns, "seeds", "least", "most"])
    return metric.rank(frame).reset_index(drop=True)

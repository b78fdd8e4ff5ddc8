"""Measure a suite against the bars of data/README.md: ``python -m data.bars``.

Rank and scales are chosen on the validation split; the test split is read at the chosen ones only.
"""

from __future__ import annotations

import argparse
import sys

import pandas as pd

from analysis.accuracy import difference, mean_accuracy
from analysis.comparison.first_result import first_recipes, first_result
from analysis.evaluation.evaluator import Evaluator
from analysis.rank_selection.adaptive import adaptive_search
from analysis.rank_selection.space import search_space
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.suites.suite import BUNDLED, load_suite

MODELS = ("Base", "Experts", "Weight average", "Task Arithmetic", "CART")


def _percent(row: pd.Series) -> str:
    """``81.2 [79.0, 83.1]`` from shares."""
    return f"{100 * row.accuracy:.1f} [{100 * row.low:.1f}, {100 * row.high:.1f}]"


def report(reference: str) -> str:
    """The tables of data/README.md as Markdown.

    Raises:
        MergeScopeError: the suite cannot be evaluated.
    """
    suite = load_suite(reference)
    session, evaluator = MergeSession(suite, None, FactorStore()), Evaluator(suite)
    for method in ("cart", "task_arithmetic"):
        adaptive_search(search_space(method, reference, session.groups.tasks), session, evaluator)
    recipes = first_recipes(reference, session, evaluator)
    results = {split: first_result(recipes, session, evaluator, split) for split in ("val", "test")}
    means = {s: mean_accuracy(frame, by=["model"]) for s, frame in results.items()}
    lines = ["| model | validation | test |", "|---|---|---|"]
    for model in MODELS:
        cells = [_percent(mean[mean["model"] == model].iloc[0]) for mean in means.values()]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    lines += ["", *(f"{title}: {recipe.parameters}" for title, (recipe, _) in recipes.items())]
    cart = recipes["CART"][0]
    for other in ("Weight average", "Task Arithmetic"):
        for split in ("val", "test"):
            hits = (evaluator.recipe_hits(r, session, split) for r in (cart, recipes[other][0]))
            gap, low, high, _ = difference(*hits)
            interval = f"[{100 * low:+.1f}, {100 * high:+.1f}]"
            lines.append(f"CART - {other}, {split}: {100 * gap:+.1f} {interval}")
    for split, frame in results.items():
        lines += ["", f"| {split} | {' | '.join(MODELS)} |", "|---" * (len(MODELS) + 1) + "|"]
        for task in session.groups.tasks:
            rows = frame[frame["task"] == task]
            cells = [_percent(rows[rows["model"] == model].iloc[0]) for model in MODELS]
            lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", nargs="?", default=BUNDLED)
    sys.stdout.write(f"{report(parser.parse_args().suite)}\n")

"""Measure a suite against the bars of data/README.md: ``python -m data.bars``.

Rank and scales are chosen on the validation split; the test split is read at the chosen ones only.
The command fails where a bar is missed. ``--tasks 14`` measures a set of the suite's tasks, and
``--signs`` asks only that every difference has its sign.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from analysis.accuracy import difference, mean_accuracy
from analysis.comparison.first_result import first_recipes, first_result
from analysis.evaluation.evaluator import Evaluator
from analysis.rank_selection.adaptive import adaptive_search
from analysis.rank_selection.space import search_space
from analysis.spectral.interference import interference_over_rank, mean_over_layers
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import Recipe
from merge_core.suites.bundled import BUNDLED
from merge_core.suites.suite import load_suite

MODELS = ("Base", "Experts", "Weight average", "Task Arithmetic", "CART")


def _percent(row: pd.Series) -> str:
    """``81.2 [79.0, 83.1]`` from shares."""
    return f"{100 * row.accuracy:.1f} [{100 * row.low:.1f}, {100 * row.high:.1f}]"


@dataclass(frozen=True)
class Bar:
    """One bar, all of whose numbers are of the validation split.

    Attributes:
        title: what is measured, accuracies in points.
        least, most: of the value; infinite where there is no such bound.
        sign: the bound that only the sign asks for, in place of the one that is finite.
    """

    title: str
    least: float = -float("inf")
    most: float = float("inf")
    sign: float | None = None

    def is_met(self, value: float, signs: bool) -> bool:
        """Whether a value is within the bounds, or within the sign's."""
        least, most = self.least, self.most
        if signs:
            if self.sign is None:
                return True
            least, most = (least, self.sign) if least == -float("inf") else (self.sign, most)
        return least <= value <= most


BARS = (
    Bar("experts", least=92, sign=80),
    Bar("lowest expert", least=80, sign=80),
    Bar("experts above the average", least=8, sign=0),
    Bar("CART above the average", least=4, sign=0),
    Bar("CART above Task Arithmetic", least=3, sign=0),
    Bar("CART in % of the experts", least=92),
    Bar("best rank", least=1e-9, most=1 - 1e-9),
    Bar("best scale", least=0.5, most=4),
    Bar("CART at 8 % and 1 above Task Arithmetic", least=2, sign=0),
    Bar("interference at 8 %, centred over original", most=0.9, sign=1),
    Bar("share of matrices on which centring lowers it", least=0.75, sign=0.5),
)
SHARE = 0.08  # the published share of directions


def measure_bars(
    frame: pd.DataFrame, recipes: Mapping[str, Recipe], session: MergeSession, evaluator: Evaluator
) -> dict[str, float]:
    """The values of :data:`BARS`.

    Args:
        frame: of :func:`analysis.comparison.first_result.first_result` on the validation split.
        recipes: Weight average, Task Arithmetic and CART at their best on it.
        session: of the suite and its tasks.
        evaluator: of the suite.

    Raises:
        MergeScopeError: the suite cannot be evaluated, or has no base.
    """
    accuracy = 100 * frame.groupby("model")["accuracy"].mean()
    experts, cart = accuracy["Experts"], accuracy["CART"]
    arithmetic, average = accuracy["Task Arithmetic"], accuracy["Weight average"]
    published = recipes["CART"].model_copy(update={"parameters": {"rank": SHARE, "scale": 1.0}})
    hits = evaluator.recipe_hits(published, session, "val")
    whole, lower = _interference(session)
    values = (
        experts,
        100 * frame[frame["model"] == "Experts"]["accuracy"].min(),
        experts - average,
        cart - average,
        cart - arithmetic,
        100 * cart / experts,
        float(recipes["CART"].parameters["rank"]),
        float(recipes["CART"].parameters["scale"]),
        100 * float(pd.Series([own.mean() for own in hits.values()]).mean()) - arithmetic,
        whole,
        lower,
    )
    return {bar.title: float(value) for bar, value in zip(BARS, values, strict=True)}


def _interference(session: MergeSession) -> tuple[float, float]:
    """I at 8 %, centred over original: of the whole model, and the share of matrices below 1."""
    centred, original = (
        interference_over_rank(session.groups, origin, [SHARE]) for origin in ("average", "base")
    )
    means = (mean_over_layers(frame)["interference"] for frame in (centred, original))
    over, under = (float(mean.iloc[0]) for mean in means)
    lower = centred["interference"].to_numpy() < original["interference"].to_numpy()
    return over / under, float(lower.mean())


def report(
    reference: str, tasks: Sequence[str] | None = None, signs: bool = False
) -> tuple[str, bool]:
    """The tables of data/README.md as Markdown, and whether every bar is met.

    Args:
        reference: a suite with a base.
        tasks: chosen tasks or presets (all when None).
        signs: whether only the signs of differences are asked for.

    Raises:
        MergeScopeError: the suite cannot be evaluated.
    """
    suite = load_suite(reference)
    session, evaluator = MergeSession(suite, suite.select(tasks), FactorStore()), Evaluator(suite)
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
    chosen = {title: recipe for title, (recipe, _) in recipes.items()}
    found = measure_bars(results["val"], chosen, session, evaluator)
    met = {bar.title: bar.is_met(found[bar.title], signs) for bar in BARS}
    lines += ["", "| bar (validation) | found | met |", "|---|---|---|"]
    lines += [
        f"| {title} | {found[title]:.3g} | {'yes' if met[title] else 'NO'} |" for title in met
    ]
    return "\n".join(lines), all(met.values())


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", nargs="?", default=BUNDLED)
    parser.add_argument("--tasks", help="tasks or presets, separated by commas; all when left out")
    parser.add_argument("--signs", action="store_true", help="ask for signs only")
    options = parser.parse_args(arguments)
    tasks = None if options.tasks is None else options.tasks.split(",")
    text, met = report(options.suite, tasks, options.signs)
    sys.stdout.write(f"{text}\n")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""A whole comparison: which methods can run, each tuned where asked, all on the same images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis import compare
from analysis.evaluation import Evaluator
from analysis.inputs import Split
from merge_core.engine import MergeSession, check_recipe
from merge_core.methods import get_method, methods
from merge_core.methods.declaration import Method
from merge_core.progress import Progress
from merge_core.recipe import Recipe, make_recipe
from merge_core.suite import Suite

SEEDS = 3


@dataclass(frozen=True)
class Compared:
    """What a comparison found; a random method has one label per seed.

    Attributes:
        hits: label to task to booleans.
        summary: of :func:`analysis.compare.summary`, with columns setting and needs (words), the
            best first.
        seeds: of :func:`over_seeds`.
        tasks: of :func:`analysis.compare.task_frame`.
        recipes: label to recipe.
        experts: each expert on its task.
        base: accuracy of the base, mean over tasks, or None.
    """

    hits: dict[str, dict[str, np.ndarray]]
    summary: pd.DataFrame
    seeds: pd.DataFrame
    tasks: pd.DataFrame
    recipes: dict[str, Recipe]
    experts: pd.DataFrame
    base: float | None


def usable(suite: Suite, tasks: Sequence[str]) -> dict[str, Method]:
    """Methods that can merge these tasks of a suite at their usual origin, by name."""
    return {
        name: method
        for name, method in methods().items()
        if (suite.base is not None or not method.needs_base())
        and method.tasks in (None, len(tasks))
    }


def compared(
    reference: str,
    names: Sequence[str],
    session: MergeSession,
    evaluator: Evaluator,
    budget: int = 1,
    seeds: int = SEEDS,
    split: Split = "test",
    limit: int | None = None,
    progress: Progress | None = None,
) -> Compared:
    """Tune each method where asked, then evaluate everything on the same images.

    Args:
        reference: how recipes name the session's suite.
        names: of methods.
        session: the merges; its tasks are taken.
        evaluator: where predictions are kept.
        budget: settings that each method may try on the validation split; 1 keeps its defaults,
            and methods that learn from data always stay at theirs.
        seeds: of each method that draws random numbers.
        split: ``test`` for reporting.
        limit: only the first so many images of each task.
        progress: reports, and cancels between two merges.

    Raises:
        RecipeError: an unknown method.
        MergeScopeError: a method that this suite cannot serve; unfit inputs.
        Cancelled: by `progress`.
    """
    progress = progress or Progress()
    tasks = session.groups.tasks
    starts = {
        name: make_recipe({"suite": reference, "tasks": tasks, "method": name}) for name in names
    }
    for recipe in starts.values():
        check_recipe(session.suite, recipe)
    recipes: dict[str, Recipe] = {}
    for done, (name, recipe) in enumerate(starts.items()):
        method = get_method(name)
        progress.step(done, 2 * len(starts), f"settings of {method.title}")
        if budget > 1 and method.learns is None:
            inner = Progress(cancel=progress.cancel)
            recipe, _ = compare.tuned(
                recipe, session, evaluator, budget, limit=limit, progress=inner
            )
        for each in compare.seeded(recipe, seeds):
            label = f"{method.title}, seed {each.seed}" if method.random else method.title
            recipes[label] = each
    listener = progress.listener

    def report(done: int, total: int, label: str) -> None:
        if listener is not None:
            listener(total + done, 2 * total, f"{label} on the {split} split")

    outer = Progress(listener=report, cancel=progress.cancel)
    hits, costs = compare.compare(recipes, session, evaluator, split, limit, outer)
    experts = evaluator.experts(tasks, split, limit)
    frame = compare.task_frame(hits)
    summary = compare.summary(frame, experts, costs)
    base = session.suite.base
    return Compared(
        hits,
        _described(summary, recipes).sort_values("accuracy", ascending=False, kind="stable"),
        over_seeds(summary, recipes),
        frame,
        recipes,
        experts,
        None
        if base is None
        else float(evaluator.checkpoint(base, tasks, split, limit)["accuracy"].mean()),
    )


def _described(summary: pd.DataFrame, recipes: Mapping[str, Recipe]) -> pd.DataFrame:
    """The summary with each label's setting and needs in words."""
    chosen = [recipes[label] for label in summary["label"]]
    return summary.assign(
        setting=[
            ", ".join(
                f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in recipe.parameters.items()
            )
            for recipe in chosen
        ],
        needs=[", ".join(recipe.declaration.needs) or "nothing else" for recipe in chosen],
    )


def over_seeds(summary: pd.DataFrame, recipes: Mapping[str, Recipe]) -> pd.DataFrame:
    """How far a random method's accuracy depends on its seed.

    Args:
        summary: of :func:`analysis.compare.summary`.
        recipes: label to recipe.

    Returns:
        One row per method that draws random numbers: title, seeds (number of them), accuracy
        (mean over seeds of the mean over tasks), spread (standard deviation over seeds with
        n − 1; NaN of one seed), least, most.
    """
    random = summary[[recipes[label].declaration.random for label in summary["label"]]]
    titles = [recipes[label].declaration.title for label in random["label"]]
    return (
        random.assign(title=titles)
        .groupby("title", sort=False)["accuracy"]
        .agg(seeds="size", accuracy="mean", spread="std", least="min", most="max")
        .reset_index()
    )


def behind(pairs: pd.DataFrame, best: str) -> pd.DataFrame:
    """Differences to one label that are real, from all paired differences.

    Args:
        pairs: of :func:`analysis.compare.paired`.
        best: the label.

    Returns:
        Columns label, difference (of the label − best, shares), low, high, p; largest first.
    """
    first = pairs[(pairs["first"] == best) & pairs["real"]]
    second = pairs[(pairs["second"] == best) & pairs["real"]]
    frame = pd.concat(
        [
            second.rename(columns={"first": "label"}),
            first.assign(
                label=first["second"],
                difference=-first["difference"],
                low=-first["high"],
                high=-first["low"],
            ),
        ]
    )
    columns = ["label", "difference", "low", "high", "p"]
    return frame[columns].sort_values("difference", ascending=False).reset_index(drop=True)

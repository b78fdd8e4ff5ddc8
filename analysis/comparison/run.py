"""A whole comparison: which methods can run, each tuned where asked, all on the same images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from analysis.accuracy import spread_over_seeds, task_frame
from analysis.comparison import tuning
from analysis.comparison.costs import cost
from analysis.evaluation.evaluator import Evaluator
from analysis.metrics import mean_over_tasks, metric_of
from analysis.outputs.inputs import Split
from merge_core.merging.engine import MergeSession, check_recipe
from merge_core.merging.recipe import Recipe, make_recipe
from merge_core.methods import get_method, get_postprocessor, methods
from merge_core.methods.declaration import Method
from merge_core.progress import Progress
from merge_core.suites.suite import Suite

SEEDS = 3
# How a setting came about.
SEARCHED = "searched on validation"  # as Rank and scale searches
OWN = "your recipe"


@dataclass(frozen=True)
class Comparison:
    """What a comparison found; a method whose seed counts has one label per seed.

    Attributes:
        hits: label to task to booleans; of language models to every text's contribution to the
            cross-entropy.
        summary: of :func:`summarise`, with columns chosen (how the setting came about), setting and
            needs (words), the best first.
        seeds: of :func:`analysis.accuracy.spread_over_seeds`.
        tasks: of :func:`analysis.accuracy.task_frame`.
        recipes: label to recipe.
        experts: each expert on its task.
        base: the metric of the base, mean over tasks, or None.
    """

    hits: dict[str, dict[str, np.ndarray]]
    summary: pd.DataFrame
    seeds: pd.DataFrame
    tasks: pd.DataFrame
    recipes: dict[str, Recipe]
    experts: pd.DataFrame
    base: float | None


@dataclass(frozen=True)
class Entry:
    """One recipe of a comparison.

    Attributes:
        recipe: what is evaluated.
        chosen: how its setting came about, in words.
        repeated: the title under which its seeds are one, None where it stands alone.
    """

    recipe: Recipe
    chosen: str
    repeated: str | None = None


def usable_methods(suite: Suite, tasks: Sequence[str]) -> dict[str, Method]:
    """Methods that can merge these tasks of a suite at their usual origin, by name.

    Example:
        >>> suite = load_suite("vision")
        >>> ["slerp" in usable_methods(suite, suite.tasks[:count]) for count in (2, 8)]
        [True, False]
    """
    return {
        name: method
        for name, method in methods().items()
        if (suite.base is not None or not method.needs_base())
        and method.tasks in (None, len(tasks))
        and not (suite.speaks and method.learns is not None)
    }


def adapt_recipe(recipe: Recipe, reference: str, tasks: Sequence[str]) -> Recipe:
    """A recipe on the suite and tasks of a comparison; all else stays as it is.

    Raises:
        RecipeError: it gives a weight to another task.

    Example:
        >>> adapt_recipe(make_recipe({"method": "cart"}), "vision", ["digits", "dots"]).tasks
        ('digits', 'dots')
    """
    return make_recipe(
        {**recipe.model_dump(exclude={"inputs"}), "suite": reference, "tasks": tuple(tasks)}
    )


def run_comparison(
    reference: str,
    names: Sequence[str],
    session: MergeSession,
    evaluator: Evaluator,
    budget: int = 1,
    seeds: int = SEEDS,
    split: Split = "test",
    limit: int | None = None,
    progress: Progress | None = None,
    own: Sequence[Recipe] = (),
    tuned: Sequence[Recipe] = (),
) -> Comparison:
    """Tune each method where asked, then evaluate everything on the same images.

    What merges alike counts once.

    Args:
        reference: how recipes name the session's suite.
        names: of methods.
        session: the merges; its tasks are taken.
        evaluator: where predictions are kept.
        budget: settings that each method may try on the validation split; 1 keeps its defaults,
            and methods that learn from data always stay at theirs.
        seeds: of each method whose seed changes the merge
            (:func:`analysis.comparison.tuning.depends_on_seed`).
        split: ``test`` for reporting.
        limit: only the first so many images of each task.
        progress: reports, and cancels between two merges.
        own: recipes beside those of the methods, evaluated as they are but for suite and tasks.
        tuned: settings that an earlier search chose on the validation split, likewise.

    Raises:
        RecipeError: an unknown method, or a recipe that gives a weight to another task.
        MergeScopeError: a method that this suite cannot serve; unfit inputs.
        Cancelled: by `progress`.

    Example:
        >>> suite = load_suite("vision")
        >>> session = MergeSession(suite, suite.tasks, FactorStore())
        >>> found = run_comparison("vision", ["average"], session, Evaluator(suite))
        >>> found.summary["label"].tolist(), len(found.tasks)
        (['Weight average'], 20)
    """
    progress = progress or Progress()
    tasks = session.groups.tasks
    starts = {
        name: make_recipe({"suite": reference, "tasks": tasks, "method": name}) for name in names
    }
    given = [Entry(adapt_recipe(recipe, reference, tasks), SEARCHED) for recipe in tuned]
    given += [Entry(adapt_recipe(recipe, reference, tasks), OWN) for recipe in own]
    for recipe in (*starts.values(), *(entry.recipe for entry in given)):
        check_recipe(session.suite, recipe)
    entries = _tune_entries(starts, session, evaluator, budget, seeds, limit, progress)
    for entry in given:
        if entry.recipe not in [each.recipe for each in entries.values()]:
            entries[label_of(entry.recipe)] = entry
    recipes = {label: entry.recipe for label, entry in entries.items()}
    half = _second_half(progress, split)
    hits, costs = evaluate_recipes(recipes, session, evaluator, split, limit, half)
    experts = evaluator.experts(tasks, split, limit)
    frame = task_frame(hits, partial(evaluator.outputs.frame, split=split, limit=limit))
    table = summarise(frame, experts, costs)
    told = _describe_settings(table, entries)
    base = session.suite.base
    return Comparison(
        hits,
        evaluator.metric.rank(told),
        spread_over_seeds(
            table,
            {label: entry.repeated for label, entry in entries.items()},
            evaluator.metric.column,
        ),
        frame,
        recipes,
        experts,
        None
        if base is None
        else float(evaluator.checkpoint(base, tasks, split, limit)[evaluator.metric.column].mean()),
    )


def _second_half(progress: Progress, split: Split) -> Progress:
    """Reports what is evaluated, after settings that took as many steps."""
    listener = progress.listener

    def report(done: int, total: int, label: str) -> None:
        if listener is not None:
            listener(total + done, 2 * total, f"{label} on the {split} split")

    return Progress(listener=report, cancel=progress.cancel)


def _tune_entries(
    starts: Mapping[str, Recipe],
    session: MergeSession,
    evaluator: Evaluator,
    budget: int,
    seeds: int,
    limit: int | None,
    progress: Progress,
) -> dict[str, Entry]:
    """Each method at its setting, under every seed where the seed counts, by label."""
    entries: dict[str, Entry] = {}
    for done, (name, start) in enumerate(starts.items()):
        title = get_method(name).title
        progress.step(done, 2 * len(starts), f"settings of {title}")
        inner = Progress(cancel=progress.cancel)
        recipe, chosen = _setting(start, session, evaluator, budget, limit, inner)
        if tuning.depends_on_seed(recipe, evaluator, session.groups.tasks):
            for each in tuning.repeat_with_seeds(recipe, seeds):
                entries[f"{title}, seed {each.seed}"] = Entry(each, chosen, title)
        else:
            entries[title] = Entry(recipe, chosen)
    return entries


def _setting(
    recipe: Recipe,
    session: MergeSession,
    evaluator: Evaluator,
    budget: int,
    limit: int | None,
    progress: Progress,
) -> tuple[Recipe, str]:
    """A method's setting within the budget, and how it came about in words."""
    if budget == 1:
        return recipe, "default"
    if recipe.declaration.learns is not None:  # each setting would take minutes
        return recipe, "default (not tuned)"
    best, tried = tuning.tune(recipe, session, evaluator, budget, limit=limit, progress=progress)
    if len(tried) == 1:
        return recipe, "default (nothing to tune)"
    return best, f"best of {len(tried)} on validation"


def _describe_settings(summary: pd.DataFrame, entries: Mapping[str, Entry]) -> pd.DataFrame:
    """The summary with each label's setting, how it came about, and needs, in words."""
    found = [entries[label] for label in summary["label"]]
    frame = summary.assign(needs=[_needs(entry.recipe) for entry in found])
    index = list(frame.columns).index("seconds")
    frame.insert(index, "chosen", [entry.chosen for entry in found])
    frame.insert(index + 1, "setting", [setting_of(entry.recipe) for entry in found])
    return frame


def _needs(recipe: Recipe) -> str:
    return ", ".join(recipe.declaration.needs) or "nothing else"


def label_of(recipe: Recipe) -> str:
    """A recipe's method and what it sets besides defaults: ``CART (rank 0.16, scale 3)``.

    Recipes that merge the same experts differently have different labels.

    Example:
        >>> label_of(make_recipe({"method": "cart", "parameters": {"rank": 0.16, "scale": 3}}))
        'CART (rank 0.16, scale 3)'
    """
    setting = setting_of(recipe, only_changed=True)
    return f"{recipe.declaration.title} ({setting or 'default'})"


def setting_of(recipe: Recipe, only_changed: bool = False) -> str:
    """Everything that a recipe sets besides method, suite and tasks, in words (empty for nothing).

    Args:
        recipe: the recipe.
        only_changed: leave out parameters of the method that have their default value.

    Example:
        >>> setting_of(make_recipe({"method": "task_arithmetic", "parameters": {"scale": 0.4}}))
        'scale 0.4'
    """
    method = recipe.declaration
    parts = [
        _value(spec.name, recipe.parameters[spec.name])
        for spec in method.specs
        if not only_changed or recipe.parameters[spec.name] != spec.default
    ]
    if recipe.origin is not None and recipe.origin != method.origins[0]:
        parts.append(f"about the {recipe.origin}")
    parts += [_value(f"weight of {task}", value) for task, value in recipe.weights.items()]
    parts += [f"{_values(each.parameters)} in {each.match}" for each in recipe.overrides]
    for step in recipe.then:
        values = _values(step.parameters)
        title = get_postprocessor(step.method).title
        parts.append(f"then {title}" + (f" at {values}" if values else ""))
    if method.draws or recipe.seed != 0:
        parts.append(f"seed {recipe.seed}")
    if recipe.dtype != "input":
        parts.append(recipe.dtype)
    return ", ".join(parts)


def _values(parameters: Mapping[str, Any]) -> str:
    return " and ".join(_value(name, value) for name, value in parameters.items())


def _value(name: str, value: Any) -> str:
    """``scale 3``; a rank of 1 direction is ``1`` and one of all of them is ``1.0``."""
    short = isinstance(value, float) and name != "rank" and float(f"{value:g}") == value
    return f"{name} {value:g}" if short else f"{name} {value}"


def evaluate_recipes(
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
        Which images each recipe classifies correctly (label to task to booleans; of language models
        see :class:`Comparison`), and one row per recipe: label, seconds, peak_mb, storage_mb (see
        :class:`analysis.comparison.costs.Cost`).

    Raises:
        MergeScopeError: unfit inputs.
        Cancelled: between two recipes, or inside a long one.

    Example:
        >>> suite = load_suite("vision")
        >>> session = MergeSession(suite, suite.tasks, FactorStore())
        >>> recipes = {"mean": make_recipe({"method": "average"})}
        >>> hits, costs = evaluate_recipes(recipes, session, Evaluator(suite))
        >>> list(hits["mean"]) == list(suite.tasks), costs["label"].tolist()
        (True, ['mean'])
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


def summarise(frame: pd.DataFrame, experts: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
    """One row per label: average, normalised average, worst task and cost.

    Args:
        frame: of :func:`analysis.accuracy.task_frame`.
        experts: of :meth:`Evaluator.experts` on the same images.
        costs: of :func:`evaluate_recipes`.

    Returns:
        Columns label, accuracy (or another metric), low, high (mean over tasks, 95 %), normalised
        (mean over tasks of accuracy / the expert's, of metrics where less is better the expert's /
        it; NaN where an expert gets nothing right), worst_task, worst, seconds, peak_mb,
        storage_mb.

    Example:
        >>> from analysis.accuracy import accuracy_frame
        >>> hits = {"digits": np.array([True, False]), "dots": np.array([True, True])}
        >>> costs = pd.DataFrame({"label": ["mean"], "seconds": 1, "peak_mb": 2, "storage_mb": 3})
        >>> experts = accuracy_frame(hits)
        >>> frame = summarise(experts.assign(label="mean"), experts, costs)
        >>> frame[["accuracy", "normalised", "worst_task"]].values.tolist()
        [[0.75, 1.0, 'digits']]
    """
    metric = metric_of(frame)
    own = experts.set_index("task")[metric.column].replace(0, np.nan)
    relative = frame.assign(
        normalised=metric.relative(frame[metric.column], frame["task"].map(own))
    )
    worst = (metric.sign * frame[metric.column]).groupby(frame["label"], sort=False).idxmin()
    lowest = frame.loc[worst]
    return (
        mean_over_tasks(frame, ["label"])
        .merge(
            relative.groupby("label", sort=False)["normalised"].agg(lambda x: x.mean(skipna=False)),
            on="label",
        )
        .merge(
            lowest[["label", "task", metric.column]].rename(
                columns={"task": "worst_task", metric.column: "worst"}
            ),
            on="label",
        )
        .merge(costs, on="label", how="left")
    )

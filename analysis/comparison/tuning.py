"""The best of a method's settings on the validation split, and one setting under several seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.evaluation.evaluator import Evaluator
from analysis.learning.context import SPLIT
from analysis.metrics import mean_over_tasks
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import Recipe, make_recipe
from merge_core.methods.declaration import ParameterSpec
from merge_core.progress import Progress

# Shares of directions that tuning draws from, on a log scale.
RANK_RANGE = (0.01, 1.0)


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

    Example:
        >>> found = candidates(make_recipe({"method": "cart"}), budget=4)
        >>> len(found), all(0.01 <= recipe.parameters["rank"] <= 1 for recipe in found)
        (4, True)
    """
    from scipy.stats import qmc  # late: it takes most of a second

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


def tune(
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
        (JSON), accuracy (or another metric), low, high.

    Raises:
        MergeScopeError: unfit inputs.
        Cancelled: between two settings.

    Example:
        >>> suite = load_suite("vision")
        >>> session = MergeSession(suite, suite.tasks, FactorStore())
        >>> recipe = make_recipe({"method": "average"})
        >>> best, frame = tune(recipe, session, Evaluator(suite), budget=4)
        >>> best == recipe, len(frame)  # nothing to tune
        (True, 1)
    """
    progress = progress or Progress()
    tried = candidates(base, budget, seed)
    rows = []
    for done, recipe in enumerate(tried):
        progress.step(done, len(tried), f"{recipe.method}, setting {done + 1}")
        inner = Progress(cancel=progress.cancel)
        for following in tried[done + 1 : done + 2]:
            images = evaluator.outputs.images(session.groups.tasks, "val", limit)
            evaluator.expect(following, session, images)
        row = mean_over_tasks(evaluator.recipe(recipe, session, "val", limit, inner)).iloc[0]
        rows.append({"parameters": json.dumps(recipe.parameters), **row})
    progress.step(len(tried), len(tried), base.method)
    frame = pd.DataFrame(rows)
    return tried[evaluator.metric.best(frame[evaluator.metric.column])], frame


def depends_on_seed(recipe: Recipe, evaluator: Evaluator, tasks: Sequence[str]) -> bool:
    """Whether another seed would give another merge on these data.

    A method that learns from a number of `examples` draws them only where a task has more.

    Args:
        recipe: the setting.
        evaluator: gives the images that methods learn from.
        tasks: that are merged.

    Example:
        >>> suite = load_suite("vision")
        >>> dare, average = (make_recipe({"method": name}) for name in ("dare_ties", "average"))
        >>> [depends_on_seed(recipe, Evaluator(suite), suite.tasks) for recipe in (dare, average)]
        [True, False]
    """
    if not recipe.declaration.draws:
        return False
    examples = recipe.parameters.get("examples", 0)
    return any(len(evaluator.outputs.raw_inputs(task, SPLIT).labels) > examples for task in tasks)


def repeat_with_seeds(recipe: Recipe, seeds: int) -> list[Recipe]:
    """The recipe under several seeds, from its own one on.

    Example:
        >>> recipe = make_recipe({"method": "dare_ties", "seed": 5})
        >>> [each.seed for each in repeat_with_seeds(recipe, 3)]
        [5, 6, 7]
    """
    document = recipe.model_dump()
    return [make_recipe({**document, "seed": recipe.seed + i}) for i in range(seeds)]

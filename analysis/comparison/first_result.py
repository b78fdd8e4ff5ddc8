"""The first thing to look at: base, experts, average, Task Arithmetic and CART side by side."""

from __future__ import annotations

import pandas as pd

from analysis.evaluation.evaluator import Evaluator
from analysis.outputs.inputs import Split
from analysis.outputs.suite_outputs import NotStored
from analysis.rank_selection.adaptive import adaptive_search
from analysis.rank_selection.select import recipe_at
from analysis.rank_selection.space import search_space
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import Recipe, make_recipe
from merge_core.progress import Progress


def suggest_recipe(
    method: str, suite: str, session: MergeSession, evaluator: Evaluator
) -> tuple[Recipe, bool]:
    """A method's recipe at the best setting known, else at its defaults.

    Args:
        method: a method with a rank or a scale.
        suite: as in recipes.
        session: the merges; its tasks are taken.
        evaluator: where predictions are kept.

    Returns:
        The recipe, and whether its setting was chosen on the validation split (all that the
        search for it runs is stored) rather than by default.

    Example:
        >>> suite = load_suite("vision")
        >>> session = MergeSession(suite, ["digits", "dots"], FactorStore())
        >>> recipe, chosen = suggest_recipe("cart", "vision", session, Evaluator(suite))
        >>> recipe.parameters["rank"], chosen  # the default: nothing is stored
        (0.08, False)
    """
    space = search_space(method, suite, session.groups.tasks)
    try:
        stored = evaluator.stored_only()
        search = adaptive_search(space, session, stored, evaluator.metric.rule)
    except NotStored:
        return space.base, False
    return recipe_at(space, search.rank, search.scale), True


def first_recipes(
    suite: str, session: MergeSession, evaluator: Evaluator
) -> dict[str, tuple[Recipe, bool]]:
    """Average, Task Arithmetic (where there is a base) and CART, each as :func:`suggest_recipe`.

    Returns:
        Title to recipe and whether its setting was chosen on the validation split.

    Example:
        >>> suite = load_suite("vision")
        >>> session = MergeSession(suite, ["digits", "dots"], FactorStore())
        >>> list(first_recipes("vision", session, Evaluator(suite)))
        ['Weight average', 'Task Arithmetic', 'CART']
    """
    average = make_recipe({"suite": suite, "tasks": session.groups.tasks, "method": "average"})
    recipes = {"Weight average": (average, True)}
    if session.suite.base is not None:
        recipes["Task Arithmetic"] = suggest_recipe("task_arithmetic", suite, session, evaluator)
    recipes["CART"] = suggest_recipe("cart", suite, session, evaluator)
    return recipes


def first_result(
    recipes: dict[str, tuple[Recipe, bool]],
    session: MergeSession,
    evaluator: Evaluator,
    split: Split = "test",
    progress: Progress | None = None,
) -> pd.DataFrame:
    """What base, experts and the recipes reach on each task.

    Returns:
        One row per model and task: model and the columns of :meth:`Evaluator.recipe`.

    Raises:
        MergeScopeError: unfit inputs.
        Cancelled: between two models.

    Example:
        >>> suite = load_suite("vision")
        >>> session = MergeSession(suite, suite.tasks, FactorStore())
        >>> recipes = {"Weight average": (make_recipe({"method": "average"}), True)}
        >>> frame = first_result(recipes, session, Evaluator(suite))
        >>> frame["model"].unique().tolist()
        ['Base', 'Weight average', 'Experts']
    """
    progress = progress or Progress()
    tasks = session.groups.tasks
    total = len(recipes) + 2
    parts = []
    progress.step(0, total, "base")
    if session.suite.base is not None:
        base = evaluator.checkpoint(session.suite.base, tasks, split)
        parts.append(base.assign(model="Base"))
    for done, (title, (recipe, _)) in enumerate(recipes.items(), start=1):
        progress.step(done, total, title)
        inner = Progress(cancel=progress.cancel)
        frame = evaluator.recipe(recipe, session, split, progress=inner)
        parts.append(frame.assign(model=title))
    progress.step(total - 1, total, "experts")
    parts.append(evaluator.experts(tasks, split).assign(model="Experts"))
    progress.step(total, total, "done")
    return pd.concat(parts, ignore_index=True)


def knows_first_result(
    recipes: dict[str, tuple[Recipe, bool]], session: MergeSession, evaluator: Evaluator
) -> bool:
    """Whether :func:`first_result` on the test split needs no forward pass.

    Example:
        >>> suite = load_suite("vision")
        >>> session = MergeSession(suite, suite.tasks, FactorStore())
        >>> recipes = {"Weight average": (make_recipe({"method": "average"}), True)}
        >>> knows_first_result(recipes, session, Evaluator(suite))  # the suite ships predictions
        True
    """
    tasks = session.groups.tasks
    base = session.suite.base
    return (
        all(evaluator.knows(recipe, session, "test") for recipe, _ in recipes.values())
        and all(evaluator.knows_member(session.suite.expert(t), [t], "test") for t in tasks)
        and (base is None or evaluator.knows_member(base, tasks, "test"))
    )

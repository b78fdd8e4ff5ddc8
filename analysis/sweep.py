"""Accuracy over rank and scale for any method that has them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pandas as pd

from analysis.evaluation import Evaluator, mean_accuracy
from analysis.inputs import Split
from merge_core.engine import MergeSession
from merge_core.errors import RecipeError
from merge_core.methods import get_method
from merge_core.progress import Progress
from merge_core.recipe import Recipe, make_recipe

RANKS: tuple[float, ...] = (0.01, 0.02, 0.04, 0.08, 0.12, 0.16, 0.24, 0.32, 0.5, 0.7, 1.0)
SCALES: dict[str, tuple[float, ...]] = {
    "cart": (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0),
    "task_arithmetic": (0.05, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0),
    "low_rank_task_arithmetic": (0.125, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0),
}
DEFAULT_SCALES: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


def grid(
    method: str,
    suite: str,
    tasks: Sequence[str] | None,
    ranks: Sequence[float | int] | None = None,
    scales: Sequence[float] | None = None,
) -> list[Recipe]:
    """One recipe per grid point, ranks outermost so that each truncation is made once.

    Args:
        method: a method with a rank, a scale, or both.
        suite: as in recipes.
        tasks: chosen tasks.
        ranks: shares (floats) or numbers of directions (integers); usual ones when None.
        scales: scaling coefficients; usual ones of the method when None.

    Raises:
        RecipeError: the method has neither, ranks are given to one without a rank, or a value
            is out of range.
    """
    names = [spec.name for spec in get_method(method).specs]
    axes: dict[str, Sequence[float | int]] = {}
    for axis, given, usual in (
        ("rank", ranks, RANKS),
        ("scale", scales, SCALES.get(method, DEFAULT_SCALES)),
    ):
        if axis in names:
            axes[axis] = usual if given is None else given
        elif given is not None:
            raise RecipeError(f"The method {method!r} has no {axis}; leave --{axis}s out.")
    for axis, values in axes.items():
        twice = [value for i, value in enumerate(values) if value in values[:i]]
        if twice:  # two rows of one setting would count as independent samples
            hint = " (1 is one direction, 1.0 all of them: sweep either)" if 1 in twice else ""
            raise RecipeError(f"--{axis}s names {twice[0]:g} twice{hint}.")
    if not axes:
        raise RecipeError(f"The method {method!r} has neither a rank nor a scale to sweep.")
    return [
        make_recipe(
            {
                "suite": suite,
                "tasks": None if tasks is None else tuple(tasks),
                "method": method,
                "parameters": dict(zip(axes, values, strict=True)),
            }
        )
        for values in product(*axes.values())
    ]


def sweep(
    recipes: Sequence[Recipe],
    session: MergeSession,
    evaluator: Evaluator,
    split: Split = "val",
    limit: int | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Evaluate each recipe on its tasks; what was evaluated before is not run again.

    Args:
        recipes: of :func:`grid`, all of the session's tasks.
        session: the merges.
        evaluator: the evaluation.
        split: choose on ``val``.
        limit: images per task (all when None).
        progress: reports each recipe; cancelling keeps what is done in the store.

    Returns:
        One row per recipe and task: method, rank, scale (NaN where the method has none), task,
        correct, images, accuracy, low, high.

    Raises:
        MergeScopeError: unfit inputs.
        Cancelled: between two recipes.
    """
    progress = progress or Progress()
    parts = []
    for done, recipe in enumerate(recipes):
        label = ", ".join(
            f"{name} {value:g}"
            for name, value in recipe.parameters.items()
            if isinstance(value, (int, float))
        )
        progress.step(done, len(recipes), label)
        frame = evaluator.recipe(recipe, session, split, limit, Progress(cancel=progress.cancel))
        frame.insert(0, "method", recipe.method)
        frame.insert(1, "rank", float(recipe.parameters.get("rank", "nan")))
        frame.insert(2, "scale", float(recipe.parameters.get("scale", "nan")))
        parts.append(frame)
    progress.step(len(recipes), len(recipes), "done")
    return pd.concat(parts, ignore_index=True)


def known_sweep(
    recipes: Sequence[Recipe],
    session: MergeSession,
    evaluator: Evaluator,
    split: Split = "val",
    limit: int | None = None,
) -> pd.DataFrame | None:
    """The sweep from stored predictions alone, or None if any point was never evaluated."""
    if all(evaluator.knows(recipe, session, split, limit) for recipe in recipes):
        return sweep(recipes, session, evaluator, split, limit)
    return None


def mean_over_tasks(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean accuracy with its interval per method, rank and scale."""
    return mean_accuracy(frame, by=["method", "rank", "scale"])


def best_point(frame: pd.DataFrame) -> pd.Series:
    """The setting of the highest mean accuracy; of equal ones the lowest rank and scale.

    Args:
        frame: of :func:`mean_over_tasks`.

    Returns:
        Its row.
    """
    ordered = frame.sort_values(
        ["accuracy", "rank", "scale"], ascending=[False, True, True], kind="stable"
    )
    return ordered.iloc[0]


def normalised_by_experts(frame: pd.DataFrame, experts: pd.DataFrame) -> pd.DataFrame:
    """Add `normalised`, each task's accuracy divided by its own expert's.

    Args:
        frame: rows with task and accuracy.
        experts: of :meth:`Evaluator.experts`.
    """
    reference = experts.set_index("task")["accuracy"]
    return frame.assign(normalised=frame["accuracy"] / frame["task"].map(reference))

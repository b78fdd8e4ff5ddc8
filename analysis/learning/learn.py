"""What merge methods learn from a suite's data before they merge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from analysis.learning.context import LearningContext
from analysis.learning.entropy import learn_adamerging, learn_cart_adaptive
from analysis.learning.fisher import learn_fisher
from analysis.learning.regmean import learn_regmean, learn_regmean_plus_plus
from analysis.outputs.suite_outputs import SuiteOutputs
from merge_core.devices import current_device, use_device
from merge_core.errors import SuiteError
from merge_core.executors.base import one_thread
from merge_core.merging.engine import MergeSession, check_recipe
from merge_core.merging.recipe import Recipe
from merge_core.progress import Progress

Learner = Callable[[LearningContext], Any]

LEARNERS: dict[str, Learner] = {
    "fisher": learn_fisher,
    "regmean": learn_regmean,
    "regmean_plus_plus": learn_regmean_plus_plus,
    "adamerging": learn_adamerging,
    "cart_adaptive": learn_cart_adaptive,
}
"""By the name that a method's declaration gives as `learns`."""


def learn(
    outputs: SuiteOutputs,
    recipe: Recipe,
    session: MergeSession,
    progress: Progress | None = None,
) -> Any:
    """What a recipe's method needs to know of the data: the state of its run.

    The images are those of the validation split; their labels are not used, and the test split
    is not read. The same recipe on the same data gives the same result.

    Args:
        outputs: of the recipe's suite.
        recipe: what is learnt for.
        session: the suite's members, with the recipe's tasks.
        progress: told between units of work, where it can be cancelled.

    Returns:
        For :meth:`merge_core.merging.engine.MergeSession.merge`; None for methods that learn
        nothing.

    Raises:
        MergeScopeError: weights, heads or data that do not fit; outputs that are not finite.
        Cancelled: by `progress`.
    """
    name = recipe.declaration.learns
    if name is None:
        return None
    if session.suite.select(recipe.tasks) != session.groups.tasks:
        raise SuiteError("The recipe's tasks are not the ones that this session holds.")
    check_recipe(session.suite, recipe)
    # Some learn in float64.
    with one_thread(), use_device(current_device().exact):
        return LEARNERS[name](LearningContext(outputs, recipe, session, progress or Progress()))

"""How merging scales: accuracy over the number of tasks, on random subsets of a suite's tasks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import comb

import numpy as np
import pandas as pd

from analysis.comparison.run import usable_methods
from analysis.evaluation.evaluator import Evaluator
from analysis.outputs.inputs import Split
from analysis.rank_selection.select import SelectionOptions, select_rank
from analysis.rank_selection.space import search_space
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import Recipe, make_recipe
from merge_core.methods import get_method
from merge_core.progress import Progress
from merge_core.suites.suite import Suite

# The simplest merge, the oldest one about the base, and the spectral ones.
METHODS = ("average", "task_arithmetic", "tsv_m", "iso_c", "cart")
# At what their rules find in the weights: their published scales are for other sums than these, and
# what is far too large at eight tasks says nothing of the method. The others have one default.
RECOMMENDED = ("task_arithmetic", "cart")
FEWEST = 2
MOST_COUNTS = 7
COLUMNS = ["method", "count", "subset"]


def task_counts(total: int, most: int = MOST_COUNTS) -> list[int]:
    """Numbers of tasks from two to all of them, evenly spread by their ratios.

    Args:
        total: tasks of the suite, at least two.
        most: numbers, at most.

    Example:
        >>> task_counts(8), task_counts(20)
        ([2, 3, 4, 5, 6, 7, 8], [2, 3, 4, 6, 9, 14, 20])
    """
    if total - FEWEST < most:
        return list(range(FEWEST, total + 1))
    return np.unique(np.geomspace(FEWEST, total, most).round().astype(int)).tolist()


def draw_subsets(
    tasks: Sequence[str], counts: Sequence[int], repeats: int, seed: int = 0
) -> list[tuple[str, ...]]:
    """Different subsets of tasks of each size, drawn evenly; all of a size where there are few.

    Args:
        tasks: all tasks.
        counts: sizes.
        repeats: subsets of a size, at most.
        seed: of the draw.

    Returns:
        Subsets by size, each in the order of `tasks`.

    Example:
        >>> draw_subsets(["a", "b", "c"], [2, 3], repeats=5)
        [('a', 'b'), ('a', 'c'), ('b', 'c'), ('a', 'b', 'c')]
    """
    rng = np.random.default_rng(seed)
    found: list[tuple[str, ...]] = []
    for count in counts:
        if comb(len(tasks), count) <= repeats:
            found += combinations(tasks, count)
            continue
        drawn: dict[tuple[int, ...], None] = {}
        while len(drawn) < repeats:
            drawn[tuple(sorted(rng.choice(len(tasks), count, replace=False).tolist()))] = None
        found += [tuple(tasks[i] for i in places) for places in drawn]
    return found


def accuracy_over_tasks(
    reference: str,
    suite: Suite,
    subsets: Sequence[tuple[str, ...]],
    evaluator: Evaluator,
    factors: FactorStore,
    split: Split = "test",
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Merge subsets of a suite's tasks with each of :data:`METHODS`, and evaluate each on its own.

    Args:
        reference: how recipes name the suite.
        suite: a suite that can be evaluated.
        subsets: of its tasks, each of at least two.
        evaluator: where predictions are kept.
        factors: where factors are kept.
        split: ``test`` for reporting.
        progress: told after each merge; cancels between two.

    Returns:
        One row per subset and method that can merge it: method (title), count (tasks), subset
        (names joined by " + "), accuracy or another metric (mean over the tasks), normalised (mean
        over them of accuracy / the expert's; NaN where an expert gets nothing right). CART of two
        tasks is their average.

    Raises:
        MergeScopeError: unfit weights, heads or data.
        Cancelled: by `progress`.

    Source: the figures over 8, 14 and 20 tasks of CART, arXiv:2412.12153, and of TSV-M,
    arXiv:2412.00081.

    Example:
        >>> suite = load_suite("vision")
        >>> subsets, evaluator = [("digits", "dots")], Evaluator(suite)
        >>> frame = accuracy_over_tasks("vision", suite, subsets, evaluator, FactorStore())
        >>> frame["method"].tolist()
        ['Weight average', 'Task Arithmetic', 'TSV-M', 'Iso-C', 'CART']
    """
    progress = progress or Progress()
    tasks = [task for task in suite.tasks if any(task in subset for subset in subsets)]
    metric = evaluator.metric
    experts = evaluator.experts(tasks, split).set_index("task")[metric.column].replace(0, np.nan)
    rows = []
    total = len(subsets) * len(METHODS)
    for number, subset in enumerate(subsets):
        session = MergeSession(suite, subset, factors)
        offered = usable_methods(suite, subset)
        for place, name in enumerate(METHODS):
            title = get_method(name).title
            progress.step(number * len(METHODS) + place, total, f"{title}, {len(subset)} tasks")
            if name not in offered:
                continue
            inner = Progress(cancel=progress.cancel)
            recipe = _recipe(name, reference, session, inner)
            found = evaluator.recipe(recipe, session, split, progress=inner).set_index("task")
            values = found[metric.column]
            relative = metric.relative(values, experts[values.index])
            rows.append(
                {
                    "method": title,
                    "count": len(subset),
                    "subset": " + ".join(subset),
                    metric.column: values.mean(),
                    "normalised": relative.mean(skipna=False),
                }
            )
    progress.step(total, total, "merged")
    return pd.DataFrame(rows, columns=[*COLUMNS, metric.column, "normalised"])


def _recipe(name: str, reference: str, session: MergeSession, progress: Progress) -> Recipe:
    """The method at its defaults, or at what its rule recommends from the weights alone."""
    tasks = session.groups.tasks
    # Two centred task vectors cancel at any setting.
    alike = name == "cart" and len(tasks) == FEWEST
    if name not in RECOMMENDED or alike:
        return make_recipe({"suite": reference, "tasks": tasks, "method": name})
    options = SelectionOptions("weights", report=False, only_rule=True)
    space = search_space(name, reference, tasks)
    return select_rank(space, session, None, options, progress=progress).recipe


def summarise_over(frame: pd.DataFrame, by: str, value: str) -> pd.DataFrame:
    """Mean and range of a value over the subsets of each size.

    Args:
        frame: of :func:`accuracy_over_tasks`.
        by: the column along which things scale, such as ``count``.
        value: ``accuracy`` or another metric, or ``normalised``.

    Returns:
        One row per method and size: method, `by`, mean, least, most, subsets (their number).

    Example:
        >>> frame = pd.DataFrame({"method": "CART", "count": 2, "accuracy": [0.5, 0.7]})
        >>> summarise_over(frame, "count", "accuracy")[["mean", "least", "most"]].values.tolist()
        [[0.6, 0.5, 0.7]]
    """
    grouped = frame.groupby(["method", by], sort=False)[value]
    return grouped.agg(mean="mean", least="min", most="max", subsets="size").reset_index()

"""Ranks of their own for the layers: what a total storage holds best, against one rank for all.

k directions of an m x n matrix take k(m + n + 1) numbers for each task. Under a total of such
numbers the gain Σ_l Σ_{i≤k_l} g_li is largest where the next direction's gain per number is the
same everywhere: the directions are taken in the order of g / (m + n + 1) until the total is
spent (water-filling). The gains g_li of one matrix fall with i, so that this order takes the
leading directions first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from glob import escape

import numpy as np
import pandas as pd

from analysis.accuracy import Difference, difference
from analysis.evaluation.evaluator import Evaluator
from analysis.metrics import mean_over_tasks
from analysis.rank_selection.space import SearchSpace
from analysis.rank_selection.weight_rules import nuclear_share
from analysis.spectral.spectra import cumulative_energy
from merge_core.errors import RecipeError
from merge_core.factors.factorise import map_matrices
from merge_core.factors.low_rank import count_directions
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import Recipe, make_recipe
from merge_core.progress import Progress
from merge_core.task_vectors import Origin, TensorGroup, TensorGroups

UNIFORM = "uniform"
NO_GAIN = Difference(0.0, 0.0, 0.0, 1.0)  # of a rule over itself


def _energy(S: np.ndarray) -> np.ndarray:
    return S**2


def _relative_energy(S: np.ndarray) -> np.ndarray:
    return np.diff(cumulative_energy(S), prepend=0.0)


def _nuclear_norm(S: np.ndarray) -> np.ndarray:
    return np.diff(nuclear_share(S), prepend=0.0)


ALLOCATIONS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "energy": ("Energy", _energy),
    "relative_energy": ("Energy, each matrix alike", _relative_energy),
    "nuclear": ("Nuclear norm, each matrix alike", _nuclear_norm),
}
"""Rules by name: title, and the gain of each direction from a spectrum (descending)."""


def stored_numbers(groups: TensorGroups, ranks: Mapping[str, int]) -> int:
    """Numbers that the kept directions of all tasks take: Σ T·k(m + n + 1).

    Args:
        groups: the suite's parameters.
        ranks: directions kept of each decomposed parameter.

    Example:
        >>> groups = TensorGroups(load_suite("vision"), ["digits", "dots"], FactorStore())
        >>> ones = uniform_ranks(groups, 0.001)  # one direction of each matrix
        >>> stored_numbers(groups, ones) == 2 * sum(
        ...     sum(group.info.matrix_shape) + 1 for group in groups.members if group.decomposed
        ... )
        True
    """
    members = [group for group in groups.members if group.decomposed]
    return sum(len(groups.tasks) * ranks[g.name] * (sum(g.info.matrix_shape) + 1) for g in members)


def uniform_ranks(groups: TensorGroups, share: float) -> dict[str, int]:
    """The same share of the directions in every decomposed parameter, k = max(1, floor(share·r)).

    Args:
        groups: the suite's parameters.
        share: in (0, 1].

    Example:
        >>> groups = TensorGroups(load_suite("vision"), ["digits", "dots"], FactorStore())
        >>> set(uniform_ranks(groups, 0.08).values())
        {20}
    """
    members = [group for group in groups.members if group.decomposed]
    return {group.name: count_directions(share, min(group.info.matrix_shape)) for group in members}


def allocate(
    groups: TensorGroups,
    origin: Origin,
    share: float,
    rule: str = "relative_energy",
    progress: Progress | None = None,
) -> dict[str, int]:
    """Directions for each matrix, in no more storage than a uniform share takes.

    Args:
        groups: the suite's parameters; those not decomposed are passed over.
        origin: what the task vectors are taken about.
        share: the uniform share whose storage is the budget, in (0, 1].
        rule: a name of :data:`ALLOCATIONS`: what a direction is worth, summed over tasks.
        progress: told after each matrix.

    Returns:
        Directions of each decomposed parameter, from 1 to r. What is left of the budget is less
        than one direction of any matrix that is not complete.

    Raises:
        RecipeError: no such rule.
        SuiteError: origin "base" without a base.
        Cancelled: by `progress`.

    Source: [derived] in the module's text; the greedy order is optimal for concave gains.

    Example:
        >>> groups = TensorGroups(load_suite("vision"), ["digits", "dots"], FactorStore())
        >>> ranks = allocate(groups, "base", 0.08)
        >>> stored_numbers(groups, ranks) <= stored_numbers(groups, uniform_ranks(groups, 0.08))
        True
    """
    if rule not in ALLOCATIONS:
        known = ", ".join(ALLOCATIONS)
        raise RecipeError(f"There is no allocation {rule!r}; choose one of {known}.")
    gain = ALLOCATIONS[rule][1]

    def gains(group: TensorGroup) -> np.ndarray:
        spectra = [S.double().numpy() for S in group.singular_values(origin)]
        return np.asarray(np.sum([gain(S) for S in spectra], axis=0))

    members = [group for group in groups.members if group.decomposed]
    worth = list(map_matrices(gains, groups, progress))
    names = [group.name for group in members]
    costs = [sum(group.info.matrix_shape) + 1 for group in members]
    uniform = uniform_ranks(groups, share)
    budget = sum(uniform[name] * cost for name, cost in zip(names, costs, strict=True))
    kept = _fill(worth, costs, budget)
    return dict(zip(names, kept, strict=True))


def _fill(worth: Sequence[np.ndarray], costs: Sequence[int], budget: int) -> list[int]:
    """How many of each matrix's directions fit, the most worth per number first, 1 at least."""
    kept = [1] * len(worth)
    left = budget - sum(costs)
    density = np.concatenate([w[1:] / c for w, c in zip(worth, costs, strict=True)])
    matrix = np.repeat(np.arange(len(worth)), [w.size - 1 for w in worth])
    # Stable, so that of directions worth the same (zeros, say) the leading ones go first.
    for index in np.argsort(-density, kind="stable"):
        if costs[matrix[index]] <= left:
            kept[matrix[index]] += 1
            left -= costs[matrix[index]]
    return kept


def with_ranks(recipe: Recipe, ranks: Mapping[str, int]) -> Recipe:
    """A recipe whose decomposed parameters have ranks of their own, as overrides.

    Args:
        recipe: of a method with a rank; overrides that it has are replaced.
        ranks: directions for each parameter's name.

    Raises:
        RecipeError: the method has no rank.

    Example:
        >>> recipe = with_ranks(make_recipe({"method": "cart"}), {"blocks.0.attn.qkv.weight": 12})
        >>> recipe.parameters_of("blocks.0.attn.qkv.weight").rank
        12
    """
    overrides = [
        {"match": escape(name), "parameters": {"rank": int(k)}} for name, k in sorted(ranks.items())
    ]
    return make_recipe({**recipe.model_dump(), "overrides": overrides})


def compare_with_uniform(
    space: SearchSpace,
    session: MergeSession,
    evaluator: Evaluator,
    shares: Sequence[float],
    scales: Sequence[float],
    rules: Sequence[str] = tuple(ALLOCATIONS),
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Accuracy of allocated ranks and of the uniform rank in the same storage, on validation.

    Every rule, the uniform rank too, gets the best of the same scales at each budget.

    Args:
        space: a method with a rank; its axes do not matter.
        session: the merges.
        evaluator: where predictions are kept.
        shares: budgets, as shares of a uniform rank.
        scales: tried for each.
        rules: names of :data:`ALLOCATIONS`.
        progress: reports merges.

    Returns:
        One row per budget and rule, uniform first: share, rule, title, numbers (stored, all
        tasks), scale (the best), accuracy (or another metric), low, high (95 %), gain (over
        uniform, at each one's best scale; of a metric where less is better it is negative where the
        rule is better), gain_low, gain_high (95 %, paired on the same images; the choice of the
        scale is not in it).

    Raises:
        RecipeError: no rank, or no such rule.
        MergeScopeError: unfit inputs.
        Cancelled: between two tasks of a merge.

    Example:
        >>> from analysis.rank_selection.space import search_space
        >>> suite = load_suite("vision")
        >>> session = MergeSession(suite, ["dots"], FactorStore())
        >>> space = search_space("cart", "vision", ["dots"])
        >>> frame = compare_with_uniform(space, session, Evaluator(suite), [0.08], [1.0], rules=[])
        >>> frame[["rule", "gain"]].values.tolist()
        [['uniform', 0.0]]
    """
    progress = progress or Progress()
    inner, groups = Progress(cancel=progress.cancel), session.groups
    origin = space.base.run(groups.tasks).origin
    total, done, rows = len(shares) * (len(rules) + 1) * len(scales), 0, []
    for share in shares:
        uniform_hits = None
        for rule in (UNIFORM, *rules):
            title = "Uniform rank" if rule == UNIFORM else ALLOCATIONS[rule][0]
            ranks = _ranks(groups, origin, share, rule, inner)
            tried = []
            for scale in scales:
                progress.step(done, total, f"{title}, share {share:g}, scale {scale:g}")
                recipe = with_ranks(space.recipe(None, scale), ranks)
                hits = evaluator.recipe_hits(recipe, session, progress=inner)
                tried.append((float(np.mean([h.mean() for h in hits.values()])), scale, hits))
                done += 1
            _, scale, hits = tried[evaluator.metric.best([mean for mean, *_ in tried])]
            uniform_hits = uniform_hits or hits
            gain = NO_GAIN if rule == UNIFORM else difference(hits, uniform_hits)
            measured = mean_over_tasks(evaluator.outputs.frame(hits, "val")).iloc[0]
            rows.append(
                {
                    "share": share,
                    "rule": rule,
                    "title": title,
                    "numbers": stored_numbers(groups, ranks),
                    "scale": scale,
                    **{name: measured[name] for name in (evaluator.metric.column, "low", "high")},
                    "gain": gain.gap,
                    "gain_low": gain.low,
                    "gain_high": gain.high,
                }
            )
    progress.step(total, total, "ranks per layer")
    return pd.DataFrame(rows)


def _ranks(
    groups: TensorGroups, origin: Origin, share: float, rule: str, progress: Progress
) -> dict[str, int]:
    if rule == UNIFORM:
        return uniform_ranks(groups, share)
    return allocate(groups, origin, share, rule, progress)

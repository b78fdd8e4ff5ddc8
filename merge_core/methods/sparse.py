"""TIES, DARE and Breadcrumbs: one family, sparsify x elect x combine.

Each method is a row of :data:`FAMILY`: which entries of the task vectors stay, whether a sign is
elected for each entry, and how what is left becomes one update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from merge_core.errors import RecipeError
from merge_core.files import digest_of
from merge_core.methods.blockwise import BLOCK, agreement, elect_sign, merge_entrywise
from merge_core.methods.declaration import (
    Method,
    MethodParameters,
    Run,
    parameter,
    warn_unmoved,
)
from merge_core.methods.selection import Passes, count_kept, kth_in_place, kth_largest
from merge_core.progress import Progress
from merge_core.task_vectors import TensorGroup, TensorGroups

Combine = Literal["mean", "sum"]
COMBINE_HELP = (
    "What becomes of the entries that agree with the elected sign: their mean (the paper), or "
    "their sum, as the vision ports take it; a sum grows with the tasks and wants λ near 0.3."
)


def _scale_parameter(default: float, help: str, typical: str, most: float) -> Any:
    return parameter(default, help, minimum=-10, maximum=10, typical=typical, show=(0, most))


def _drop_parameter() -> Any:
    return parameter(
        0.9,
        "Probability p that an entry of a task vector is dropped; those that stay are divided by "
        "1 − p. Raising it leaves fewer, larger entries and a noisier merge.",
        minimum=0.0,
        maximum=0.999,
        typical="0.9 (paper); 0.5 in several ports",
        show=(0, 0.99),
    )


class TiesParameters(MethodParameters):
    """Parameters of TIES-Merging."""

    density: float = parameter(
        0.2,
        "Share of the largest entries kept of each task vector; the others are set to zero.",
        minimum=0.0,
        maximum=1.0,
        typical="0.2",
        show=(0.01, 1),
    )
    scale: float = _scale_parameter(
        1.0, "Scaling coefficient λ of the merged task vector.", "1 (searched in 0.8 to 3)", 3
    )
    trim: Literal["global", "tensor"] = parameter(
        "global",
        "Where the largest entries are taken: over the whole model (the paper) or in each tensor "
        "by itself (as several toolkits do).",
    )
    combine: Combine = parameter("mean", COMBINE_HELP, later=True)


class DareTaskArithmeticParameters(MethodParameters):
    """Parameters of DARE with Task Arithmetic."""

    drop: float = _drop_parameter()
    scale: float = _scale_parameter(
        0.3, "Scaling coefficient λ of the summed task vectors.", "0.3 for 8 tasks", 1.5
    )


class DareTiesParameters(MethodParameters):
    """Parameters of DARE with TIES."""

    drop: float = _drop_parameter()
    scale: float = _scale_parameter(1.0, "Scaling coefficient λ of the merged task vector.", "1", 3)
    combine: Combine = parameter("mean", COMBINE_HELP)


class BreadcrumbsParameters(MethodParameters):
    """Parameters of Model Breadcrumbs."""

    drop_small: float = parameter(
        0.85,
        "Share of the smallest entries dropped from each tensor of a task vector. Raising it "
        "leaves fewer entries.",
        minimum=0.0,
        maximum=1.0,
        typical="0.8 to 0.95",
    )
    drop_large: float = parameter(
        0.006,
        "Share of the largest entries, the outliers, dropped from each tensor of a task vector.",
        minimum=0.0,
        maximum=1.0,
        typical="0.001 to 0.01",
        show=(0, 0.1),
    )
    scale: float = _scale_parameter(
        0.3, "Scaling coefficient α of the summed task vectors.", "0.2 to 0.3", 1.5
    )


@dataclass(frozen=True)
class Limits:
    """The magnitudes that TIES keeps over the whole model, and the settings they were found for.

    Attributes:
        density: of the recipe.
        values: T thresholds, or None for tensor-wise trimming.
    """

    density: float
    values: Tensor | None


def thresholds(
    groups: TensorGroups, parameters: TiesParameters, run: Run, progress: Progress
) -> Tensor | None:
    """The magnitude that each task's kept entries reach, over the whole model, exactly.

    One or two passes over the parameters, see :func:`merge_core.methods.selection.kth_largest`.

    Args:
        groups: all parameters.
        parameters: the method's parameters.
        run: says the origin and the weights of the task vectors.
        progress: reports each parameter of each pass.

    Returns:
        T thresholds (entries of at least that magnitude are kept), or None for tensor-wise
        trimming.
    """
    if parameters.trim == "tensor":
        return None
    passes = Passes(groups, run.origin, run.apply_weights, progress, 0, 1, torch.float64)
    keep = count_kept(parameters.density, passes.entries)
    if keep == 0:
        return torch.full((passes.tasks,), torch.inf)
    return kth_largest(passes, _magnitude, (keep,), "magnitudes")[:, 0]


def _limits(
    groups: TensorGroups, parameters: TiesParameters, run: Run, progress: Progress
) -> Limits:
    return Limits(parameters.density, thresholds(groups, parameters, run, progress))


# Sparsify: for one parameter, what of a block of its task vectors (T x n) stays, others zero. It is
# asked for each block once, in order.

Sparsified = Callable[[Tensor, slice], Tensor]


def _magnitude(tau: Tensor) -> Tensor:
    """|τ| in float32, in which every threshold is found and applied."""
    return tau.float().abs()


def _kth_in_tensor(
    group: TensorGroup, run: Run, ks: Sequence[int], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """For each k, T values: the k-th largest magnitude of each task's tensor, infinite for 0."""
    found = [torch.full((len(group.tasks),), torch.inf) for _ in ks]
    magnitude = torch.empty(group.info.numel)  # of one task at a time
    for t in range(len(group.tasks)):
        weight = run.weights[t] if run.weights else 1.0
        for part, tau in group.blocks(run.origin, BLOCK, dtype=dtype, task=t):
            magnitude[part] = _magnitude(tau[0] if weight == 1 else tau[0] * weight)
        for limits, k in zip(found, ks, strict=True):
            if k:
                limits[t] = kth_in_place(magnitude, k)
    return found


def keep_largest(group: TensorGroup, parameters: TiesParameters, run: Run) -> Sparsified:
    """The entries of largest magnitude, over the model or in this tensor."""
    if parameters.trim == "tensor":
        keep = count_kept(parameters.density, group.info.numel)
        (limit,) = _kth_in_tensor(group, run, [keep], torch.float64)
    else:
        found = run.state
        if found.values is None or found.density != parameters.density:
            raise RecipeError(
                "With trim: global, TIES takes one threshold over the whole model, so that an "
                "override can change neither density nor trim. Take trim: tensor for the whole "
                "recipe."
            )
        limit = found.values
    return lambda tau, _: torch.where(_magnitude(tau) >= limit[:, None], tau, 0)


def keep_random(
    group: TensorGroup,
    parameters: DareTaskArithmeticParameters | DareTiesParameters,
    run: Run,
) -> Sparsified:
    """Entries that a coin of probability 1 − p keeps, divided by 1 − p.

    The coins of a parameter and task follow from the seed and the two names alone: neither the
    other experts, nor their order, nor streaming, nor blocks change them.
    """
    sources = []
    for task in group.tasks:
        seed = int(digest_of("dare", str(run.seed), group.name, task)[:15], 16)
        sources.append(torch.Generator().manual_seed(seed))

    def kept(tau: Tensor, _: slice) -> Tensor:
        # Each block draws on where the one before ended.
        coins = torch.stack([torch.rand(tau.shape[1], generator=source) for source in sources])
        return torch.where(coins >= parameters.drop, tau, 0) / (1 - parameters.drop)

    return kept


def keep_middle(group: TensorGroup, parameters: BreadcrumbsParameters, run: Run) -> Sparsified:
    """Entries of this tensor that are neither among the smallest nor among the largest."""
    total = group.info.numel
    small = int(parameters.drop_small * total + 1e-9)
    large = int(parameters.drop_large * total + 1e-9)
    if small + large >= total:
        return lambda tau, _: torch.zeros_like(tau)
    most, least = _kth_in_tensor(group, run, [large + 1, total - small])

    def keep(tau: Tensor, _: slice) -> Tensor:
        magnitude = _magnitude(tau)
        inside = (magnitude >= least[:, None]) & (magnitude <= most[:, None])
        return torch.where(inside, tau, 0)

    return keep


def elect_signs(votes: Tensor, task_vectors: Tensor | None = None) -> Tensor:
    """T x n: entries of the elected sign (see :func:`elect_sign`), others zero."""
    return votes * agreement(votes, elect_sign(votes, task_vectors))


def combine(tau: Tensor, how: Combine) -> Tensor:
    """n: the sum over tasks, or the mean over the tasks whose entry is not zero."""
    total = tau.sum(dim=0)
    return total if how == "sum" else total / (tau != 0).sum(dim=0).clamp_min(1)


@dataclass(frozen=True)
class Row:
    """One method of the family.

    Attributes:
        sparsify: which entries stay.
        elect: whether only entries of the elected sign stay, and `combine` is a parameter;
            otherwise what stays is summed, as in Task Arithmetic.
        alike: whether what stays of a vector stays of its negative too.
        keeps_all: whether, with these parameters, every entry stays.
    """

    sparsify: Callable[[TensorGroup, Any, Run], Sparsified]
    elect: bool
    alike: bool
    keeps_all: Callable[[Any], bool]


FAMILY = {
    "ties": Row(keep_largest, True, True, lambda p: p.density == 1),
    "dare_task_arithmetic": Row(keep_random, False, False, lambda p: p.drop == 0),
    "dare_ties": Row(keep_random, True, False, lambda p: p.drop == 0),
    "breadcrumbs": Row(keep_middle, False, True, lambda p: p.drop_small == p.drop_large == 0),
}


def merge(row: Row, group: TensorGroup, parameters: Any, run: Run) -> Tensor:
    """Origin + λ · combine(elect(sparsify(τ_1 … τ_T))) of one parameter."""
    stays = row.sparsify(group, parameters, run)

    def update(tau: Tensor, part: slice) -> Tensor:
        kept = stays(tau, part)
        if row.elect:
            return parameters.scale * combine(elect_signs(kept, tau), parameters.combine)
        return parameters.scale * combine(kept, "sum")

    return merge_entrywise(group, run, update, torch.float64 if row.elect else None)


def warnings(
    row: Row, title: str, tasks: int, parameters: Any, run: Run | None = None
) -> list[str]:
    """About the average the task vectors sum to zero, and of two one is the other's negative."""
    if run is None or parameters is None or not run.cancels:
        return []
    everything = row.keeps_all(parameters)
    if tasks == 2 and (everything or row.alike):
        return [warn_unmoved(title, "the two centred task vectors are each other's negative")]
    if everything:
        return [warn_unmoved(title, "every entry is kept, and the task vectors sum to zero")]
    return []


ELECTED = (
    r"\tau_j = \mathrm{mean}\{\hat\tau_{t,j} : \mathrm{sgn}\,\hat\tau_{t,j} = "
    r"\mathrm{sgn} \textstyle\sum_s \hat\tau_{s,j}\}"
)
DROPPED = r"\hat\tau_t = \frac{m_t \odot \tau_t}{1 - p},\; m_{t,j} \sim \mathrm{Bernoulli}(1 - p)"

METHODS = (
    Method(
        name="ties",
        title="TIES",
        order=2,
        summary="Keeps the largest entries of each task vector, elects one sign per entry, and "
        "averages (or sums) the entries that agree with it.",
        formula=rf"\theta = \theta_0 + \lambda \tau,\quad {ELECTED}",
        source="Yadav et al., TIES-Merging, arXiv:2306.01708, algorithm 1",
        parameters=TiesParameters,
        merge=partial(merge, FAMILY["ties"]),
        warnings=partial(warnings, FAMILY["ties"], "TIES"),
        revisions={"average": 1},
        origins=("base", "average"),
        weighted=True,
        deviations="An even vote, zero but for the rounding of float64, changes nothing (the "
        "authors' code then takes the sign that most entries of the model have). Entries as large "
        "as the smallest kept one are kept too. About the average the task vectors sum to zero, so "
        "that two experts, or all entries kept, give the average.",
        prepare=_limits,
    ),
    Method(
        name="dare_task_arithmetic",
        title="DARE with Task Arithmetic",
        order=10,
        summary="Drops most entries of each task vector at random, rescales the others so that "
        "the expectation stays what it was, and adds the scaled sum to the base.",
        formula=rf"\theta = \theta_0 + \lambda \sum_t \hat\tau_t,\quad {DROPPED}",
        source="Yu et al., Language models are super Mario, arXiv:2311.03099, section 3",
        parameters=DareTaskArithmeticParameters,
        merge=partial(merge, FAMILY["dare_task_arithmetic"]),
        warnings=partial(warnings, FAMILY["dare_task_arithmetic"], "DARE with Task Arithmetic"),
        origins=("base", "average"),
        weighted=True,
        draws="which entries are dropped",
    ),
    Method(
        name="dare_ties",
        title="DARE with TIES",
        order=11,
        summary="Drops entries of each task vector at random and rescales the others; then elects "
        "one sign per entry and averages (or sums) the entries that agree with it.",
        formula=rf"\theta = \theta_0 + \lambda \tau,\quad {ELECTED},\quad {DROPPED}",
        source="Yu et al., Language models are super Mario, arXiv:2311.03099, section 3, with the "
        "sign election of TIES-Merging, arXiv:2306.01708",
        parameters=DareTiesParameters,
        merge=partial(merge, FAMILY["dare_ties"]),
        warnings=partial(warnings, FAMILY["dare_ties"], "DARE with TIES"),
        revisions={"average": 1},
        origins=("base", "average"),
        weighted=True,
        draws="which entries are dropped",
        deviations="The random drop replaces the trim of TIES, as in PEFT and mergekit; the "
        "authors' code trims by magnitude after the drop as well.",
    ),
    Method(
        name="breadcrumbs",
        title="Breadcrumbs",
        order=12,
        summary="Drops both the smallest and the largest entries of each tensor of a task vector "
        "and adds the scaled sum of the rest to the base.",
        formula=r"\theta = \theta_0 + \alpha \sum_t m_t \odot \tau_t,\quad "
        r"m_{t,j} = 1\{\beta_t \le |\tau_{t,j}| \le \gamma_t\}\ \text{in each tensor}",
        source="Davari and Belilovsky, Model Breadcrumbs, arXiv:2312.06795, section 3",
        parameters=BreadcrumbsParameters,
        merge=partial(merge, FAMILY["breadcrumbs"]),
        warnings=partial(warnings, FAMILY["breadcrumbs"], "Breadcrumbs"),
        origins=("base", "average"),
        weighted=True,
        deviations="Shares are of each tensor, as in the paper; the authors' code takes them of "
        "each row (the last dimension) and leaves scalars whole. Entries as large as the smallest "
        "or as the largest kept one are kept too.",
    ),
)

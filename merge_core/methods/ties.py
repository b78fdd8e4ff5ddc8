"""TIES-Merging: trim, elect a sign, and average what agrees."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from merge_core.methods.declaration import Method, MethodParameters, Run, parameter
from merge_core.progress import Progress
from merge_core.task_vectors import Groups, ParameterGroup


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
    scale: float = parameter(
        1.0,
        "Scaling coefficient λ of the merged task vector.",
        minimum=-10,
        maximum=10,
        typical="1 (searched in 0.8 to 3)",
        show=(0, 3),
    )
    trim: Literal["global", "tensor"] = parameter(
        "global",
        "Where the largest entries are taken: over the whole model (the paper) or in each tensor "
        "by itself (as several toolkits do).",
    )


def kept_count(density: float, total: int) -> int:
    """Number of entries that a density keeps of `total`: the floor, at least one unless 0."""
    if density == 0:
        return 0
    return min(total, max(1, int(density * total + 1e-9)))


def _magnitude_bits(values: Tensor) -> Tensor:
    """|x| of float32 as integers of the same order: the bit pattern without the sign."""
    return values.float().abs().contiguous().view(torch.int32).flatten()


def thresholds(
    groups: Groups, parameters: TiesParameters, run: Run, progress: Progress
) -> Tensor | None:
    """The magnitude that each task's kept entries reach, over the whole model, exactly.

    A radix selection in two passes over the parameters (upper, then lower 16 bits of the
    magnitudes), so that memory does not grow with the model.

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
    tasks = len(groups.tasks)
    total = 0
    upper = torch.zeros(tasks, 1 << 16, dtype=torch.int64)
    for i, group in enumerate(groups):
        progress.step(i, 2 * len(groups), f"magnitudes of {group.name}")
        if group.info.is_floating:
            total += group.info.numel
            for t, vector in enumerate(run.task_vectors(group)):
                upper[t] += torch.bincount(_magnitude_bits(vector) >> 16, minlength=1 << 16)
    keep = kept_count(parameters.density, total)
    if keep == 0:
        return torch.full((tasks,), torch.inf)
    above = upper.flip(1).cumsum(1)
    place = (above >= keep).int().argmax(dim=1)  # from the top: first bin that reaches `keep`
    bins = (1 << 16) - 1 - place
    missing = keep - (above - upper.flip(1)).gather(1, place[:, None])[:, 0]
    lower = torch.zeros_like(upper)
    for i, group in enumerate(groups):
        progress.step(len(groups) + i, 2 * len(groups), f"thresholds of {group.name}")
        if group.info.is_floating:
            for t, vector in enumerate(run.task_vectors(group)):
                bits = _magnitude_bits(vector)
                inside = bits[(bits >> 16) == bins[t]] & 0xFFFF
                lower[t] += torch.bincount(inside, minlength=1 << 16)
    below = (lower.flip(1).cumsum(1) >= missing[:, None]).int().argmax(dim=1)
    pattern = (bins << 16) | ((1 << 16) - 1 - below)
    return pattern.to(torch.int32).view(torch.float32)


def merge(group: ParameterGroup, parameters: TiesParameters, run: Run) -> Tensor:
    """θ_0 + λ · disjoint mean of the trimmed task vectors that agree with the elected sign."""
    tau = run.task_vectors(group)
    magnitude = tau.float().abs()  # both trims rank in float32, as the threshold pass does
    if run.state is None:
        flat = magnitude.reshape(len(tau), group.info.numel)
        keep = kept_count(parameters.density, flat.shape[1])
        limit = flat.topk(keep, dim=1).values[:, -1] if keep else torch.full((len(tau),), torch.inf)
    else:
        limit = run.state
    limit = limit.reshape(-1, *[1] * (tau.ndim - 1))
    trimmed = torch.where((magnitude >= limit) & (tau != 0), tau, 0)
    sign = trimmed.sum(dim=0).sign()
    agrees = (trimmed.sign() == sign) & (trimmed != 0)
    update = (trimmed * agrees).sum(dim=0) / agrees.sum(dim=0).clamp_min(1)
    return group.origin(run.origin) + parameters.scale * update


METHOD = Method(
    name="ties",
    title="TIES",
    place=2,
    summary="Keeps the largest entries of each task vector, elects one sign per entry, and "
    "averages the entries that agree with it.",
    formula=r"\theta = \theta_0 + \lambda \tau,\quad \tau_j = "
    r"\mathrm{mean}\{\hat\tau_{t,j} : \mathrm{sgn}\,\hat\tau_{t,j} = "
    r"\mathrm{sgn} \textstyle\sum_s \hat\tau_{s,j}\}",
    source="Yadav et al., TIES-Merging, arXiv:2306.01708, algorithm 1",
    parameters=TiesParameters,
    merge=merge,
    origins=("base", "average"),
    weighted=True,
    prepare=thresholds,
)

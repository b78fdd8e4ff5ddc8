"""TALL-masks, Consensus and EMR: one unified task vector seen through binary masks.

What a task's model needs at inference, with two-byte numbers and one bit per entry of a mask: the
base and the unified task vector, both shared, and its own mask; for EMR also one number per task.
Integer buffers are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merge_core.methods.blockwise import agreement, merge_entrywise, sign_of_vote
from merge_core.methods.declaration import Method, MethodParameters, Run, parameter
from merge_core.methods.selection import Passes, sum_pairs
from merge_core.progress import Progress
from merge_core.task_vectors import TensorGroup, TensorGroups

NUMBER = 2  # bytes


def mask_storage(group: TensorGroup) -> int:
    """Bytes of one parameter for all tasks: base, unified task vector, and a bit per task."""
    entries = group.info.numel
    return 2 * NUMBER * entries + -(-entries * len(group.tasks) // 8)


def _threshold_parameter() -> Any:
    return parameter(
        0.4,
        "λ_t of the masks, the same for all tasks: an entry is active in a task whose own change "
        "is at least λ_t times what the other tasks add. Raising it makes the masks sparser.",
        minimum=0.0,
        maximum=10.0,
        typical="0.2 to 0.6",
        show=(0, 2),
    )


class TallMasksParameters(MethodParameters):
    """Parameters of TALL-masks."""

    threshold: float = _threshold_parameter()


class ConsensusParameters(MethodParameters):
    """Parameters of Consensus Task Arithmetic."""

    threshold: float = _threshold_parameter()
    scale: float = parameter(
        0.3,
        "Scaling coefficient α of the summed task vectors.",
        minimum=-10,
        maximum=10,
        typical="searched in 0 to 1",
        show=(0, 1.5),
    )


class EmrParameters(MethodParameters):
    """EMR-Merging has none."""


def active_mask(tau: Tensor, threshold: float) -> Tensor:
    """T x shape: |τ_t| ≥ λ_t |τ_MTL − τ_t|, with τ_MTL = Σ_t τ_t."""
    return tau.abs() >= threshold * (tau.sum(dim=0) - tau).abs()


def tall_model(group: TensorGroup, parameters: TallMasksParameters, run: Run, index: int) -> Tensor:
    """θ_0 + m_t ∘ τ_MTL of one parameter."""

    def update(tau: Tensor, _: slice) -> Tensor:
        total, own = tau.sum(dim=0), tau[index]  # the others' masks are not looked at
        active = own.abs() >= parameters.threshold * (total - own).abs()
        return total * active.to(total.dtype)

    return merge_entrywise(group, run, update)


def tall_storage(group: TensorGroup, parameters: TallMasksParameters, run: Run) -> int:
    """Bytes of one parameter for all tasks together."""
    return mask_storage(group)


def merge_consensus(group: TensorGroup, parameters: ConsensusParameters, run: Run) -> Tensor:
    """θ_0 + α τ_MTL of one parameter where two tasks at least are active, θ_0 elsewhere."""

    def update(tau: Tensor, _: slice) -> Tensor:
        votes = active_mask(tau, parameters.threshold).sum(dim=0)
        shared = votes >= min(2, len(tau))  # a single task has nobody to agree with
        return parameters.scale * torch.where(shared, tau.sum(dim=0), 0)

    return merge_entrywise(group, run, update)


@dataclass(frozen=True)
class Rescale:
    """What EMR measures over the whole model.

    Attributes:
        factors: λ_t = Σ|τ_t| / Σ|m_t ∘ τ_uni| of each task, 1 where a mask leaves nothing.
        first: the parameter that these T numbers are counted with.
    """

    factors: Tensor
    first: str


def unify(tau: Tensor) -> Tensor:
    """EMR's unified task vector: n, in the dtype of T x n.

    Per entry the sign of the sum over tasks, and the largest magnitude among the tasks that have
    it. Of a positive vote that is the largest entry itself, of a negative one the smallest.
    """
    low, high = tau.amin(dim=0), tau.amax(dim=0)
    sign = sign_of_vote(tau.sum(dim=0, dtype=torch.float64), torch.maximum(high, -low))
    sign = sign.to(tau.dtype)
    return high * sign.clamp_min(0) - low * sign.clamp_max(0)


def measure_rescaling(
    groups: TensorGroups, parameters: EmrParameters, run: Run, progress: Progress
) -> Rescale:
    """λ_t of every task, in one pass over the parameters.

    Args:
        groups: all parameters.
        parameters: none.
        run: the task vectors' origin.
        progress: reports each parameter.
    """
    passes = Passes(groups, run.origin, run.apply_weights, progress, 1, dtype=torch.float64)
    own = torch.zeros(passes.tasks, dtype=torch.float64)
    common = torch.zeros_like(own)

    def sums(tau: Tensor) -> tuple[Tensor, Tensor]:
        unified = unify(tau)
        return tau.abs().sum(dim=1), agreement(tau, unified.sign()) @ unified.abs()

    for mine, seen in passes.run("rescaling", sums, sum_pairs):
        own += mine
        common += seen
    factors = torch.where(common > 0, own / common, 1)
    floating = [group.name for group in groups if group.info.is_floating]
    return Rescale(factors, floating[0] if floating else "")


def emr_model(group: TensorGroup, parameters: EmrParameters, run: Run, index: int) -> Tensor:
    """θ_0 + λ_t m_t ∘ τ_uni of one parameter."""
    factor = float(run.state.factors[index])

    def update(tau: Tensor, _: slice) -> Tensor:
        unified = unify(tau)
        return factor * agreement(tau[index], unified.sign()) * unified

    return merge_entrywise(group, run, update, torch.float64)


def emr_storage(group: TensorGroup, parameters: EmrParameters, run: Run) -> int:
    """Bytes of one parameter for all tasks together; λ_t are counted with the first parameter."""
    scalars = NUMBER * len(group.tasks) if group.name == run.state.first else 0
    return mask_storage(group) + scalars


WANG = (
    "Wang et al., Localizing task information for improved model merging and compression, "
    "arXiv:2405.07813"
)
MASK = r"m_t = 1\{|\tau_t| \ge \lambda_t |\tau_{MTL} - \tau_t|\},\; \tau_{MTL} = \sum_t \tau_t"
ONE_THRESHOLD = (
    "One λ_t for all tasks (the paper chooses one per task on validation data); an equality "
    "counts as active, as in the paper (the authors' code takes a strict inequality)."
)

METHODS = (
    Method(
        name="consensus",
        title="Consensus Task Arithmetic",
        order=13,
        summary="Task Arithmetic without the entries that serve no task or a single one: an entry "
        "of the summed task vectors stays where the masks of two tasks at least are active.",
        formula=rf"\theta = \theta_0 + \alpha\, 1\{{\textstyle\sum_t m_t \ge 2\}} \odot "
        rf"\tau_{{MTL}},\quad {MASK}",
        source=f"{WANG}, section 4 (consensus merging)",
        parameters=ConsensusParameters,
        merge=merge_consensus,
        origins=("base",),
        deviations=f"{ONE_THRESHOLD} With one task, its own active entries stay.",
    ),
    Method(
        name="tall_masks",
        title="TALL-masks",
        order=60,
        summary="One model per task: the base and the summed task vectors, of which a binary mask "
        "lets through what matters for the task.",
        formula=rf"\theta_t' = \theta_0 + m_t \odot \tau_{{MTL}},\quad {MASK}",
        source=f"{WANG}, section 4 (TALL-masks)",
        parameters=TallMasksParameters,
        merge_for=tall_model,
        storage=tall_storage,
        origins=("base",),
        deviations=ONE_THRESHOLD,
    ),
    Method(
        name="emr",
        title="EMR-Merging",
        order=61,
        summary="One model per task: a unified task vector of the elected signs and the largest "
        "agreeing magnitudes, seen through the task's binary mask and rescaled to the task's own "
        "mean magnitude.",
        formula=r"\theta_t' = \theta_0 + \lambda_t\, m_t \odot \tau_{uni},\quad \tau_{uni} = "
        r"\sigma \odot \max_{t: \mathrm{sgn}\,\tau_t = \sigma} |\tau_t|,\; "
        r"\sigma = \mathrm{sgn} \textstyle\sum_t \tau_t,\; m_t = 1\{\tau_t \odot \tau_{uni} > 0\},"
        r"\; \lambda_t = \frac{\sum |\tau_t|}{\sum |m_t \odot \tau_{uni}|}",
        source="Huang et al., EMR-Merging, arXiv:2405.17461, section 3",
        parameters=EmrParameters,
        merge_for=emr_model,
        storage=emr_storage,
        origins=("base",),
        deviations="λ_t sums over all entries of the model, as in the paper (the authors' code "
        "sums the mean of each tensor, so that small tensors weigh as much as large ones); an "
        "even vote changes nothing (there: counts as negative).",
        prepare=measure_rescaling,
    ),
)

"""SVC: singular values calibrated by how often the tasks count a direction."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_core.factors.decomposition import decompose
from merge_core.factors.low_rank import as_matrix, resolution
from merge_core.methods.declaration import MethodParameters, Postprocessor, Run, parameter
from merge_core.methods.spectral import orient
from merge_core.task_vectors import TensorGroup


class SvcParameters(MethodParameters):
    """Parameters of SVC."""

    floor: float = parameter(
        1.0,
        "Least coefficient that a task counts with, in units of 1/T (the paper's α = 1/T is 1). "
        "Raising it damps directions that few tasks share.",
        minimum=0.001,
        maximum=100,
        typical="1",
        show=(0.1, 8),
    )


def coefficients(matrix: Tensor, U: Tensor, tau: Tensor, noise: float) -> Tensor:
    """s = ⟨a, a_t⟩ / ‖a_t‖² along each left direction u: how often the merge counts task t there.

    Args:
        matrix: m x n, the merged update.
        U: m x r, its left singular vectors.
        tau: T x m x n, the task vectors.
        noise: length below which a_t = uᵀτ_t counts as zero, where s is 0.

    Returns:
        T x r.
    """
    merged = U.T @ matrix
    rows = []
    for task in tau:
        own = U.T @ task
        length = own.square().sum(dim=1)
        used = length.sqrt() > noise
        rows.append(torch.where(used, (merged * own).sum(dim=1) / length.where(used, 1.0), 0.0))
    return torch.stack(rows)


def apply(group: TensorGroup, update: Tensor, parameters: SvcParameters, run: Run) -> Tensor:
    """U (γ Σ) Vᵀ of one update, with γ_r = T / Σ_t max(α, s_t) along each left direction."""
    stored = as_matrix(update)
    matrix = orient(group, stored)
    factors = decompose(matrix)
    vectors = run.task_vectors(group).double()
    tau = orient(group, vectors.reshape(len(vectors), *stored.shape))
    noise = resolution(as_matrix(group.origin(run.origin) + update))
    s = coefficients(matrix.double(), factors.U, tau, noise)
    T = len(tau)
    gamma = T / s.clamp_min(parameters.floor / T).sum(dim=0)
    calibrated = (factors.U * (gamma * factors.S)) @ factors.V.T
    return orient(group, calibrated).to(update.dtype).reshape(update.shape)


POSTPROCESSOR = Postprocessor(
    name="svc",
    title="SVC",
    order=11,
    summary="Singular value calibration: scales each direction of a merged update down by how "
    "often the tasks together count it, so that what they share is not counted again and again.",
    formula=r"\sigma_r \leftarrow \gamma_r \sigma_r,\quad "
    r"\gamma_r = T \big/ \textstyle\sum_t \max(\alpha, s_{r,t}),\; "
    r"s_{r,t} = \frac{\langle u_r^\top \Delta, u_r^\top \tau_t \rangle}{\|u_r^\top \tau_t\|^2},\; "
    r"\alpha = 1/T",
    source="Li et al., When shared knowledge hurts, arXiv:2602.05536",
    parameters=SvcParameters,
    apply=apply,
    deviations="The paper's rule; the authors' code has it too (its division by max(α, mean of "
    "s_t) is commented out). A task without a part along a direction, but for rounding, counts "
    "with the floor. τ_t is about the recipe's origin, under its weights. After Iso-C, Iso-CTS or "
    "Subspace Boosting the directions are not determined, there as here: a recipe is warned.",
    along_directions=True,
)

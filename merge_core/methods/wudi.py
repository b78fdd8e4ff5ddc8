"""WUDI: the update that interferes least with every task's own input space."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from merge_core.factors.decomposition import gram
from merge_core.factors.lapack import eigenpairs_above
from merge_core.methods.declaration import Method, MethodParameters, Run, parameter
from merge_core.methods.spectral import AVERAGED, CHOSEN, add_to_origin, task_matrices
from merge_core.task_vectors import TensorGroup

# Eigenvalues below this share of the largest are rounding noise of float64.
ROUNDING = 1e-14
# From this share on the eigenvalues above it are taken for a part of all.
PART = 1e-3
# Adam's constants, PyTorch's defaults.
BETAS = (0.9, 0.999)
EPSILON = 1e-8


class WudiParameters(MethodParameters):
    """Parameters of WUDI.

    The minimum itself is not what the paper's results are: the authors' descent stops after 300
    steps, long before it, and never reaches the weak directions of the inputs. A cut leaves them
    out likewise. On eight sentence experts of a 22 M BERT (base 71.0 %) the minimum gives 67.7 %,
    the descent 82.9 % and a cut of 0.01 83.1 %; on eight experts of a small ViT (base 61.7 %)
    61.4 %, 44.2 % and 76.5 %: the learning rate is in the unit of the weights, a cut is not.
    """

    solver: Literal["closed", "descent"] = parameter(
        "closed",
        "The minimum in closed form, or the authors' descent by Adam from the sum of the task "
        "vectors, which stops early.",
    )
    cut: float = parameter(
        0.01,
        "Eigenvalues of Σ G below this share of the largest are left out of its inverse, in closed "
        "form only. Raising it leaves weak input directions, which few tasks agree on, at the "
        "base; 1e-10 gives the minimum itself, which fits those directions too and merges badly.",
        minimum=0.0,
        maximum=1.0,
        typical="0.01 (as good as the authors' descent, which stops early); 1e-10 for the minimum",
        show=(0, 0.1),
    )
    norm: Literal["squared", "plain"] = parameter(
        "squared",
        "What each task's interference is divided by: the squared norm of its task vector (the "
        "paper) or the norm (the authors' code), which lets strong tasks weigh more.",
    )
    learning_rate: float = parameter(
        1e-5,
        "Adam's learning rate, of the descent only.",
        minimum=0.0,
        maximum=1.0,
        typical="1e-5",
        show=(0, 1e-3),
    )
    steps: int = parameter(
        300,
        "Steps of the descent; more of them come closer to the closed form.",
        minimum=0,
        maximum=100_000,
        typical="300",
        show=(0, 1000),
    )


def normal_equations(tau: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """A = Σ G_i and B = Σ τ_i G_i, with G_i = τ_iᵀτ_i / ‖τ_i‖²_F: the loss is least where X A = B.

    Args:
        tau: T x m x n, float64; a zero task vector counts for nothing.
        norm: ``squared``, or ``plain`` to divide by ‖τ_i‖_F instead.

    Returns:
        n x n and m x n.
    """
    _, m, n = tau.shape
    sizes = torch.linalg.matrix_norm(tau)
    live = sizes > 0
    if not live.all():
        tau, sizes = tau[live], sizes[live]
    units = tau / sizes[:, None, None]
    if norm == "plain":
        units *= sizes[:, None, None].sqrt()
    B = tau.new_zeros(m, n)
    for matrix, unit in zip(tau, units, strict=True):
        # τ (τᵀτ) or (τ τᵀ) τ, of which the smaller matrix is made.
        B += (matrix @ unit.T) @ unit if m < n else matrix @ gram(unit)
    return gram(units.reshape(-1, n)), B


def solve_closed_form(A: Tensor, B: Tensor, cut: float) -> Tensor:
    """B A⁺, m x n: the least-norm minimum.

    Args:
        A: n x n, symmetric, no negative eigenvalues.
        B: m x n.
        cut: eigenvalues up to this share of the largest count as zero (and those that float64
            cannot tell from zero always do).
    """
    if cut >= PART:
        values, rows = eigenpairs_above(A, cut)
    else:
        values, columns = torch.linalg.eigh(A)
        live = values > max(cut, ROUNDING) * values[-1]
        values, rows = values[live], columns[:, live].T
    return (B @ rows.T / values) @ rows


def descend(start: Tensor, A: Tensor, B: Tensor, rate: float, steps: int) -> Tensor:
    """Adam on Σ_i ‖(X − τ_i) τ_iᵀ‖² / ‖τ_i‖², whose gradient is 2 (X A − B), from `start`."""
    X = start.clone()
    first, second = torch.zeros_like(X), torch.zeros_like(X)
    for step in range(1, steps + 1):
        gradient = 2 * (X @ A - B)
        first.lerp_(gradient, 1 - BETAS[0])
        second.lerp_(gradient.square(), 1 - BETAS[1])
        root = (second / (1 - BETAS[1] ** step)).sqrt() + EPSILON
        X -= rate / (1 - BETAS[0] ** step) * first / root
    return X


def merge(group: TensorGroup, parameters: WudiParameters, run: Run) -> Tensor:
    """θ_0 + the update of least interference of one matrix; the average of anything else."""
    if not group.decomposed:
        return group.average
    tau = task_matrices(group, run.origin)
    A, B = normal_equations(tau, parameters.norm)
    if parameters.solver == "closed":
        update = solve_closed_form(A, B, parameters.cut)
    else:
        update = descend(tau.sum(dim=0), A, B, parameters.learning_rate, parameters.steps)
    return add_to_origin(group, run.origin, update)


METHOD = Method(
    name="wudi",
    title="WUDI",
    order=24,
    summary="The update whose difference from each task vector lies as far as possible outside "
    "that task's own input directions, in closed form or by the authors' descent. What is not "
    "decomposed is averaged.",
    formula=r"\theta = \theta_0 + \arg\min_\tau \sum_t \frac{\|(\tau - \tau_t)\, \tau_t^\top\|_F^2}"
    r"{\|\tau_t\|_F^2} = \theta_0 + \Big(\sum_t \tau_t G_t\Big)\Big(\sum_t G_t\Big)^{+},\quad "
    r"G_t = \tau_t^\top \tau_t / \|\tau_t\|_F^2",
    source="Cheng et al., Whoever started the interference should end it, arXiv:2503.08099",
    parameters=WudiParameters,
    merge=merge,
    origins=("base",),
    averaged=AVERAGED,
    deviations="The paper descends 300 steps of Adam, which moves no entry by more than about 300 "
    "learning rates and stops far from the minimum (solver = descent). The default here is the "
    "closed form without the weak directions of Σ G, which regularises as stopping early does, "
    "whatever the unit of the weights; the minimum itself is cut = 1e-10. The authors' code "
    "divides by the norm, not its square: norm = plain. The descent runs in float64. Their ViT "
    "code leaves everything but four matrices of each block at the base, where the rest is "
    f"averaged here. {CHOSEN}",
)

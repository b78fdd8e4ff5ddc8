"""CART with its energy rule: as many directions as carry a share of each vector's energy."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_core.factors.low_rank import sum_of_truncations
from merge_core.methods.cart import warnings
from merge_core.methods.declaration import Method, MethodParameters, Run, parameter
from merge_core.methods.spectral import AVERAGED, energy_rank
from merge_core.task_vectors import TensorGroup


class CartEnergyParameters(MethodParameters):
    """Parameters of CART by energy."""

    energy: float = parameter(
        0.8,
        "Share of Σσ² that the kept directions of each centred task vector reach; all of it gives "
        "the average.",
        minimum=0.0,
        maximum=1.0,
        typical="0.5 to 0.95",
    )
    scale: float = parameter(
        1.0,
        "Scaling coefficient λ of the kept directions; 0 gives the average.",
        minimum=-10,
        maximum=10,
        typical="1 (paper); 1 to 3 as shipped",
        show=(0, 8),
    )


def merge(group: TensorGroup, parameters: CartEnergyParameters, run: Run) -> Tensor:
    """θ_avg + λ Σ_t SVD_{k_t}(C_t) of one matrix; the average of anything else."""
    # All of the centred vectors sum to zero exactly; their rounded factors do not.
    if not group.decomposed or parameters.energy == 1:
        return group.average
    ranks = [energy_rank(S, parameters.energy) for S in group.singular_values("average")]
    terms = group.truncations("average", ranks)
    # Σ_t C_t = 0: what the tails are subtracted from, where they are the smaller product.
    update = sum_of_truncations(terms, ranks, lambda: torch.zeros(1))
    update = update.reshape(group.average.shape)
    return group.average + parameters.scale * update.to(group.average.dtype)


METHOD = Method(
    name="cart_energy",
    title="CART by energy",
    order=26,
    summary="CART whose rank follows each centred task vector's spectrum: the fewest directions "
    "that carry a share of its energy, chosen per task and matrix.",
    formula=r"\theta = \theta_{avg} + \lambda \sum_t \mathrm{SVD}_{k_t}(\theta_t - \theta_{avg}),"
    r"\quad k_t = \min\{k : \textstyle\sum_{i \le k} \sigma_{t,i}^2 \ge \eta \sum_i "
    r"\sigma_{t,i}^2\}",
    source="Choi et al., Revisiting weight averaging for model merging, arXiv:2412.12153; an "
    "option of the authors' code",
    parameters=CartEnergyParameters,
    merge=merge,
    origins=("average",),
    averaged=AVERAGED,
    deviations="The paper fixes a share of the rank (method CART) and gives no default energy. "
    "On eight experts of a small ViT the 8 % of CART carry 0.82 to 0.96 of the energy.",
    warnings=warnings,
)

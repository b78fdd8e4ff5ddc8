"""RegMean and RegMean++: each linear layer as the least-squares fit to all experts' outputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from merge_core.methods.blockwise import merge_entrywise
from merge_core.methods.declaration import Method, MethodParameters, Run, parameter
from merge_core.task_vectors import TensorGroup

# Eigenvalues below this share of the largest are rounding of float32 activations.
CUT = 1e-10


class RegmeanParameters(MethodParameters):
    """Parameters of RegMean and RegMean++."""

    off_diagonal: float = parameter(
        0.95,
        "Factor of the off-diagonal entries of each Gram matrix; 1 is the least-squares fit "
        "itself, 0 weighs every input channel by itself.",
        minimum=0.0,
        maximum=1.0,
        typical="0.9 to 0.95",
    )
    examples: int = parameter(
        256,
        "Images (or texts) of each task's validation split, drawn by the seed, whose activations "
        "are used.",
        minimum=1,
        maximum=100_000,
        typical="256",
        show=(16, 512),
    )
    gram: Literal["sum", "mean"] = parameter(
        "sum",
        "A task's Gram matrix: XᵀX (the paper), in which a task with more inputs counts more, or "
        "XᵀX over the number of its rows (the authors' code), in which every task counts alike.",
        later=True,
    )


@dataclass
class NormalEquations:
    """The least-squares problem of one layer: its update X about W_avg solves X A = B.

    Attributes:
        A: Σ_t G_t, n x n.
        B: Σ_t (W_t − W_avg) G_t, m x n.
    """

    A: Tensor
    B: Tensor

    def add(self, offset: Tensor, gram: Tensor, factor: float) -> None:
        """Count one expert in.

        Args:
            offset: W_t − W_avg, m x n, float64.
            gram: X_tᵀX_t of the layer's inputs (rows are tokens or images), n x n, float64.
            factor: of its off-diagonal entries.
        """
        reduced = factor * gram + (1 - factor) * gram.diagonal().diag()
        self.A += reduced
        self.B += offset @ reduced

    def solve(self) -> Tensor:
        """B A⁺, m x n; directions in which no input lies stay at the average."""
        size = self.A.diagonal().clamp_min(0).sqrt()
        scale = 1 / torch.where(size > 0, size, 1.0)
        # Channels differ by orders of magnitude; scaled to a unit diagonal, the cut spares them.
        values, vectors = torch.linalg.eigh(self.A * scale * scale[:, None])
        live = values > CUT * values[-1]
        inverse = torch.where(live, 1 / torch.where(live, values, 1.0), 0.0)
        update = (self.B * scale @ vectors * inverse) @ vectors.T * scale
        # The scaling left a part along the null space of A, which is that of the scaled one, bent.
        null, _ = torch.linalg.qr(scale[:, None] * vectors[:, ~live])
        return update - update @ null @ null.T


def no_equations(rows: int, columns: int) -> NormalEquations:
    """The problem of an m x n layer before any expert is counted in."""
    zeros = torch.zeros(rows + columns, columns, dtype=torch.float64)
    return NormalEquations(zeros[:columns], zeros[columns:])


def merge(group: TensorGroup, parameters: RegmeanParameters, run: Run) -> Tensor:
    """W_avg + the learnt update of one linear layer's weight; the average of anything else.

    Args:
        group: the parameter.
        parameters: of the method.
        run: its state holds the update of each linear layer's weight, m x n, by name.
    """
    update = run.state.get(group.name)
    if update is None:
        return group.average
    learnt = update.reshape(-1)

    def moved(tau: Tensor, part: slice) -> Tensor:
        return (tau.double().mean(dim=0) + learnt[part]).to(tau.dtype)

    return merge_entrywise(group, replace(run, origin="average"), moved)


FORMULA = (
    r"W = \Big(\sum_t W_t G_t\Big)\Big(\sum_t G_t\Big)^{-1},\quad G_t = \alpha X_t^\top X_t + "
    r"(1 - \alpha)\, \mathrm{diag}(X_t^\top X_t)"
)
AVERAGED = (
    "everything but the weights of linear layers: biases, norms, embeddings, convolutions (the "
    "patch embedding too), attention in one module of PyTorch's own, GPT-2's layers (Conv1D)"
)
DATA = (
    "The inputs come from the validation split, not the training data. Directions in which no "
    "input lies, for which the formula has no inverse, stay at the average. The authors' code "
    "divides each Gram matrix by its rows: gram = mean."
)

METHODS = (
    Method(
        name="regmean",
        title="RegMean",
        order=51,
        summary="Each linear layer becomes the least-squares fit to the outputs of all experts' "
        "layers, each on the inputs that its own expert gives it.",
        formula=FORMULA,
        source="Jin et al., Dataless knowledge fusion by merging weights of language models, "
        "arXiv:2212.09849, equation 2 and section 4.3",
        parameters=RegmeanParameters,
        merge=merge,
        draws="the inputs, where a task has more than `examples`",
        learns="regmean",
        data="inputs",
        averaged=AVERAGED,
        deviations=DATA,
    ),
    Method(
        name="regmean_plus_plus",
        title="RegMean++",
        order=52,
        summary="RegMean from the first block to the last, where the inputs of a block are what "
        "the merged blocks before it give, so that a layer is fitted to what it will see.",
        formula=FORMULA + r",\quad X_t\ \text{from the merged blocks before}",
        source="Nguyen et al., RegMean++, arXiv:2508.03121",
        parameters=RegmeanParameters,
        merge=merge,
        draws="the inputs, where a task has more than `examples`",
        learns="regmean_plus_plus",
        data="inputs",
        averaged=AVERAGED,
        deviations="Within a block, each expert's own layers pass the merged block's inputs on, "
        "as in the paper and its code. " + DATA,
    ),
)

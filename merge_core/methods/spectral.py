"""What the spectral methods share: task vectors as exact matrices, and what rounding leaves."""

from __future__ import annotations

from torch import Tensor

from merge_core.factors.low_rank import as_matrix
from merge_core.means import centre
from merge_core.task_vectors import Origin, TensorGroup

AVERAGED = (
    "everything but the weights of inner linear layers (attention, MLP, …) and convolution "
    "kernels; the patch embedding is averaged too"
)
CHOSEN = (
    "Which tensors are decomposed is the suite's choice (`decompose`, `average`): convolution "
    "kernels by default, but not CLIP's positional embedding and projections."
)
AUTHORS_TENSORS = (
    f"{CHOSEN} The authors' code does the opposite: it decomposes every 2-D tensor but "
    "text_projection (the positional embedding and visual.proj too) and averages 4-D kernels."
)
# Singular values below this share of the largest one are rounding noise of float64.
DEAD = 1e-12


def task_matrices(group: TensorGroup, origin: Origin) -> Tensor:
    """T x m x n, float64: each θ_t − origin as a matrix (out x in)."""
    exact = origin == "average"
    vectors = centre(group.experts) if exact else group.experts.double() - group.base.double()
    return orient(group, vectors.reshape(len(vectors), *as_matrix(vectors[0]).shape))


def orient(group: TensorGroup, matrices: Tensor) -> Tensor:
    """Matrices of a parameter as out x in, given as they are stored; or the other way round.

    Only methods for which outputs differ from inputs need it: transposed matrices have the same
    singular values.
    """
    return matrices.mT if group.stored_transposed else matrices


def add_to_origin(group: TensorGroup, origin: Origin, update: Tensor) -> Tensor:
    """shape of one expert: origin + an update given as an m x n float64 matrix."""
    start = group.origin(origin)
    return (start.double() + orient(group, update).reshape(start.shape)).to(start.dtype)


def energy_rank(S: Tensor, share: float) -> int:
    """The smallest k ≥ 1 with Σ_{i≤k} σ_i² ≥ share · Σ σ_i²; 0 where all σ are zero.

    A matrix of zeros has rank 0 and is reached by no direction at all: whichever were kept would
    be one that rounding chose.

    Args:
        S: r singular values, descending; r may be 0.
        share: part of the energy, in [0, 1].

    Raises:
        ValueError: share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; a part of the energy lies in [0, 1]")
    reached = S.double().square().cumsum(dim=0)
    if not reached.any():
        return 0
    return int((reached >= share * reached[-1]).int().argmax()) + 1


def factored_bytes(group: TensorGroup, k: int) -> int:
    """Bytes of one parameter for all tasks, each number in two, where the task is known.

    A matrix: its origin once, and k triplets of m + n + 1 numbers for each task, or the task's
    whole matrix where that is smaller. Anything else: each expert's own.

    Args:
        group: the parameter.
        k: directions kept of each task.
    """
    tasks = len(group.tasks)
    if not group.decomposed:
        return 2 * tasks * group.info.numel
    m, n = group.info.matrix_shape
    return 2 * (m * n + tasks * min(k * (m + n + 1), m * n))

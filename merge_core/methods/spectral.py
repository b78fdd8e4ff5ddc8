"""What the spectral methods share: task vectors as exact matrices, and what rounding leaves."""

from __future__ import annotations

from torch import Tensor

from merge_core import linalg
from merge_core.linalg import as_matrix
from merge_core.task_vectors import Origin, ParameterGroup

AVERAGED = "everything but the weight matrices of attention and MLP"
# Singular values below this share of the largest one are rounding noise of float64.
DEAD = 1e-12


def task_matrices(group: ParameterGroup, origin: Origin) -> Tensor:
    """T x m x n, float64: each θ_t − origin as a matrix (out x in)."""
    vectors = group.experts.double() - group.origin(origin).double()
    return oriented(group, vectors.reshape(len(vectors), *as_matrix(vectors[0]).shape))


def oriented(group: ParameterGroup, matrices: Tensor) -> Tensor:
    """Matrices of a parameter as out x in, given as they are stored; or the other way round.

    Only methods for which outputs differ from inputs need it: transposed matrices have the same
    singular values.
    """
    return matrices.mT if group.in_by_out else matrices


def moved(group: ParameterGroup, origin: Origin, update: Tensor) -> Tensor:
    """shape of one expert: origin + an update given as an m x n float64 matrix."""
    start = group.origin(origin)
    return (start.double() + oriented(group, update).reshape(start.shape)).to(start.dtype)


def matrix_shape(group: ParameterGroup) -> tuple[int, int]:
    """m and n of a decomposed parameter as the matrix (out x in)."""
    return linalg.matrix_shape(group.info.shape)


def factored_bytes(group: ParameterGroup, k: int) -> int:
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
    m, n = matrix_shape(group)
    return 2 * (m * n + tasks * min(k * (m + n + 1), m * n))

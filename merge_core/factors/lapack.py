"""LAPACK's eigensolver for symmetric matrices, side by side on several threads.

scipy's own call holds Python's lock while it works, for seconds at 4,096, and torch's finds all
eigenvectors, which costs a CART merge of eight ViT-B/32 a fifth more processor time.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

POWERS = 8
SLACK = 1e-6  # of bounds that rounding must not make too narrow
_BLOCK = 64  # columns that LAPACK takes at a time, at most


def leading_eigenpairs(G: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of a symmetric matrix and their eigenvectors.

    Args:
        G: n x n, float32 or float64, on the CPU, finite.
        count: how many, 1 to n; 0 for all eigenvalues without vectors.

    Returns:
        Values, descending, and vectors, count x n, orthonormal rows.

    Raises:
        ArithmeticError: LAPACK does not find them.

    Source: syevr, https://www.netlib.org/lapack/explore-html/, through scipy's table,
    https://docs.scipy.org/doc/scipy/reference/linalg.cython_lapack.html.
    """
    n = G.shape[0]
    values, vectors = _syevr(G, count, "I" if count else "A", (n - count + 1, n), (0.0, 0.0))
    if len(values) != (count or n):
        raise ArithmeticError(f"LAPACK finds {len(values)} of {count or n} eigenvalues")
    return values, vectors


def eigenpairs_above(G: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The eigenvalues of a symmetric matrix above a share of the largest, and their eigenvectors.

    Where they are a part of all, their vectors take a part of the work.

    Args:
        G: n x n, no negative eigenvalues, float32 or float64, on the CPU, finite.
        share: at least that of rounding.

    Returns:
        Values, descending, and vectors, one a row, orthonormal; none of a matrix of zeros.

    Raises:
        ArithmeticError: LAPACK does not find them.

    Example:
        >>> values, vectors = eigenpairs_above(torch.diag(torch.tensor([9.0, 4.0, 0.5])), 0.1)
        >>> values, vectors.abs()
        (tensor([9., 4.]), tensor([[1., 0., 0.],
                [0., 1., 0.]]))
    """
    n, most = G.shape[0], float(torch.linalg.matrix_norm(G))
    if not most:
        return G.new_zeros(0), G.new_zeros(0, n)
    # Power iteration comes close to the largest eigenvalue from below: what lies under its share
    # is none that is asked for, and the largest one found says which of the others are.
    x = G[:, int(G.diagonal().argmax())]
    for _ in range(POWERS):
        x = G @ (x / x.norm())
    lowest = share * float(x.norm()) * (1 - SLACK)
    values, vectors = _syevr(G, n, "V", (1, n), (lowest, most * (1 + SLACK)))
    live = values > share * values[0]
    return values[live], vectors[live]


def _syevr(
    G: Tensor, count: int, range_: str, places: tuple[int, int], limits: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, of a range of places or values, with at most `count` vectors."""
    n, dtype = G.shape[0], G.dtype
    square = G.contiguous().clone()  # it is overwritten; symmetric, so rows may be columns
    values, vectors = torch.empty(n, dtype=dtype), torch.empty(count, n, dtype=dtype)
    support, found = torch.empty(2 * n, dtype=torch.int32), ctypes.c_int(0)
    work = torch.empty((_BLOCK + 26) * n, dtype=dtype)
    integers = torch.empty(10 * n, dtype=torch.int32)
    real = ctypes.c_float if dtype == torch.float32 else ctypes.c_double
    status = ctypes.c_int(0)
    low, high = (ctypes.byref(real(limit)) for limit in limits)
    _routine("ssyevr" if dtype == torch.float32 else "dsyevr")(
        _char(b"V" if count else b"N"), _char(range_.encode()), _char(b"L"), _int(n),
        _pointer(square), _int(n), low, high,
        _int(places[0]), _int(places[1]), ctypes.byref(real(0)), ctypes.byref(found),
        _pointer(values), _pointer(vectors), _int(n), _pointer(support), _pointer(work),
        _int(work.numel()), _pointer(integers), _int(integers.numel()), ctypes.byref(status),
    )  # fmt: skip
    if status.value:
        raise ArithmeticError(f"LAPACK ends with {status.value}")
    return values[: found.value].flip(0), vectors[: found.value].flip(0)


def _char(letter: bytes) -> Any:
    return ctypes.byref(ctypes.c_char(letter))


def _int(number: int) -> Any:
    return ctypes.byref(ctypes.c_int(number))


def _pointer(tensor: Tensor) -> Any:
    return ctypes.c_void_p(tensor.data_ptr())


@lru_cache(maxsize=2)
def _routine(name: str) -> Any:
    """A routine of scipy's table; ctypes lets other threads run meanwhile."""
    from scipy.linalg import cython_lapack

    _limit_blas_threads()
    capsule = cython_lapack.__pyx_capi__[name]
    get_name = ctypes.pythonapi.PyCapsule_GetName
    get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype = ctypes.c_void_p
    get_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    address = get_pointer(capsule, get_name(capsule))
    assert address is not None
    return ctypes.CFUNCTYPE(None)(address)


def _limit_blas_threads() -> None:
    """Matrices are worked on side by side: their BLAS must not start threads of its own.

    The number belongs to the process, so it is set for good, of scipy's own library only where
    it has one.
    """
    from threadpoolctl import ThreadpoolController

    libraries = ThreadpoolController().select(user_api="blas")
    paths = [Path(library["filepath"]) for library in libraries.info()]
    own = [str(path) for path in paths if "scipy" in str(path.parent)]
    (libraries.select(filepath=own) if own else libraries).limit(limits=1)

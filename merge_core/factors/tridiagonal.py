"""Symmetric matrices reduced to tridiagonal form, and leading eigenvectors made from it.

The reduction costs a third of all eigenvectors; once kept, it gives any number of them. LAPACK's
routines are reached through scipy's table of them, without Python's lock while they work.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_WORK = 64  # columns that LAPACK takes at a time, at most


@dataclass(frozen=True)
class Reduction:
    """G = Q T Qᵀ, T tridiagonal, Q a product of reflections.

    Attributes:
        reflectors: n(n + 1)/2, float32: the columns of the lower triangle, one after another.
        tau: their factors, n − 1.
        diagonal: of T, n, float64.
        beside: of T, next to the diagonal, n − 1, float64.
        eigenvalues: of T, n, float64, ascending.
    """

    reflectors: Tensor
    tau: Tensor
    diagonal: Tensor
    beside: Tensor
    eigenvalues: Tensor

    def eigenvectors(self, first: int, stop: int) -> Tensor:
        """Eigenvectors in descending order of their eigenvalues.

        Those of T are made by inverse iteration in float64, so that float32 enters by Q alone.

        Args:
            first, stop: which, counted from the largest eigenvalue.

        Returns:
            (stop − first) x n, float32, orthonormal rows.

        Raises:
            ArithmeticError: an iteration fails.

        Source: LAPACK's dstein, stpttr and sormtr, https://www.netlib.org/lapack/explore-html/.
        """
        n, count = len(self.diagonal), stop - first
        values = self.eigenvalues[n - stop : n - first].contiguous()
        block, ends = torch.ones(count, dtype=torch.int32), torch.zeros(n, dtype=torch.int32)
        ends[0] = n
        Z = torch.empty(count, n, dtype=torch.float64)
        work, integers = torch.empty(5 * n, dtype=torch.float64), torch.empty(n, dtype=torch.int32)
        failed = torch.empty(count, dtype=torch.int32)
        status = _call(
            "dstein", n, self.diagonal, self.beside, count, values, block, ends,
            Z, n, work, integers, failed,
        )  # fmt: skip
        # Entries fade beyond what float32 holds: such numbers take a processor ten times as long.
        if status:
            raise ArithmeticError(f"{status} of {count} inverse iterations fail")
        return self._turned(torch.hardshrink(Z.flip(0), 1e-20).float())

    def _turned(self, X: Tensor, *, back: bool = False) -> Tensor:
        """Q (Qᵀ to turn back) applied to each row of X, p x n, float32."""
        p, n = X.shape
        X = X.contiguous().clone()
        square = torch.empty(n, n)
        status = _call("stpttr", b"L", n, self.reflectors, square, n)
        assert status == 0
        work = torch.empty(max(1, p) * _WORK + _WORK * _WORK)
        status = _call(
            "sormtr", b"L", b"L", b"T" if back else b"N", n, p, square, n, self.tau, X, n, work,
            work.numel(),
        )  # fmt: skip
        assert status == 0
        return X

    def times(self, X: Tensor) -> Tensor:
        """Q T Qᵀ applied to each row of X, p x n, float32."""
        Y = self._turned(X, back=True).double()
        product = Y * self.diagonal
        product[:, 1:] += Y[:, :-1] * self.beside
        product[:, :-1] += Y[:, 1:] * self.beside
        return self._turned(product.float())


def reduced(G: Tensor) -> Reduction:
    """The tridiagonal form and the eigenvalues of a symmetric matrix.

    Args:
        G: n x n, float32, on the CPU, finite.

    Raises:
        ArithmeticError: the eigenvalues are not found.

    Source: LAPACK's ssytrd, strttp and dsterf, https://www.netlib.org/lapack/explore-html/.
    """
    n = G.shape[0]
    square = G.contiguous().clone()  # symmetric: rows for columns
    d, e, tau = torch.empty(n), torch.empty(n - 1), torch.empty(n - 1)
    work = torch.empty(n * _WORK)
    status = _call("ssytrd", b"L", n, square, n, d, e, tau, work, work.numel())
    assert status == 0
    reflectors = torch.empty(n * (n + 1) // 2)
    status = _call("strttp", b"L", n, square, n, reflectors)
    assert status == 0
    # In float32 this step alone would lose a digit and a half.
    diagonal, beside = d.double(), e.double()
    eigenvalues = diagonal.clone()
    if _call("dsterf", n, eigenvalues, beside.clone()):
        raise ArithmeticError("the eigenvalues of a tridiagonal matrix are not found")
    return Reduction(reflectors, tau, diagonal, beside, eigenvalues)


def _call(name: str, *arguments: Any) -> int:
    """A LAPACK routine with its arguments by reference; its status, which comes last."""
    status = ctypes.c_int(0)
    held: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            held.append(ctypes.c_void_p(argument.data_ptr()))
        elif isinstance(argument, bytes):
            held.append(ctypes.byref(ctypes.c_char(argument)))
        else:
            held.append(ctypes.byref(ctypes.c_int(argument)))
    _routine(name)(*held, ctypes.byref(status))
    return status.value


@lru_cache(maxsize=8)
def _routine(name: str) -> Any:
    """A routine of scipy's table; ctypes lets other threads run meanwhile.

    Source: https://docs.scipy.org/doc/scipy/reference/linalg.cython_lapack.html.
    """
    from scipy.linalg import cython_lapack

    _one_thread()
    capsule = cython_lapack.__pyx_capi__[name]
    get_name = ctypes.pythonapi.PyCapsule_GetName
    get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype = ctypes.c_void_p
    get_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    address = get_pointer(capsule, get_name(capsule))
    assert address is not None
    return ctypes.CFUNCTYPE(None)(address)


@lru_cache(maxsize=1)
def _one_thread() -> None:
    """Matrices are worked on side by side: their BLAS must not start threads of its own.

    The number belongs to the process, so it is set for good, of scipy's own library only where
    it has one.
    """
    from threadpoolctl import ThreadpoolController

    libraries = ThreadpoolController().select(user_api="blas")
    paths = [Path(library["filepath"]) for library in libraries.info()]
    own = [str(path) for path in paths if "scipy" in str(path.parent)]
    (libraries.select(filepath=own) if own else libraries).limit(limits=1)

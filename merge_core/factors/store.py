"""Decompositions of task vectors, made once and kept: in memory, and on disk by content.

A decomposition is known by the digests of the checkpoint and of the origin it is taken about, and
the parameter's name, so that another rank, scale or page does not decompose again. Only the short
side is stored; the long one is a product with the task vector itself.
"""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from cachetools import LRUCache
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from merge_core.bounded_folder import BoundedFolder
from merge_core.devices import CPU, Device, compute
from merge_core.factors.decomposition import (
    Route,
    Side,
    is_clear,
    leading_side,
    singular_values,
    whole_side,
)
from merge_core.factors.low_rank import (
    ORTHONORMAL,
    Directions,
    Truncations,
    complete,
    product,
    product_by_rows,
)
from merge_core.files import cache_dir, digest_of, factors_limit
from merge_core.work_sizes import LEADING_SHARES, SMALL

FORMAT = "factors-4"
# What SVD_k of a task vector may be off by, relative to its norm.
TOLERANCE = 1e-4
LOOK_EVERY = 256 << 20


@dataclass(frozen=True)
class TaskMatrix:
    """One task vector's matrix, made a few rows at a time when it is asked for.

    Attributes:
        key: its content: digests of expert and origin, and the parameter's name.
        shape: m, n.
        dtype: that it can be made in at least, float32 or float64.
        tall: makes rows of it, of its transpose where m ≤ n.
        floor: gives the singular value up to which the stored numbers resolve nothing.
        there: makes all rows on an accelerator, where the CPU need not make them.
    """

    key: tuple[str, str, str]
    shape: tuple[int, int]
    dtype: torch.dtype
    tall: Callable[[torch.dtype, slice], Tensor]
    floor: Callable[[], float]
    there: Callable[[torch.dtype, Device], Tensor] | None = None

    def whole(self, device: Device) -> Tensor:
        """All rows of the taller of the matrix and its transpose, on a device."""
        if device.accelerates and self.there is not None:
            return self.there(self.dtype, device)
        return device.send(self.tall(self.dtype, slice(None)))


class FactorStore:
    """Decompositions by content key, on disk as float32 safetensors and in memory up to a limit.

    Several threads and processes may share one folder: files appear whole or not at all, and the
    least recently used go first when there are too many.

    Args:
        folder: where files lie; None for ``factors/`` in the cache folder.
        memory_bytes: limit of what is kept in memory; the least recently used goes first.
        route: how whole matrices are decomposed (see
            :func:`merge_core.factors.decomposition.whole_side`); with ``"svd"`` every one is.
        disk_bytes: limit of the folder; ``$MERGESCOPE_FACTORS_GB``, else 20 GiB when None.

    Attributes:
        decompositions: how many were made.
    """

    def __init__(
        self,
        folder: Path | None = None,
        memory_bytes: int = 128 << 20,
        route: Route = "gram",
        disk_bytes: int | None = None,
    ) -> None:
        self.folder = cache_dir() / "factors" if folder is None else folder
        self.route = route
        self.decompositions = 0
        limit = factors_limit() if disk_bytes is None else disk_bytes
        self._files = BoundedFolder(self.folder, limit, ".safetensors", LOOK_EVERY)
        self._memory: LRUCache[str, Side] = LRUCache(memory_bytes, _count_bytes)
        self._lock = threading.Lock()

    def singular_values(self, matrix: TaskMatrix) -> Tensor:
        """All r singular values, float32, each right to float32's precision (3e-8 of the first)."""
        side = self._find(matrix, self.route)
        if side is None and (self.route == "svd" or min(matrix.shape) < SMALL):
            side = self._get(matrix, self.route)
        return (side or self._get(matrix, "values")).S

    def truncations(self, matrix: TaskMatrix, k: int) -> Truncations:
        """SVD_k of a matrix, to within :data:`TOLERANCE` of its norm, and perhaps at other ranks.

        Of a large matrix a share of its directions is found in float32. Where that cannot tell
        kept from dropped ones (close singular values, or far below the first), all of them are
        in float64.

        Args:
            matrix: of a task vector.
            k: how many directions must be within reach.
        """
        r = min(matrix.shape)
        tall = partial(matrix.tall, torch.float32)
        side = self._find(matrix, self.route)
        if side is None and self._is_large(matrix):
            count = next((r // share for share in LEADING_SHARES if k < r // share), None)
            if count is not None:
                with suppress(ArithmeticError):
                    part, long = self._lead(matrix, count, k)
                    terms = Truncations(part.vectors, part.errors, matrix.shape, tall, False, long)
                    if terms.error(k) <= TOLERANCE:
                        return terms
        side = side or self._get(matrix, self.route)
        return Truncations(side.vectors, side.errors, matrix.shape, tall, True)

    def directions(self, matrix: TaskMatrix, k: int | None = None) -> Directions:
        """Leading directions, each right by itself, float32; those that carry nothing are dropped.

        Args:
            matrix: of a task vector.
            k: how many at most; all when None.
        """
        side, floor = self._get(matrix, self.route), matrix.floor()
        if self.route == "gram" and not is_clear(side.S[:k], floor):
            side = self._get(matrix, "svd")
        S = side.S[:k].double()
        live = S > max(floor, torch.finfo(torch.float64).eps * max(matrix.shape) * float(S[0]))
        rows, S = side.vectors[:k][live].double(), S[live]
        # In float64: what rounds here is measured by the first singular value, not by the own.
        weighted = product(partial(matrix.tall, torch.float64), max(matrix.shape), rows.T)
        wide = operator.le(*matrix.shape)

        def work(device: Device) -> Directions:
            there = [device.send(part) for part in (rows, S, weighted)]
            found = complete(there[0], there[1], there[2], wide, defect=ORTHONORMAL)
            return found.fetch(device)

        found = work(CPU) if min(matrix.shape) < SMALL else compute(work, exact=True)
        return Directions(found.U.float(), found.S.float(), found.V.float())

    def _is_large(self, matrix: TaskMatrix) -> bool:
        """Whether float32 is worth its care."""
        exact = self.route == "svd" or matrix.dtype == torch.float64
        return min(matrix.shape) >= SMALL and not exact

    def _get(self, matrix: TaskMatrix, kind: str) -> Side:
        """One kind of decomposition, made if it was never made before.

        Raises:
            ArithmeticError: LAPACK fails.
        """
        return self._find(matrix, kind) or self._make(matrix, kind, 0)[0]

    def _lead(self, matrix: TaskMatrix, count: int, k: int) -> tuple[Side, Tensor | None]:
        """Leading directions; the long side of the first k too, while the matrix is at hand."""
        kind = f"leading-{count}"
        side = self._find(matrix, kind)
        if side is not None:
            return side, None
        return self._make(matrix, kind, k)

    def _make(self, matrix: TaskMatrix, kind: str, k: int) -> tuple[Side, Tensor]:
        """A decomposition, kept; and the long side of its first k directions."""
        small = min(matrix.shape) < SMALL

        def work(device: Device) -> tuple[Side, Tensor]:
            B = matrix.whole(device)
            side = _decompose(B, kind)
            X = side.vectors[:k].T
            long = B @ X if device.accelerates else product_by_rows(B.__getitem__, len(B), X)
            fetched = {name: device.fetch(tensor) for name, tensor in vars(side).items()}
            return Side(**fetched), device.fetch(long)

        side, long = work(CPU) if small else compute(work, exact=True)
        side = self._keep(self._key(matrix, kind), side)
        with self._lock:
            self.decompositions += 1
        return side, long

    def _find(self, matrix: TaskMatrix, kind: str) -> Side | None:
        """What is stored of a matrix, in memory or on disk."""
        key = self._key(matrix, kind)
        with self._lock:
            side = self._memory.get(key)
        if side is not None:
            return side
        side = self._read(key)
        if side is None or not _is_sound(side, min(matrix.shape)):
            # Absent, written by a killed process or damaged since: made afresh and replaced.
            return None
        self._remember(key, side)
        return side

    @staticmethod
    def _key(matrix: TaskMatrix, kind: str) -> str:
        return digest_of(FORMAT, kind, *matrix.key)

    def _keep(self, key: str, side: Side) -> Side:
        """Write to disk; what was written, whose pages can be dropped by the system."""
        self._files.write(key, save(vars(side)))
        side = self._read(key) or side
        self._remember(key, side)
        return side

    def _read(self, key: str) -> Side | None:
        path = self._files.path(key)
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                side = Side(**{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            os.utime(path)
        except (SafetensorError, OSError, TypeError):
            return None
        return side

    def _remember(self, key: str, side: Side) -> None:
        with self._lock, suppress(ValueError):  # larger than all that may be held
            self._memory[key] = side


def _decompose(B: Tensor, kind: str) -> Side:
    """A decomposition of one kind: of all directions by a route, of leading ones, or values."""
    if kind.startswith("leading-"):
        return leading_side(B, int(kind.removeprefix("leading-")))
    if kind == "values":
        S = singular_values(B).float()
        return Side(S.new_empty(0, len(S)), S, S.new_empty(0))
    return whole_side(B, "svd" if kind == "svd" else "gram")


def _is_sound(side: Side, r: int) -> bool:
    """Whether what was stored can be a decomposition: unit vectors, finite descending values."""
    vectors, S, errors = side.vectors, side.S, side.errors
    if {tensor.dtype for tensor in vars(side).values()} != {torch.float32}:
        return False
    if vectors.ndim != 2 or vectors.shape[1] != r or S.shape not in {(r,), (len(vectors),)}:
        return False
    if errors.shape != (len(vectors),) or not bool((errors >= 0).all()):
        return False
    ordered = bool((S[:-1] >= S[1:]).all() and S.isfinite().all())
    return ordered and bool(((vectors.norm(dim=1) - 1).abs() < 1e-3).all())


def _count_bytes(side: Side) -> int:
    return sum(tensor.nbytes for tensor in vars(side).values())

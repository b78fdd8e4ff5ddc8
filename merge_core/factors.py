"""Factors of task vectors, computed once and kept: in memory, and on disk by content.

Changing the rank or the scale of a merge never decomposes again: a factor is known by the
digests of the checkpoint and of the origin it is taken about, and the parameter's name. Only the
short side is stored; the long one is a product with the task vector itself.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from merge_core.decomposition import Route, Side, cut, short_side
from merge_core.errors import OutputError
from merge_core.files import cache_dir, digest_of, evict, write_atomically
from merge_core.linalg import SMALL, SideFactors

FORMAT = "factors-2"
# What SVD_k of a task vector may be off by, relative to its norm; the estimate is rarely too low.
TOLERANCE = 5e-5
DISK_BYTES = 20 << 30
LOOK_EVERY = 256 << 20

Tall = Callable[[torch.dtype, slice], Tensor]


def _sound(side: Side) -> bool:
    """Whether what was stored can be a decomposition: unit vectors, finite descending values."""
    vectors, S = side.vectors, side.S
    if vectors.ndim != 2 or S.ndim != 1 or not 0 <= vectors.shape[0] <= S.numel():
        return False
    ordered = bool((S[:-1] >= S[1:]).all() and S.isfinite().all())
    return ordered and bool(((vectors.norm(dim=1) - 1).abs() < 1e-3).all())


class FactorStore:
    """Factors by content key, on disk as float32 safetensors and in memory up to a limit.

    Several threads and processes may share one folder: files appear whole or not at all, and the
    least recently used go first when there are too many.

    Args:
        folder: where files lie; None for ``factors/`` in the cache folder.
        memory_bytes: limit of what is kept in memory; the least recently used goes first.
        route: how matrices are decomposed (see :func:`merge_core.decomposition.short_side`).
        disk_bytes: limit of the folder; ``$MERGESCOPE_FACTORS_GB``, else 20 GiB when None.
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
        self._disk_limit = _disk_limit() if disk_bytes is None else disk_bytes
        self._written = 0
        self._limit = memory_bytes
        self._held = 0
        self._memory: OrderedDict[str, Side] = OrderedDict()
        self._lock = threading.Lock()

    def get(
        self,
        member: str,
        origin: str,
        parameter: str,
        tall: Tall,
        shape: tuple[int, int],
        k: int | None = None,
    ) -> SideFactors:
        """The factors of one task vector's matrix, decomposed only if never seen before.

        Args:
            member: content digest of the expert.
            origin: content digest of what it is taken about (the base, or all experts averaged).
            parameter: the parameter's name.
            tall: makes rows of the m x n matrix, of its transpose where m ≤ n, in float32 or
                float64.
            shape: m, n.
            k: how many leading directions must span their space to within a relative error of
                SVD_k of about 1e-4; where float32 does not reach that (close singular values),
                the matrix is decomposed once more in float64. None asks for values and single
                directions only.

        Returns:
            Factors in float32.
        """
        key = digest_of(FORMAT, self.route, member, origin, parameter)
        path = self.folder / key[:2] / f"{key}.safetensors"
        side = self._remembered(key)
        if side is None:
            side = self._read(path, shape) or self._made(path, tall, torch.float32, shape)
            self._remember(key, side)
        rows = partial(tall, torch.float32)
        if side.noise == 0:
            return SideFactors(side.vectors, side.S, shape, rows)
        if k is None:  # no number of leading directions was asked for
            return SideFactors(side.vectors, side.S, shape, rows, sure_at=0)
        ready = cut(side, rows, max(shape), k, TOLERANCE)
        if ready.error > TOLERANCE:
            side = self._made(path, tall, torch.float64, shape)
            self._remember(key, side)
            return SideFactors(side.vectors, side.S, shape, rows)
        factors = SideFactors(ready.side.vectors, side.S, shape, rows, sure_at=k)
        if ready.long is not None:
            factors.weigh(ready.long)
        return factors

    def _made(self, path: Path, tall: Tall, dtype: torch.dtype, shape: tuple[int, int]) -> Side:
        """Decompose, and keep on disk."""
        B = tall(dtype, slice(None))
        A = (B.T if shape[0] <= shape[1] else B).to(_device(B))
        side = short_side(A, self.route)
        with self._lock:
            self.decompositions += 1
        data = save({"vectors": side.vectors, "S": side.S}, {"noise": repr(side.noise)})
        # A full or read-only cache costs time, never the result.
        with suppress(OutputError):
            write_atomically(path, data)
            self._make_room(len(data))
        return self._read(path, shape) or side  # the file's pages can be dropped by the system

    def _make_room(self, written: int) -> None:
        """Evict what was not used for longest, now and then."""
        with self._lock:
            self._written += written
            due = self._written >= min(LOOK_EVERY, self._disk_limit // 4)
            if due:
                self._written = 0
        if due:
            with suppress(OSError):
                evict(self.folder, self._disk_limit)

    def _read(self, path: Path, shape: tuple[int, ...]) -> Side | None:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                noise = float((file.metadata() or {})["noise"])
                side = Side(file.get_tensor("vectors"), file.get_tensor("S"), noise)
            os.utime(path)
        except (SafetensorError, OSError, KeyError, ValueError):
            # Absent, written by a killed process or damaged since: computed afresh and replaced.
            return None
        fits = side.S.shape == (min(shape),) and side.vectors.shape[1:] == (min(shape),)
        return side if fits and _sound(side) else None

    def _remembered(self, key: str) -> Side | None:
        with self._lock:
            if key in self._memory:
                self._memory.move_to_end(key)
            return self._memory.get(key)

    def _remember(self, key: str, side: Side) -> None:
        with self._lock:
            self._held -= _size(self._memory.pop(key, None))
            if _size(side) > self._limit:
                return
            self._memory[key] = side
            self._held += _size(side)
            while self._held > self._limit:
                _, old = self._memory.popitem(last=False)
                self._held -= _size(old)


def _size(side: Side | None) -> int:
    return 0 if side is None else side.vectors.nbytes + side.S.nbytes


def _disk_limit() -> int:
    """Bytes from ``$MERGESCOPE_FACTORS_GB``; the default where it is not a number."""
    with suppress(KeyError, ValueError, OverflowError):
        return int(float(os.environ["MERGESCOPE_FACTORS_GB"]) * (1 << 30))
    return DISK_BYTES


def _device(A: Tensor) -> torch.device:
    """Where a matrix is decomposed: on a GPU, if there is one and the matrix is large."""
    large = min(A.shape) >= SMALL and torch.cuda.is_available()
    return torch.device("cuda") if large else A.device

"""Factors of task vectors, computed once and kept: in memory, and on disk by content.

Changing the rank or the scale of a merge does not decompose again (see :meth:`FactorStore.get` for
two exceptions): a factor is known by the digests of the checkpoint and of the origin it is taken
about, and the parameter's name. Only the
short side is stored; the long one is a product with the task vector itself. Of large matrices the
first vectors are made, and the reduction is kept, from which further ones follow when asked for.
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

from merge_core.decomposition import Route, Side, cut, extended, short_side
from merge_core.errors import OutputError
from merge_core.files import cache_dir, digest_of, evict, factors_limit, write_atomically
from merge_core.linalg import SMALL, SideFactors
from merge_core.tridiagonal import Reduction
from merge_core.work_sizes import BLOCKS

FORMAT = "factors-3"
# What SVD_k of a task vector may be off by, relative to its norm; the estimate is rarely too low.
TOLERANCE = 5e-5
LOOK_EVERY = 256 << 20

Tall = Callable[[torch.dtype, slice], Tensor]


def _sound(side: Side, r: int) -> bool:
    """Whether what was stored can be a decomposition: unit vectors, finite descending values."""
    vectors, S, parts = side.vectors, side.S, side.reduction
    if S.shape != (r,) or vectors.ndim != 2 or vectors.shape[1] != r or len(vectors) > r:
        return False
    if len(vectors) < r and parts is None:
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
        self._disk_limit = factors_limit() if disk_bytes is None else disk_bytes
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
                directions only, whose vectors are made when they are looked at. Where most values
                are small, a merge leaves those rough: they are made when they are asked for.

        Returns:
            Factors in float32.
        """
        key = digest_of(FORMAT, self.route, member, origin, parameter)
        rows = partial(tall, torch.float32)
        wanted = 0 if k is None else min(k, min(shape))
        made: Callable[[slice], Tensor] = rows
        side = self._known(key, shape, k)
        if side is None:
            B = tall(torch.float32, slice(None))
            made = B.__getitem__  # for the cut: not made a second time
            side = self._made(key, B, shape, wanted)
        self._remember(key, side)
        if side.noise == 0:
            return SideFactors(side.vectors, side.S, shape, rows)
        more = partial(self._more, key, tall, shape)
        if k is None:  # no number of leading directions was asked for
            return SideFactors(side.vectors, side.S, shape, rows, sure_at=0, more=more)
        side = self._extended(key, side, tall, shape, wanted)
        ready = cut(side, made, max(shape), k, TOLERANCE)
        if ready.error > TOLERANCE and side.reduction is not None:
            # With the directions after the cut at hand it can be turned back.
            side = self._extended(key, side, tall, shape, k + min(shape) // BLOCKS)
            ready = cut(side, made, max(shape), k, TOLERANCE)
        if ready.error > TOLERANCE:
            side = self._made(key, tall(torch.float64, slice(None)), shape)
            self._remember(key, side)
            return SideFactors(side.vectors, side.S, shape, rows)
        factors = SideFactors(ready.side.vectors, side.S, shape, rows, k, more, side.rough)
        if ready.long is not None:
            factors.weigh(ready.long)
        return factors

    def _made(self, key: str, B: Tensor, shape: tuple[int, int], wanted: int | None = None) -> Side:
        """Decompose a matrix, given as the taller of itself and its transpose; keep on disk."""
        A = (B.T if shape[0] <= shape[1] else B).to(_device(B))
        side = short_side(A, self.route, wanted)
        with self._lock:
            self.decompositions += 1
        return self._kept(key, side, shape)

    def _more(self, key: str, tall: Tall, shape: tuple[int, int], wanted: int) -> Tensor:
        """At least so many vectors of a matrix that was seen before."""
        side = self._known(key, shape, wanted)
        if side is None:  # evicted meanwhile, or too rough
            side = self._made(key, tall(torch.float32, slice(None)), shape, wanted)
        return self._extended(key, side, tall, shape, wanted).vectors

    def _extended(
        self, key: str, side: Side, tall: Tall, shape: tuple[int, int], wanted: int
    ) -> Side:
        """The side with at least so many vectors, kept where they had to be made."""
        if side.reduction is None or len(side.vectors) >= min(wanted, min(shape)):
            return side
        try:
            side = self._kept(key, extended(side, wanted), shape)
        except ArithmeticError:
            side = self._made(key, tall(torch.float32, slice(None)), shape)
        self._remember(key, side)
        return side

    def _kept(self, key: str, side: Side, shape: tuple[int, int]) -> Side:
        """Write to disk; what was written, whose pages can be dropped by the system."""
        tensors = {"vectors": side.vectors, "S": side.S}
        if side.reduction is not None:
            tensors |= vars(side.reduction)
        if side.rough:
            tensors["rough"] = torch.ones(1, dtype=torch.bool)
        data = save(tensors, {"noise": repr(side.noise)})
        # A full or read-only cache costs time, never the result.
        with suppress(OutputError):
            write_atomically(self._path(key), data)
            self._make_room(len(data))
        return self._read(key, shape) or side

    def _known(self, key: str, shape: tuple[int, int], k: int | None) -> Side | None:
        """What is stored, if its values and vectors are good enough for so many directions."""
        side = self._remembered(key) or self._read(key, shape)
        if side is not None and side.rough and (k is None or 3 * k > min(shape)):
            return None
        return side

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

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

    def _read(self, key: str, shape: tuple[int, int]) -> Side | None:
        path = self._path(key)
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                noise = float((file.metadata() or {})["noise"])
                held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            os.utime(path)
            vectors, S, rough = held.pop("vectors"), held.pop("S"), "rough" in held
            held.pop("rough", None)
            side = Side(vectors, S, noise, Reduction(**held) if held else None, rough)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError):
            # Absent, written by a killed process or damaged since: computed afresh and replaced.
            return None
        return side if _sound(side, min(shape)) else None

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
    if side is None:
        return 0
    parts = [] if side.reduction is None else list(vars(side.reduction).values())
    return sum(tensor.nbytes for tensor in (side.vectors, side.S, *parts))


def _device(A: Tensor) -> torch.device:
    """Where a matrix is decomposed: on a GPU, if there is one and the matrix is large."""
    large = min(A.shape) >= SMALL and torch.cuda.is_available()
    return torch.device("cuda") if large else A.device

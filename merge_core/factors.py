"""Factors of task vectors, computed once and kept: in memory, and on disk by content.

Changing the rank or the scale of a merge never decomposes again: a factor is known by the
digests of the checkpoint and of the origin it is taken about, and the parameter's name.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from merge_core.errors import OutputError
from merge_core.files import cache_dir, digest_of, write_atomically
from merge_core.linalg import Factors, Route, decompose

FORMAT = "factors-1"


def _sound(factors: Factors) -> bool:
    """Whether what was stored can be a decomposition: unit columns, finite descending values."""
    U, S, V = factors.U, factors.S, factors.V
    if U.ndim != 2 or V.ndim != 2 or not U.shape[1] == V.shape[1] == S.numel():
        return False
    ordered = bool((S[:-1] >= S[1:]).all() and S.isfinite().all())
    return ordered and all(bool(((X.norm(dim=0) - 1).abs() < 1e-3).all()) for X in (U, V))


class FactorStore:
    """Factors by content key, on disk as float32 safetensors and in memory up to a limit.

    Args:
        folder: where files lie; None for ``factors/`` in the cache folder.
        memory_bytes: limit of what is kept in memory; the least recently used goes first.
        route: how matrices are decomposed (see :func:`merge_core.linalg.decompose`).
    """

    def __init__(
        self,
        folder: Path | None = None,
        memory_bytes: int = 512 << 20,
        route: Route = "gram",
    ) -> None:
        self.folder = cache_dir() / "factors" if folder is None else folder
        self.route = route
        self.decompositions = 0
        self._limit = memory_bytes
        self._held = 0
        self._memory: OrderedDict[str, Factors] = OrderedDict()
        self._lock = threading.Lock()

    def get(
        self, member: str, origin: str, parameter: str, matrix: Callable[[], Tensor]
    ) -> Factors:
        """The factors of one task vector's matrix, decomposed only if never seen before.

        Args:
            member: content digest of the expert.
            origin: content digest of what it is taken about (the base, or all experts averaged).
            parameter: the parameter's name.
            matrix: makes the m x n matrix; called only when nothing is stored.

        Returns:
            Factors in float32.
        """
        key = digest_of(FORMAT, self.route, member, origin, parameter)
        with self._lock:
            if key in self._memory:
                self._memory.move_to_end(key)
                return self._memory[key]
        path = self.folder / key[:2] / f"{key}.safetensors"
        factors = self._read(path)
        if factors is None:
            factors = decompose(matrix(), self.route).to(torch.float32)
            self.decompositions += 1
            data = save({"U": factors.U, "S": factors.S, "V": factors.V})
            # A full or read-only cache costs time, never the result.
            with suppress(OutputError):
                write_atomically(path, data)
        self._remember(key, factors)
        return factors

    def _read(self, path: Path) -> Factors | None:
        if not path.is_file():
            return None
        try:
            stored = load_file(path)
            factors = Factors(stored["U"], stored["S"], stored["V"])
            return factors if _sound(factors) else None
        except (SafetensorError, OSError, KeyError):
            # Written by a killed process or damaged since: computed afresh and replaced.
            return None

    def _remember(self, key: str, factors: Factors) -> None:
        size = sum(t.numel() * t.element_size() for t in (factors.U, factors.S, factors.V))
        with self._lock:
            if key in self._memory or size > self._limit:
                return
            self._memory[key] = factors
            self._held += size
            while self._held > self._limit:
                _, old = self._memory.popitem(last=False)
                self._held -= sum(t.numel() * t.element_size() for t in (old.U, old.S, old.V))

"""What the members of a pool, and merges of them, give for the pool's images.

Evaluation mode, fixed splits: choices are made on validation, test is for reporting; of the
training images only normalisation statistics, class means and the like are taken.
"""

from __future__ import annotations

import io
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from analysis.data_sources.archive import TaskInputs, read_split
from analysis.networks.pool_network import pool_network
from analysis.networks.stateless import Outputs, State, StatelessNetwork
from analysis.outputs.inputs import normalise_pixels
from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.errors import OutputError, PoolError
from merge_core.executors.base import one_thread
from merge_core.files import cache_dir, digest_of, evict, write_atomically
from merge_core.suites.pool import Pool

PoolSplit = Literal["train", "val", "test"]
FORMAT = "outputs-1"
DISK_BYTES = 2 << 30
HELD_MERGES = 200


class PoolEvaluator:
    """Runs models of one pool's architecture; what was computed is kept by content.

    Outputs of members lie in memory and in the cache folder, those of merges in memory only.

    Args:
        pool: the pool.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> evaluator = PoolEvaluator(load_pool("digits-linear"))
        >>> evaluator.member(0, "test").logits.shape
        torch.Size([500, 10])
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._inputs: dict[PoolSplit, TaskInputs] = {}
        self._images: dict[PoolSplit, Tensor] = {}
        self._members: dict[tuple[str, PoolSplit], Outputs] = {}
        self._merges: OrderedDict[str, Outputs] = OrderedDict()
        self._lock = threading.RLock()
        self.forward_images = 0

    @cached_property
    def network(self) -> StatelessNetwork:
        """The pool's architecture.

        Raises:
            PoolError: it cannot be built.
        """
        return pool_network(self.pool)

    def inputs(self, split: PoolSplit) -> TaskInputs:
        """Images as stored (uint8), labels and class names of a split.

        Raises:
            PoolError: missing or malformed data.
        """
        with self._lock:
            if split not in self._inputs:
                data = self.pool.spec.data
                what = f"data of pool {self.pool.name!r}"
                self._inputs[split] = read_split(
                    self.pool.file(data.file), split, what, PoolError, channels=len(data.mean)
                )
            return self._inputs[split]

    def labels(self, split: PoolSplit) -> np.ndarray:
        """int64, N."""
        return self.inputs(split).labels

    def images(self, split: PoolSplit) -> Tensor:
        """Normalised with the constants of the pool's dataset: float32, N x C x H x W."""
        with self._lock:
            if split not in self._images:
                data = self.pool.spec.data
                self._images[split] = normalise_pixels(
                    self.inputs(split).images, data.mean, data.std
                )
            return self._images[split]

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """One per class."""
        return self.inputs("test").class_names

    def weights(self, number: int) -> dict[str, Tensor]:
        """A member's tensors, floating ones as float32.

        Raises:
            CheckpointError: an unreadable file.
        """
        return tensors_of(self.pool.member(number))

    def run(self, weights: State, split: PoolSplit, dtype: torch.dtype = torch.float32) -> Outputs:
        """Outputs of any weights, computed afresh.

        Raises:
            PoolError: weights, data and architecture that do not fit together.
        """
        images = self.images(split)
        outputs = self.network.outputs(weights, images, dtype)
        classes, highest = outputs.logits.shape[1], int(self.labels(split).max())
        if highest >= classes:
            raise PoolError(
                f"{self.pool.path}: the models know {classes} classes, but the data hold labels "
                f"up to {highest}. Give the data of this task."
            )
        self.forward_images += len(images)
        return outputs

    def member(self, number: int, split: PoolSplit) -> Outputs:
        """Outputs of a member, computed at most once ever.

        Raises:
            MergeScopeError: unreadable or unfit weights or data.
        """
        return self.checkpoint(self.pool.member(number), split)

    def checkpoint(self, checkpoint: Checkpoint, split: PoolSplit) -> Outputs:
        """Outputs of any checkpoint of the pool (a member, a snapshot, the start).

        Raises:
            MergeScopeError: unreadable or unfit weights or data.
        """
        key = digest_of(FORMAT, checkpoint.digest, self.pool.data_digest, split)
        with self._lock:
            known = self._members.get((key, split))
            if known is None:
                known = _read(key) or self.run(tensors_of(checkpoint), split)
                self._members[key, split] = known
                _write(key, known)
            return known

    def merge(self, key: str, weights: Callable[[], State], split: PoolSplit) -> Outputs:
        """Outputs of merged weights; the last :data:`HELD_MERGES` are kept.

        Args:
            key: what the weights are determined by, within this pool.
            weights: gives them; called only where the outputs are not known.
            split: which images.
        """
        key = digest_of(key, split)
        with self._lock:
            if key not in self._merges:
                self._merges[key] = self.run(weights(), split)
                while len(self._merges) > HELD_MERGES:
                    self._merges.popitem(last=False)
            self._merges.move_to_end(key)
            return self._merges[key]


@one_thread()
def tensors_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All tensors of a checkpoint, floating ones as float32.

    Example:
        >>> tensors = tensors_of(load_suite("vision").expert("digits"))
        >>> tensors["cls_token"].dtype
        torch.float32
    """
    tensors = {name: checkpoint.tensor(name) for name in checkpoint}
    return {
        name: value.float() if value.is_floating_point() else value
        for name, value in tensors.items()
    }


def _read(key: str) -> Outputs | None:
    path = cache_dir() / "outputs" / f"{key}.npz"
    damaged = (ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error)
    with suppress(OSError, *damaged):
        with np.load(path, allow_pickle=False) as archive:
            features, logits = archive["features"], archive["logits"]
        path.touch()  # the least recently used are dropped first
        return Outputs(torch.from_numpy(features), torch.from_numpy(logits))
    return None


def _write(key: str, outputs: Outputs) -> None:
    """Keep outputs; a store that cannot be written costs time, never a result."""
    stream = io.BytesIO()
    np.savez(stream, features=outputs.features.numpy(), logits=outputs.logits.numpy())
    folder = cache_dir() / "outputs"
    with suppress(OSError, OutputError):
        write_atomically(folder / f"{key}.npz", stream.getvalue())
        evict(folder, DISK_BYTES)

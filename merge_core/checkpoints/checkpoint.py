"""A checkpoint: named tensors read one at a time, whose shapes are known without reading them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError

from merge_core.checkpoints.header_checks import read_index
from merge_core.checkpoints.shards import (
    SafetensorsShard,
    Shard,
    TensorInfo,
    open_shard,
    owners_by_index,
)
from merge_core.checkpoints.stored.entry import find_entry, is_index, split_part
from merge_core.checkpoints.stored.names import public_names
from merge_core.checkpoints.stored.packed import check_plain
from merge_core.errors import CheckpointError
from merge_core.files import digest_of, file_digest, size_in_words
from merge_core.input_files import file_stamp
from merge_core.lazy import lazy

if TYPE_CHECKING:
    from torch import Tensor

COMPARED_BYTES = 1 << 22


def is_finite(value: Tensor) -> bool:
    """Whether no entry is NaN or infinite: one pass, without a temporary."""
    if not value.dtype.is_floating_point or not value.numel():
        return True
    low, high = (value.float() if value.dtype.itemsize == 1 else value).aminmax()
    return bool(low.isfinite() and high.isfinite())  # NaN is both extremes of its like


class Checkpoint:
    """Named tensors of one model, over one file, a sharded index, or a folder holding either.

    Opening reads headers only; :meth:`tensor` reads one tensor. Files are memory-mapped, so
    what was read can be dropped by the system again.

    Args:
        path: a ``.safetensors`` file, a ``*.index.json``, a file of ``torch.save`` or
            ``pickle.dump`` (``.pt``, ``.pth``, ``.bin``, ``.ckpt``, ``.pkl``, ``.pth.tar``; a state
            dict, a whole module or a trainer's checkpoint, read as data: nothing in it is imported
            or run), or a folder holding one of these. A key after ``#`` says which of several sets
            of weights in a pickled file is meant: ``net.pth#params``.

    Attributes:
        path: as given.
        files: the files that hold tensors.
        metadata: the texts in a safetensors file's header, of several the first one's.
        notes: what was chosen where a file leaves a choice, in sentences.
        unsafe_globals: full names of the classes and functions that pickled files would import,
            sorted.
        ties: sets of names that pickled files keep one tensor under, and those of `aliases`.
        aliases: names that are in no file (see :meth:`with_alias`).

    Raises:
        CheckpointError: missing, empty, truncated file or another format; shards that do not match
            their index; packed or scaled weights, or factors of an adapter.
    """

    ties: tuple[tuple[str, ...], ...] = ()
    aliases: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    _part = ""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file, part = split_part(self.path)
        entry = find_entry(file)
        self.files: tuple[Path, ...]
        self.metadata: dict[str, str]
        if is_index(entry.name):
            weight_map = read_index(entry)
            self.files = tuple(entry.parent / name for name in sorted(set(weight_map.values())))
            self._stamps = {file: file_stamp(file) for file in self.files}
            shards = {file.name: open_shard(file) for file in self.files}
            owners, self.notes = owners_by_index(entry, weight_map, shards)
            shard = shards[self.files[0].name]
        else:
            self.files = (entry,)
            self._stamps = {entry: file_stamp(entry)}
            shard = open_shard(entry, part)
            owners = dict.fromkeys(shard.infos, shard)
            self.notes, self._part = shard.notes, shard.part
        self.metadata = shard.metadata
        if not owners:
            raise CheckpointError(f"{entry} holds no tensors. Give a file with model weights.")
        self._own(owners, str(entry), entry.parent)

    def _own(self, owners: Mapping[str, Shard], where: str, folder: Path | None = None) -> None:
        """Name the tensors that shards hold, after a look at whether they are weights.

        Raises:
            CheckpointError: they are packed, scaled or factors, or two get one name.
        """
        infos = {name: owner.infos[name] for name, owner in owners.items()}
        self._check_kind(infos, where, folder)
        shards = dict.fromkeys(owners.values())
        lightning = any(shard.lightning for shard in shards)
        shapes = {name: infos[name].shape for name in sorted(infos)}
        self._stored = public_names(shapes, where, lightning)
        self._owners = dict(owners)
        met = set().union(*(shard.unsafe_globals for shard in shards))
        self.unsafe_globals: tuple[str, ...] = tuple(sorted(met))
        public = {stored: name for name, stored in self._stored.items()}
        self.ties = tuple(
            tuple(public[name] for name in names)
            for shard in shards
            for names in shard.ties
            if all(name in public for name in names)
        )

    def _check_kind(self, infos: Mapping[str, TensorInfo], where: str, folder: Path | None) -> None:
        check_plain(infos, where, folder)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self)} tensors)"

    def __len__(self) -> int:
        return len(self._stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def stored_name(self, name: str) -> str:
        """A tensor's name in the file, wrappers' prefixes (``module.``) included.

        Of an alias it is the name that a file would have.

        Raises:
            CheckpointError: there is no tensor of that name.
        """
        self._owner(name)
        if name not in self.aliases:
            return self._stored[name]
        tied = next(n for names in self.ties if name in names for n in names if n != name)
        stored = self._stored[tied]
        if tied.endswith(stored):
            return name.removeprefix(tied.removesuffix(stored))
        return stored.removesuffix(tied) + name if stored.endswith(tied) else name

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """The same tensors under other names.

        Args:
            names: the new name by the name here; what is not among them keeps its own.
        """
        if not names:
            return self
        other = copy.copy(self)
        other._stored = {names.get(name, name): key for name, key in self._stored.items()}
        other.ties = tuple(tuple(names.get(n, n) for n in group) for group in self.ties)
        other.aliases = frozenset(names.get(name, name) for name in self.aliases)
        return other

    def with_alias(self, alias: str, name: str) -> Checkpoint:
        """The same tensors, one of them under a second name, tied to its own.

        Args:
            alias: the second name, which is in no file.
            name: of the tensor.

        Raises:
            CheckpointError: there is no tensor of that name.
        """
        self._owner(name)
        other = copy.copy(self)
        other._stored = {**self._stored, alias: self._stored[name]}
        other.ties = (*self.ties, (name, alias))
        other.aliases = self.aliases | {alias}
        return other

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor, without reading it.

        Raises:
            CheckpointError: there is no tensor of that name.
        """
        return self._owner(name).infos[self._stored[name]]

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, as stored (dtype unchanged, on the CPU; treat it as read-only).

        Raises:
            CheckpointError: no tensor of that name, an unreadable file, a file that changed
                since it was opened, or NaN or infinite entries.
        """
        value = self.read_unchecked(name)
        self.check_finite(name, value)
        return value

    def read_unchecked(self, name: str) -> Tensor:
        """As :meth:`tensor`, without its check for NaN and infinity, which callers make later.

        Raises:
            CheckpointError: as :meth:`tensor`, except for NaN or infinite entries.
        """
        self.check_unchanged()
        try:
            return self._owner(name).tensor(self._stored[name])
        except MemoryError as error:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} takes {size_in_words(self.info(name).nbytes)}, more "
                "than there is memory. Use a machine with more, or a smaller model."
            ) from error
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} cannot be read ({error}). Copy the file again."
            ) from error

    def rows(self, name: str, places: np.ndarray) -> np.ndarray:
        """Some rows of a tensor as a matrix, float64; where it can, without importing torch.

        Args:
            name: of a tensor of two dimensions or more.
            places: of the rows.

        Raises:
            CheckpointError: as :meth:`read_unchecked`, and NaN or infinite entries among them.
        """
        self.check_unchanged()
        owner, found = self._owner(name), None
        if isinstance(owner, SafetensorsShard):
            try:
                found = owner.rows(self._stored[name], places)
            except (OSError, ValueError, LookupError) as error:
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} cannot be read ({error}). Copy the file again."
                ) from error
        return self._rows_of(name, places) if found is None else self._check_rows(name, found)

    def _rows_of(self, name: str, places: np.ndarray) -> np.ndarray:
        """The same from the tensor."""
        value = self.read_unchecked(name).reshape(self.info(name).matrix_shape)
        return self._check_rows(name, value[places].double().numpy())

    def _check_rows(self, name: str, found: np.ndarray) -> np.ndarray:
        if not np.isfinite(found).all():
            import torch

            self.check_finite(name, torch.from_numpy(found))
        return found

    def check_finite(self, name: str, value: Tensor) -> None:
        """Refuse a tensor with NaN or infinite entries.

        Args:
            name: of the tensor, for the message.
            value: as read.

        Raises:
            CheckpointError: it has such entries.
        """
        if not is_finite(value):
            bad = int((~value.float().isfinite()).sum())
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has {bad:,} NaN or infinite entries of "
                f"{value.numel():,}. Such weights cannot be merged; train or export again."
            )

    def are_equal(self, first: str, second: str) -> bool:
        """Whether two tensors have the same entries, bit by bit; reading ends where they differ.

        Args:
            first, second: tensors of one shape and dtype.

        Raises:
            CheckpointError: as :meth:`read_unchecked`.
        """
        import torch

        a, b = (self.read_unchecked(name).reshape(-1).view(torch.uint8) for name in (first, second))
        return all(
            torch.equal(a[start : start + COMPARED_BYTES], b[start : start + COMPARED_BYTES])
            for start in range(0, len(a), COMPARED_BYTES)
        )

    def may_differ(self, name: str) -> bool:
        """Whether a tensor may differ from the base's; an adapter changes only some of them."""
        return name in self

    def low_rank(self, name: str) -> tuple[Tensor, Tensor] | None:  # noqa: ARG002
        """The update about the base as a product of thin matrices, where one is known.

        Args:
            name: a parameter.

        Returns:
            None here; left m x r and right r x n of an adapter (see
            :mod:`merge_core.checkpoints.lora`).
        """
        return None

    @lazy
    def digest(self) -> str:
        """SHA-256 (hex) of the BLAKE3 of all files, in the order of their names.

        Where a file holds several sets of weights, the chosen one's key is part of it.

        Raises:
            CheckpointError: a file vanished, changed since it was opened, or cannot be read.
        """
        self.check_unchanged()
        try:
            part = [f"part:{self._part}"] if self._part else []
            return digest_of(*(file_digest(file) for file in self.files), *part)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}.") from error

    @property
    def nbytes(self) -> int:
        """Total size of the tensors in bytes, as stored."""
        return sum(self.info(name).nbytes for name in self)

    def check_unchanged(self) -> None:
        """Refuse a file replaced under the open map: its digest and tensors would not agree.

        Raises:
            CheckpointError: a file was removed or changed since it was opened.
        """
        for file, stamp in self._stamps.items():
            if file_stamp(file) != stamp:
                what = "has changed" if file.exists() else "was removed"
                raise CheckpointError(
                    f"{file} {what} since it was opened. Put the file back, or load the suite "
                    "again."
                )

    def _owner(self, name: str) -> Shard:
        stored = self._stored.get(name)
        if stored is None:
            raise CheckpointError(f"{self.path} holds no tensor named {name!r}.")
        return self._owners[stored]

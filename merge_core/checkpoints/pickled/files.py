"""Tensors of pickled checkpoints by name, read one at a time; no code in them is run.

``torch.save(model)`` writes a pickle that names the model's classes, and opening it as Python
does imports and runs whatever it names. Here it is read as data (:mod:`pickle_machine`), torch's
reconstructors are recognised (:mod:`pickle_tensors`) in each of torch's formats
(:mod:`pickle_containers`), the model's weights are found among what a trainer keeps
(:mod:`sets`), and tensors get the names of ``state_dict()`` (:mod:`names`).
Nothing is imported or called on the file's behalf.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from merge_core.checkpoints.pickled.arrays import ArrayReader, decode
from merge_core.checkpoints.pickled.containers import read_contents
from merge_core.checkpoints.pickled.machine import PickleFileError
from merge_core.checkpoints.pickled.names import NamedTensor
from merge_core.checkpoints.pickled.sets import find_model
from merge_core.checkpoints.pickled.tensors import Region, StoredTensor, Unreadable
from merge_core.checkpoints.pickled.zips import inflate
from merge_core.errors import CheckpointError
from merge_core.input_files import open_regular
from merge_core.lazy import lazy

if TYPE_CHECKING:
    from torch import Tensor, UntypedStorage


class PickledTensors:
    """The tensors of one file that ``torch.save`` or ``pickle.dump`` wrote.

    Opening reads the pickle and no tensor, and needs no torch. For tensors the file is
    memory-mapped (copy-on-write), so that what was read can be dropped by the system again;
    compressed storages are unpacked when read.

    Args:
        path: the file.
        part: keys joined by dots under which its weights lie; the usual ones if empty.

    Attributes:
        stored: shape, dtype and place of each tensor, or what it is instead of a plain array,
            by its name in ``state_dict()``.
        part: the keys under which they lie, where others could have been taken; else empty.
        notes: what was chosen among several sets of weights, in sentences.
        lightning: whether PyTorch Lightning wrote it.
        unsafe_globals: full names of the classes and functions that the file would import
            besides torch's own.

    Raises:
        CheckpointError: no such file, a damaged or a hostile one, or no model in it.
    """

    def __init__(self, path: Path, part: str = "") -> None:
        self.path = path
        try:
            with open_regular(path) as stream:
                self._size = stream.seek(0, 2)
                stream.seek(0)
                contents = read_contents(stream, self._size)
            found = find_model(contents.content, ArrayReader(contents.unpacked), part)
        except PickleFileError as fault:
            raise CheckpointError(f"{path} cannot be read as a torch file: {fault}") from fault
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        self.stored: dict[str, NamedTensor] = found.tensors
        self.part, self.notes, self.lightning = found.part, found.notes, found.lightning
        self.unsafe_globals = contents.unsafe_globals
        self._unpacked: tuple[Region, UntypedStorage] | None = None

    @property
    def ties(self) -> tuple[tuple[str, ...], ...]:
        """Sets of names that share bytes, dtype, shape and strides, so that they are one tensor."""
        places: dict[tuple[object, ...], list[str]] = {}
        for name, place in self.stored.items():
            if isinstance(place, StoredTensor) and place.extent:
                seen = (id(place.region), place.begin, place.dtype, place.shape, place.strides)
                places.setdefault(seen, []).append(name)
        return tuple(tuple(names) for names in places.values() if len(names) > 1)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, with the shape, strides and dtype that it was saved with.

        Args:
            name: a key of `stored` whose value is a :class:`StoredTensor`.

        Raises:
            CheckpointError: it is no plain array, or its bytes cannot be read.
        """
        import torch

        place = self.stored[name]
        if isinstance(place, Unreadable):
            raise CheckpointError(f"{self.path}: tensor {name!r} is no plain array.")
        try:
            storage = self._bytes(place)
        except PickleFileError as fault:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} cannot be read: {fault}"
            ) from fault
        empty = torch.empty(0, dtype=place.dtype.torch)
        return empty.set_(storage, 0, place.shape, place.strides)

    @lazy
    def _whole(self) -> UntypedStorage | None:
        from torch import UntypedStorage

        try:
            whole = UntypedStorage.from_file(str(self.path), False, self._size)
        except RuntimeError:  # a file larger than the memory is not always mapped: read in pieces
            return None
        assert isinstance(whole, UntypedStorage)
        return whole

    def _bytes(self, place: StoredTensor) -> UntypedStorage:
        """The bytes from a tensor's first element to its last."""
        from torch import UntypedStorage

        region, begin, end = place.region, place.begin, place.begin + place.extent
        if begin == end:
            return UntypedStorage(0)
        if region.data is not None:
            return _storage_of(bytearray(region.data[begin:end]))
        if region.packed is not None:
            return self._unpack(region)[begin:end]
        assert region.start is not None
        if self._whole is None:
            return _storage_of(self._read(region.start + begin, end - begin))
        found = self._whole[region.start + begin : region.start + end]
        # Only torch's zip format keeps storages at addresses that suit their dtype.
        return found.clone() if (region.start + begin) % place.dtype.itemsize else found

    def _unpack(self, region: Region) -> UntypedStorage:
        """A compressed storage, or a text's; the last is kept, for the tensors that share it."""
        known = self._unpacked
        if known is not None and known[0] is region:
            return known[1]
        assert region.start is not None
        assert region.packed is not None
        packed = self._read(region.start, region.packed)
        unpack = decode if region.is_text else inflate
        storage = _storage_of(bytearray(unpack(packed, region.size)))
        self._unpacked = (region, storage)
        return storage

    def _read(self, start: int, size: int) -> bytearray:
        with open_regular(self.path) as stream:
            stream.seek(start)
            data = bytearray(stream.read(size))
        if len(data) != size:
            raise PickleFileError.damaged("it is truncated")
        return data


def _storage_of(data: bytearray) -> UntypedStorage:
    import torch

    return torch.frombuffer(data, dtype=torch.uint8).untyped_storage()

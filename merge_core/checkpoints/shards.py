"""The files of a checkpoint: what they hold by their headers, and single tensors from them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open

from merge_core.checkpoints.dtypes import SAFETENSORS_DTYPES, Dtype
from merge_core.checkpoints.header_checks import check_safetensors_header, check_tensors
from merge_core.checkpoints.pickled.files import PickledTensors
from merge_core.checkpoints.pickled.tensors import StoredTensor, Unreadable
from merge_core.checkpoints.stored.placeholders import check_content
from merge_core.errors import CheckpointError
from merge_core.input_files import open_regular
from merge_core.lazy import lazy

if TYPE_CHECKING:
    from torch import Tensor

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pt.tar", ".pth.tar")
# As NumPy reads real numbers; it has no bfloat16.
NUMPY_TYPES = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}
# In a folder, .pkl is rather data than weights, and .tar an archive.
PICKLE_SUFFIXES = (*TORCH_SUFFIXES, ".pkl", ".tar")


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: Dtype

    @classmethod
    def of(cls, tensor: Tensor) -> TensorInfo:
        """Shape and dtype of a tensor in memory."""
        return cls(tuple(tensor.shape), Dtype.of(tensor.dtype))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """m and n of a weight as the matrix that is decomposed (:func:`.low_rank.as_matrix`)."""
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        """Size in bytes as stored."""
        return self.numel * self.dtype.itemsize

    @property
    def is_floating(self) -> bool:
        """Whether the entries are real numbers (counters and masks are integers or booleans)."""
        return self.dtype.is_floating_point


class Shard(Protocol):
    """One file of a checkpoint: headers at once, tensors on demand.

    Attributes:
        infos: shape and dtype by name.
        unsafe_globals: full names of what a pickled file would import.
        ties: sets of names that a pickled file keeps one tensor under.
        part: the keys under which a pickled file holds them, where others could have been taken.
        notes: what was chosen there, in sentences.
        lightning: whether PyTorch Lightning wrote it.
        metadata: the texts in a safetensors file's header.
    """

    infos: dict[str, TensorInfo]
    unsafe_globals: tuple[str, ...]
    ties: tuple[tuple[str, ...], ...]
    part: str
    notes: tuple[str, ...]
    lightning: bool
    metadata: dict[str, str]

    def tensor(self, name: str) -> Tensor:
        """One tensor as stored."""


S = TypeVar("S", bound=Shard)


class PlainShard:
    """What a file of tensors alone is, which has nothing else in it; see :class:`Shard`."""

    unsafe_globals: tuple[str, ...] = ()
    ties: tuple[tuple[str, ...], ...] = ()
    part = ""
    notes: tuple[str, ...] = ()
    lightning = False
    metadata: dict[str, str] = {}  # noqa: RUF012 - replaced, never changed


class SafetensorsShard(PlainShard):
    """A safetensors file; see :class:`Shard`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            check_safetensors_header(path)
            header = _safe_open(path, "np")  # which does without torch
            self.metadata = header.metadata() or {}
            self.infos = {name: self._info(header, name) for name in header.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, UnicodeDecodeError, RuntimeError, TypeError) as error:
            raise CheckpointError(
                f"{path} is not a readable safetensors file: {_reason(path, error)}"
            ) from error

    def _info(self, header: Any, name: str) -> TensorInfo:
        piece = header.get_slice(name)
        dtype = SAFETENSORS_DTYPES.get(piece.get_dtype())
        if dtype is None:
            raise CheckpointError(
                f"{self._path}: tensor {name!r} has dtype {piece.get_dtype()}, which is not "
                "supported. Convert it to float32, float16 or bfloat16; packed weights must be "
                "dequantised first."
            )
        return TensorInfo(tuple(piece.get_shape()), dtype)

    @lazy
    def _tensors(self) -> Any:
        return _safe_open(self._path, "pt")

    def tensor(self, name: str) -> Tensor:
        value: Tensor = self._tensors.get_tensor(name)
        return value

    @lazy
    def _places(self) -> dict[str, int]:
        """Where each tensor begins in the file, in bytes."""
        with open_regular(self._path) as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        return {name: 8 + length + header[name]["data_offsets"][0] for name in self.infos}

    def rows(self, name: str, places: np.ndarray) -> np.ndarray | None:
        """Rows of a tensor as a matrix, float64, read without torch; None of dtypes NumPy lacks.

        Args:
            name: of a tensor of two dimensions or more.
            places: of the rows.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is another one by now.
        """
        info = self.infos[name]
        kind = NUMPY_TYPES.get(info.dtype.name)
        if kind is None:
            return None
        place, shape = self._places[name], info.matrix_shape
        found = np.memmap(self._path, kind, "r", offset=place, shape=shape)[places]
        if info.dtype.name == "bfloat16":  # the upper half of a float32
            found = (found.astype("<u4") << 16).view("<f4")
        return found.astype(np.float64)


def _safe_open(path: Path, framework: str) -> Any:
    try:
        return safe_open(path, framework=framework, device="cpu")
    except RuntimeError:  # a file larger than the memory is not always mapped: read in pieces
        return safe_open(path, framework=framework, device="cpu", backend="pread")


class TorchShard:
    """A pickled file, read as data; see :class:`Shard`."""

    def __init__(self, path: Path, part: str = "") -> None:
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path} is empty (0 bytes). Copy or download it again.")
        self._file = PickledTensors(path, part)
        self.unsafe_globals = self._file.unsafe_globals
        self.ties = self._file.ties
        self.part, self.notes = self._file.part, self._file.notes
        self.lightning = self._file.lightning
        self.metadata: dict[str, str] = {}
        self.infos = {
            name: _plain_info(path, name, stored) for name, stored in self._file.stored.items()
        }

    def tensor(self, name: str) -> Tensor:
        return self._file.tensor(name)


def _plain_info(path: Path, name: str, stored: StoredTensor | Unreadable) -> TensorInfo:
    """Refuse what a torch file may hold but a merge cannot read: sparse, quantised, complex."""
    if isinstance(stored, StoredTensor) and stored.dtype in SAFETENSORS_DTYPES.values():
        return TensorInfo(stored.shape, stored.dtype)
    kind = stored.dtype.name if isinstance(stored, StoredTensor) else stored.kind
    raise CheckpointError(
        f"{path}: tensor {name!r} is {kind}, which is not supported. "
        "Convert it to a dense float32, float16 or bfloat16 tensor."
    )


def _reason(path: Path, error: Exception) -> str:
    """Why a safetensors file could not be opened, in words."""
    if isinstance(error, PermissionError):
        return f"{error.strerror}. Check who may read it."
    if not path.exists():
        return "the file does not exist. Check the path."
    size = path.stat().st_size
    if size == 0:
        return "it is empty (0 bytes). Copy or download it again."
    text = str(error).lower()
    if "incomplete" in text or "buffer" in text or "offset" in text or "small" in text:
        return f"it is truncated or damaged ({size:,} bytes). Copy or download it again."
    return (
        "its content is not in the safetensors format (wrong file, or renamed from another "
        "format). Give the original file."
    )


def open_shard(path: Path, part: str = "") -> Shard:
    """A file of weights, by its ending.

    Args:
        path: the file.
        part: keys joined by dots under which a pickled file holds them; the usual ones if empty.

    Raises:
        CheckpointError: missing, empty, truncated or of another format; a part of what has none.
    """
    try:
        exists = path.is_file()
        if exists:
            check_content(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Check it.") from error
    if not exists:
        raise CheckpointError(f"{path} does not exist. Copy or download all shards again.")
    if path.suffix == ".safetensors":
        if part:
            raise CheckpointError(
                f"{path} holds one set of weights and no {part!r:.80}. Leave out what stands after "
                "'#'."
            )
        return _check_names(path, SafetensorsShard(path))
    if path.name.endswith(PICKLE_SUFFIXES):
        return _check_names(path, TorchShard(path, part))
    if path.parent.name == "blobs":
        raise CheckpointError(
            f"{path} lies in a cache under the name of its content. Name the file or the folder "
            "in 'snapshots', which leads to it."
        )
    raise CheckpointError(
        f"{path} has an unknown ending. Known: .safetensors, .index.json, "
        f"{', '.join(PICKLE_SUFFIXES)}."
    )


def owners_by_index(
    entry: Path, weight_map: Mapping[str, str], shards: Mapping[str, S]
) -> tuple[dict[str, S], tuple[str, ...]]:
    """Which shard each tensor is read from, and what is to be said of it.

    Args:
        entry: the index, for messages.
        weight_map: shard by tensor, as the index says.
        shards: by name. What they hold beside the index's tensors belongs to the model too, as
            transformers reads them.

    Raises:
        CheckpointError: a tensor is not where the index says.
    """
    owners: dict[str, S] = {}
    for name, file in weight_map.items():
        if name not in shards[file].infos:
            raise CheckpointError(
                f"{entry} says that {name!r} is in {file}, but it is not there. "
                "Copy or download all shards again."
            )
        owners[name] = shards[file]
    further = {name: shard for shard in shards.values() for name in shard.infos}
    unlisted = [name for name in further if name not in owners]
    owners |= {name: further[name] for name in unlisted}
    if not unlisted:
        return owners, ()
    note = (
        f"{len(unlisted)} tensors that {entry.name} does not list (such as {unlisted[0]!r}) are "
        "read from its shards"
    )
    return owners, (note,)


def _check_names(path: Path, shard: Shard) -> Shard:
    check_tensors(path, ((name, info.shape) for name, info in shard.infos.items()))
    return shard

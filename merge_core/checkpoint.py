"""A checkpoint: named tensors read one at a time, whose shapes are known without reading them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from merge_core.errors import CheckpointError
from merge_core.files import digest_of, file_digest
from merge_core.header_checks import check_safetensors_header, check_tensors, read_index
from merge_core.lazy import lazy
from merge_core.pickled.files import PickledTensors
from merge_core.pickled.tensors import StoredTensor, Unreadable

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pt.tar", ".pth.tar")
# In a folder, .pkl is rather data than weights, and .tar an archive.
PICKLE_SUFFIXES = (*TORCH_SUFFIXES, ".pkl", ".tar")
PREFIXES = ("module.", "_orig_mod.")
FOLDER_CANDIDATES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes as stored."""
        return self.numel * self.dtype.itemsize

    @property
    def is_floating(self) -> bool:
        """Whether the entries are weights (counters and masks are integers or booleans)."""
        return self.dtype.is_floating_point


class _Shard(Protocol):
    """One file of a checkpoint: headers at once, tensors on demand."""

    infos: dict[str, TensorInfo]
    foreign: tuple[str, ...]
    ties: tuple[tuple[str, ...], ...]

    def tensor(self, name: str) -> Tensor: ...


class _SafetensorsShard:
    foreign: tuple[str, ...] = ()
    ties: tuple[tuple[str, ...], ...] = ()

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            check_safetensors_header(path)
            self._file = _safe_open(path)
            self.metadata: dict[str, str] = self._file.metadata() or {}
            self.infos = {name: self._info(name) for name in self._file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, UnicodeDecodeError, RuntimeError, TypeError) as error:
            raise CheckpointError(
                f"{path} is not a readable safetensors file: {_reason(path, error)}"
            ) from error

    def _info(self, name: str) -> TensorInfo:
        piece = self._file.get_slice(name)
        dtype = SAFETENSORS_DTYPES.get(piece.get_dtype())
        if dtype is None:
            raise CheckpointError(
                f"{self._path}: tensor {name!r} has dtype {piece.get_dtype()}, which is not "
                "supported. Convert it to float32, float16 or bfloat16."
            )
        return TensorInfo(tuple(piece.get_shape()), dtype)

    def tensor(self, name: str) -> Tensor:
        return self._file.get_tensor(name)


def _safe_open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except RuntimeError:  # a file larger than the memory is not always mapped: read in pieces
        return safe_open(path, framework="pt", device="cpu", backend="pread")


class _TorchShard:
    def __init__(self, path: Path) -> None:
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path} is empty (0 bytes). Copy or download it again.")
        self._file = PickledTensors(path)
        self.foreign = self._file.foreign
        self.ties = self._file.ties
        self.infos = {
            name: _plain_info(path, name, stored) for name, stored in self._file.stored.items()
        }

    def tensor(self, name: str) -> Tensor:
        return self._file.tensor(name)


def _plain_info(path: Path, name: str, stored: StoredTensor | Unreadable) -> TensorInfo:
    """Refuse what a torch file may hold but a merge cannot read: sparse, quantised, complex."""
    if isinstance(stored, StoredTensor) and stored.dtype in SAFETENSORS_DTYPES.values():
        return TensorInfo(stored.shape, stored.dtype)
    if isinstance(stored, StoredTensor):
        kind = str(stored.dtype).removeprefix("torch.")
    else:
        kind = stored.kind
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


def without_prefix(names: list[str]) -> dict[str, str]:
    """Map the public name of each tensor to the stored one, common wrapper prefixes removed."""
    public = {name: name for name in names}
    changed = True
    while changed and public:
        changed = False
        for prefix in PREFIXES:
            if all(name.startswith(prefix) for name in public):
                public = {name[len(prefix) :]: stored for name, stored in public.items()}
                changed = True
    return public


class Checkpoint:
    """Named tensors of one model, over one file, a sharded index, or a folder holding either.

    Opening reads headers only; :meth:`tensor` reads one tensor. Files are memory-mapped, so
    what was read can be dropped by the system again.

    Args:
        path: a ``.safetensors`` file, a ``*.index.json``, a file of ``torch.save`` or
            ``pickle.dump`` (``.pt``, ``.pth``, ``.bin``, ``.ckpt``, ``.pkl``, ``.pth.tar``; a state
            dict or a whole module, read as data: nothing in it is imported or run), or a folder
            holding one of these.

    Attributes:
        path: as given.
        files: the files that hold tensors.
        metadata: the texts in a safetensors file's header.
        foreign: full names of the classes and functions that pickled files would import, sorted.
        ties: sets of names that pickled files keep one tensor under.

    Raises:
        CheckpointError: missing, empty, truncated or foreign file; shards that do not match
            their index.
    """

    ties: tuple[tuple[str, ...], ...] = ()

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        entry = _resolve_folder(self.path)
        owners: dict[str, _Shard] = {}
        self.files: tuple[Path, ...]
        self.metadata: dict[str, str] = {}
        if entry.name.endswith(".index.json"):
            weight_map = read_index(entry)
            self.files = tuple(entry.parent / name for name in sorted(set(weight_map.values())))
            self._stamps = {file: _stamp(file) for file in self.files}
            shards = {file.name: _open_shard(file) for file in self.files}
            for name, file in weight_map.items():
                if name not in shards[file].infos:
                    raise CheckpointError(
                        f"{entry} says that {name!r} is in {file}, but it is not there. "
                        "Copy or download all shards again."
                    )
                owners[name] = shards[file]
        else:
            self.files = (entry,)
            self._stamps = {entry: _stamp(entry)}
            shard = _open_shard(entry)
            self.metadata = getattr(shard, "metadata", {})
            owners = dict.fromkeys(shard.infos, shard)
        if not owners:
            raise CheckpointError(f"{entry} holds no tensors. Give a file with model weights.")
        self._stored = without_prefix(sorted(owners))
        self._owners = owners
        met = set().union(*(shard.foreign for shard in set(owners.values())))
        self.foreign: tuple[str, ...] = tuple(sorted(met))
        public = {stored: name for name, stored in self._stored.items()}
        self.ties = tuple(
            tuple(public[name] for name in names)
            for shard in set(owners.values())
            for names in shard.ties
            if all(name in public for name in names)
        )

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

        Raises:
            CheckpointError: there is no tensor of that name.
        """
        self._owner(name)
        return self._stored[name]

    def under(self, prefix: str) -> Checkpoint:
        """The same tensors with a prefix before their names, such as ``transformer.``."""
        if not prefix:
            return self
        renamed = copy.copy(self)
        renamed._stored = {prefix + name: stored for name, stored in self._stored.items()}
        return renamed

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
        self.check_unchanged()
        try:
            value = self._owner(name).tensor(self._stored[name])
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} cannot be read ({error}). Copy the file again."
            ) from error
        if value.dtype.is_floating_point and value.numel():
            # One pass without a temporary: NaN propagates through both extremes.
            wide = value.float() if value.dtype.itemsize == 1 else value
            low, high = torch.aminmax(wide)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                bad = int((~torch.isfinite(wide)).sum())
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} has {bad:,} NaN or infinite entries of "
                    f"{value.numel():,}. Such weights cannot be merged; train or export again."
                )
        return value

    def touches(self, name: str) -> bool:
        """Whether a tensor may differ from the base's (of an adapter, not all do)."""
        return name in self

    def low_rank(self, name: str) -> tuple[Tensor, Tensor] | None:  # noqa: ARG002
        """The update about the base as a product of thin matrices, where one is known.

        Args:
            name: a parameter.

        Returns:
            None here; left m x r and right r x n of an adapter (see
            :mod:`merge_core.adapters.checkpoint`).
        """
        return None

    @lazy
    def digest(self) -> str:
        """SHA-256 (hex) of the content of all files, in the order of their names.

        Raises:
            CheckpointError: a file vanished, changed since it was opened, or cannot be read.
        """
        self.check_unchanged()
        try:
            return digest_of(*(file_digest(file) for file in self.files))
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
            if _stamp(file) != stamp:
                what = "has changed" if file.exists() else "was removed"
                raise CheckpointError(
                    f"{file} {what} since it was opened. Put the file back, or load the suite "
                    "again."
                )

    def _owner(self, name: str) -> _Shard:
        stored = self._stored.get(name)
        if stored is None:
            raise CheckpointError(f"{self.path} holds no tensor named {name!r}.")
        return self._owners[stored]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What tells one state of a file from another: size, modification time and inode."""
    try:
        stat = path.stat()
    except (OSError, ValueError):  # absent, or a name that no file can have
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _resolve_folder(path: Path) -> Path:
    try:
        return _entry(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Check it.") from error


def _entry(path: Path) -> Path:
    """The file that says what a checkpoint holds: the path itself, or one in its folder."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist. Check the path.")
    if not path.is_dir():
        return path
    if (path / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{path} is an adapter, which is no model without its base. Make it an expert of a "
            "suite whose 'base:' is what it was trained on."
        )
    for candidate in FOLDER_CANDIDATES:
        if (path / candidate).is_file():
            return path / candidate
    weights = sorted(
        file for file in path.iterdir() if file.name.endswith((".safetensors", *TORCH_SUFFIXES))
    )
    if len(weights) == 1:
        return weights[0]
    what = "no weight file" if not weights else f"{len(weights)} weight files and no index"
    raise CheckpointError(f"The folder {path} holds {what}. Name the file itself.")


def _open_shard(path: Path) -> _Shard:
    try:
        exists = path.is_file()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Check it.") from error
    if not exists:
        raise CheckpointError(f"{path} does not exist. Copy or download all shards again.")
    if path.suffix == ".safetensors":
        return _checked(path, _SafetensorsShard(path))
    if path.name.endswith(PICKLE_SUFFIXES):
        return _checked(path, _TorchShard(path))
    raise CheckpointError(
        f"{path} has an unknown ending. Known: .safetensors, .index.json, "
        f"{', '.join(PICKLE_SUFFIXES)}."
    )


def _checked(path: Path, shard: _Shard) -> _Shard:
    check_tensors(path, ((name, info.shape) for name, info in shard.infos.items()))
    return shard

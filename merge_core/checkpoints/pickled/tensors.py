"""What a pickle's globals and calls stand for: tensors as places in a file, all else inert.

The table of reconstructors is torch's own (``torch._utils._rebuild_*``, ``torch.storage``); none
of them is called. A tensor is described by its storage's place, an offset, a shape and strides,
and these are checked against the file before anything is read.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from merge_core.checkpoints.dtypes import DTYPES, Dtype
from merge_core.checkpoints.pickled.machine import Global, Pairs, PickleFileError, Record

STORAGE_DTYPES = {
    "DoubleStorage": DTYPES["float64"],
    "FloatStorage": DTYPES["float32"],
    "HalfStorage": DTYPES["float16"],
    "BFloat16Storage": DTYPES["bfloat16"],
    "LongStorage": DTYPES["int64"],
    "IntStorage": DTYPES["int32"],
    "ShortStorage": DTYPES["int16"],
    "CharStorage": DTYPES["int8"],
    "ByteStorage": DTYPES["uint8"],
    "BoolStorage": DTYPES["bool"],
    "ComplexDoubleStorage": DTYPES["complex128"],
    "ComplexFloatStorage": DTYPES["complex64"],
    "QInt8Storage": DTYPES["qint8"],
    "QInt32Storage": DTYPES["qint32"],
    "QUInt8Storage": DTYPES["quint8"],
    "QUInt4x2Storage": DTYPES["quint4x2"],
    "QUInt2x4Storage": DTYPES["quint2x4"],
    "UntypedStorage": DTYPES["uint8"],
    "TypedStorage": DTYPES["uint8"],
}
STORAGE_MODULES = ("torch", "torch.cuda", "torch.storage")
# Globals that are safe: what plain tensors and containers are pickled with.
KNOWN = {
    "_codecs.encode",
    "collections.OrderedDict",
    "collections.defaultdict",
    "collections.Counter",
    *(
        f"{module}.{name}"
        for module in ("builtins", "__builtin__")
        for name in ("bytearray", "bytes", "complex", "dict", "frozenset", "int", "list", "object",
                     "range", "set", "slice", "str", "tuple")
    ),
    "torch.Size",
    "torch.Tensor",
    "torch._tensor._rebuild_from_type_v2",
    "torch.device",
    "torch.nn.parameter.Buffer",
    "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout",
    "torch.storage._load_from_bytes",
}  # fmt: skip
# No model needs these. Nothing is called whatever it is named: the file is refused so that its
# owner learns what it would do elsewhere.
HOSTILE_MODULES = {
    "os", "posix", "nt", "commands", "ctypes", "pty", "runpy", "shutil", "socket", "subprocess",
}  # fmt: skip
HOSTILE_BUILTINS = {"__import__", "compile", "eval", "exec", "execfile", "input", "open"}
FOREIGN_STORAGE = "in a storage that torch.save did not write"
KINDS = {
    "_rebuild_tensor": FOREIGN_STORAGE,
    "_rebuild_tensor_v2": FOREIGN_STORAGE,
    "_rebuild_tensor_v3": FOREIGN_STORAGE,
    "_rebuild_sparse_tensor": "sparse",
    "_rebuild_qtensor": "quantised",
    "_rebuild_nested_tensor": "nested",
    "_rebuild_meta_tensor_no_storage": "without values (on the meta device)",
}

MOST_ARGUMENTS = 16
MOST_DIMENSIONS = 16
MOST_ELEMENTS = 1 << 48
# Tensors may repeat the bytes of their storage (expanded masks and positions do, and are small).
MOST_REPEATED = 1 << 24


@dataclass(slots=True, eq=False)
class Region:
    """A storage in the file.

    Attributes:
        size: its bytes, decompressed.
        start: where it begins; None until that is known.
        packed: its bytes in the file where it is compressed (deflate) or a text, else None.
        is_text: whether it is a text of Latin-1 in UTF-8, in place of compressed bytes.
        data: the bytes themselves, where they are not kept as they are in the file.
    """

    size: int
    start: int | None = None
    packed: int | None = None
    is_text: bool = False
    data: bytes | None = None


@dataclass(slots=True, eq=False)
class Storage:
    """A typed view of a region, from byte `begin` of it on."""

    region: Region
    dtype: Dtype
    begin: int
    size: int


@dataclass(slots=True, eq=False)
class StoredTensor:
    """A tensor that has not been read.

    Attributes:
        begin: its first byte within the region.
        strides: in elements.
    """

    region: Region
    dtype: Dtype
    begin: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def extent(self) -> int:
        """Bytes from the first to the last element, inclusive."""
        return _reach(self.shape, self.strides) * self.dtype.itemsize


@dataclass(slots=True, eq=False)
class Unreadable:
    """A tensor that is no plain array (sparse, quantised, on no device, ...)."""

    kind: str


def storage_dtype(kind: Any) -> Dtype:
    """The dtype that a storage class stands for.

    Raises:
        PickleFileError: no storage class of torch.
    """
    if isinstance(kind, Global) and kind.module in STORAGE_MODULES and kind.name in STORAGE_DTYPES:
        return STORAGE_DTYPES[kind.name]
    raise PickleFileError.damaged("it names a kind of storage that torch does not have")


def count(value: Any) -> int:
    """A number of bytes or elements as stated in a file.

    Raises:
        PickleFileError: no integer from 0 to 2^48.
    """
    if type(value) is not int or not 0 <= value <= MOST_ELEMENTS:
        raise PickleFileError.damaged("it states a size that no tensor has")
    return value


def view(storage: Storage, offset: Any, shape: Any, strides: Any) -> StoredTensor:
    """A tensor over a storage, checked to lie within it.

    Args:
        storage: the storage.
        offset: its first element, counted in elements of the storage.
        shape: sizes.
        strides: steps in elements.

    Raises:
        PickleFileError: sizes that are none, or a tensor that reaches beyond its storage or repeats
            its bytes more than any model does.
    """
    if not (
        isinstance(shape, tuple | list)
        and isinstance(strides, tuple | list)
        and len(shape) == len(strides) <= MOST_DIMENSIONS
    ):
        raise PickleFileError.damaged("it holds a tensor without a shape")
    sizes, steps = tuple(map(count, shape)), tuple(map(count, strides))
    if math.prod(max(1, size) for size in sizes) > MOST_ELEMENTS:
        raise PickleFileError.damaged("it states a size that no tensor has")
    item = storage.dtype.itemsize
    tensor = StoredTensor(
        storage.region, storage.dtype, storage.begin + count(offset) * item, sizes, steps
    )
    if tensor.begin + tensor.extent > storage.begin + storage.size:
        raise PickleFileError.damaged("a tensor in it reaches beyond its storage")
    if math.prod(sizes) * item > max(storage.size, MOST_REPEATED):
        raise PickleFileError.damaged("a tensor in it is larger than its storage")
    return tensor


def _reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last, inclusive, of a strided tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))


class TensorMaker(ABC):
    """Puts tensors' places for torch's reconstructors, and records for everything else.

    Subclasses say what lies outside the pickle (:meth:`persistent_load`).

    Attributes:
        unsafe_globals: the full names of all other classes and functions that were met.
    """

    def __init__(self) -> None:
        self.unsafe_globals: set[str] = set()

    def find(self, module: str, name: str) -> Global:
        """A global's name, noted if it is an unsafe one.

        Raises:
            PickleFileError: a name that only an attack needs.
        """
        builtin = module in ("builtins", "__builtin__") and name in HOSTILE_BUILTINS
        found = Global(module, name)
        if builtin or module in HOSTILE_MODULES:
            raise PickleFileError(
                f"it asks for {found.shown}, which no model needs: loaded carelessly, it "
                "would run foreign code. Nothing was run; do not use this file."
            )
        full = str(found)
        tensors = module == "torch._utils" and name.startswith("_rebuild")
        dtypes = module == "torch" and name in DTYPES
        # Storages, and the classes of tensors that files from before torch 0.4 name.
        classes = module in STORAGE_MODULES and name.replace("Tensor", "Storage") in STORAGE_DTYPES
        if not (tensors or classes or dtypes or full in KNOWN):
            self.unsafe_globals.add(found.shown)
        return found

    @abstractmethod
    def persistent_load(self, key: Any) -> Any:
        """What lies outside the pickle under `key`."""

    def read_nested(self, data: Any) -> Any:
        """The storage in bytes that hold a torch file of their own: inert, by default."""
        return Record(Global("torch.storage", "_load_from_bytes"), data)

    def make(self, maker: Any, args: Any) -> Any:
        """What a call would return, for torch's reconstructors; else a record of the call."""
        if not isinstance(maker, Global) or not isinstance(args, tuple):
            return Record(maker, args)
        if len(args) > MOST_ARGUMENTS:  # no reconstructor, and costly to look at again and again
            return Record(maker, args)
        if maker.module == "torch._utils" and maker.name.startswith("_rebuild"):
            return _rebuild(maker, args)
        match (str(maker), args):
            case (
                "torch._tensor._rebuild_from_type_v2",
                (Global() as inner, _, tuple() as rest, _),
            ):
                return _rebuild(inner, rest)
            case ("collections.OrderedDict", ()):
                return Pairs()
            case ("torch.Size", (tuple() | list() as sizes,)):
                return sizes
            case ("torch.storage._load_from_bytes", (data,)):
                return self.read_nested(data)
        return Record(maker, args)


def _rebuild(maker: Global, args: tuple[Any, ...]) -> Any:
    """What one of the ``torch._utils._rebuild_*`` functions would return."""
    name = maker.name if maker.module == "torch._utils" else ""
    match (name, args):
        case ("_rebuild_parameter" | "_rebuild_parameter_with_state", (data, *_)):
            return data
        case ("_rebuild_tensor", (Storage() as storage, offset, shape, strides)):
            return view(storage, offset, shape, strides)
        case ("_rebuild_tensor_v2", (Storage() as storage, offset, shape, strides, _, _, *meta)):
            return _check_flags(meta) or view(storage, offset, shape, strides)
        case (
            "_rebuild_tensor_v3",
            (Storage() as storage, offset, shape, strides, _, _, Global("torch", dtype), *meta),
        ):
            retyped = Storage(storage.region, _dtype_of(dtype), storage.begin, storage.size)
            return _check_flags(meta) or view(retyped, offset, shape, strides)
    return Unreadable(KINDS.get(name, f"made by {maker.shown}"))


def _dtype_of(name: str) -> Dtype:
    if name not in DTYPES:
        raise PickleFileError.damaged("it names a dtype that torch does not have")
    return DTYPES[name]


def _check_flags(meta: list[Any]) -> Unreadable | None:
    """A tensor whose entries are to be conjugated or negated when they are read."""
    flags = meta[0] if meta else None
    if isinstance(flags, Pairs) and flags:
        return Unreadable("conjugated or negated view")
    return None

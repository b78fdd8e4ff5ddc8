"""Dtypes of stored tensors, for what reads headers alone: importing torch takes seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import dtype as torch_dtype


@dataclass(frozen=True)
class Dtype:
    """The dtype of a stored tensor's entries.

    Attributes:
        name: as in torch, such as ``float32``.
        itemsize: bytes of an entry.
        is_floating_point: whether entries are real numbers.
    """

    name: str
    itemsize: int
    is_floating_point: bool

    @classmethod
    def of(cls, value: torch_dtype) -> Dtype:
        """The record of one of torch's dtypes."""
        name = str(value).removeprefix("torch.")
        return cls(name, value.itemsize, value.is_floating_point)

    @property
    def torch(self) -> torch_dtype:
        """The dtype of torch, which is imported for it.

        Raises:
            AttributeError: the installed torch does not know it.
        """
        import torch

        value: torch_dtype = getattr(torch, self.name)
        return value


_NAMES_BY_SIZE = {
    1: "bool uint8 uint1 uint2 uint3 uint4 uint5 uint6 uint7 int8 int1 int2 int3 int4 int5 int6 "
    "int7 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu "
    "float4_e2m1fn_x2 qint8 quint8 quint2x4 quint4x2 bits8 bits1x8 bits2x4 bits4x2",
    2: "uint16 int16 float16 bfloat16 bits16",
    4: "uint32 int32 float32 qint32 complex32 bcomplex32",
    8: "uint64 int64 float64 complex64",
    16: "complex128",
}
# Source: torch 2.15. All are known by name, though weights come in few of them.
DTYPES = {
    name: Dtype(name, size, name.startswith(("float", "bfloat")))
    for size, names in _NAMES_BY_SIZE.items()
    for name in names.split()
}
# What can be merged or written, by its name in safetensors files.
SAFETENSORS_DTYPES = {
    "F64": DTYPES["float64"],
    "F32": DTYPES["float32"],
    "F16": DTYPES["float16"],
    "BF16": DTYPES["bfloat16"],
    "F8_E4M3": DTYPES["float8_e4m3fn"],
    "F8_E5M2": DTYPES["float8_e5m2"],
    "I64": DTYPES["int64"],
    "I32": DTYPES["int32"],
    "I16": DTYPES["int16"],
    "I8": DTYPES["int8"],
    "U8": DTYPES["uint8"],
    "BOOL": DTYPES["bool"],
}

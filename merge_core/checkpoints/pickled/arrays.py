"""Numpy arrays in pickled state dicts, as the places of their bytes.

Source: numpy's ``ndarray.__reduce_ex__``: ``_reconstruct`` and a state up to protocol 4,
``_frombuffer`` from protocol 5 on; ``pickle``'s ``save_bytes`` before protocol 3. None is called.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

from merge_core.checkpoints.dtypes import DTYPES, Dtype
from merge_core.checkpoints.pickled.machine import Blob, Global, PickleFileError, Record
from merge_core.checkpoints.pickled.tensors import Region, Storage, StoredTensor, count, view

CODES = {
    "f8": DTYPES["float64"],
    "f4": DTYPES["float32"],
    "f2": DTYPES["float16"],
    "i8": DTYPES["int64"],
    "i4": DTYPES["int32"],
    "i2": DTYPES["int16"],
    "i1": DTYPES["int8"],
    "u1": DTYPES["uint8"],
    "b1": DTYPES["bool"],
}
RECONSTRUCT = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
ENCODE = "_codecs.encode"
FROM_BUFFER = ("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer")


class ArrayReader:
    """Makes tensors of the numpy arrays in one pickle.

    Args:
        unpacked: the pickle's bytes where they are compressed in the file, else None.
    """

    def __init__(self, unpacked: bytes | None = None) -> None:
        self._unpacked = unpacked

    def stored(self, value: Any) -> StoredTensor | None:
        """A numpy array of numbers, as the place of its bytes.

        Args:
            value: what :func:`merge_core.checkpoints.pickled.machine.read_pickle` put for it.

        Returns:
            None for anything else, and for arrays of texts, objects or big-endian numbers.

        Raises:
            PickleFileError: sizes that no array has, or more than its bytes hold.
        """
        match value:
            case Record(
                maker=Global() as maker, state=(_, shape, dtype, bool() as fortran, data)
            ) if str(maker) in RECONSTRUCT:
                return self._array(data, dtype, shape, fortran)
            case Record(maker=Global() as maker, args=(data, dtype, shape, str() as order)) if (
                str(maker) in FROM_BUFFER
            ):
                return self._array(data, dtype, shape, order == "F")
        return None

    def _array(self, data: Any, kind: Any, shape: Any, fortran: bool) -> StoredTensor | None:
        dtype = _dtype(kind)
        if dtype is None or not isinstance(shape, tuple):
            return None
        sizes = [count(size) for size in shape]
        region = self._region(data, math.prod(sizes) * dtype.itemsize)
        if region is None:
            return None
        ordered = sizes if fortran else sizes[::-1]
        steps = list(accumulate(ordered, lambda a, b: a * b, initial=1))[:-1]
        storage = Storage(region, dtype, 0, region.size)
        return view(storage, 0, shape, steps if fortran else steps[::-1])

    def _region(self, data: Any, size: int) -> Region | None:
        """The place of an array's bytes: in the file, or, where that holds them otherwise, here.

        Protocols 0 to 2 have no bytes: numpy gives them as a text of Latin-1, which the pickle
        keeps in UTF-8, one byte or two for each.
        """
        match data:
            case Blob():
                if self._unpacked is None:
                    return Region(data.size, data.start)
                return _inline(self._unpacked[data.start : data.start + data.size])
            case Record(maker=Global() as maker, args=(str() as text, "latin1")) if (
                str(maker) == ENCODE
            ):
                return _inline(text.encode("latin-1")) if _is_latin(text) else None
            case Record(maker=Global() as maker, args=(Blob() as text, "latin1")) if (
                str(maker) == ENCODE and size <= text.size
            ):
                if self._unpacked is None:
                    return Region(size, text.start, packed=text.size, is_text=True)
                return _inline(decode(self._unpacked[text.start : text.start + text.size], size))
        return None


def decode(text: bytes | bytearray, size: int) -> bytes:
    """The bytes that a text of Latin-1 stands for, which is given in UTF-8.

    Raises:
        PickleFileError: it stands for another number of them, or for none.
    """
    try:
        data = text.decode("utf-8").encode("latin-1")
    except UnicodeError as error:
        raise PickleFileError.damaged("an array in it is damaged") from error
    if len(data) != size:
        raise PickleFileError.damaged("an array in it has another size than it says")
    return data


def _inline(data: bytes) -> Region:
    return Region(len(data), 0, data=data)


def _is_latin(text: str) -> bool:
    return not text or max(text) <= "\xff"


def _dtype(kind: Any) -> Dtype | None:
    match kind:
        case Record(
            maker=Global("numpy", "dtype"), args=(str() as code, *_), state=(_, "<" | "|", *_)
        ):
            return CODES.get(code)
    return None

"""Numpy arrays in pickled state dicts, as the places of their bytes.

Source: numpy's ``ndarray.__reduce_ex__``: ``_reconstruct`` and a state up to protocol 4,
``_frombuffer`` from protocol 5 on. Neither is called.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from merge_core.checkpoints.dtypes import DTYPES, Dtype
from merge_core.checkpoints.pickled.machine import Blob, Global, Record
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
FROM_BUFFER = ("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer")


def stored_array(value: Any) -> StoredTensor | None:
    """A numpy array of numbers as a place in the stream that its pickle was read from.

    Args:
        value: what :func:`merge_core.checkpoints.pickled.machine.read_pickle` put for it.

    Returns:
        None for anything else, and for arrays of texts, objects or big-endian numbers, and those
        that protocols 0 to 2 write as text.

    Raises:
        PickleFileError: sizes that no array has, or more than its bytes hold.
    """
    match value:
        case Record(
            maker=Global() as maker, state=(_, shape, dtype, bool() as fortran, Blob() as data)
        ) if str(maker) in RECONSTRUCT:
            return _array(data, dtype, shape, fortran)
        case Record(
            maker=Global() as maker, args=(Blob() as data, dtype, shape, str() as order)
        ) if str(maker) in FROM_BUFFER:
            return _array(data, dtype, shape, order == "F")
    return None


def _array(data: Blob, kind: Any, shape: Any, fortran: bool) -> StoredTensor | None:
    dtype = _dtype(kind)
    if dtype is None or not isinstance(shape, tuple):
        return None
    sizes = [count(size) for size in shape]
    steps = list(accumulate(sizes if fortran else sizes[::-1], lambda a, b: a * b, initial=1))[:-1]
    storage = Storage(Region(data.size, data.start), dtype, 0, data.size)
    return view(storage, 0, shape, steps if fortran else steps[::-1])


def _dtype(kind: Any) -> Dtype | None:
    match kind:
        case Record(
            maker=Global("numpy", "dtype"), args=(str() as code, *_), state=(_, "<" | "|", *_)
        ):
            return CODES.get(code)
    return None

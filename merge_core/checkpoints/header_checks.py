"""Bounds on what headers and shard indexes claim, checked before use; no real model exceeds them.

The safetensors library checks that tensors fill the file without holes or overlaps; this adds
what would cost minutes and gigabytes, or what could not be named in a message or an output.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from merge_core.checkpoints.stored.placeholders import check_content
from merge_core.errors import CheckpointError
from merge_core.input_files import open_regular, read_json

HEADER_BYTES = 10_000_000  # of one file: some 70,000 tensors
INDEX_BYTES = 20_000_000  # of all shards: some 200,000 tensors
INDEX_VALUES = 400_000  # a name and a file for each
HEADER_VALUES = 1_000_000  # a dtype, two places and some sizes of each
NAME_CHARACTERS = 500
DIMENSIONS = 32
ELEMENTS = 1 << 59  # of 8 bytes at most: sizes stay below 2^62
RESERVED = "__metadata__"  # where a safetensors header keeps its notes


def check_safetensors_header(path: Path) -> None:
    """Refuse a safetensors header that is too long or names a tensor twice.

    Whatever else is wrong with the file, the safetensors library says.

    Raises:
        CheckpointError: the header is too long or names a tensor twice.
        OSError: the file cannot be read.
    """
    with open_regular(path) as stream:
        length = int.from_bytes(stream.read(8), "little")
        left = path.stat().st_size - 8
        if HEADER_BYTES < length <= left:
            raise CheckpointError(
                f"{path}: its header has {length:,} bytes; no model's has more than "
                f"{HEADER_BYTES:,}. Give the original file."
            )
        text = stream.read(length) if length <= left else b""
    if text.count(b",") > HEADER_VALUES:
        raise CheckpointError(
            f"{path}: its header holds more than {HEADER_VALUES:,} values; no model's does. Give "
            "the original file."
        )
    try:
        json.loads(text, object_pairs_hook=_unique)
    except _Twice as twice:
        raise CheckpointError(
            f"{path}: its header says {str(twice)!r:.100} twice. Give the original file."
        ) from twice
    except (ValueError, RecursionError):
        return


def check_tensors(path: Path, tensors: Iterable[tuple[str, tuple[int, ...]]]) -> None:
    """Refuse names that no message or output could hold, and shapes that no tensor could have.

    Args:
        path: of the file, for messages.
        tensors: name and shape of each.

    Raises:
        CheckpointError: there is such a tensor.
    """
    for name, shape in tensors:
        if not name.isprintable() or len(name) > NAME_CHARACTERS or name == RESERVED:
            raise CheckpointError(
                f"{path}: {name!r:.100} is not a name that a tensor can have. Give the original "
                "file, or export the weights again."
            )
        if len(shape) > DIMENSIONS or math.prod(size for size in shape if size) > ELEMENTS:
            raise CheckpointError(
                f"{path}: tensor {name!r} claims a shape that no tensor has: {shape!s:.100}. "
                "Give the original file."
            )


def read_index(path: Path) -> dict[str, str]:
    """Which shard holds each tensor, as a ``*.index.json`` says.

    Raises:
        CheckpointError: not such an index, or it names a file outside its folder.
    """
    try:
        check_content(path)
        weight_map = read_json(path, INDEX_BYTES, INDEX_VALUES)["weight_map"]
        if not weight_map or not all(
            isinstance(name, str) and isinstance(file, str) for name, file in weight_map.items()
        ):
            raise TypeError
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Check it.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a shard index (a JSON object with a 'weight_map'). Copy it again."
        ) from error
    outside = [file for file in weight_map.values() if not _is_file_name(file)]
    if outside:
        raise CheckpointError(f"{path} names a shard outside its folder: {outside[0]!r:.100}.")
    check_tensors(path, ((name, ()) for name in weight_map))
    return dict(weight_map)


def _is_file_name(text: str) -> bool:
    """Whether a text names a file of the folder at hand, and nothing else."""
    plain = Path(text).name == text and text not in ("", "..") and text.isprintable()
    return plain and len(text.encode()) <= 255


class _Twice(Exception):  # noqa: N818 - carries a name out of the JSON reader
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        raise _Twice(next(name for name, _ in pairs if name in seen or seen.add(name)))  # type: ignore[func-returns-value]
    return fields

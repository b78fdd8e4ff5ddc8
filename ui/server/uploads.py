"""Uploaded checkpoints: checked on the server and kept in the session's own folder."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.errors import CheckpointError, OutputError
from merge_core.files import explain_os_error
from merge_core.opening.draft import task_name
from merge_core.opening.search import SAYS_NOTHING

SUFFIX = ".safetensors"
UNNAMED = "upload"
MOST_SHOWN = 3
MOST_FILES = 32
MOST_BYTES = 2_000_000_000  # of one session
SPARE_BYTES = 1_000_000_000  # that stay free on the disk


class Upload(Protocol):
    """A file as the browser sent it."""

    name: str
    size: int

    def read(self, size: int = ..., /) -> bytes: ...


def keep(uploads: Sequence[Upload], folder: Path) -> list[str]:
    """Keep the uploads that are readable safetensors files within the limits.

    Args:
        uploads: what the browser sent; their names are never used as paths.
        folder: the session's own.

    Returns:
        One sentence for each upload that was refused.
    """
    refused = []
    for upload in uploads:
        try:
            _keep(upload, folder)
        except (CheckpointError, OutputError) as error:
            refused.append(str(error))
    return refused


def stem_of(name: str) -> str:
    """What an upload is called: by its file's name, unless that says nothing of the model."""
    stem = name.removesuffix(SUFFIX)
    return UNNAMED if SAYS_NOTHING.match(stem) else stem


def say_alike(names: Sequence[str], kept: Sequence[str]) -> str:
    """A sentence on uploads whose names do not tell them apart; empty if all do.

    Args:
        names: of the files as they were sent now.
        kept: stems of the files that were kept before.

    Example:
        >>> say_alike(["cars.safetensors", "dtd.safetensors"], [])
        ''
        >>> say_alike(["cars.safetensors"], ["cars"])[:37]
        "Some uploads are named alike ('cars.s"
    """
    stems = [stem_of(name) for name in names]
    counts = Counter([*stems, *kept])
    alike = dict.fromkeys(n for n, stem in zip(names, stems, strict=True) if counts[stem] > 1)
    if not alike:
        return ""
    shown = ", ".join(f"{name!r:.60}" for name in list(alike)[:MOST_SHOWN])
    return (
        f"Some uploads are named alike ({shown}). Each has a row of its own below, in the order in "
        "which they came: give each a task name that tells what it is."
    )


def _keep(upload: Upload, folder: Path) -> None:
    """Keep one upload.

    Raises:
        CheckpointError: it is none, or beyond the limits.
        OutputError: the disk is full.
    """
    shown = f"{upload.name!r:.100}"
    if not upload.name.endswith(SUFFIX):
        raise CheckpointError(f"{shown} is not a {SUFFIX} file. Other formats are not uploaded.")
    known = list(folder.glob(f"*{SUFFIX}"))
    if len(known) >= MOST_FILES:
        raise CheckpointError(f"{shown}: at most {MOST_FILES} files can be uploaded.")
    held = sum(path.stat().st_size for path in known)
    if held + upload.size > MOST_BYTES:
        raise CheckpointError(
            f"{shown} would make more than {MOST_BYTES / 1e9:g} GB of uploads. Put the files in a "
            "folder on the server and choose it there."
        )
    if shutil.disk_usage(folder).free - upload.size < SPARE_BYTES:
        raise OutputError(f"{shown}: the server's disk is nearly full. It was not kept.")
    name = task_name(stem_of(upload.name), {path.stem for path in known}) + SUFFIX
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as place:
            path = Path(place) / name
            with path.open("wb") as stream:
                shutil.copyfileobj(upload, stream)
            Checkpoint(path)
            path.rename(folder / name)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(path), shown)) from error
    except OSError as error:
        raise explain_os_error(error, Path(name)) from error

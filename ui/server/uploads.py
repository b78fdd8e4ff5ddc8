"""Uploaded checkpoints: checked on the server and kept in the session's own folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.errors import CheckpointError, OutputError
from merge_core.files import explain_os_error
from merge_core.opening.draft import task_name

SUFFIX = ".safetensors"
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
    name = task_name(upload.name.removesuffix(SUFFIX), {path.stem for path in known}) + SUFFIX
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

"""Places on disk: the cache folder, content digests, and writes that are whole or absent."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from merge_core.errors import MergeScopeError, OutputError

CHUNK = 1 << 22


def cache_dir() -> Path:
    """The folder for derived results: ``$MERGESCOPE_CACHE``, else the user's cache folder."""
    chosen = os.environ.get("MERGESCOPE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "mergescope"


def digest_of(*parts: str | bytes) -> str:
    """SHA-256 (hex) of a sequence of strings or bytes, unambiguous as to where each ends."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "little"))
        whole.update(data)
    return whole.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, remembered by path, size and times of change.

    Raises:
        OSError: the file cannot be read.
    """
    stat = path.stat()
    memo_key = digest_of(
        str(path.resolve()),
        str(stat.st_size),
        str(stat.st_mtime_ns),
        str(stat.st_ctime_ns),  # the one that no tool can set back
        str(stat.st_ino),
    )
    memo = cache_dir() / "digests" / memo_key
    with suppress(OSError, ValueError):
        known = memo.read_text()
        if len(bytes.fromhex(known)) == hashlib.sha256().digest_size:
            return known
    whole = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            whole.update(chunk)
    with suppress(OSError, OutputError):
        write_atomically(memo, whole.hexdigest().encode())
    return whole.hexdigest()


def read_yaml(
    path: Path, usual_name: str, error: type[MergeScopeError], alternative: str
) -> tuple[dict[str, Any], Path]:
    """Read a YAML file that describes something.

    Args:
        path: the file, or the folder that holds it under its usual name.
        usual_name: ``suite.yaml``, say.
        error: what is raised.
        alternative: what may be given in place of a path, for the message.

    Returns:
        Its fields, and the path of the file.

    Raises:
        MergeScopeError: of the given kind: unreadable, not YAML, or not a table of fields.
    """
    try:
        path = path.expanduser()
        if path.is_dir():
            path = path / usual_name
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as fault:  # ValueError: month 13
        first = str(fault).replace("\n", " ")
        raise error(f"{path} is not valid YAML: {first:.200}") from fault
    except (OSError, RuntimeError) as fault:  # RuntimeError: ~someone without a home folder
        reason = fault.strerror if isinstance(fault, OSError) else str(fault)
        raise error(
            f"{path} cannot be read ({reason}). Give a {usual_name}, its folder, or {alternative}."
        ) from fault
    if not isinstance(document, dict):
        what = Path(usual_name).stem
        raise error(f"{path} is not a {what}: it must hold fields such as name.")
    return document, path


def evict(folder: Path, most: int) -> None:
    """Delete the least recently changed files of a folder until it holds at most `most` bytes.

    Raises:
        OSError: the folder cannot be read.
    """
    files = [(path, path.stat()) for path in folder.iterdir() if path.is_file()]
    excess = sum(stat.st_size for _, stat in files) - most
    for path, stat in sorted(files, key=lambda pair: pair[1].st_mtime):
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= stat.st_size


def explain_os_error(error: OSError, target: Path) -> OutputError:
    """An OutputError in words for what the operating system refused while writing `target`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"The disk is full: {target} was not written. Free some space or choose another folder."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(f"{target} cannot be written (no permission). Choose another folder.")
    return OutputError(f"{target} could not be written: {error.strerror or error}.")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file or none: to a temporary name beside it, then renamed.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise explain_os_error(error, path) from error


@contextmanager
def folder_written_whole(output: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `output` that takes its name only if the block succeeds.

    Args:
        output: the folder to appear (absent or empty before); its parents are made.

    Raises:
        OutputError: `output` exists and is not empty, or cannot be written.
    """
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file; the output must be a folder. Choose another name.")
    if output.is_dir() and any(output.iterdir()):
        raise OutputError(
            f"{output} exists and is not empty. Choose another folder, or remove it first."
        )
    staging: Path | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
        yield staging
        # mkdtemp makes a private folder; the result gets the permissions any new folder has.
        mask = os.umask(0)
        os.umask(mask)
        staging.chmod(0o777 & ~mask)
        staging.replace(output)
    except OSError as error:
        raise explain_os_error(error, output) from error
    finally:
        if staging is not None and staging.exists():
            shutil.rmtree(staging, ignore_errors=True)

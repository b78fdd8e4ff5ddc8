"""Files that strangers made: where their paths and links lead, their kind, and their state."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from merge_core.errors import MergeScopeError

# A repository in the hub's cache: snapshots/<revision>/ holds links to blobs/.
HUB_REPO = re.compile(r"(models|datasets|spaces)--.+")
# Where git-annex and DVC keep content, from the top of a repository.
CONTENT_STORES = (Path(".git", "annex", "objects"), Path(".dvc", "cache"))
MOST_HOPS = 40  # from link to link, as Linux counts
MOST_ENTRIES = 2_000_000  # ImageNet has 1.4 million files

Stamp = tuple[int, int, int, int]


def expand_path(path: str | Path, error: type[MergeScopeError], what: str = "") -> Path:
    """A path that somebody wrote, with ``~`` made the home folder.

    Args:
        path: as written.
        error: what is raised.
        what: where it is written, for the message.

    Raises:
        MergeScopeError: of the given kind: no such home, or no path at all.

    Example:
        >>> expand_path("models/base", MergeScopeError)
        PosixPath('models/base')
    """
    try:
        if "\0" in str(path):
            raise ValueError("it holds a NUL")
        found = Path(path).expanduser()
        with suppress(PermissionError):  # whoever reads there says it
            found.exists()  # a name may be too long for the system
    except (OSError, ValueError, RuntimeError) as fault:
        raise _path_error(path, error, what, fault) from fault
    return found


def resolve_path(
    path: str | Path, error: type[MergeScopeError], root: Path | None = None, what: str = ""
) -> Path:
    """A path that somebody wrote, absolute and with its links followed.

    Args:
        path: as written; ``~`` is the home folder.
        error: what is raised.
        root: where relative paths start; the working folder if None.
        what: where it is written, for the message.

    Raises:
        MergeScopeError: of the given kind: links in a circle, no such home, or no path at all.

    Example:
        >>> resolve_path("experts/../base", MergeScopeError, Path("/models"))
        PosixPath('/models/base')
        >>> resolve_path("~nobody-of-that-name/base", MergeScopeError)
        Traceback (most recent call last):
        ...
        merge_core.errors.MergeScopeError: '~nobody-of-that-name/base' is not a path (...)...
    """
    expanded = expand_path(path, error, what)
    try:
        return ((root or Path()) / expanded).resolve()
    except (OSError, ValueError, RuntimeError) as fault:
        raise _path_error(path, error, what, fault) from fault


def _path_error(
    path: str | Path, error: type[MergeScopeError], what: str, fault: Exception
) -> MergeScopeError:
    reason = fault.strerror if isinstance(fault, OSError) else fault
    place = f"{what}: " if what else ""
    return error(f"{place}{str(path)!r:.80} is not a path ({reason!s:.160}). Correct it.")


def stays_inside(path: Path, root: Path) -> bool:
    """Whether what a path names lies in a folder, all links followed.

    What lies in a snapshot of the Hugging Face cache may be a link to the blobs of the same
    repository, which are its content.

    Args:
        path: of a file or folder, there or not.
        root: the folder.

    Example:
        >>> Path("models").mkdir()
        >>> Path("models/vocab.txt").symlink_to(Path("secret.txt").absolute())
        >>> stays_inside(Path("models/vocab.txt"), Path("models"))
        False
    """
    try:
        top = root.resolve()
        if path.resolve() == top:
            return True
        for _ in range(MOST_HOPS):
            place = path.parent.resolve()
            if not place.is_relative_to(top):
                return False
            if not path.is_symlink():
                return (place / path.name).resolve().is_relative_to(top)
            path = place / path.readlink()  # what lies beside it may be read as well
            if any(path.resolve().is_relative_to(blobs) for blobs in _hub_blobs(place)):
                return True
    except (OSError, ValueError, RuntimeError):  # links in a circle
        return False
    return False


def belongs_beside(path: Path, weights: Path) -> bool:
    """Whether a file beside weights may be copied with them: its content is of the same model.

    A link may lead to the folder itself, to the folder that the weights are a link into, and to
    where the Hugging Face cache, git-annex or DVC keep the content of that folder. Anywhere else,
    it may lead to what its maker could not read: a private key under the name ``vocab.txt``.

    Args:
        path: of the file, in the folder of the weights or below it.
        weights: a file of weights, as it was named.
    """
    try:
        target, place = path.resolve(), path.parent.resolve()
        if not place.is_relative_to(weights.parent.resolve()):
            return False  # a folder in the folder is a link
        places = [place, *_hub_blobs(place), *_content_stores(place)]
        return target.parent == weights.resolve().parent or any(map(target.is_relative_to, places))
    except (OSError, ValueError, RuntimeError):  # links in a circle
        return False


def find_outside(path: Path, root: Path) -> Path | None:
    """Something that leads outside a folder: the path itself, or what lies anywhere below it.

    Args:
        path: of a file or folder, which need not be there.
        root: the folder in which all of it must lie; see :func:`stays_inside`.

    Returns:
        What leads outside, or the path itself where more than :data:`MOST_ENTRIES` entries would
        have to be looked at; None if nothing does.

    Raises:
        OSError: a folder cannot be read.

    Example:
        >>> Path("root").mkdir()
        >>> Path("root/out").symlink_to("/")
        >>> find_outside(Path("root"), Path("root"))
        PosixPath('root/out')
    """
    if not stays_inside(path, root):
        return path
    waiting, seen, entries = [path], {path.resolve()}, 0
    while waiting:
        folder = waiting.pop()
        if not folder.is_dir():
            continue
        with os.scandir(folder) as listing:
            for entry in listing:
                entries += 1
                if entries > MOST_ENTRIES:
                    return path
                child = Path(entry.path)
                if entry.is_symlink() and not stays_inside(child, root):
                    return child
                if entry.is_dir() and (real := child.resolve()) not in seen:
                    seen.add(real)
                    waiting.append(child)
    return None


def list_files(folder: Path) -> Iterator[Path]:
    """What is no folder in a folder, at any depth; links are followed, but never in a circle.

    Raises:
        OSError: a folder cannot be read, or there are more than :data:`MOST_ENTRIES` entries.
    """
    entries = 0
    waiting: list[tuple[Path, frozenset[tuple[int, int]]]] = [(folder, frozenset())]
    while waiting:
        place, above = waiting.pop()
        state = place.stat()
        if (own := (state.st_dev, state.st_ino)) in above:
            continue
        with os.scandir(place) as listing:
            for entry in listing:
                entries += 1
                if entries > MOST_ENTRIES:
                    raise OSError(errno.E2BIG, f"more than {MOST_ENTRIES:,} files", str(folder))
                if entry.is_dir():
                    waiting.append((Path(entry.path), above | {own}))
                else:
                    yield Path(entry.path)


def check_all_regular(folder: Path) -> None:
    """Refuse a folder for a library that opens what it finds, and would wait at a pipe for ever.

    Raises:
        OSError: there is something other than files and folders in it, at any depth.
    """
    for path in list_files(folder):
        if path.exists():
            check_regular(path)


def _hub_blobs(place: Path) -> Iterator[Path]:
    """Where the hub's cache keeps the content of a snapshot that a folder is, or lies in."""
    for folder in (place, *place.parents):
        repo = folder.parent.parent
        if folder.parent.name == "snapshots" and HUB_REPO.fullmatch(repo.name):
            yield repo / "blobs"


def _content_stores(place: Path) -> Iterator[Path]:
    """Where git-annex and DVC keep the content of a folder."""
    for top in (place, *place.parents):
        yield from (top / store for store in CONTENT_STORES)


def check_regular(path: Path) -> os.stat_result:
    """The state of a file to be read: a pipe, a device, a socket or a folder is none.

    Raises:
        OSError: it is no regular file, or not there.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return state


def open_regular(path: Path) -> io.BufferedReader:
    """A regular file, opened for reading; opening never waits for another process.

    Raises:
        OSError: it is no regular file, or cannot be read.
    """
    check_regular(path)  # opening a device may have an effect
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):  # another one by now
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_bounded(path: Path, most: int) -> bytes:
    """The content of a small regular file.

    Raises:
        OSError: it is no regular file, or cannot be read.
        ValueError: it has more than `most` bytes.

    Example:
        >>> _ = Path("config.json").write_text("{}")
        >>> read_bounded(Path("config.json"), 100)
        b'{}'
    """
    with open_regular(path) as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise ValueError(f"longer than {most:,} bytes")
    return content


def read_json(path: Path, most_bytes: int, most_values: int) -> Any:
    """What a JSON file of a stranger says, with bounds on its bytes and on what they hold.

    A value that takes two bytes in the file may take a hundred in memory.

    Raises:
        OSError: it is no regular file, or cannot be read.
        ValueError: it is no JSON, too long, or holds too many values.
        RecursionError: it is too deep.

    Example:
        >>> _ = Path("index.json").write_text('{"weight_map": {}}')
        >>> read_json(Path("index.json"), 1000, 10)
        {'weight_map': {}}
    """
    content = read_bounded(path, most_bytes)
    if sum(map(content.count, (b",", b"[", b"{"))) > most_values:
        raise ValueError(f"more than {most_values:,} values")
    return json.loads(content)


def file_stamp(path: Path) -> Stamp | None:
    """What changes when a file does, replaced or in place; None if it is not there.

    Returns:
        Size, times of modification and of change, and inode. No tool can set the time of change
        back.

    Example:
        >>> path = Path("notes.txt")
        >>> _ = path.write_text("before")
        >>> before = file_stamp(path)
        >>> _ = path.write_text("after!")
        >>> file_stamp(path) == before
        False
    """
    try:
        return stamp_of(path.stat())
    except (OSError, ValueError, RuntimeError):  # absent, or a name that no file can have
        return None


def stamp_of(state: os.stat_result) -> Stamp:
    """The stamp of a file in that state; see :func:`file_stamp`."""
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino

"""Files: the cache folder, content digests, and writes that succeed whole or leave nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from blake3 import blake3

from merge_core.errors import MergeScopeError, OutputError
from merge_core.input_files import check_regular, expand_path, open_regular, resolve_path, stamp_of
from merge_core.yaml_text import load_yaml, read_text_file

PARTIAL = ".partial"
FACTORS_BYTES = 20 << 30
PIECE_BYTES = 1 << 20


def cache_dir() -> Path:
    """The folder for derived results: ``$MERGESCOPE_CACHE``, else the user's cache folder.

    Raises:
        OutputError: the variable names no path, or there is no home folder.

    Example:
        >>> cache_dir().is_absolute()
        True
    """
    for variable, below in (("MERGESCOPE_CACHE", ""), ("XDG_CACHE_HOME", "mergescope")):
        if chosen := os.environ.get(variable):
            return resolve_path(chosen, OutputError, what=f"The cache folder (${variable})") / below
    return resolve_path("~/.cache/mergescope", OutputError, what="The cache folder")


def factors_limit() -> int:
    """Bytes that stored factors may take: ``$MERGESCOPE_FACTORS_GB``, else 20 GiB."""
    with suppress(KeyError, ValueError, OverflowError):
        return max(0, int(float(os.environ["MERGESCOPE_FACTORS_GB"]) * (1 << 30)))
    return FACTORS_BYTES


def digest_of(*parts: str | bytes) -> str:
    """SHA-256 (hex) of a sequence of strings or bytes, unambiguous as to where each ends.

    Example:
        >>> len(digest_of("a", "b")), digest_of("a", "b") == digest_of("ab")
        (64, False)
    """
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "little"))
        whole.update(data)
    return whole.hexdigest()


def file_digest(path: Path) -> str:
    """BLAKE3 (hex, 256 bits) of a file's bytes, remembered by path, size and times of change.

    Cryptographic like SHA-256, at more than three times its speed: checkpoints are large.

    Raises:
        OSError: the file cannot be read.

    Source: https://github.com/BLAKE3-team/BLAKE3-specs.

    Example:
        >>> path = Path("weights.bin")
        >>> _ = path.write_bytes(b"abc")
        >>> file_digest(path)[:16]
        '6437b3ac38465133'
    """
    state = check_regular(path)
    memo_key = digest_of("blake3", str(path.resolve()), *map(str, stamp_of(state)))
    memo = cache_dir() / "digests" / memo_key
    with suppress(OSError, ValueError):
        known = memo.read_text()
        if len(bytes.fromhex(known)) == blake3.digest_size:
            return known
    digest = hash_of(path).hexdigest()
    with suppress(OSError, OutputError):
        write_atomically(memo, digest.encode())
    return digest


def hash_of(path: Path) -> blake3:
    """BLAKE3 of a file's bytes, read in pieces.

    Raises:
        OSError: the file cannot be read.
    """
    whole = blake3()
    piece = memoryview(bytearray(PIECE_BYTES))
    with open_regular(path) as stream:
        if hasattr(os, "posix_fadvise"):  # the disk works ahead: twice as fast where it is new
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while size := stream.readinto(piece):
            whole.update(piece[:size])
    return whole


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

    Example:
        >>> _ = Path("suite.yaml").write_text("name: mine")
        >>> read_yaml(Path(), "suite.yaml", MergeScopeError, "nothing else")
        ({'name': 'mine'}, PosixPath('suite.yaml'))
    """
    path = expand_path(path, error)
    try:
        if path.is_dir():
            path = path / usual_name
        document = load_yaml(read_text_file(path))
    except (yaml.YAMLError, ValueError) as fault:  # ValueError: not text
        first = str(fault).replace("\n", " ")
        raise error(f"{path} is not valid YAML: {first:.200}") from fault
    except OSError as fault:
        raise error(
            f"{path} cannot be read ({fault.strerror}). Give a {usual_name}, its folder, or "
            f"{alternative}."
        ) from fault
    if not isinstance(document, dict):
        what = Path(usual_name).stem
        raise error(f"{path} is not a {what}: it must hold fields such as name.")
    return document, path


def path_below(root: Path, text: str, error: type[MergeScopeError]) -> Path:
    """A path that somebody wrote, made absolute, the links of its folders followed.

    A link that it names itself is kept: a file of weights has the name and the neighbours of the
    link, where the Hugging Face cache, git-annex and DVC keep what it leads to under the name of
    its content.

    Args:
        root: where relative paths start.
        text: the path as written; ``~`` is the home folder.
        error: what is raised.

    Raises:
        MergeScopeError: of the given kind: links in a circle, no such home, or no path at all.

    Example:
        >>> Path("model.safetensors").symlink_to("4d7a")
        >>> path_below(Path(), "model.safetensors", MergeScopeError).name
        'model.safetensors'
        >>> path_below(Path("/models"), "experts/../base", MergeScopeError)
        PosixPath('/models/base')
    """
    try:
        path = root / Path(text).expanduser()
        named = path.parent.resolve() / path.name if path.is_symlink() else path.resolve()
        named.exists()  # a name may be too long for the system
    except (OSError, ValueError, RuntimeError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) else fault
        raise error(f"{text!r:.80} is not a path ({reason!s:.160}). Correct it.") from fault
    return named


def evict(folder: Path, most: int) -> None:
    """Delete a folder's least recently changed files until it holds at most `most` bytes.

    Files in its folders count too; one that another process deletes meanwhile is gone all the same.

    Raises:
        OSError: the folder cannot be read.
    """
    files = []
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            state = path.stat()
            if stat.S_ISREG(state.st_mode):
                files.append((path, state))
    excess = sum(state.st_size for _, state in files) - most
    for path, state in sorted(files, key=lambda pair: pair[1].st_mtime):
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= state.st_size


def size_in_words(nbytes: float) -> str:
    """A number of bytes in the largest unit of which there is one, with three digits.

    Example:
        >>> size_in_words(4_000), size_in_words(1_260_000), size_in_words(4.2e10)
        ('4 KB', '1.26 MB', '42 GB')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes / 1e3:.3g} KB"


def explain_os_error(error: OSError, target: Path) -> OutputError:
    """An OutputError in words for what the operating system refused while writing `target`.

    Example:
        >>> print(explain_os_error(PermissionError(13, "Permission denied"), Path("out")))
        out cannot be written (no permission). Choose another folder.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"The disk is full: {target} was not written. Free some space or choose another folder."
        )
    if error.errno == errno.ENOTEMPTY:
        return OutputError(f"{target} was filled meanwhile. Choose another folder.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(f"{target} cannot be written (no permission). Choose another folder.")
    return OutputError(f"{target} could not be written: {error.strerror or error}.")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file or none: to a temporary name beside it, then renamed.

    Raises:
        OutputError: the disk is full or the folder cannot be written.

    Example:
        >>> write_atomically(Path("new/notes.txt"), b"whole or not at all")
        >>> Path("new/notes.txt").read_text()
        'whole or not at all'
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


def check_output(output: Path) -> None:
    """Refuse, before any work, a folder that cannot be made or would be overwritten.

    Raises:
        OutputError: a file, a folder with content, or a place where disks are mounted.
    """
    try:
        target = output.resolve()
        if output.exists() and not output.is_dir():
            raise OutputError(
                f"{output} is a file; the output must be a folder. Choose another name."
            )
        if output.is_dir() and any(output.iterdir()):
            raise OutputError(
                f"{output} exists and is not empty. Choose another folder, or remove it first."
            )
    except OSError as error:
        raise explain_os_error(error, output) from error
    except (ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise OutputError(f"{str(output)!r:.80} cannot be a folder's name ({error}).") from error
    if target.is_mount():  # no other folder can take its name
        raise OutputError(f"{output} is where a disk is mounted. Name a folder below it.")


@contextmanager
def write_folder_atomically(output: Path, key: str | None = None) -> Iterator[Path]:
    """Yield a hidden folder beside `output` that takes its name only if the block succeeds.

    An exception removes the hidden folder; a killed process leaves it, and the next block with
    the same output and key gets it back as it was. A success removes what other keys left. One
    process at a time writes to an output.

    Args:
        output: the folder to appear (absent or empty before); its parents are made.
        key: what tells this content from any other, in letters and digits; None for a folder that
            is never continued.

    Raises:
        OutputError: `output` exists and is not empty, cannot be written, or is being written by
            another process; the disk is full.
    """
    check_output(output)
    staging: Path | None = None
    try:
        target = output.resolve()  # through a link, and for "."
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock_output(target, output):
            check_output(output)  # the last holder of the lock may have finished
            staging = _staging(target, key)
            yield staging
            # The staging folder is private; the result gets what any new folder has.
            mask = os.umask(0)
            os.umask(mask)
            staging.chmod(0o777 & ~mask)
            staging.replace(target)
            for stale in _find_stale(target):
                shutil.rmtree(stale, ignore_errors=True)
    except OSError as error:
        raise explain_os_error(error, output) from error
    finally:
        if staging is not None and staging.exists():
            shutil.rmtree(staging, ignore_errors=True)


def _find_stale(target: Path) -> list[Path]:
    """What killed processes left for this output (and not for one named ``target.more``)."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.\w+{re.escape(PARTIAL)}")
    return [path for path in target.parent.iterdir() if pattern.fullmatch(path.name)]


def _staging(target: Path, key: str | None) -> Path:
    """The private folder for content under a key: as a killed process left it, or new."""
    if key is None:
        return Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=PARTIAL))
    staging = target.with_name(f".{target.name}.{key}{PARTIAL}")
    with suppress(FileExistsError):
        staging.mkdir(mode=0o700)
    found = staging.lstat()
    # In a folder that many users may write to, another one could have put something there.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise OutputError(f"{staging} is in the way and not yours. Choose another folder.")
    return staging


@contextmanager
def lock_output(target: Path, output: Path) -> Iterator[None]:
    """Hold the right to write to an output; the lock of a killed process is void.

    Raises:
        OutputError: another process holds it.
    """
    from filelock import FileLock, Timeout

    path = target.with_name(f".{target.name}.lock")
    with suppress(FileExistsError):  # filelock would take a place that holds no files for locked
        path.touch(mode=0o600, exist_ok=False)
    lock = FileLock(path, mode=0o600, blocking=False, fallback_to_soft=False)
    with ExitStack() as held:
        try:
            held.enter_context(lock)
        except Timeout as error:
            raise OutputError(
                f"{output} is being written by another process. "
                "Wait for it, or choose another folder."
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise  # those file systems have no locks: work without
        held.callback(path.unlink, missing_ok=True)  # before the lock is given back
        yield

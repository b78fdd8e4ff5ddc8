"""Models on the Hugging Face Hub: what they consist of, where they lie, and their download.

Files land in huggingface_hub's own cache, shared with every other library; nothing but weights,
configuration, tokenizer and card is fetched, and nothing fetched is run. A branch stays at the
commit that was downloaded first, so that a merge can be made again. The token comes from
``HF_TOKEN`` alone and stands in no message.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from merge_core.checkpoints.header_checks import read_index
from merge_core.checkpoints.lora import is_adapter
from merge_core.checkpoints.lora_config import WEIGHT_FILES
from merge_core.checkpoints.side_files import MOST_FILES, SIDE_FILE_BYTES
from merge_core.errors import Cancelled, CheckpointError, HubError
from merge_core.hub.client import (
    MEGABYTE,
    api,
    cache_folder,
    fetch_file,
    is_cached,
    reporting_bar,
    repository_folder,
    snapshot,
)
from merge_core.hub.errors import explain_hub_errors
from merge_core.hub.files import (
    HubId,
    entry_file,
    is_plain_path,
    side_files,
)
from merge_core.progress import Progress

TIMEOUT = 20.0


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: size in bytes, and the hash by which the hub knows its content."""

    size: int
    sha256: str | None
    git_sha1: str | None


@dataclass(frozen=True)
class HubModel:
    """What a model on the hub consists of, at one commit.

    Attributes:
        asked: the name as it was given.
        id: the same at the commit that its revision stands for now.
        entry: the file by which its weights open.
        weights: the files that hold tensors.
        files: all that a download fetches, small files first.
    """

    asked: HubId
    id: HubId
    entry: str
    weights: tuple[str, ...]
    files: dict[str, RemoteFile]

    @property
    def is_adapter(self) -> bool:
        """Whether its weights are those of a PEFT adapter, which opens by its folder."""
        return PurePosixPath(self.entry).name in WEIGHT_FILES

    @property
    def nbytes(self) -> int:
        """Size of all its files in bytes."""
        return sum(file.size for file in self.files.values())

    @property
    def to_download(self) -> int:
        """Bytes that are not in the cache yet."""
        return sum(file.size for name, file in self.files.items() if not is_cached(self.id, name))


def describe(text: str) -> HubModel:
    """Ask the hub what a model consists of: one request, and its index where it has shards.

    Args:
        text: ``hf://org/name[@revision][:file]``.

    Raises:
        HubError: no such repository, revision, file or weights; no access; no network; offline.
    """
    asked = HubId.parse(text)
    with explain_hub_errors(asked, cache_folder()):
        info = api().model_info(
            asked.repo, revision=asked.revision, files_metadata=True, timeout=TIMEOUT
        )
    found = {
        file.rfilename: RemoteFile(
            file.size or 0, None if file.lfs is None else file.lfs.sha256, file.blob_id
        )
        for file in info.siblings or []
        if is_plain_path(file.rfilename)
    }
    fixed = asked.at(str(info.sha))
    if not fixed.pinned:
        raise HubError(f"The hub names no commit for {asked}. Try again later.")
    entry = entry_file(found, asked.file, asked.repo)
    weights = [entry]
    small = [name for name, file in found.items() if file.size <= SIDE_FILE_BYTES]
    beside = side_files(small, entry)[:MOST_FILES]
    if entry.endswith(".index.json"):
        beside.append(entry)
        weights = _shards(entry, fetch_file(fixed, entry))
        if absent := [name for name in weights if name not in found]:
            raise HubError(f"{asked}: the index names {absent[0]}, which is not there.")
    return HubModel(
        asked, fixed, entry, tuple(weights), {name: found[name] for name in [*beside, *weights]}
    )


def find_cached(text: str) -> Path | None:
    """Where a model lies in the cache, complete; None if it does not. The network is not asked.

    Args:
        text: ``hf://org/name[@revision][:file]``; a branch stands for the commit that was
            downloaded.

    Returns:
        The file that opens it (weights or index), or an adapter's folder.

    Raises:
        HubError: not a name on the hub.
    """
    asked = HubId.parse(text)
    folder = snapshot(asked)
    if folder is None:
        return None
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    try:
        entry = entry_file(names, asked.file, asked.repo)
        if entry.endswith(".index.json") and not names.issuperset(_shards(entry, folder / entry)):
            return None
    except CheckpointError:  # parts of it only
        return None
    path = folder / entry
    if path.name not in WEIGHT_FILES:
        return path
    return path.parent if is_adapter(path) else None


def find_or_fetch(text: str, progress: Progress | None = None) -> Path:
    """Where a model lies on this machine: from the cache, else downloaded into it.

    Args:
        text: ``hf://org/name[@revision][:file]``.
        progress: reports megabytes; cancels within a file.

    Returns:
        As :func:`find_cached`.

    Raises:
        HubError: as :func:`describe`; a file is damaged; too little disk space.
        OutputError: the cache cannot be written.
        Cancelled: `progress` was cancelled; complete files are kept.
    """
    path = find_cached(text)
    if path is None:
        fetch([describe(text)], progress)
        path = find_cached(text)
    if path is None:
        raise HubError(f"{text} changed on the hub during the download. Try again.")
    return path


def fetch(models: Sequence[HubModel], progress: Progress | None = None) -> None:
    """Download what is not in the cache yet, and check that it arrived as it is on the hub.

    Args:
        models: what :func:`describe` found.
        progress: reports megabytes; cancels within a file.

    Raises:
        HubError, OutputError, Cancelled: as :func:`find_or_fetch`.
    """
    check_space(models)
    total = sum(model.nbytes for model in models)
    done = 0
    for model in models:
        try:
            for name, file in model.files.items():
                bar = reporting_bar(progress, done, total, f"MB, {model.id.repo}/{name}")
                _check_content(model, file, fetch_file(model.id, name, bar))
                done += file.size
                if progress is not None:
                    progress.step(done // MEGABYTE, total // MEGABYTE, f"MB, {model.id.repo}")
        except Cancelled as error:
            raise Cancelled(
                f"The download of {model.asked} was cancelled; files that were complete are kept."
            ) from error
        if not model.asked.pinned:
            # The cache learns last which commit the branch stands for: it never names a half one.
            fetch_file(model.asked, next(iter(model.files)))


def free_space() -> int:
    """Bytes left on the disk of the cache."""
    place = cache_folder()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def check_space(models: Sequence[HubModel]) -> None:
    """Refuse a download for which the disk has no room.

    Raises:
        HubError: what is missing in the cache is larger than the free space there.
    """
    needed, free = sum(model.to_download for model in models), free_space()
    if needed > free:
        raise HubError(
            f"The download takes {needed / MEGABYTE:,.0f} MB, and {cache_folder()} has "
            f"{free / MEGABYTE:,.0f} MB left. Free some space, or choose another disk with HF_HOME."
        )


def resolve_revision(text: str) -> str | None:
    """The name with the cached commit in place of its branch; None if no commit is cached.

    Raises:
        HubError: not a name on the hub.
    """
    asked = HubId.parse(text)
    folder = snapshot(asked)
    return None if folder is None else str(asked.at(folder.name))


def cache_path(text: str) -> Path:
    """Where a model lies in the cache; if it is not there, the folder of its repository.

    Raises:
        HubError: not a name on the hub.
    """
    return find_cached(text) or repository_folder(HubId.parse(text))


def require_cached(text: str) -> Path:
    """Where a model lies in the cache.

    Raises:
        HubError: it is not there; the message says how to download it.
    """
    path = find_cached(text)
    if path is None:
        raise HubError(missing_message(text))
    return path


def missing_message(text: str) -> str:
    """The sentence for a model that is not in the cache."""
    return (
        f"{text} is not downloaded yet. Download it on the page Open checkpoints, or with: "
        f"mergescope download {text}"
    )


def _shards(entry: str, index: Path) -> list[str]:
    """The files that an index names, as paths in the repository."""
    return [path_beside(entry, file) for file in sorted(set(read_index(index).values()))]


def path_beside(entry: str, file: str) -> str:
    """The path in the repository of a file in the entry's folder."""
    return str(PurePosixPath(entry).with_name(file))


def _check_content(model: HubModel, file: RemoteFile, path: Path) -> None:
    """Compare a file with its hash on the hub; a damaged one is removed from the cache.

    Raises:
        HubError: it differs.
    """
    if file.sha256 is not None:
        with path.open("rb") as stream:
            same = hashlib.file_digest(stream, "sha256").hexdigest() == file.sha256
    elif file.git_sha1 is not None:
        content = path.read_bytes()
        # Git names content by this hash; it guards against accidents here, not against attacks.
        git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
        same = git.hexdigest() == file.git_sha1
    else:
        same = path.stat().st_size == file.size
    if not same:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise HubError(
            f"{model.asked}: {path.name} arrived damaged (its hash is not the hub's) and was "
            "removed. Download it again."
        )

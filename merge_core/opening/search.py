"""Search for models in folders, among files and on the hub, from headers alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.lora import adapter_folder, is_adapter
from merge_core.checkpoints.lora_config import CONFIG_FILE, WEIGHT_FILES, read_adapter_config
from merge_core.checkpoints.shards import TORCH_SUFFIXES
from merge_core.checkpoints.side_files import find_side_files
from merge_core.checkpoints.stored.entry import (
    FOLDER_CANDIDATES,
    INDEX,
    SHARD,
    is_index,
    shard_number,
    split_part,
    weight_files,
)
from merge_core.errors import MergeScopeError, SuiteError
from merge_core.files import path_below
from merge_core.hub.files import COMMIT, HubId, is_hub_id
from merge_core.input_files import read_bounded, stays_inside
from merge_core.opening.draft import Layout
from merge_core.opening.roles import FoundModel, Kind, suggest_roles
from merge_core.progress import Progress

CARD = "README.md"
WEIGHT_SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
SNAPSHOT = re.compile(r"models--(?:.*--)?(.+)/snapshots/[^/]+")
# File names that say nothing about the task: the folder's name does.
SAYS_NOTHING = re.compile(
    r"^(model|pytorch_model|adapter_model|adapter|finetuned|nonlinear_finetuned|fine_tuned|"
    r"checkpoint|ckpt|weights|best|last|final|encoder|image_encoder)$",
    re.IGNORECASE,
)
COMMIT_BYTES = 100
MOST_MODELS = 200
MOST_ENTRIES = 5000
AT_ONCE = 8  # asking the hub is mostly waiting


def find_models(
    places: Sequence[str], inside: Path | None = None, progress: Progress | None = None
) -> tuple[FoundModel, ...]:
    """The models at these places, with suggested task names and roles.

    A model is a weight file, a sharded index, a Hugging Face folder, an adapter folder or a hub
    id. Folders are searched to one level below them. Only headers are read.

    Args:
        places: folders, files and hub ids.
        inside: refuse files that lie outside this folder, also by symbolic links.
        progress: told after each model.

    Raises:
        SuiteError: a place that does not exist, nothing found, or too much.
        Cancelled: `progress` says so.

    Example:
        >>> suite = load_suite("vision")
        >>> [each.task for each in find_models([str(suite.root / "experts")])][:3]
        ['arabic', 'arrows', 'clocks']
    """
    listed = [found for place in places for found in _find_at(place, len(places) == 1)]
    if not listed:
        where = ", ".join(places)
        raise SuiteError(
            f"No model was found in {where}. Known: .safetensors, {', '.join(TORCH_SUFFIXES)}, "
            "sharded indices, Hugging Face and adapter folders, one level deep."
        )
    if len(listed) > MOST_MODELS:
        raise SuiteError(
            f"{len(listed)} models were found, more than {MOST_MODELS}. Name a folder further "
            "down, or the files themselves."
        )
    once = list({found.reference: found for found in reversed(listed)}.values())[::-1]
    opened = []
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        for found in pool.map(lambda each: _open(each, inside), once):
            opened.append(found)
            (progress or Progress()).step(len(opened), len(once), found.shown)
    finally:
        pool.shutdown(cancel_futures=True)
    return suggest_roles(opened)


def _find_at(place: str, alone: bool) -> Iterator[FoundModel]:
    """The models at one place; below a model's own folder only if no other place is searched."""
    if is_hub_id(place):
        asked = HubId.parse(place)
        inner = Path(asked.file or "").parts
        told = [asked.repo.rpartition("/")[2], *(p for p in inner if not _says_nothing(p))]
        shown = place.removeprefix("hf://")
        yield FoundModel(place, "-".join(told), re.sub(r"[/@:]", "-", shown), shown)
        return
    try:
        path = path_below(Path(), place, SuiteError)
        if (adapter := adapter_folder(path)) is not None and not path.is_dir():
            yield _folder(adapter, adapter.parent)
            return
        if split_part(path)[0].is_file():
            yield _file(path, path.parent)
            return
        if not path.is_dir():
            raise SuiteError(f"{place} does not exist. Check the path.")
        path = _snapshot(path) or path
        if _is_model(path):
            yield _folder(path, path.parent)
            if not alone:
                return
        else:
            yield from _files(path, path)
        for child in _entries(path):
            if child.is_dir() and _is_model(child):
                yield _folder(child, path)
            elif child.is_dir():
                yield from _files(child, path)
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, impossible names
        reason = getattr(error, "strerror", None) or error
        raise SuiteError(f"{place} cannot be read ({reason}). Check the path.") from error


def _snapshot(folder: Path) -> Path | None:
    """The files of a repository in the hub's cache, as its main branch is there."""
    main = folder / "refs" / "main"
    if not folder.name.startswith("models--") or not main.is_file():
        return None
    commit = read_bounded(main, COMMIT_BYTES).decode().strip()
    snapshot = folder / "snapshots" / commit
    return snapshot if COMMIT.fullmatch(commit) and snapshot.is_dir() else None


def holds_models(folder: Path) -> bool:
    """Whether a folder is a model or holds weight files, by their names.

    Example:
        >>> holds_models(Path())
        False
    """
    try:
        return _is_model(folder) or any(True for _ in _files(folder, folder))
    except (OSError, SuiteError):  # not ours to read, or far too much
        return False


def _entries(folder: Path) -> list[Path]:
    """What is in a folder and not hidden, by name.

    Raises:
        SuiteError: too much.
    """
    entries = list(islice(folder.iterdir(), MOST_ENTRIES + 1))
    if len(entries) > MOST_ENTRIES:
        raise SuiteError(f"{folder} holds more than {MOST_ENTRIES} files. Name a smaller folder.")
    return sorted(entry for entry in entries if not entry.name.startswith("."))


def _is_model(folder: Path) -> bool:
    return is_adapter(folder) or any((folder / name).is_file() for name in FOLDER_CANDIDATES)


def _folder(path: Path, root: Path) -> FoundModel:
    kind: Kind = "adapter" if is_adapter(path) else "model"
    cached = SNAPSHOT.search(path.as_posix())  # the hub's cache names folders by commits
    label = cached[1] if cached else path.name
    return FoundModel(str(path), label, label, path.relative_to(root).as_posix(), kind)


def _files(folder: Path, root: Path) -> Iterator[FoundModel]:
    """Each weight file of a folder, an index standing for its shards, or the folder itself.

    The folder stands for shards without an index, so that what is missing is said.
    """
    names = [path.name for path in _entries(folder) if path.is_file()]
    files = weight_files(names)
    indexed = any(is_index(name) for name in files)
    for name in files:
        if not (SHARD.search(name) if indexed else shard_number(name)):
            yield _file(folder / name, root)
    if not indexed and any(map(shard_number, files)):
        shown = folder.name if folder == root else folder.relative_to(root).as_posix()
        yield FoundModel(str(folder), folder.name, folder.name, shown)


def _file(path: Path, root: Path) -> FoundModel:
    file, part = split_part(path)
    nothing = _says_nothing(file.name) and file.parent != root
    stem = "-".join(filter(None, (_stem(file.name), part)))
    label = path.parent.name if nothing else stem
    return FoundModel(
        str(path), label, f"{path.parent.name}-{stem}", path.relative_to(root).as_posix()
    )


def _stem(name: str) -> str:
    """A weight file's name without its endings."""
    stem = INDEX.sub("", name)
    while Path(stem).suffix in (*WEIGHT_SUFFIXES, ".tar"):
        stem = Path(stem).stem
    return stem


def _says_nothing(name: str) -> bool:
    return SAYS_NOTHING.match(_stem(name)) is not None


def _open(found: FoundModel, inside: Path | None) -> FoundModel:
    """The model with its headers, or with the reason why they cannot be read."""
    try:
        if is_hub_id(found.reference):
            return _open_on_hub(found)
        path, _ = split_part(Path(found.reference))
        if inside is not None and (outside := _find_outside(path, inside)) is not None:
            note = f"{outside.name} is a link to a place outside the folder."
            return replace(found, role="left out", refused=True, note=note)
        if found.kind == "adapter":
            of = read_adapter_config(path / CONFIG_FILE).base_model_name_or_path
            size = sum(
                (path / name).stat().st_size for name in WEIGHT_FILES if (path / name).exists()
            )
            return replace(found, nbytes=size, note=f"an adapter of {of or 'an unnamed base'}")
        return _with_checkpoint(found, Checkpoint(found.reference))
    except MergeScopeError as error:
        note = str(error).replace(found.reference, found.shown)
        return replace(found, role="left out", note=note)
    except OSError as error:
        return replace(found, role="left out", note=f"It cannot be read ({error.strerror}).")


def _open_on_hub(found: FoundModel) -> FoundModel:
    """A model of the hub: from the cache, else by the headers of its weights there."""
    from merge_core.hub import models as hub
    from merge_core.hub.headers import read_headers

    path = hub.find_cached(found.reference)
    if path is not None:
        if is_adapter(path):
            return replace(found, kind="adapter")
        return _with_checkpoint(found, Checkpoint(path))
    model = hub.describe(found.reference)
    found = replace(found, nbytes=model.nbytes, download=model.to_download)
    if model.is_adapter:
        return replace(found, kind="adapter", note="an adapter: read once it is downloaded")
    if not model.entry.endswith((".safetensors", ".index.json")):
        return replace(found, note="pickled weights: read once they are downloaded")
    return replace(_with_checkpoint(found, read_headers(model)), nbytes=model.nbytes)


def _with_checkpoint(found: FoundModel, checkpoint: Checkpoint) -> FoundModel:
    named = ", ".join(checkpoint.unsafe_globals)
    said = [f"a pickle that names {named}; nothing of it is run"] if named else []
    note = "; ".join([*said, *checkpoint.notes]) or found.note
    known = replace(found, checkpoint=checkpoint, nbytes=checkpoint.nbytes, note=note)
    return replace(known, kind="head") if _is_head(known.layout) else known


def _find_outside(path: Path, inside: Path) -> Path | None:
    """A file of the model that lies outside the folder, by a symbolic link, if there is one.

    Descriptions and tokenizers beside a lone file of weights are read with it; other weights are
    models of their own.
    """
    beside = path if path.is_dir() else path.parent
    lone = path.is_file() and not (path.suffix == ".json" or SHARD.search(path.stem))
    files = [*find_side_files(beside).values(), beside / CARD] if lone else beside.iterdir()
    return next((file for file in (path, *files) if not stays_inside(file, inside)), None)


def _is_head(layout: Layout) -> bool:
    """Whether a layout is a bare linear classifier."""
    return layout.keys() <= {"weight", "bias"} and len(layout.get("weight", ())) == 2

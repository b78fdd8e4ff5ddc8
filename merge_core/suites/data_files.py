"""Where a task's evaluation data and head lie, and by what content they are known."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from merge_core.errors import OutputError, SuiteError
from merge_core.files import cache_dir, digest_of, file_digest, hash_of, write_atomically
from merge_core.input_files import file_stamp
from merge_core.suites.data_spec import (
    OF_TEXTS,
    TORCHVISION,
    DataSpec,
    HeadSpec,
    Names,
    ZeroShotSpec,
    head_spec,
)
from merge_core.yaml_text import read_text_file

Resolve = Callable[[str], Path]  # a path of suite.yaml, made absolute

# Endings of tables of texts.
TABLES = (".parquet", ".csv", ".tsv", ".jsonl", ".json")
PLAIN_TEXT = (".txt", ".text")
# SVHN's files lie in the root itself, perhaps beside other datasets.
SVHN_FILES = "*_32x32.mat"


def read_names(names: Names, resolve: Resolve, what: str) -> tuple[str, ...]:
    """Names that are written out, or one on each line of a text file.

    Args:
        names: as in suite.yaml.
        resolve: of paths.
        what: whose names these are, for messages.

    Raises:
        SuiteError: the file cannot be read or is empty, or a name stands twice.
    """
    if isinstance(names, str):
        path = resolve(names)
        try:
            lines = read_text_file(path).splitlines()
        except (OSError, ValueError) as fault:
            raise SuiteError(f"{path} ({what}) cannot be read as a text file: {fault}.") from fault
        found = tuple(line.strip() for line in lines if line.strip())
    else:
        found = tuple(names)
    if not found or len(set(found)) < len(found):
        raise SuiteError(f"{what}: names must be there, each once.")
    return found


def locate_data(data: DataSpec, resolve: Resolve, what: str, download: bool = False) -> Path:
    """The file or folder that holds a task's images and nothing else.

    Args:
        data: where they are.
        resolve: of paths.
        what: whose data these are, for messages.
        download: whether a dataset of the hub may be fetched.

    Raises:
        SuiteError: there is none.
    """
    if data.kind in ("huggingface", *OF_TEXTS) and data.path is None:
        return _hub_dataset(data, what, download)
    written = data.path if data.file is None else data.file
    assert written is not None
    path = resolve(written)
    if data.kind == "torchvision":
        assert data.dataset is not None
        path = path / TORCHVISION[data.dataset][0]
    if data.kind == "numpy" and not path.is_file():
        raise SuiteError(
            f"{path} ({what}) does not exist. Correct the path in suite.yaml, or leave the field "
            "out."
        )
    endings = TABLES if data.kind == "text" else (*TABLES, *PLAIN_TEXT)
    if data.kind in OF_TEXTS and path.is_file() and path.suffix.lower() in endings:
        return path
    if data.kind != "numpy" and not path.is_dir():
        hint = ""
        if data.kind == "torchvision":
            hint = " `mergescope prepare SUITE --download` fetches it where torchvision can."
        raise SuiteError(
            f"{path} ({what}) is not a folder"
            + (f" or a file {', '.join(endings)}" if data.kind in OF_TEXTS else "")
            + f". Correct the path in suite.yaml; archives must be unpacked.{hint}"
        )
    return path


def _hub_dataset(data: DataSpec, what: str, download: bool) -> Path:
    """A dataset's files in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    assert data.dataset is not None
    name = f"{data.dataset}@{data.revision}" if data.revision else data.dataset
    try:
        return Path(
            snapshot_download(
                data.dataset,
                repo_type="dataset",
                revision=data.revision,
                local_files_only=not download,
                ignore_patterns=["*.py"],
            )
        )
    except LocalEntryNotFoundError as fault:
        reason = "could not be fetched" if download else "is not in the cache of the hub"
        raise SuiteError(
            f"The dataset {name} ({what}) {reason}. Fetch it once with --download "
            "(`mergescope prepare SUITE` or `suite build PLAN`), or give the folder of its files "
            "as 'path'."
        ) from fault
    except (HfHubHTTPError, HFValidationError, OSError) as fault:
        reason = str(fault).strip().split("\n")[0]
        raise SuiteError(
            f"The dataset {name} ({what}) could not be fetched: {reason:.160}"
        ) from fault


def content_digest(path: Path, pattern: str | None = None) -> str:
    """BLAKE3 (hex) of a file's bytes; of a folder, SHA-256 over its files' places and BLAKE3.

    A folder's is remembered by the sizes and times of change of its files. Hidden files do not
    count.

    Args:
        path: file or folder.
        pattern: only the files of the folder itself that it fits.

    Raises:
        OSError: something cannot be read.
    """
    if path.is_file():
        return file_digest(path)
    files = sorted(path.glob(pattern)) if pattern is not None else sorted(_files(path))
    signs, names = [], []
    for file in files:
        stamp = file_stamp(file)
        names.append(os.fsencode(file.relative_to(path)))
        signs += [names[-1], repr(stamp).encode()]
    memo = cache_dir() / "digests" / digest_of("blake3", os.fsencode(path.resolve()), *signs)
    with suppress(OSError, ValueError):
        known = memo.read_text()
        if len(bytes.fromhex(known)) == hashlib.sha256().digest_size:
            return known
    parts: list[bytes] = []
    for name, file in zip(names, files, strict=True):
        parts += [name, hash_of(file).digest()]
    whole = digest_of("folder", *parts)
    with suppress(OSError, OutputError):
        write_atomically(memo, whole.encode())
    return whole


def _files(folder: Path) -> Iterator[Path]:
    """The files below a folder, hidden ones aside."""
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(where) / name for name in names if not name.startswith("."))


def data_identity(data: DataSpec, resolve: Resolve, what: str) -> str:
    """Digest (hex) of what determines a task's images and labels: content and what is made of it.

    Raises:
        SuiteError: the data are missing or cannot be read.

    Example:
        >>> suite = load_suite("vision")
        >>> len(data_identity(suite.data("digits"), suite.file, "digits"))
        64
    """
    path = locate_data(data, resolve, what)
    pattern = SVHN_FILES if data.dataset == "SVHN" and data.kind == "torchvision" else None
    try:
        content = content_digest(path, pattern)
    except OSError as fault:
        raise SuiteError(f"{path} ({what}) cannot be read: {fault}.") from fault
    if data.plain:
        return content
    apart = {"file", "path", "revision"}
    fields = data.model_dump(mode="json", exclude=apart, exclude_defaults=True)
    if data.kind in OF_TEXTS:
        fields["tokenizer"] = _tokenizer_identity(tokenizer_path(data, resolve), what)
    if data.kind == "language":
        fields["length"] = data.window
    if data.classes is not None:
        fields["classes"] = read_names(data.classes, resolve, f"classes of {what}")
    return digest_of("data", json.dumps(fields, sort_keys=True), content)


def head_identity(head: str | HeadSpec, resolve: Resolve, what: str) -> str:
    """Digest (hex) of what determines a task's head.

    Raises:
        SuiteError: a file is missing or cannot be read.
        HubError: one on the hub is not downloaded.
    """
    table = head_spec(head)
    made = table.zero_shot
    if made is None:
        assert table.file is not None
        path = head_path(table.file, resolve)
    else:
        path = tower_path(made, resolve, what)
    if not path.exists():
        raise SuiteError(
            f"{path} ({what}) does not exist. Correct the path in suite.yaml, or leave the field "
            "out."
        )
    try:
        content = content_digest(path)
    except OSError as fault:
        raise SuiteError(f"{path} ({what}) cannot be read: {fault}.") from fault
    if made is None:
        if table.layers is not None:
            content = digest_of("layers", table.layers, content)
        return digest_of("normalized", content) if table.normalize else content
    fields = {
        "model": made.model,
        "classes": made.classes and read_names(made.classes, resolve, f"classes of {what}"),
        "templates": read_names(made.templates, resolve, f"templates of {what}"),
    }
    return digest_of("zero-shot", json.dumps(fields, sort_keys=True), content)


def tokenizer_path(data: DataSpec, resolve: Resolve) -> Path:
    """The folder of a tokenizer, or of weights beside it; of one on the hub, in the cache.

    Raises:
        SuiteError: none is named, and there is no base that could have it.
        HubError: it is on the hub and not downloaded.
    """
    from merge_core.hub.files import is_hub_id
    from merge_core.hub.models import require_cached

    if data.tokenizer is None:
        raise SuiteError(
            "Texts need a tokenizer. Name it as 'tokenizer' of the data: a folder, or a name on "
            "the hub (hf://org/name)."
        )
    on_hub = is_hub_id(data.tokenizer)
    path = require_cached(data.tokenizer) if on_hub else resolve(data.tokenizer)
    return path.parent if path.is_file() else path


def _tokenizer_identity(folder: Path, what: str) -> str:
    """Digest (hex) of the files by which a tokenizer works.

    Raises:
        SuiteError: there are none.
    """
    names = (
        *("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "vocab.txt"),
        *("spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),
    )
    files = [folder / name for name in names if (folder / name).is_file()]
    if not files:
        raise SuiteError(
            f"{folder} (tokenizer of {what}) holds no tokenizer of transformers. Correct "
            "'tokenizer'."
        )
    return digest_of(*(file_digest(file) for file in files))


def head_path(file: str, resolve: Resolve) -> Path:
    """The file of a head; of one on the hub, in the cache.

    Raises:
        HubError: it is on the hub and not downloaded.
    """
    from merge_core.hub.files import is_hub_id
    from merge_core.hub.models import require_cached

    return require_cached(file) if is_hub_id(file) else resolve(file)


def tower_path(made: ZeroShotSpec, resolve: Resolve, what: str) -> Path:
    """The file or folder of a text tower; of one on the hub, in the cache.

    Raises:
        SuiteError: it is not there.
        HubError: it is on the hub and not downloaded.
    """
    from merge_core.hub.files import is_hub_id
    from merge_core.hub.models import require_cached

    if is_hub_id(made.text_tower):
        path = require_cached(made.text_tower)
        return path if made.model is not None or path.is_dir() else path.parent
    path = resolve(made.text_tower)
    if not path.exists():
        raise SuiteError(f"{path} (text tower of {what}) does not exist. Correct the path.")
    return path

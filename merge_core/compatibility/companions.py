"""The small files beside a model's weights, read within bounds and never run.

They are strangers' files: a regular file of bounded size and bounded nesting is read, anything
else counts as absent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.lora import AdaptedCheckpoint
from merge_core.errors import MergeScopeError
from merge_core.files import file_digest
from merge_core.hub.client import fetch_file
from merge_core.hub.headers import HubHeaders
from merge_core.hub.models import HubModel, path_beside
from merge_core.input_files import read_bounded

CONFIG_BYTES = 4 << 20
TOKENIZER_BYTES = 64 << 20
# What reading takes follows from the number of values rather than of bytes.
MOST_VALUES = 5_000_000
MOST_CONTAINERS = 2_000_000
MOST_NESTED = 32
VOCABULARY_FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)


class Companions:
    """The files in one folder.

    A link is followed within the folder, or to where the weights' own links lead (a cache of the
    hub, a store of models): a stranger's folder shows nothing of another one.

    Args:
        folder: where a member's weights lie.
        weights: the files that hold them.
    """

    def __init__(self, folder: Path, weights: Sequence[Path] = ()) -> None:
        self.folder = folder
        self._weights = weights
        self._documents: dict[str, Any] = {}

    def digest(self, name: str) -> str:
        """Digest (hex) of a file's content; empty where there is none."""
        try:
            path = self._find(name)
            return "" if path is None else file_digest(path)
        except OSError:
            return ""

    def document(self, name: str, most_bytes: int = CONFIG_BYTES) -> dict[str, Any] | None:
        """The object in a JSON file; None where there is none that can be read.

        Args:
            name: of the file.
            most_bytes: larger files are not read.
        """
        found = self._parsed(name, most_bytes)
        return found if isinstance(found, dict) else None

    def array(self, name: str, most_bytes: int = CONFIG_BYTES) -> list[Any] | None:
        """The array in a JSON file; None where there is none that can be read.

        Args:
            name: of the file.
            most_bytes: larger files are not read.
        """
        found = self._parsed(name, most_bytes)
        return found if isinstance(found, list) else None

    def text(self, name: str, most_bytes: int = CONFIG_BYTES) -> str | None:
        """The text in a file; None where there is none that can be read."""
        data = self._read(name, most_bytes)
        try:
            return None if data is None else data.decode("utf-8")
        except UnicodeDecodeError:
            return None

    @cached_property
    def vocabulary_key(self) -> tuple[str, ...]:
        """Digests of all files that say which token is which; all empty where there are none."""
        return tuple(self.digest(name) for name in VOCABULARY_FILES)

    def _parsed(self, name: str, most_bytes: int) -> Any:
        if name not in self._documents:
            self._documents[name] = self._parse(name, most_bytes)
        return self._documents[name]

    def _parse(self, name: str, most_bytes: int) -> Any:
        data = self._read(name, most_bytes)
        if data is None or data.count(b",") > MOST_VALUES:
            return None
        if data.count(b"{") + data.count(b"[") > MOST_CONTAINERS:
            return None
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            return None
        return document if isinstance(document, dict | list) and is_shallow(document) else None

    def _read(self, name: str, most_bytes: int) -> bytes | None:
        path = self._find(name)
        return None if path is None else _content(path, most_bytes)

    def _find(self, name: str) -> Path | None:
        """A regular file of the folder; None where there is none, or a link leads away."""
        path = self.folder / name
        try:
            if not path.is_file():
                return None
            target = path.resolve()
            places = {file.resolve().parent for file in self._weights}
        except (OSError, ValueError, RuntimeError):  # links in a circle, impossible names
            return None
        within = target.is_relative_to(self.folder.resolve())
        return path if within or target.parent in places else None


def is_shallow(document: dict[str, Any] | list[Any]) -> bool:
    """Whether objects and lists are nested as files of libraries nest them.

    Example:
        >>> is_shallow({"rope_scaling": {"factor": [1, 2]}})
        True
    """
    layer: list[Any] = [document]
    for _ in range(MOST_NESTED):
        within = [part.values() if isinstance(part, dict) else part for part in layer]
        layer = [value for part in within for value in part if isinstance(value, dict | list)]
        if not layer:
            return True
    return False


def _content(path: Path, most_bytes: int) -> bytes | None:
    """A file's content; None for what cannot be read, and for what is larger."""
    try:
        return read_bounded(path, most_bytes)
    except (OSError, ValueError):
        return None


class HubCompanions(Companions):
    """The files beside weights on the hub, of which only those that differ are fetched.

    Args:
        model: a model that is not downloaded.
    """

    def __init__(self, model: HubModel) -> None:
        super().__init__(Path(model.entry).parent)
        self._model = model

    def digest(self, name: str) -> str:
        """The hash by which the hub knows a file; empty where there is none."""
        file = self._model.files.get(path_beside(self._model.entry, name))
        return "" if file is None else file.sha256 or file.git_sha1 or ""

    def _read(self, name: str, most_bytes: int) -> bytes | None:
        path = path_beside(self._model.entry, name)
        file = self._model.files.get(path)
        if file is None or file.size > most_bytes:
            return None
        try:
            return _content(fetch_file(self._model.id, path), most_bytes)
        except MergeScopeError:  # said where weights are asked for
            return None


def companions_of(member: Checkpoint) -> Companions | None:
    """The files beside a member's weights (an adapter's own); None where it has no place."""
    if isinstance(member, HubHeaders):
        return HubCompanions(member.model)
    if isinstance(member, AdaptedCheckpoint):
        return Companions(member.path)
    return Companions(member.files[0].parent, member.files) if member.files else None


def documents_of(
    members: Mapping[str, Companions], name: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each member's object in the JSON file of that name, where it has one."""
    for member, files in members.items():
        document = files.document(name)
        if document is not None:
            yield member, document


def agree(members: Mapping[str, Companions], names: Sequence[str]) -> bool:
    """Whether all members have the same bytes in all these files."""
    keys = {tuple(files.digest(name) for name in names) for files in members.values()}
    return len(keys) <= 1

"""Names on the Hugging Face Hub, and which files of a repository make up a model's weights.

Nothing here asks the network: see :mod:`merge_core.hub.models`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from merge_core.checkpoints.lora_config import CONFIG_FILE, WEIGHT_FILES
from merge_core.checkpoints.shards import PICKLE_SUFFIXES
from merge_core.checkpoints.side_files import is_side_file
from merge_core.checkpoints.stored.entry import (
    FOLDER_CANDIDATES,
    explain_no_single,
    is_index,
    shard_number,
    usual_file,
    weight_files,
)
from merge_core.errors import HubError

SCHEME = "hf://"
MAIN = "main"
CARD = "README.md"
BESIDE = (CONFIG_FILE, CARD)  # besides what any model has

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_ID = re.compile(rf"hf://(?P<repo>{_PART}(?:/{_PART})?)(?:@(?P<revision>[^:]*))?(?::(?P<file>.*))?")
_WORD = re.compile(r"[A-Za-z0-9_.+=-]+")
_MODULE = re.compile(r"[0-9]+_[A-Za-z]+")
COMMIT = re.compile(r"[0-9a-f]{40}")


def is_hub_id(text: str) -> bool:
    """Whether a text names something on the hub rather than a path."""
    return text.startswith(SCHEME)


@dataclass(frozen=True)
class HubId:
    """``hf://org/name@revision:file``.

    Attributes:
        repo: ``org/name``, or ``name`` alone.
        revision: branch, tag or commit.
        file: a weight file, an index or a folder of the repository; its usual one when None.
    """

    repo: str
    revision: str = MAIN
    file: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubId:
        """Read ``hf://[org/]name[@revision][:file]``.

        Raises:
            HubError: another form, or a path that leaves the repository.
        """
        match = _ID.fullmatch(text)
        parts = match.groupdict() if match else {}
        repo, revision, file = parts.get("repo"), parts.get("revision"), parts.get("file")
        if (
            repo is None
            or ".." in repo
            or "--" in repo
            or (revision is not None and not _stays_inside(revision))
            or (file is not None and not is_plain_path(file))
        ):
            raise HubError(
                f"{text!r:.200} is not a name on the hub. Write hf://org/name, "
                "hf://org/name@revision or hf://org/name@revision:file."
            )
        return cls(repo, revision or MAIN, file)

    def at(self, revision: str) -> HubId:
        """The same model at another revision."""
        return replace(self, revision=revision)

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, whose content never changes."""
        return COMMIT.fullmatch(self.revision) is not None

    def __str__(self) -> str:
        revision = "" if self.revision == MAIN else f"@{self.revision}"
        file = "" if self.file is None else f":{self.file}"
        return f"{SCHEME}{self.repo}{revision}{file}"


def _stays_inside(revision: str) -> bool:
    """Whether a revision (``main``, ``v1.0``, ``refs/pr/3``) is safe as the name of a file."""
    return all(_WORD.fullmatch(part) and set(part) != {"."} for part in revision.split("/"))


def is_plain_path(path: str) -> bool:
    """Whether a file's name in a repository stays inside it, on every system."""
    return (
        path.isprintable()
        and not set(path) & set('\\:*?"<>|')
        and all(part.strip(" .") for part in path.split("/"))
    )


def entry_file(names: Collection[str], wanted: str | None, repo: str) -> str:
    """The file by which a model's weights open: a file, an index, or an adapter's weights.

    Safetensors come before pickles, then the order is that of transformers
    (:func:`merge_core.checkpoints.stored.entry.usual_file`).

    Args:
        names: the files of the repository.
        wanted: a file or folder that was asked for; the root when None.
        repo: its name, for the message.

    Raises:
        HubError: there is no such file, no weights, or several and none is usual.
    """
    if wanted is not None and wanted in names:
        if not is_weights(wanted):
            raise HubError(
                f"{repo}: {wanted} is no weight file. Name a .safetensors file, an index or a "
                "PyTorch file."
            )
        if number := shard_number(wanted):
            raise HubError(
                f"{repo}: {wanted} is shard {number[0]} of {number[1]}, a part of a model. Name "
                "the index of its shards, or their folder."
            )
        return wanted
    folder = PurePosixPath(wanted or "")
    here = sorted(
        path.name for path in map(PurePosixPath, names) if path.parent == folder and path.name
    )
    if wanted is not None and not here:
        raise HubError(f"{repo} has no file or folder {wanted!r}. Check the name after the colon.")
    adapter = next((name for name in WEIGHT_FILES if name in here), None)
    first = usual_file([name for name in here if ".safetensors" in name]) or usual_file(here)
    if adapter and CONFIG_FILE in here and first not in FOLDER_CANDIDATES:
        first = adapter
    if first is not None:
        return str(folder / first)
    found = weight_files(here)
    if not found:
        raise HubError(f"{repo} holds no weights. Name another repository or folder.")
    if any(map(shard_number, found)):
        raise HubError(f"{repo} holds {explain_no_single(here)}")
    raise HubError(
        f"{repo} holds several weight files ({', '.join(found[:4])}…) and no index. "
        f"Name one: {SCHEME}{repo}:{folder / found[0]}."
    )


def is_weights(name: str) -> bool:
    """Whether a file's ending is one that weights, or their index, have."""
    return is_index(name) or name.endswith((".safetensors", *PICKLE_SUFFIXES))


def side_files(names: Collection[str], entry: str) -> list[str]:
    """The configuration, tokenizer, licence and card beside the weights.

    Args:
        names: the files of the repository.
        entry: the file by which its weights open.
    """
    folder = str(PurePosixPath(entry).parent / "x")[:-1]
    below = ((name, name.removeprefix(folder)) for name in sorted(names) if name.startswith(folder))
    # A folder with weights is another model, unless sentence-transformers numbers it as a module.
    models = {str(PurePosixPath(name).parent) for name in names if is_weights(name)}
    others = {model for model in models if not _MODULE.fullmatch(PurePosixPath(model).name)}
    others.discard(str(PurePosixPath(entry).parent))
    return [
        name
        for name, own in below
        if (own in BESIDE or is_side_file(own)) and str(PurePosixPath(name).parent) not in others
    ]

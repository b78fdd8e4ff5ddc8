"""How the input lies on disk, so that the output opens where the input did.

The base's files set the layout, or the first expert's where there is no base.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.members import longest_vocabulary, names_in_all
from merge_core.checkpoints.parameter_roles import describe
from merge_core.checkpoints.side_files import SIDE_FILES
from merge_core.errors import OutputError
from merge_core.input_files import belongs_beside
from merge_core.suites.suite import Suite

# One of these, and in it one of those fields, makes a folder a library's own.
CONFIGS = ("config.json", "open_clip_config.json")
CONFIG_FIELDS = ("model_type", "architectures", "architecture", "model_cfg")
SIDE_FILE_BYTES = 100_000_000
CONFIG_BYTES = 10_000_000


@dataclass(frozen=True)
class Layout:
    """The layout of a suite's weights.

    Attributes:
        reference: the member whose layout it is.
        kept: parameters that only the base has, in its order: written as they are there.
        vocabulary: tokens of the reference and of the output, where these differ.
    """

    reference: Checkpoint
    kept: tuple[str, ...]
    vocabulary: tuple[int, int] | None = None

    def stored_name(self, name: str) -> str:
        """A parameter's name in the reference's files, wrappers' prefixes included."""
        return self.reference.stored_name(name) if name in self.reference else name

    def list_side_files(self) -> tuple[Path, ...]:
        """Configuration and tokenizer files beside the reference's weights.

        Raises:
            OutputError: one is a link to a place outside; see :func:`.belongs_beside`.
        """
        folder = self.reference.files[0].parent
        if not any(_describes_model(folder / name) for name in CONFIGS):
            return ()
        found = [path for name in SIDE_FILES if (path := folder / name).is_file()]
        for path in found:
            if not belongs_beside(path, self.reference.files[0]):
                raise OutputError(
                    f"{path} is a link to a place outside its folder, and would be copied into "
                    "the output. Put the file itself there, or remove the link."
                )
        return tuple(path for path in found if path.stat().st_size <= SIDE_FILE_BYTES)

    def copy_side_files(self, folder: Path) -> None:
        """Copy them into a folder; ``vocab_size`` becomes the output's number of tokens.

        Raises:
            OSError: one cannot be read or written.
            OutputError: one is a link to a place outside its folder.
        """
        for path in self.list_side_files():
            # Their content alone: the hub's cache holds links.
            with path.open("rb") as source, (folder / path.name).open("wb") as stream:
                shutil.copyfileobj(source, stream)
        config = folder / "config.json"
        if self.vocabulary is not None and config.is_file():
            document = _with_vocabulary(json.loads(config.read_text("utf-8")), *self.vocabulary)
            config.write_text(json.dumps(document, indent=2), encoding="utf-8")


def layout(suite: Suite, tasks: tuple[str, ...], merged: frozenset[str]) -> Layout:
    """The layout of a suite's base, or of the first chosen expert where there is none.

    Args:
        suite: the suite.
        tasks: chosen tasks.
        merged: names of the parameters that are merged.

    Raises:
        CheckpointError: the member cannot be opened.
    """
    reference = suite.expert(tasks[0]) if suite.base is None else suite.base
    kept = () if suite.base is None else tuple(name for name in suite.base if name not in merged)
    return Layout(reference, kept, _vocabulary(suite, tasks, merged, reference))


def _vocabulary(
    suite: Suite, tasks: tuple[str, ...], merged: frozenset[str], reference: Checkpoint
) -> tuple[int, int] | None:
    """Tokens of the reference and of the output, where these differ."""
    if suite.spec.vocabulary != "common":
        return None
    members = suite.members(tasks)
    for name in sorted(merged.intersection(names_in_all(members))):
        own, info = reference.info(name), longest_vocabulary(name, members)
        if info is not None and describe(name, own).kind == "token embedding":
            return None if own.shape == info.shape else (own.shape[0], info.shape[0])
    return None


def _with_vocabulary(document: Any, old: int, new: int) -> Any:
    """A configuration with ``vocab_size``, also in nested parts, set to the new number."""
    if not isinstance(document, dict):
        return document
    changed = {name: _with_vocabulary(value, old, new) for name, value in document.items()}
    return changed | ({"vocab_size": new} if document.get("vocab_size") == old else {})


def _describes_model(path: Path) -> bool:
    """Whether a file is a library's description of a model."""
    try:
        if not path.is_file() or path.stat().st_size > CONFIG_BYTES:
            return False
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and any(field in document for field in CONFIG_FIELDS)

"""How the input lies on disk, so that the output opens where the input did.

The base's files set the layout, or those of the manifest's reference where there is no base.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.parameter_roles import describe
from merge_core.checkpoints.side_files import SIDE_FILES
from merge_core.checkpoints.tied import declares_tied
from merge_core.suites.manifest import Manifest
from merge_core.task_vectors import TensorGroups

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
        unties: whether the output's language head is not its embedding, as the reference's is, or
            may be.
    """

    reference: Checkpoint
    kept: tuple[str, ...]
    vocabulary: tuple[int, int] | None = None
    unties: bool = False

    def stored_name(self, name: str) -> str:
        """A parameter's name in the reference's files, wrappers' prefixes included."""
        return self.reference.stored_name(name) if name in self.reference else name

    @property
    def side_files(self) -> tuple[Path, ...]:
        """Configuration and tokenizer files beside the reference's weights."""
        folder = self.reference.files[0].parent
        if not any(_describes_model(folder / name) for name in CONFIGS):
            return ()
        found = (folder / name for name in SIDE_FILES)
        return tuple(p for p in found if p.is_file() and p.stat().st_size <= SIDE_FILE_BYTES)

    def copy_side_files(self, folder: Path) -> None:
        """Copy them into a folder; ``config.json`` then says what holds for the output.

        That is its number of tokens, and that its head is not tied where it is not.

        Raises:
            OSError: one cannot be read or written.
        """
        for path in self.side_files:
            # Their content alone: the hub's cache holds links.
            with path.open("rb") as source, (folder / path.name).open("wb") as stream:
                shutil.copyfileobj(source, stream)
        config = folder / "config.json"
        if not config.is_file() or not (self.vocabulary or self.unties):
            return
        document = json.loads(config.read_text("utf-8"))
        if self.vocabulary is not None:
            document = _with_vocabulary(document, *self.vocabulary)
        if self.unties:
            document = _untied(document)
        config.write_text(json.dumps(document, indent=2), encoding="utf-8")


def layout(groups: TensorGroups) -> Layout:
    """The layout of a merge's output, that of its manifest's reference.

    Args:
        groups: the parameters that are merged.
    """
    manifest = groups.manifest
    unties = manifest.keeps_head_apart and declares_tied(manifest.reference) is not False
    return Layout(manifest.reference, manifest.copied, _vocabulary(manifest), unties)


def _vocabulary(manifest: Manifest) -> tuple[int, int] | None:
    """Tokens of the reference and of the output, where these differ."""
    for name in sorted(manifest.completed):
        own, info = manifest.reference.info(name), manifest.infos[name]
        if describe(name, own).kind == "token embedding":
            return None if own.shape == info.shape else (own.shape[0], info.shape[0])
    return None


def _with_vocabulary(document: Any, old: int, new: int) -> Any:
    """A configuration with ``vocab_size``, also in nested parts, set to the new number."""
    if not isinstance(document, dict):
        return document
    changed = {name: _with_vocabulary(value, old, new) for name, value in document.items()}
    return changed | ({"vocab_size": new} if document.get("vocab_size") == old else {})


def _untied(document: Any) -> Any:
    """A configuration, also in nested parts, that no longer ties the head to the embedding."""
    if not isinstance(document, dict):
        return document
    changed = {name: _untied(value) for name, value in document.items()}
    own = "tie_word_embeddings" in changed or "model_type" in changed
    return changed | ({"tie_word_embeddings": False} if own else {})


def _describes_model(path: Path) -> bool:
    """Whether a file is a library's description of a model."""
    try:
        if not path.is_file() or path.stat().st_size > CONFIG_BYTES:
            return False
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and any(field in document for field in CONFIG_FIELDS)

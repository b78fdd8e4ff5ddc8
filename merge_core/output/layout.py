"""How the input lies on disk, so that the output opens where the input did.

The base's files set the layout, or those of the manifest's reference where there is no base.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.parameter_roles import describe
from merge_core.checkpoints.side_files import (
    copy_side_file,
    describes_model,
    find_side_files,
    has_tokenizer,
    is_tokenizer_file,
    read_description,
)
from merge_core.errors import OutputError
from merge_core.input_files import belongs_beside
from merge_core.output.config_files import Written, is_configuration, true_configuration
from merge_core.task_vectors import TensorGroups

WEIGHTS = "model.safetensors"
# open_clip looks for this name on the hub, and reads no shards.
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"
OPEN_CLIP_NAMES = (OPEN_CLIP_WEIGHTS, "open_clip_pytorch_model.bin")
OPEN_CLIP_CONFIG = "open_clip_config.json"


@dataclass(frozen=True)
class Layout:
    """The layout of a suite's weights.

    Attributes:
        reference: the member whose layout it is.
        kept: parameters that only the base has, in its order: written as they are there.
        vocabulary: tokens of the reference and of the output, where these differ.
        members: from whose folders side files may come, the reference first, then the experts.
        longest: the member whose vocabulary the output has, where the reference's is shorter.
    """

    reference: Checkpoint
    kept: tuple[str, ...]
    vocabulary: tuple[int, int] | None = None
    members: tuple[Checkpoint, ...] = ()
    longest: Checkpoint | None = field(default=None, repr=False)

    def stored_name(self, name: str) -> str:
        """A parameter's name in the reference's files, wrappers' prefixes included."""
        return self.reference.stored_name(name) if name in self.reference else name

    @cached_property
    def weights_name(self) -> str:
        """The name of the output's weight file, where it is one."""
        folder = folder_of(self.reference)
        own = (folder / OPEN_CLIP_CONFIG).is_file() and not describes_model_of_transformers(folder)
        named = self.reference.files[0].name in OPEN_CLIP_NAMES
        return OPEN_CLIP_WEIGHTS if own or named else WEIGHTS

    @property
    def may_be_sharded(self) -> bool:
        """Whether the library that opens the output reads several weight files."""
        return self.weights_name == WEIGHTS

    @cached_property
    def description(self) -> Path | None:
        """The folder that describes the model: the reference's, else the first expert's that does.

        None where no member lies in a library's own folder.
        """
        folders = (folder_of(member) for member in (self.reference, *self.members))
        return next((folder for folder in folders if describes_model(folder)), None)

    @cached_property
    def side_files(self) -> dict[str, Path]:
        """Files that come along, by their paths in the output's folder.

        Configurations are those of :attr:`description`. The tokenizer is of the member whose
        vocabulary the output has; else it lies beside the configuration, else with the first
        expert that has one.

        Raises:
            OutputError: one is a link to a place outside; see :func:`.belongs_beside`.
        """
        if self.description is None:
            return {}
        found = {member: _files_beside(member) for member in (self.reference, *self.members)}
        own = next(
            files for member, files in found.items() if folder_of(member) == self.description
        )
        candidates = [own, *found.values()]
        if self.longest is not None:
            candidates.insert(0, _files_beside(self.longest))
        tokenizer = next((files for files in candidates if has_tokenizer(files)), own)
        chosen = {
            **{name: path for name, path in own.items() if not is_tokenizer_file(name)},
            **{name: path for name, path in tokenizer.items() if is_tokenizer_file(name)},
        }
        beside = {path: member.files[0] for member in found for path in found[member].values()}
        for name, path in chosen.items():
            # A folder between may be the link.
            parts = {path, path.parent} if "/" in name else {path}
            if not all(belongs_beside(part, beside[path]) for part in parts):
                raise OutputError(
                    f"{path} is a link to a place outside its folder, and would be copied into "
                    "the output. Put the file itself there, or remove the link."
                )
        return chosen

    def copy_side_files(self, folder: Path, written: Written) -> None:
        """Copy them into a folder; configurations say what is written there.

        Args:
            folder: of the output.
            written: what its weights are.

        Raises:
            OSError: one cannot be read or written.
            OutputError: one is a link to a place outside its folder.
        """
        for name, path in self.side_files.items():
            copy_side_file(path, folder / name)
            if not is_configuration(name):
                continue
            document = read_description(path)
            now = true_configuration(document, written, name, self.vocabulary)
            if now != document:
                (folder / name).write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")


def folder_of(member: Checkpoint) -> Path:
    """The folder in which a member's description lies; an adapter's own."""
    return member.path if member.path.is_dir() else member.files[0].parent


def describes_model_of_transformers(folder: Path) -> bool:
    """Whether a folder's ``config.json`` is one of transformers."""
    document = read_description(folder / "config.json")
    return isinstance(document, dict) and "model_type" in document


def layout(groups: TensorGroups) -> Layout:
    """The layout of a merge's output: that of its manifest's reference.

    Args:
        groups: the parameters that are merged.

    Raises:
        CheckpointError: a member cannot be opened.
    """
    manifest = groups.manifest
    experts = tuple(groups.suite.expert(task) for task in sorted(groups.tasks))
    vocabulary, longest = _vocabulary(groups)
    return Layout(manifest.reference, manifest.copied, vocabulary, experts, longest)


def _files_beside(member: Checkpoint) -> dict[str, Path]:
    return find_side_files(folder_of(member))


def _vocabulary(groups: TensorGroups) -> tuple[tuple[int, int] | None, Checkpoint | None]:
    """Tokens of the reference and of the output where these differ, and whose they are."""
    manifest = groups.manifest
    for name in sorted(manifest.completed):
        own, info = manifest.reference.info(name), manifest.infos[name]
        if describe(name, own).kind == "token embedding" and own.shape != info.shape:
            members = groups.suite.members(sorted(groups.tasks))
            longest = next(each for each in members if each.info(name).shape == info.shape)
            return (own.shape[0], info.shape[0]), longest
    return None, None

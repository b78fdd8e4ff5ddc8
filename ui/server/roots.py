"""The folders below which the dashboard may look for models, and paths that stay inside them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from merge_core.checkpoints.stored.entry import split_part
from merge_core.errors import MergeScopeError
from merge_core.input_files import find_outside, resolve_path
from merge_core.opening.search import holds_models

VARIABLE = "MERGESCOPE_ROOTS"
DEPTH = 4
SECONDS = 2.0


def environment(named: Sequence[Path]) -> dict[str, str]:
    """The variable that tells the dashboard its roots.

    Args:
        named: the roots. Where there are none, the variable stays as it is, and the working
            folder is the root if it is not set.

    Raises:
        MergeScopeError: a root is no folder, or holds the character that separates paths.
    """
    if not named and os.environ.get(VARIABLE):
        return {}
    named = named or [Path()]
    for root in named:
        if not root.is_dir():
            raise MergeScopeError(f"--root {root} is not a folder. Name one that exists.")
        if os.pathsep in str(root):
            raise MergeScopeError(f"--root {root} holds {os.pathsep!r}. Rename or move the folder.")
    return {VARIABLE: os.pathsep.join(str(resolve_path(root, MergeScopeError)) for root in named)}


def roots() -> tuple[Path, ...]:
    """The allowed roots, resolved; the server's working folder where none was named.

    Raises:
        MergeScopeError: one is no path any more.
    """
    named = [part for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part]
    return tuple(dict.fromkeys(resolve_path(part, MergeScopeError) for part in named or ["."]))


def confine(text: str, root: Path) -> Path:
    """A path that somebody typed, as an existing folder below a root.

    Args:
        text: relative to the root.
        root: an allowed root.

    Returns:
        The resolved folder; the root itself for an empty text.

    Raises:
        MergeScopeError: it is absolute, climbs by ``..``, leads outside by a symbolic link, or
            is no folder. The message does not tell what lies outside.
    """
    refused = MergeScopeError(
        f"{text!r} is not a folder below {root.name or root}. Give a path relative to it, "
        "without '..'."
    )
    path = Path(text)
    if path.is_absolute() or ".." in path.parts or text.startswith("~"):
        raise refused
    try:
        top = root.resolve(strict=True)
        folder = (top / path).resolve(strict=True)
        if folder.is_relative_to(top) and folder.is_dir():
            return folder
    except (OSError, RuntimeError, ValueError) as error:
        raise refused from error
    raise refused


def folders(root: Path) -> tuple[list[str], bool]:
    """Folders with models below a root, relative to it; symbolic links are not followed.

    Returns:
        The folders, and whether all were looked into down to :data:`DEPTH` levels: the search
        ends after :data:`SECONDS`.
    """
    end = time.monotonic() + SECONDS
    found: list[str] = []
    level = [root]
    for _ in range(DEPTH + 1):
        deeper: list[Path] = []
        for folder in level:
            if time.monotonic() > end:
                return sorted(found), False
            if holds_models(folder):
                found.append(folder.relative_to(root).as_posix())
            deeper += _below(folder)
        level = deeper
    return sorted(found), True


def names_outside(document: object, folder: Path, root: Path) -> str | None:
    """A text in a suite's document that names an existing file outside a root, if there is one.

    A folder is outside also by a link anywhere below it, but those of a Hugging Face cache to its
    own content.

    Args:
        document: what a suite.yaml says.
        folder: where it lies; relative paths start here.
        root: an allowed root.
    """
    if isinstance(document, dict):
        parts = (names_outside(item, folder, root) for item in document.values())
        return next((part for part in parts if part is not None), None)
    if isinstance(document, (list, tuple)):
        parts = (names_outside(item, folder, root) for item in document)
        return next((part for part in parts if part is not None), None)
    if isinstance(document, str):
        try:
            path, _ = split_part(folder / Path(document).expanduser())
            if not path.exists():
                return None
        except (OSError, RuntimeError, ValueError):  # no path at all
            return None
        try:
            return None if find_outside(path, root) is None else document
        except OSError:  # what cannot be looked into is not known to be inside
            return document
    return None


def _below(folder: Path) -> list[Path]:
    try:
        return sorted(
            child
            for child in folder.iterdir()
            if not child.name.startswith(".") and not child.is_symlink() and child.is_dir()
        )
    except OSError:  # not ours to read
        return []

"""Folders of images: one folder a class, inside one folder a split or without splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS  # type: ignore[import-untyped]  # no stubs

from analysis.data_sources.source import UNLABELLED, WHOLE, Request, Source
from analysis.data_sources.splits import KNOWN
from merge_core.errors import SuiteError
from merge_core.input_files import check_regular, list_files
from merge_core.suites.data_files import read_names


@dataclass(frozen=True)
class Files:
    """Records of image files."""

    paths: Sequence[Path]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int, /) -> tuple[Image.Image, int]:
        check_regular(self.paths[number])
        with Image.open(self.paths[number]) as file:
            return file.convert("RGB"), self.labels[number]

    def where(self, number: int) -> str:
        """Its path."""
        return str(self.paths[number])


def open_folder(request: Request) -> Source:
    """The splits of a folder of images.

    Folders called train, val, test and the like are splits, as are those that suite.yaml names
    as such; without any, the folder is one part. Classes are folders in it, in alphabetical
    order unless suite.yaml gives another; their images may lie at any depth.

    Raises:
        SuiteError: a class has no folder in a split, or there is no class.
    """
    data, root = request.data, request.path
    wanted = {data.val, data.test, *KNOWN}
    folders = [root / name for name in _folders(root) if name in wanted]
    parts = {folder.name: folder for folder in folders} or {WHOLE: root}
    if not data.labelled:
        return Source(None, {name: partial(_list_unlabelled, part) for name, part in parts.items()})
    if data.classes is not None:
        classes = read_names(data.classes, request.resolve, f"classes of {request.what}")
    else:
        classes = tuple(sorted({name for part in parts.values() for name in _folders(part)}))
    if not classes:
        raise SuiteError(
            f"{root} ({request.what}) holds no folder of a class. Give every class a folder of "
            "images, or say 'labelled: false'."
        )
    return Source(
        classes, {name: partial(_split, request, part, classes) for name, part in parts.items()}
    )


def _split(request: Request, folder: Path, classes: tuple[str, ...]) -> Files:
    found = set(_folders(folder))
    if lacking := [name for name in classes if name not in found]:
        raise SuiteError(
            f"{folder} ({request.what}) has no folder for the class {lacking[0]!r} "
            f"({len(lacking)} of {len(classes)} are missing). Add it, empty if need be, or "
            "correct 'classes'."
        )
    if odd := sorted(found - set(classes)):
        raise SuiteError(
            f"{folder} ({request.what}) has a folder {odd[0]!r} that is none of the {len(classes)} "
            "classes. Add it to 'classes', or move it away."
        )
    paths, labels = [], []
    for label, name in enumerate(classes):
        mine = _images(folder / name)
        paths += mine
        labels += [label] * len(mine)
    return Files(paths, labels)


def _list_unlabelled(folder: Path) -> Files:
    paths = _images(folder)
    return Files(paths, [UNLABELLED] * len(paths))


def _folders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    """Image files at any depth, in a fixed order."""
    return sorted(
        path
        for path in list_files(folder)
        if path.name.lower().endswith(IMG_EXTENSIONS) and not path.name.startswith(".")
    )

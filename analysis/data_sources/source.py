"""What every kind of data is read as: splits of images with labels, decoded one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from merge_core.suites.data_files import Resolve
from merge_core.suites.data_spec import DataSpec

UNLABELLED = -1
# The one part of a source without splits.
WHOLE = "all"


class Records(Protocol):
    """Images and labels of one split, in the order in which they are stored."""

    def __len__(self) -> int:
        """Number of images."""

    def __getitem__(self, number: int, /) -> tuple[Image.Image, int]:
        """An image, decoded, and its label (:data:`UNLABELLED` without one)."""

    def where(self, number: int) -> str:
        """The file of an image, or its index in one, for messages."""


@dataclass(frozen=True)
class Source:
    """A dataset on disk.

    Attributes:
        classes: names in the order of the labels; None where labels are mere numbers.
        splits: what opens each, by the source's own names.
    """

    classes: tuple[str, ...] | None
    splits: Mapping[str, Callable[[], Records]]


@dataclass(frozen=True)
class Request:
    """What is needed to open a source.

    Attributes:
        data: what suite.yaml says.
        path: the file or folder that holds the data and nothing else.
        resolve: of other paths of suite.yaml.
        what: whose data these are, for messages.
    """

    data: DataSpec
    path: Path
    resolve: Resolve
    what: str


@dataclass(frozen=True)
class Pixels:
    """Records of images that lie in memory.

    Attributes:
        images: uint8, N x H x W x 3, or N x H x W for grey ones.
        labels: N integers.
        name: of the file and split, for messages.
    """

    images: np.ndarray
    labels: np.ndarray
    name: str

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int, /) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[number]), int(self.labels[number])

    def where(self, number: int) -> str:
        """Its number in the file."""
        return f"image {number} of {self.name}"

"""Datasets that torchvision reads, from the root where it keeps them. Nothing is unpickled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from analysis.data_sources.cifar import open_cifar
from analysis.data_sources.idx import open_idx
from analysis.data_sources.source import UNLABELLED, WHOLE, Records, Request, Source
from merge_core.errors import SuiteError
from merge_core.input_files import check_all_regular
from merge_core.suites.data_spec import TORCHVISION

# Read here: torchvision unpickles CIFAR, and files of its own making in the MNIST family.
MNIST_FAMILY = ("MNIST", "FashionMNIST", "KMNIST", "EMNIST")
CIFAR = ("CIFAR10", "CIFAR100")


@dataclass(frozen=True)
class Torchvision:
    """Records of one of torchvision's datasets."""

    dataset: Any
    labelled: bool
    name: str

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int, /) -> tuple[Image.Image, int]:
        image, label = self.dataset[number]
        return image, int(label) if self.labelled else UNLABELLED

    def where(self, number: int) -> str:
        """Its number in the dataset."""
        return f"image {number} of {self.name}"


def open_torchvision(request: Request) -> Source:
    """The splits of a dataset of torchvision, as its own class gives them.

    Raises:
        SuiteError: it is not there, or damaged.
    """
    name = request.data.dataset
    assert name is not None
    if name in CIFAR:
        return open_cifar(request)
    if name in MNIST_FAMILY:
        return open_idx(request)
    open_split = partial(_open, request, name)
    splits = TORCHVISION[name][1] or (WHOLE,)
    classes = getattr(open_split(splits[-1]).dataset, "classes", None)
    named = tuple(map(str, classes)) if classes is not None else None
    opened: dict[str, Callable[[], Records]] = {s: partial(open_split, s) for s in splits}
    return Source(named, opened)


def _open(request: Request, name: str, split: str) -> Torchvision:
    from torchvision import datasets  # type: ignore[import-untyped]  # no stubs

    root = request.resolve(request.data.path or "")
    arguments = {} if split == WHOLE else {"split": split}
    try:
        check_all_regular(request.path)
        dataset = getattr(datasets, name)(root, download=False, **arguments)
    except ImportError as fault:
        raise SuiteError(
            f"torchvision needs another package for {name} ({request.what}): {fault}"
        ) from fault
    except Exception as fault:  # whatever a damaged file does to its reader
        reason = str(fault).split("\n")[0]
        raise SuiteError(
            f"{root} ({request.what}) does not hold {name} ({split}) as torchvision stores it: "
            f"{reason:.160} `mergescope prepare SUITE --download` fetches it where torchvision can."
        ) from fault
    return Torchvision(dataset, request.data.labelled, f"{name}, {split}")


def fetch(name: str, root: Path, what: str) -> None:
    """Let torchvision download a dataset into a root; what is there already stays.

    Raises:
        SuiteError: torchvision cannot fetch it, or the network is away.
    """
    from torchvision import datasets
    from torchvision.datasets.utils import (  # type: ignore[import-untyped]  # no stubs
        download_and_extract_archive,
    )

    loader = getattr(datasets, name)
    try:
        if name in CIFAR:  # its class would unpickle what it has fetched
            if not (root / loader.base_folder).is_dir():
                download_and_extract_archive(
                    loader.url, str(root), filename=loader.filename, md5=loader.tgz_md5
                )
        elif name == "EMNIST":
            loader(root, split="letters", download=True)  # one archive holds all its parts
        elif name in MNIST_FAMILY:
            loader(root, download=True)
        else:
            for split in TORCHVISION[name][1] or (WHOLE,):
                loader(root, download=True, **({} if split == WHOLE else {"split": split}))
    except Exception as fault:  # network, checksums, a source that is gone
        reason = str(fault).strip().split("\n")[0]
        raise SuiteError(
            f"torchvision could not fetch {name} ({what}) into {root}: {reason:.200} Put its "
            "files there by hand."
        ) from fault

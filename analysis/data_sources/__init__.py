"""Evaluation images as people have them: each kind read as splits of images with labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from analysis.data_sources.source import Request, Source
from merge_core.errors import SuiteError
from merge_core.suites.data_files import Resolve, locate_data
from merge_core.suites.data_spec import OF_TEXTS, DataSpec, Kind


def open_source(data: DataSpec, resolve: Resolve, what: str) -> Source:
    """Open a task's data; images are read when they are asked for, and nothing is fetched.

    Args:
        data: what suite.yaml says.
        resolve: of paths of suite.yaml.
        what: whose data these are, for messages.

    Raises:
        SuiteError: missing, of another form, or a package that is not installed.

    Example:
        >>> suite = load_suite("vision")
        >>> source = open_source(suite.spec.experts["digits"].data, suite.file, "digits")
        >>> sorted(source.splits), len(source.splits["test"]())
        (['test', 'val'], 250)
    """
    # Each brings libraries of its own.
    from analysis.data_sources.archive import open_archive
    from analysis.data_sources.cifar import open_cifar
    from analysis.data_sources.folder import open_folder
    from analysis.data_sources.hugging_face import open_hugging_face
    from analysis.data_sources.idx import open_idx
    from analysis.data_sources.torchvision_sets import open_torchvision

    openers: Mapping[Kind, Callable[[Request], Source]] = {
        "numpy": open_archive,
        "folder": open_folder,
        "idx": open_idx,
        "cifar": open_cifar,
        "torchvision": open_torchvision,
        "huggingface": open_hugging_face,
    }
    path = locate_data(data, resolve, what)
    try:
        return openers[data.kind](Request(data, path, resolve, what))
    except OSError as fault:
        raise SuiteError(f"{path} ({what}) cannot be read: {fault}.") from fault


def download(data: DataSpec, resolve: Resolve, what: str) -> None:
    """Fetch a task's data where they come from torchvision or the hub and are not there yet.

    Args:
        data: what suite.yaml says; other kinds are left alone.
        resolve: of paths of suite.yaml.
        what: whose data these are, for messages.

    Raises:
        SuiteError: they cannot be fetched.
    """
    from analysis.data_sources.torchvision_sets import fetch

    if data.kind == "torchvision":
        fetch(data.dataset or "", resolve(data.path or ""), what)
    elif data.kind in ("huggingface", *OF_TEXTS) and data.path is None:
        locate_data(data, resolve, what, download=True)

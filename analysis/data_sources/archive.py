"""Numpy archives: ``{split}_images`` (uint8, N x H x W x 3) and ``{split}_labels``."""

from __future__ import annotations

import zipfile
from functools import partial

import numpy as np

from analysis.data_sources.source import UNLABELLED, Pixels, Request, Source
from merge_core.errors import SuiteError

ENDING = "_images"


def open_archive(request: Request) -> Source:
    """The splits of a ``.npz`` file; nothing pickled in it is opened.

    Raises:
        SuiteError: no such archive.
    """
    try:
        with np.load(request.path, allow_pickle=False) as archive:
            names = [name.removesuffix(ENDING) for name in archive if name.endswith(ENDING)]
            classes = (
                tuple(str(name) for name in archive["class_names"])
                if "class_names" in archive
                else None
            )
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as fault:
        raise SuiteError(
            f"{request.path} ({request.what}) cannot be read as a numpy archive: {fault}."
        ) from fault
    return Source(classes, {name: partial(_split, request, name) for name in names})


def _split(request: Request, split: str) -> Pixels:
    from analysis.inputs import read_split

    found = read_split(
        request.path,
        split,
        request.what,
        SuiteError,
        channels=3,
        labelled=request.data.labelled,
    )
    labels = found.labels if request.data.labelled else np.full(len(found.images), UNLABELLED)
    return Pixels(found.images, labels, f"{request.path.name}, {split}")

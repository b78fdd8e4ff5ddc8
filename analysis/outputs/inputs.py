"""Evaluation inputs of a task: images and labels of a split, and how they are normalised."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from analysis.data_sources.archive import TaskInputs, open_arrays, read_split
from analysis.data_sources.prepared import prepare_split
from analysis.data_sources.source import UNLABELLED
from analysis.data_sources.text import read_texts
from analysis.data_sources.transforms import resolve_transform
from merge_core.devices import CPU, Device
from merge_core.errors import SuiteError
from merge_core.progress import Progress
from merge_core.suites.architectures import read_class_names
from merge_core.suites.data_spec import DataSpec
from merge_core.suites.suite import Suite

Split = Literal["val", "test"]
SPLIT_NAMES: dict[Split, str] = {"val": "validation", "test": "test"}


def load_inputs(
    suite: Suite,
    task: str,
    split: Split,
    limit: int | None = None,
    progress: Progress | None = None,
) -> TaskInputs:
    """Read one split of a task's data.

    A numpy archive (``.npz``) holds ``val_images``, ``val_labels``, ``test_images``,
    ``test_labels`` and, optionally, ``class_names``. Labels may be left out; then nothing that
    needs accuracy can be asked. Other kinds of data are decoded once and kept
    (:func:`analysis.data_sources.prepared.prepare_split`).

    Args:
        suite: the suite.
        task: a task with data.
        split: ``val`` for choosing, ``test`` for reporting.
        limit: only the first so many images.
        progress: reports images that have to be decoded.

    Raises:
        SuiteError: no data, a missing file, or content of another form.
        OutputError: decoded images cannot be kept.
        Cancelled: between two images.

    Example:
        >>> inputs = load_inputs(load_suite("vision"), "digits", "test", limit=5)
        >>> inputs.images.shape, inputs.labels.shape
        ((5, 32, 32, 3), (5,))
    """
    spec, what = _data(suite, task), f"data of task {task!r}"
    if spec.plain:
        assert spec.file is not None
        path = suite.file(spec.file)
        found = read_split(path, split, what, SuiteError, channels=3, limit=limit, labelled=False)
    elif spec.kind == "text":
        tokens, labels, names = read_texts(spec, split, suite.file, what)
        found = TaskInputs(tokens[:limit], labels[:limit], names)
    else:
        kept = prepare_split(spec, suite.architecture, split, suite.file, what, progress)
        found = TaskInputs(kept.images[:limit], kept.labels[:limit], kept.class_names)
    return _in_own_order(found, suite, task) if spec.classes is None else found


def _in_own_order(inputs: TaskInputs, suite: Suite, task: str) -> TaskInputs:
    """Labels in the order of the classes that a classifier within a checkpoint has.

    Where data name their classes as the checkpoint's ``config.json`` does, labels go by the names;
    where they only number them, they get its names.
    """
    own = read_class_names(suite.expert(task)) if suite.has_own_head(task) else None
    named = inputs.class_names
    if own is None or not named:
        return inputs
    if all(name.isdigit() for name in named) and len(named) <= len(own):
        return TaskInputs(inputs.images, inputs.labels, own)
    folded = {name.casefold(): number for number, name in enumerate(own)}
    places = [folded.get(name.casefold()) for name in named]
    if None in places or len(set(places)) < len(named):
        return inputs
    table = np.array([*places, UNLABELLED])  # the last one stands for no label
    return TaskInputs(inputs.images, table[inputs.labels], own)


def _data(suite: Suite, task: str) -> DataSpec:
    spec = suite.data(task)
    if spec is None:
        raise SuiteError(f"Task {task!r} has no data; add 'data:' to it in {suite.path}.")
    return spec


def has_labels(suite: Suite, task: str, split: Split) -> bool:
    """Whether a task has labels in a split: as suite.yaml says, or as an archive names them.

    Raises:
        SuiteError: a file that is no archive.

    Example:
        >>> has_labels(load_suite("vision"), "digits", "val")
        True
    """
    spec = suite.spec.experts[task].data
    if spec is None:
        return False
    if not spec.plain:
        return spec.labelled  # of a language model's texts the tokens
    assert spec.file is not None
    path = suite.file(spec.file)
    try:
        with open_arrays(path) as archive:
            return f"{split}_labels" in archive
    except (OSError, ValueError, TypeError, EOFError, MemoryError, zipfile.BadZipFile) as fault:
        raise SuiteError(f"{path} (data of task {task!r}) cannot be read: {fault}.") from fault


def normalise_for_task(images: np.ndarray, suite: Suite, task: str, device: Device = CPU) -> Tensor:
    """float32, N x 3 x H x W: scaled to [0, 1], then (x − mean) / std of the task's data.

    Computed on a device and left there; tokens of texts stay on the CPU, as they are few.

    Raises:
        SuiteError: the task has no data, or its transform is not known.
    """
    spec = _data(suite, task)
    if spec.kind == "text":
        return torch.from_numpy(images.astype(np.int64))
    transform = resolve_transform(spec, suite.architecture, f"data of task {task!r}")
    mean, std = spec.constants if transform is None else (transform.mean, transform.std)
    return normalise_pixels(images, mean, std, device)


def normalise_pixels(
    images: np.ndarray, mean: Sequence[float], std: Sequence[float], device: Device = CPU
) -> Tensor:
    """float32, N x C x H x W: (x / 255 − mean) / std of uint8 images N x H x W x C, on a device."""
    shift, scale = (
        device.send(torch.tensor(constants).reshape(-1, 1, 1)) for constants in (mean, std)
    )
    if device.accelerates:  # bytes travel, and are laid out there
        there = device.send(torch.from_numpy(np.array(images)))
        pixels = there.permute(0, 3, 1, 2).contiguous().float()
    else:
        pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float()
    return (pixels / 255 - shift) / scale

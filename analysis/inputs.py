"""Evaluation inputs of a task: images and labels of a split, and the task's frozen head."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from analysis.data_sources.prepared import prepared
from analysis.data_sources.source import UNLABELLED
from analysis.data_sources.text import read_texts
from analysis.data_sources.transforms import resolved
from analysis.zero_shot import zero_shot_weight
from merge_core.checkpoint import Checkpoint
from merge_core.data_files import head_path
from merge_core.data_spec import DataSpec, head_spec
from merge_core.errors import CheckpointError, MergeScopeError, SuiteError
from merge_core.progress import Progress
from merge_core.suite import Suite

Split = Literal["val", "test"]
SPLIT_NAMES: dict[Split, str] = {"val": "validation", "test": "test"}


@dataclass(frozen=True)
class TaskInputs:
    """One split of one task.

    Attributes:
        images: uint8, N x H x W x channels; perhaps mapped from a file. Of texts their tokens,
            int32, N x L.
        labels: int64, N, in 0..classes−1; all :data:`UNLABELLED` where there are none.
        class_names: one per class.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class Head:
    """A frozen linear classifier: logits = features @ weight.T + bias.

    Attributes:
        weight: classes x width, float32.
        bias: classes, float32.
        normalizes: whether features are divided by their norm first.
        hidden: weight and bias of a layer before it, after which comes tanh (RoBERTa's heads).
    """

    weight: Tensor
    bias: Tensor
    normalizes: bool = False
    hidden: tuple[Tensor, Tensor] | None = None

    def logits(self, features: Tensor) -> Tensor:
        """N x classes from N x width."""
        if self.normalizes:
            features = features / features.norm(dim=-1, keepdim=True)
        if self.hidden is not None:
            weight, bias = self.hidden
            features = torch.tanh(features @ weight.T + bias)
        return features @ self.weight.T + self.bias


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
    (:func:`analysis.data_sources.prepared.prepared`).

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
    """
    spec, what = _data(suite, task), f"data of task {task!r}"
    if spec.plain:
        assert spec.file is not None
        path = suite.file(spec.file)
        return read_split(path, split, what, SuiteError, channels=3, limit=limit, labelled=False)
    if spec.kind == "text":
        tokens, labels, names = read_texts(spec, split, suite.file, what)
        return TaskInputs(tokens[:limit], labels[:limit], names)
    found = prepared(spec, suite.spec.architecture, split, suite.file, what, progress)
    return TaskInputs(found.images[:limit], found.labels[:limit], found.class_names)


def _data(suite: Suite, task: str) -> DataSpec:
    spec = suite.spec.experts[task].data
    if spec is None:
        raise SuiteError(f"Task {task!r} has no data; add 'data:' to it in {suite.path}.")
    return spec


def has_labels(suite: Suite, task: str, split: Split) -> bool:
    """Whether a task has labels in a split: as suite.yaml says, or as an archive names them.

    Raises:
        SuiteError: a file that is no archive.
    """
    spec = suite.spec.experts[task].data
    if spec is None:
        return False
    if not spec.plain:
        return spec.labelled
    assert spec.file is not None
    path = suite.file(spec.file)
    try:
        with np.load(path, allow_pickle=False) as archive:
            return f"{split}_labels" in archive
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as fault:
        raise SuiteError(f"{path} (data of task {task!r}) cannot be read: {fault}.") from fault


def read_split(
    path: Path,
    split: str,
    what: str,
    error: type[MergeScopeError],
    channels: int,
    limit: int | None = None,
    labelled: bool = True,
) -> TaskInputs:
    """Read one split of a numpy archive of images.

    Args:
        path: the archive.
        split: its arrays are ``{split}_images`` and ``{split}_labels``.
        what: whose data these are, for messages.
        error: what is raised.
        channels: the number of colour channels expected.
        limit: only the first so many images.
        labelled: whether labels must be there; else they are :data:`UNLABELLED` where missing.

    Raises:
        MergeScopeError: of the given kind: a missing file, or content of another form.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            images = archive[f"{split}_images"][:limit]
            if labelled or f"{split}_labels" in archive:
                labels = archive[f"{split}_labels"][:limit]
                least = 0
            else:
                labels, least = np.full(len(images), UNLABELLED), UNLABELLED
            if labels.dtype.kind not in "iu":
                raise ValueError(f"the labels are {labels.dtype}, not integers")
            labels = labels.astype(np.int64)
            count = int(labels.max(initial=-1)) + 1
            names = (
                tuple(str(name) for name in archive["class_names"])
                if "class_names" in archive
                else tuple(str(i) for i in range(count))
            )
    except OSError as fault:
        raise error(f"{path} ({what}) cannot be read: {fault}.") from fault
    # TypeError: a lone .npy array; IndexError: a number instead of an array; the others: damage.
    except (
        ValueError,
        LookupError,
        TypeError,
        EOFError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as fault:
        raise error(
            f"{path} ({what}) is not a numpy archive with {split}_images and "
            f"{split}_labels ({fault})."
        ) from fault
    if images.ndim != 4 or images.shape[-1] != channels or images.dtype != np.uint8:
        raise error(
            f"{path}: {split}_images must be uint8 of shape N x height x width x {channels}, "
            f"got {images.dtype} of shape {images.shape}."
        )
    if labels.shape != (len(images),) or len(labels) == 0 or labels.min() < least:
        raise error(f"{path}: {split}_labels must be one class number per image, from 0.")
    return TaskInputs(images, labels, names)


def normalised(images: np.ndarray, suite: Suite, task: str) -> Tensor:
    """float32, N x 3 x H x W: scaled to [0, 1], then (x − mean) / std of the task's data.

    Raises:
        SuiteError: the task has no data, or its transform is not known.
    """
    spec = _data(suite, task)
    if spec.kind == "text":
        return torch.from_numpy(images.astype(np.int64))
    transform = resolved(spec, suite.spec.architecture, f"data of task {task!r}")
    mean, std = spec.constants if transform is None else (transform.mean, transform.std)
    return scaled(images, mean, std)


def scaled(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """float32, N x C x H x W: (x / 255 − mean) / std of uint8 images N x H x W x C."""
    shift, scale = (torch.tensor(constants).reshape(-1, 1, 1) for constants in (mean, std))
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float()
    return (pixels / 255 - shift) / scale


def load_head(suite: Suite, task: str) -> Head:
    """A task's head: a file with ``weight`` and ``bias`` (a prefix such as ``head.`` is allowed),
    or one made of class names (:mod:`analysis.zero_shot`).

    Raises:
        SuiteError: no head, a missing file, or one without weight and bias.
        MergeScopeError: a text tower that cannot be fetched or run.
    """
    given = suite.spec.experts[task].head
    if given is None:
        raise SuiteError(f"Task {task!r} has no head; add 'head:' to it in {suite.path}.")
    spec = head_spec(given)
    if spec.zero_shot is not None:
        made = zero_shot_weight(suite, task, spec.zero_shot)
        return Head(made, torch.zeros(len(made)), normalizes=True)
    assert spec.file is not None
    path = head_path(spec.file, suite.file)
    try:
        checkpoint = Checkpoint(path)
        start = "" if spec.layers is None else f"{spec.layers}."
        names = [
            n
            for n in checkpoint
            if n.startswith(start) and n.rpartition(".")[2] in ("weight", "bias")
        ]
        first = [f"{start}dense.{kind}" for kind in ("weight", "bias")]
        hidden = None
        if set(first) < set(names):  # dense, tanh, out_proj: a classification head of RoBERTa
            hidden = (checkpoint.tensor(first[0]).float(), checkpoint.tensor(first[1]).float())
            names = [name for name in names if name not in first]
        found = {name.rpartition(".")[2]: checkpoint.tensor(name).float() for name in names}
    except CheckpointError as error:
        raise SuiteError(f"Head of task {task!r}: {error}") from error
    if len(found) < len(names):
        raise SuiteError(
            f"{path} (head of task {task!r}) holds several layers "
            f"({', '.join(names[:4])}, ...). Give a file with one 'weight' and one 'bias', or "
            "name the head's by 'layers'."
        )
    weight = found.get("weight")
    if weight is None or weight.ndim != 2:
        raise SuiteError(
            f"{path} (head of task {task!r}) must hold a 'weight' of shape "
            "classes x width, and may hold a 'bias'."
        )
    bias = found.get("bias", torch.zeros(len(weight)))
    if bias.shape != (len(weight),):
        raise SuiteError(f"{path}: bias and weight disagree about the classes.")
    return Head(weight, bias, spec.normalizes, hidden)

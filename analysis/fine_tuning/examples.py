"""Labelled inputs of one task, taken a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from analysis.data_sources.archive import TaskInputs, read_split
from analysis.data_sources.prepared import prepare_split
from analysis.data_sources.splits import Part
from analysis.data_sources.text import PADDING, read_texts
from analysis.outputs.inputs import normalise_for_task
from merge_core.errors import SuiteError
from merge_core.progress import Progress
from merge_core.suites.suite import Suite


@dataclass(frozen=True)
class Examples:
    """Inputs as a network takes them, and their classes.

    Attributes:
        take: from numbers of examples to N x 3 x H x W, or tokens N x L.
        labels: int64, N.
        lengths: tokens of each text; None for images.
    """

    take: Callable[[np.ndarray], Tensor]
    labels: np.ndarray
    lengths: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: np.ndarray) -> Examples:
        """Some of them, by their numbers."""
        lengths = None if self.lengths is None else self.lengths[rows]
        return Examples(lambda numbers: self.take(rows[numbers]), self.labels[rows], lengths)

    def sort(self, numbers: np.ndarray) -> np.ndarray:
        """The same examples, short texts first, so that neighbours need little padding."""
        if self.lengths is None:
            return numbers
        return numbers[np.argsort(self.lengths[numbers], kind="stable")]


def read_part(
    suite: Suite,
    task: str,
    part: Part,
    limit: int | None = None,
    progress: Progress | None = None,
) -> TaskInputs:
    """A part of a task's data, as evaluation reads it.

    Args:
        suite: says where they are.
        task: a task with data.
        part: for fine-tuning, for choosing or for reporting.
        limit: examples at most, in place of the data's own limit.
        progress: reports images that have to be decoded.

    Raises:
        SuiteError: missing or malformed data, or no labels.
        OutputError: decoded images cannot be kept.
    """
    data, what = suite.spec.experts[task].data, f"data of task {task!r}"
    assert data is not None
    if not data.labelled:
        raise SuiteError(f"{what[0].upper()}{what[1:]}: fine-tuning needs labels.")
    if data.plain:
        assert data.file is not None
        return read_split(suite.file(data.file), part, what, SuiteError, channels=3, limit=limit)
    if limit is not None:
        data = data.model_copy(update={"limit": limit})
    if data.kind == "text":
        return TaskInputs(*read_texts(data, part, suite.file, what))
    found = prepare_split(data, suite.architecture, part, suite.file, what, progress)
    return TaskInputs(found.images, found.labels, found.class_names)


def to_examples(inputs: TaskInputs, suite: Suite, task: str) -> Examples:
    """Inputs as the suite's network takes them; pixels are normalised when they are taken."""

    def take(numbers: np.ndarray) -> Tensor:
        return normalise_for_task(np.asarray(inputs.images[numbers]), suite, task)

    texts = inputs.images.ndim == 2
    lengths = (inputs.images != PADDING).sum(axis=1) if texts else None
    return Examples(take, inputs.labels, lengths)


def shuffled_batches(count: int, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Numbers of examples without end: each once in every pass, shuffled anew.

    Args:
        count: examples.
        size: of a batch; one may reach from the end of a pass into the next.
        rng: of the order.
    """
    waiting = np.empty(0, dtype=np.int64)
    while True:
        while len(waiting) < size:
            waiting = np.concatenate([waiting, rng.permutation(count)])
        yield waiting[:size]
        waiting = waiting[size:]

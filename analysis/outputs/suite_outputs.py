"""What weights of a suite give for images: run for those that are asked for, and kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cache, cached_property, partial
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.accuracy import accuracy_frame
from analysis.data_sources.archive import TaskInputs
from analysis.data_sources.source import UNLABELLED
from analysis.metrics import ACCURACY, Metric
from analysis.networks.stateless import Outputs, StatelessNetwork
from analysis.networks.towers import suite_network
from analysis.outputs.heads import Head, load_head
from analysis.outputs.inputs import SPLIT_NAMES, Split, load_inputs, normalise_for_task
from analysis.outputs.measures import MEASURES, Kind
from analysis.outputs.prediction_store import (
    CLASSES,
    PredictionStore,
    empty_vector,
    fill_missing,
    is_missing,
    output_key,
)
from analysis.outputs.prepared_inputs import PREPARED
from merge_core.devices import compute, current_device
from merge_core.errors import MergeScopeError, SuiteError
from merge_core.executors.base import one_thread
from merge_core.files import digest_of
from merge_core.progress import Progress
from merge_core.suites.suite import Suite

Images = Mapping[str, np.ndarray]
# By name, or one after another.
Weights = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
# Task to measure to values, one per image.
Measurements = dict[str, dict[str, np.ndarray]]

Precision = Literal["float32", "bfloat16"]
DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class NotStored(MergeScopeError):  # noqa: N818 - a state rather than a fault
    """Something has never been evaluated, and nothing may be evaluated now."""


# Images that are normalised at a time; for an accelerator, which takes as many at once as fit.
READ, READ_THERE = 250, 1024


class SuiteOutputs:
    """Runs weights of one suite; the model, inputs, heads and what was computed are kept.

    Args:
        suite: a suite with architecture, heads and data.
        predictions: where outputs are kept (in the cache folder by default).
        stored_only: measure what is stored, and refuse to run the model for the rest.
        precision: in which the network computes; what each gives is kept apart.

    Attributes:
        forward_images: images run so far.
        metric: what models are measured by.
        kinds: what can be measured of each input.

    Raises:
        SuiteError: the suite cannot be evaluated.
    """

    metric: Metric = ACCURACY
    kinds: Mapping[str, Kind] = MEASURES

    def __init__(
        self,
        suite: Suite,
        predictions: PredictionStore | None = None,
        stored_only: bool = False,
        precision: Precision = "float32",
    ) -> None:
        if suite.why_not_evaluated is not None:
            raise SuiteError(
                f"The suite {suite.name!r} can be analysed and merged but not evaluated: "
                f"{suite.why_not_evaluated}."
            )
        self.suite = suite
        self.predictions = predictions or PredictionStore()
        self.precision = precision
        self._raw: dict[tuple[str, Split, int | None], TaskInputs] = {}
        self._heads: dict[str, Head] = {}
        self._digests: dict[str, str] = {}
        self._expert_outputs: dict[tuple[str, Split], Outputs] = {}
        self._stored_only = stored_only
        self.forward_images = 0

    @cached_property
    def network(self) -> StatelessNetwork:
        """The suite's architecture, without classifier.

        Raises:
            MergeScopeError: it cannot be built.
        """
        return suite_network(self.suite)

    def inputs(self, task: str, split: Split, limit: int | None) -> tuple[Tensor, np.ndarray]:
        """Normalised images (N x 3 x H x W) and labels (N) of a task: all at once, on the device.

        Raises:
            MergeScopeError: missing or malformed data.
        """
        raw, device = self.raw_inputs(task, split, limit), current_device()
        prepare = partial(self._normalise, raw.images, task)
        if not PREPARED.fits(_prepared_bytes(raw), device):
            return prepare(), raw.labels
        return PREPARED.get(self._content(task, split, limit), device, prepare), raw.labels

    def _normalise(self, images: np.ndarray, task: str) -> Tensor:
        return compute(lambda device: normalise_for_task(images, self.suite, task, device))

    def raw_inputs(
        self,
        task: str,
        split: Split,
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> TaskInputs:
        """Images before normalisation (those that were decoded are mapped from a file), and labels.

        Raises:
            MergeScopeError: missing or malformed data.
            Cancelled: between two images that have to be decoded.
        """
        key = (task, split, limit)
        if key not in self._raw:
            self._raw[key] = PREPARED.read(
                self._content(task, split, limit),
                lambda: load_inputs(self.suite, task, split, limit, progress),
            )
        return self._raw[key]

    def _content(self, task: str, split: Split, limit: int | None) -> str:
        return digest_of(self.data_digest(task), split, str(limit))

    def images(
        self,
        tasks: Collection[str],
        split: Split,
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> Images:
        """Task to the numbers of its images in a split: all, or the first `limit`.

        Raises:
            MergeScopeError: missing or malformed data.
            Cancelled: between two images that have to be decoded.
        """
        found = {task: self.raw_inputs(task, split, limit, progress) for task in tasks}
        return {task: np.arange(len(inputs.labels)) for task, inputs in found.items()}

    def head(self, task: str) -> Head:
        """A task's head.

        Raises:
            SuiteError: missing or malformed head.
        """
        if task not in self._heads:
            self._heads[task] = load_head(self.suite, task)
        return self._heads[task]

    @one_thread()
    def predict(
        self, weights: Mapping[str, Tensor], task: str, split: Split, limit: int | None = None
    ) -> np.ndarray:
        """Predicted classes (int64, N), which are not kept.

        Raises:
            SuiteError: weights, head or data that do not fit; non-finite logits.
        """
        whole = self._run(self._load(weights), self.images([task], split, limit), split)[task]
        return whole.logits.argmax(dim=1).numpy()

    @one_thread()
    def measure(
        self,
        digest: str,
        weights: Callable[[], Weights],
        images: Images,
        split: Split = "val",
        measures: Collection[str] = (CLASSES,),
        progress: Progress | None = None,
    ) -> Measurements:
        """What weights give for images of some tasks; what is known is not run again.

        Labels are not used.

        Args:
            digest: content digest of the weights.
            weights: gives them; called only if an image has to be run.
            images: task to numbers of images in the split, in any order.
            split: ``val`` or ``test``.
            measures: names of :data:`analysis.outputs.measures.MEASURES`; one pass gives them all.
            progress: reports images run; what was run is kept when cancelled.

        Returns:
            Task to measure to values, aligned with `images` (int16 classes, else float32).

        Raises:
            MergeScopeError: weights, heads or data that do not fit; non-finite logits.
            NotStored: something would have to be run, where only what is stored may be given.
            Cancelled: between two batches.
        """
        progress = progress or Progress()
        loaded = cache(lambda: self._load(weights()))
        keys, vectors = self._look_up(digest, images, split, measures)
        unknown = _find_unknown(vectors, images)
        total, done = sum(len(wanted) for wanted in unknown.values()), 0
        if total and self._stored_only:
            raise NotStored("This has not been evaluated yet.")
        touched: set[str] = set()
        try:
            for batch in _batches(unknown, READ_THERE if current_device().accelerates else READ):
                progress.step(done, total, ", ".join(batch))
                found = self._measure_batch(loaded(), batch, split, measures)
                for task, part in batch.items():
                    for name, values in vectors[task].items():
                        values[part] = found[task][name]
                touched.update(batch)
                done += sum(len(part) for part in batch.values())
        finally:
            new = {k: vectors[task][name] for (task, name), k in keys.items() if task in touched}
            self.predictions.put(new)
        progress.step(total, total, "done")
        return {
            task: {name: values[images[task]] for name, values in vectors[task].items()}
            for task in images
        }

    def keep(self, digest: str, images: Images, split: Split, measured: Measurements) -> None:
        """Store what weights gave elsewhere, as :meth:`measure` does with what it ran.

        Args:
            digest: content digest of the weights.
            images: task to numbers of images.
            split: ``val`` or ``test``.
            measured: task to measure to values, aligned with `images`.
        """
        for task, values in measured.items():
            mine = {task: images[task]}
            keys, vectors = self._look_up(digest, mine, split, list(values))
            for name, given in values.items():
                vectors[task][name][images[task]] = given
            self.predictions.put({key: vectors[t][name] for (t, name), key in keys.items()})
            self.forward_images += len(images[task])

    def is_stored(
        self,
        digest: str,
        images: Images,
        split: Split = "val",
        measures: Collection[str] = (CLASSES,),
    ) -> bool:
        """Whether :meth:`measure` would run nothing."""
        _, vectors = self._look_up(digest, images, split, measures)
        return not any(map(len, _find_unknown(vectors, images).values()))

    def _look_up(
        self, digest: str, images: Images, split: Split, measures: Collection[str]
    ) -> tuple[dict[tuple[str, str], str], Measurements]:
        """Keys by task and measure, and what is stored: as far as the last image at least."""
        keys = {
            (task, name): self._output_key(digest, task, split, name)
            for task in images
            for name in measures
        }
        stored = self.predictions.get({k: self.kinds[name].dtype for (_, name), k in keys.items()})
        vectors: Measurements = {task: {} for task in images}
        for (task, name), key in keys.items():
            empty = empty_vector(int(images[task].max(initial=-1)) + 1, self.kinds[name].dtype)
            vectors[task][name] = fill_missing(stored[key], empty) if key in stored else empty
        return keys, vectors

    def _load(self, weights: Weights) -> Any:
        """Weights as they are run."""
        return self.network.load(dict(weights), DTYPES[self.precision])

    def _measure_batch(
        self, loaded: Any, images: Images, split: Split, measures: Collection[str]
    ) -> Measurements:
        """What weights, as they were loaded, give for some images."""
        outputs = self._run(loaded, images, split)
        return {
            task: {
                name: self._measure_part(name, outputs[task], task, split, part)
                for name in measures
            }
            for task, part in images.items()
        }

    def _measure_part(
        self, name: str, outputs: Outputs, task: str, split: Split, part: np.ndarray
    ) -> np.ndarray:
        measure = MEASURES[name]
        reference = outputs
        if measure.by_expert:
            reference = self._outputs_of_expert(task, split)[torch.from_numpy(part)]
        return measure.of(outputs, reference).numpy().astype(measure.dtype)

    def _outputs_of_expert(self, task: str, split: Split) -> Outputs:
        """What a task's expert gives for all its images, which is kept."""
        key = (task, split)
        if key not in self._expert_outputs:
            expert = self.suite.expert(task)
            weights = {name: expert.tensor(name) for name in expert}
            images = self.images([task], split)
            self._expert_outputs[key] = self._run(self._load(weights), images, split)[task]
        return self._expert_outputs[key]

    def _run(self, weights: Any, images: Images, split: Split) -> dict[str, Outputs]:
        """One pass over ascending images of some tasks together: few of many fill a batch too."""
        pixels = [self.pixels(task, split, part) for task, part in images.items()]
        alike = len({(part.shape[1:], part.is_cpu) for part in pixels}) == 1
        together = [torch.cat(pixels)] if alike and len(pixels) > 1 else pixels
        features = torch.cat([self.network.run(weights, part) for part in together]).float()
        outputs = {}
        sizes = [len(part) for part in images.values()]
        for task, mine in zip(images, features.split(sizes), strict=True):
            head = self.head(task)
            if mine.shape[-1] != head.width:
                raise SuiteError(self.misfit_message(task, f"features of width {mine.shape[-1]}"))
            logits = head.logits(mine, weights.device)
            outputs[task] = Outputs(weights.device.fetch(mine), logits)
            if not bool(torch.isfinite(outputs[task].logits).all()):
                raise SuiteError(
                    f"The model gives non-finite outputs on task {task!r}; choose a smaller scale."
                )
        self.forward_images += len(features)
        return outputs

    def unit_scores(
        self, measured: Measurements, images: Images, split: Split, limit: int | None
    ) -> dict[str, np.ndarray]:
        """The metric of each image, of which the mean is a task's: whether it is right (bool, N).

        Args:
            measured: the metric's measure, aligned with `images`.
            images: task to numbers of images.
            split: ``val`` or ``test``.
            limit: of the first so many images.

        Raises:
            SuiteError: images without labels, or labels that the head does not know.
        """
        return {
            task: measured[task][CLASSES] == self._checked_labels(task, numbers, split, limit)
            for task, numbers in images.items()
        }

    def _checked_labels(
        self, task: str, images: np.ndarray, split: Split, limit: int | None
    ) -> np.ndarray:
        labels = self.raw_inputs(task, split, limit).labels[images]
        if int(labels.min()) == UNLABELLED:
            raise SuiteError(
                f"The {SPLIT_NAMES[split]} {self.suite.inputs} of task {task!r} have no "
                f"labels, so no accuracy can be measured. Add {split}_labels to its data; "
                "rank and scale can be chosen without labels."
            )
        if int(labels.max()) >= len(self.head(task).weight):
            raise SuiteError(self.misfit_message(task, f"labels up to {int(labels.max())}"))
        return labels

    def unit_weights(
        self,
        task: str,  # noqa: ARG002 - of images all are alike
        split: Split,  # noqa: ARG002
        limit: int | None = None,  # noqa: ARG002
    ) -> np.ndarray | None:
        """By what each image's number counts in its task's mean (mean 1); None where all alike."""
        return None

    def frame(
        self,
        scores: Mapping[str, np.ndarray],
        split: Split,  # noqa: ARG002 - hits say all
        limit: int | None = None,  # noqa: ARG002
    ) -> pd.DataFrame:
        """The metric of each task with its interval, from :meth:`unit_scores`."""
        return accuracy_frame(scores)

    def misfit_message(self, task: str, what: str) -> str:
        """The message that a task's head does not fit."""
        head = self.head(task)
        return (
            f"The head of task {task!r} ({len(head.weight)} classes of width "
            f"{head.width}) does not fit {what}."
        )

    def pixels(self, task: str, split: Split, images: np.ndarray) -> Tensor:
        """Normalised images of these numbers (at least one), on the device: float32, N x 3 x H x W.

        Raises:
            MergeScopeError: missing or malformed data.
        """
        first, last = int(images[0]), int(images.max())
        # What was read up to a limit is enough where it reaches far enough.
        held = [key for key, kept in list(self._raw.items()) if len(kept.labels) > last]
        limit = next((most for *place, most in held if place == [task, split]), None)
        raw = self.raw_inputs(task, split, limit)
        if not PREPARED.fits(_prepared_bytes(raw), current_device()):
            return self._normalise(raw.images[images], task)
        source = self.inputs(task, split, limit)[0]
        if np.array_equal(images, np.arange(first, last + 1)):
            return source[first : last + 1]  # without a copy
        return source[torch.from_numpy(images)]

    def _output_key(self, digest: str, task: str, split: Split, name: str) -> str:
        if self.kinds[name].by_expert:
            name = f"{name} {self.suite.expert(task).digest}"
        if self.precision != "float32":
            name = f"{name} in {self.precision}"
        return output_key(digest, self.data_digest(task), split, name)

    def data_digest(self, task: str) -> str:
        """Digest of a task's data, head and architecture (remembered)."""
        if task not in self._digests:
            self._digests[task] = self.suite.data_digest(task)
        return self._digests[task]


def _prepared_bytes(raw: TaskInputs) -> int:
    return int(raw.images.size) * torch.float32.itemsize


def _find_unknown(vectors: Measurements, images: Images) -> dict[str, np.ndarray]:
    """Images, ascending, of which a vector of their task does not know the value."""
    return {
        task: np.unique(
            wanted[np.any([is_missing(v[wanted]) for v in vectors[task].values()], axis=0)]
        )
        for task, wanted in images.items()
    }


def _batches(images: Images, size: int) -> Iterator[dict[str, np.ndarray]]:
    """Images in their order, `size` at a time across tasks."""
    batch: dict[str, np.ndarray] = {}
    room = size
    for task, numbers in images.items():
        rest = numbers
        while len(rest):
            batch[task], rest = rest[:room], rest[room:]
            room -= len(batch[task])
            if room == 0:
                yield batch
                batch, room = {}, size
    if batch:
        yield batch

"""What language models say of texts and choices: run for those that are asked for, and kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.cross_entropy import cross_entropy_frame
from analysis.language.inputs import LanguageInputs, Scored, read_language
from analysis.language.network import LanguageModel, LanguageNetwork
from analysis.language.tokenizers import refuse_other_tokenizers
from analysis.metrics import CROSS_ENTROPY
from analysis.networks.stateless import Outputs
from analysis.outputs.inputs import Split
from analysis.outputs.measures import MEASURES, Kind
from analysis.outputs.prediction_store import PredictionStore
from analysis.outputs.suite_outputs import (
    Images,
    Measurements,
    Precision,
    SuiteOutputs,
    Weights,
)
from merge_core.devices import ran_out_of_memory
from merge_core.errors import SuiteError
from merge_core.executors.base import usual_workers
from merge_core.executors.local import Serial, Threads
from merge_core.progress import Progress
from merge_core.suites.suite import Suite

# Numbers of a batch's logits, of all threads together (4 bytes each).
LOGITS = 1 << 26
TOKENS = 4096  # of a batch
# Experts that stay loaded, to compare merges with them.
KEPT_EXPERT_BYTES = 1 << 30
NO_CHOICE = -1e9  # nats: less likely than any choice, and no infinity


@dataclass(frozen=True)
class PerToken:
    """A mean over the tokens of a text (see :class:`analysis.outputs.measures.Kind`)."""

    by_expert: bool
    dtype: Literal["float32"] = "float32"


def open_outputs(
    suite: Suite,
    predictions: PredictionStore | None = None,
    stored_only: bool = False,
    precision: Precision = "float32",
) -> SuiteOutputs:
    """What runs the models of a suite: classifiers, or language models on texts or questions.

    Raises:
        SuiteError: the suite cannot be evaluated, or not in this precision.
    """
    if not suite.speaks:
        return SuiteOutputs(suite, predictions, stored_only, precision)
    if precision != "float32":
        raise SuiteError(
            f"Language models are evaluated in float32; leave {precision} out for this suite."
        )
    kind = TextOutputs if suite.measured_by == "cross_entropy" else ChoiceOutputs
    return kind(suite, predictions, stored_only)


class LanguageOutputs(SuiteOutputs):
    """Runs the language models of one suite (see :class:`SuiteOutputs`).

    Raises:
        SuiteError: the suite cannot be evaluated, or an expert's tokenizer is not the base's.
    """

    def __init__(
        self, suite: Suite, predictions: PredictionStore | None = None, stored_only: bool = False
    ) -> None:
        super().__init__(suite, predictions, stored_only)
        refuse_other_tokenizers(suite)
        self._texts: dict[tuple[str, Split], LanguageInputs] = {}
        self._experts: OrderedDict[str, LanguageModel] = OrderedDict()

    @cached_property
    def network(self) -> Any:
        """The suite's network, without weights.

        Raises:
            MergeScopeError: it cannot be built.
        """
        return LanguageNetwork(self.suite)

    def raw_inputs(
        self,
        task: str,
        split: Split,
        limit: int | None = None,
        progress: Progress | None = None,  # noqa: ARG002 - nothing is decoded
    ) -> Any:
        """A task's texts or questions as tokens.

        Raises:
            MergeScopeError: missing or malformed data.
        """
        if (task, split) not in self._texts:
            data = self.suite.data(task)
            assert data is not None
            what = f"data of task {task!r}"
            self._texts[task, split] = read_language(data, split, self.suite.file, what)
        return self._texts[task, split].first(limit)

    def _load(self, weights: Weights) -> LanguageModel:
        pairs = weights.items() if isinstance(weights, Mapping) else weights
        model: LanguageModel = self.network.load(pairs)
        return model

    def _expert(self, task: str) -> LanguageModel:
        """A task's expert; those used last stay loaded, as far as there is room."""
        if task not in self._experts:
            expert = self.suite.expert(task)
            room = KEPT_EXPERT_BYTES - 4 * sum(expert.info(name).numel for name in expert)
            while self._experts and sum(each.nbytes for each in self._experts.values()) > room:
                self._experts.popitem(last=False)
            self._experts[task] = self._load((name, expert.tensor(name)) for name in expert)
        self._experts.move_to_end(task)
        return self._experts[task]

    def _each(
        self, sequences: Sequence[Scored], model: LanguageModel, run: Any
    ) -> Iterator[tuple[list[int], Any]]:
        """Batches of similar length, by their places among the sequences, and what `run` gives."""
        batches = list(_batches(sequences, model.vocabulary))
        work = [[sequences[place] for place in batch] for batch in batches]
        side_by_side = len(batches) > 1 and not model.device.accelerates
        where = Threads() if side_by_side else Serial()
        yield from zip(batches, where.map(run, work), strict=True)


class TextOutputs(LanguageOutputs):
    """Language models on texts: cross-entropy in nats per token."""

    metric = CROSS_ENTROPY
    kinds: Mapping[str, Kind] = {
        "cross_entropy": PerToken(by_expert=False),
        "entropy": PerToken(by_expert=False),
        "divergence": PerToken(by_expert=True),
    }

    def unit_scores(
        self, measured: Measurements, images: Images, split: Split, limit: int | None
    ) -> dict[str, np.ndarray]:
        """Every text's contribution to its task's cross-entropy (float64, N), in nats per token.

        Its own nats per token times :meth:`unit_weights`: the mean is that over all tokens.
        """
        return {
            task: measured[task]["cross_entropy"].astype(float)
            * self.unit_weights(task, split, limit)[numbers]
            for task, numbers in images.items()
        }

    def unit_weights(self, task: str, split: Split, limit: int | None = None) -> np.ndarray:
        """Tokens of each text as a share of the mean text's."""
        tokens = self.raw_inputs(task, split, limit).tokens
        return np.asarray(tokens / tokens.mean())

    def frame(
        self, scores: Mapping[str, np.ndarray], split: Split, limit: int | None = None
    ) -> pd.DataFrame:
        """See :func:`analysis.cross_entropy.cross_entropy_frame`."""
        tokens = {task: self.raw_inputs(task, split, limit).tokens for task in scores}
        return cross_entropy_frame(scores, tokens)

    def _measure_batch(
        self, loaded: Any, images: Images, split: Split, measures: Collection[str]
    ) -> Measurements:
        found: Measurements = {}
        for task, units in images.items():
            found[task] = self._measure_task(loaded, task, units, split, measures)
            if sum(each.nbytes for each in self._experts.values()) > KEPT_EXPERT_BYTES:
                self._experts.clear()  # no third model beside the next two
            self.forward_images += len(units)
        return found

    def _measure_task(
        self,
        loaded: LanguageModel,
        task: str,
        units: np.ndarray,
        split: Split,
        measures: Collection[str],
    ) -> dict[str, np.ndarray]:
        inputs = self.raw_inputs(task, split)
        sequences = list(inputs.of(units))
        expert = self._expert(task) if "divergence" in measures else None
        run = partial(_say, loaded, expert, tuple(measures))
        sums = np.zeros((len(inputs.labels), len(measures)))
        for batch, values in self._each(sequences, loaded, run):
            for place, value in zip(batch, values, strict=True):
                sums[sequences[place].unit] += value
        means = sums[units] / inputs.tokens[units, None]
        _refuse_non_finite(means, task)
        return {
            name: means[:, column].astype(self.kinds[name].dtype)
            for column, name in enumerate(measures)
        }


class ChoiceOutputs(LanguageOutputs):
    """Language models on questions: the likeliest of the choices is the answer."""

    kinds: Mapping[str, Kind] = {
        name: measure for name, measure in MEASURES.items() if name not in ("l2", "cosine")
    }

    def _run(self, weights: Any, images: Images, split: Split) -> dict[str, Outputs]:
        outputs = {}
        for task, units in images.items():
            inputs = self.raw_inputs(task, split)
            sequences = list(inputs.of(units))
            most = 1 + max(each.choice for each in inputs.sequences)
            logits = torch.full((len(inputs.labels), most), NO_CHOICE)
            run = partial(_say, weights, None, ("cross_entropy",))
            for batch, values in self._each(sequences, weights, run):
                for place, value in zip(batch, values, strict=True):
                    each = sequences[place]
                    share = each.scored if inputs.by_token else 1
                    logits[each.unit, each.choice] = -float(value[0]) / share
            mine = logits[torch.from_numpy(units)]
            _refuse_non_finite(mine.numpy(), task)
            outputs[task] = Outputs(torch.zeros(len(units), 0), mine)
            self.forward_images += len(units)
        return outputs

    def _checked_labels(
        self, task: str, images: np.ndarray, split: Split, limit: int | None
    ) -> np.ndarray:
        labels: np.ndarray = self.raw_inputs(task, split, limit).labels[images]
        return labels


def _refuse_non_finite(values: np.ndarray, task: str) -> None:
    if not np.isfinite(values).all():
        raise SuiteError(
            f"The model gives non-finite outputs on task {task!r}; choose a smaller scale."
        )


def _batches(sequences: Sequence[Scored], vocabulary: int) -> Iterator[list[int]]:
    """Places of sequences, the longest first, as many at once as their logits have room."""
    room = max(min(TOKENS, LOGITS // usual_workers() // max(vocabulary, 1)), 1)
    order = sorted(range(len(sequences)), key=lambda place: -len(sequences[place].tokens))
    while order:
        count = max(room // len(sequences[order[0]].tokens), 1)
        yield order[:count]
        order = order[count:]


def _say(
    model: LanguageModel,
    expert: LanguageModel | None,
    measures: Sequence[str],
    sequences: Sequence[Scored],
) -> np.ndarray:
    """What :func:`_say_at_once` gives: half of the sequences at a time where memory is too short.

    One that does not fit into an accelerator alone is run on the CPU.
    """
    try:
        return _say_at_once(model, expert, measures, sequences)
    except RuntimeError as error:
        if not (model.device.accelerates and ran_out_of_memory(error)):
            raise
    model.device.release()
    if len(sequences) == 1:
        there = None if expert is None else expert.on_cpu()
        return _say_at_once(model.on_cpu(), there, measures, sequences)
    half = len(sequences) // 2
    parts = (sequences[:half], sequences[half:])
    return np.concatenate([_say(model, expert, measures, part) for part in parts])


def _say_at_once(
    model: LanguageModel,
    expert: LanguageModel | None,
    measures: Sequence[str],
    sequences: Sequence[Scored],
) -> np.ndarray:
    """Sums over the scored tokens of each sequence, float64, sequences x measures.

    Of −log p of the token that stands there (`cross_entropy`), of the entropy of p (`entropy`), and
    of KL(q ‖ p) with the expert's q (`divergence`), all in nats.
    """
    longest = max(len(each.tokens) for each in sequences)
    tokens = torch.full((len(sequences), longest), -1, dtype=torch.int64)
    for row, each in zip(tokens, sequences, strict=True):
        row[: len(each.tokens)] = torch.from_numpy(each.tokens.astype(np.int64))
    logs = model.logits(tokens)[:, :-1]
    reference = None
    if expert is not None:  # which may lie elsewhere
        reference = model.device.send(expert.device.fetch(expert.logits(tokens)))[:, :-1]
    sums = np.zeros((len(sequences), len(measures)))
    for row, each in enumerate(sequences):
        scored = slice(each.start - 1, len(each.tokens) - 1)
        own = logs[row, scored].log_softmax(dim=-1)
        wanted = model.device.send(tokens[row, each.start : len(each.tokens), None])
        for column, name in enumerate(measures):
            sums[row, column] = _sum(name, own, wanted, reference, (row, scored))
    return sums


def _sum(
    name: str, own: Tensor, wanted: Tensor, reference: Tensor | None, place: tuple[int, slice]
) -> float:
    """One measure of one sequence, from the logarithms of p (L x vocabulary)."""
    if name == "cross_entropy":
        return -float(own.gather(1, wanted).double().sum())
    if name == "entropy":
        return -float((own.exp() * own).double().sum())
    assert reference is not None
    theirs = reference[place].log_softmax(dim=-1)
    known = min(theirs.shape[-1], own.shape[-1])  # rows that only one of the two has
    terms = theirs.exp()[:, :known] * (theirs[:, :known] - own[:, :known])
    return float(terms.double().sum())

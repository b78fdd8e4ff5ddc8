"""Predictions of models whose weights are multiplied by m.

All in evaluation mode. At m = 1 members' cached outputs are used; where scaling by m is exactly a
power of m in the logits (:func:`analysis.magnitude.homogeneity.exact_degree`), so are they at every
m, and nothing is run. Elsewhere a forward pass in float32 is made where, on the first
:data:`PROBE_IMAGES` images, its logits agree with float64's to :data:`PROBE_TOLERANCE` and predict
the same; else, and where a logit is not finite, in float64.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from analysis.averaging.soups import (
    Statistics,
    mean_norms,
    reestimate_batchnorm,
    restore_norms,
    uniform_soup,
)
from analysis.averaging.soups import predict_classes as predicted_classes
from analysis.magnitude.calibration import MEASURES, excess_over_uniform, measures
from analysis.magnitude.homogeneity import (
    WHAT,
    Law,
    PowerLaw,
    What,
    exact_degree,
    layer_names,
    power_law,
    scaled_names,
)
from analysis.networks.stateless import State
from analysis.outputs.pool_outputs import PoolEvaluator, PoolSplit
from merge_core.errors import PoolError
from merge_core.executors.base import one_thread
from merge_core.executors.local import Threads
from merge_core.progress import Progress

Who = Literal["all", "first", "last", "all_but_last"]
WHO: dict[Who, str] = {
    "all": "all members",
    "first": "the first member",
    "last": "the last member",
    "all_but_last": "all but the last member",
}
SUBJECTS: dict[str, str] = {
    "individuals": "individuals (mean of the scaled)",
    "uniform_soup": "uniform soup",
    "norm_restored": "norm-restored soup",
    "logit_ensemble": "logit ensemble",
    "probability_ensemble": "probability ensemble",
}
PROBE_IMAGES = 16
PROBE_TOLERANCE = 1e-3


def scaled_state(
    weights: State, m: float, what: What, module: nn.Module, layer: str | None = None
) -> dict[str, Tensor]:
    """θ → m·θ for a part of a state.

    Args:
        weights: of a model.
        m: the factor.
        what: which part, see :func:`scaled_names`.
        module: the network of these weights, which knows parameters from buffers.
        layer: for what = "layer".

    Returns:
        All tensors; the scaled ones float64, since their magnitude may leave float32's range.

    Raises:
        PoolError: no layer of that name.

    Example:
        >>> weights = {"weight": torch.ones(1, 2), "bias": torch.ones(1)}
        >>> scaled = scaled_state(weights, 3.0, "weights", nn.Linear(2, 1))
        >>> scaled["weight"].tolist(), scaled["bias"].tolist()
        ([[3.0, 3.0]], [1.0])
    """
    return _multiply(weights, m, scaled_names(module, what, layer))


def _multiply(weights: State, m: float, names: frozenset[str]) -> dict[str, Tensor]:
    return {name: value.double() * m if name in names else value for name, value in weights.items()}


def choose_scaled(members: Sequence[int], who: Who) -> tuple[int, ...]:
    """The members that are scaled.

    Raises:
        PoolError: none would be left, or no members were given.

    Example:
        >>> choose_scaled([4, 5, 6], "all_but_last")
        (4, 5)
    """
    slices = {"all": slice(None), "first": slice(1), "last": slice(-1, None)}
    scaled = tuple(members)[slices.get(who, slice(-1))]
    if not scaled:
        raise PoolError("No member would be scaled. Choose more members, or scale all of them.")
    return scaled


@dataclass(frozen=True)
class _Subjects:
    """The subjects of a sweep, as functions that give logits (float64, N x C) at any m.

    Attributes:
        member: those of a scaled member, by number and m.
        soups: those of each soup, by m.
    """

    member: Callable[[int, float], Tensor]
    soups: Mapping[str, Callable[[float], Tensor]]


class _Scaling:
    """One choice of members and tensors, and the logits of everything that it scales."""

    def __init__(
        self,
        evaluator: PoolEvaluator,
        members: Sequence[int],
        who: Who,
        names: frozenset[str],
        split: PoolSplit,
        statistics: Statistics,
    ) -> None:
        self.evaluator = evaluator
        self.members = evaluator.pool.select(members)
        self.scaled = choose_scaled(self.members, who)
        self.others = tuple(i for i in self.members if i not in self.scaled)
        self.names = names
        self.split: PoolSplit = split
        self.statistics: Statistics = statistics
        self.degree = exact_degree(evaluator, names)
        self.images = evaluator.images(split)
        self._double: dict[float, bool] = {}
        self._lock = threading.Lock()

    def subjects(self) -> _Subjects:
        """All that can be measured."""
        soup = uniform_soup(self.evaluator, self.members)
        if self.others:
            return _Subjects(self.member, {"uniform_soup": self._mixed_soup(soup)})
        restored = restore_norms(soup, mean_norms(self.evaluator, self.members))
        return _Subjects(
            self.member,
            {"uniform_soup": self._scaled_soup(soup), "norm_restored": self._scaled_soup(restored)},
        )

    def member(self, number: int, m: float) -> Tensor:
        """Logits of a scaled member."""
        unscaled = self.evaluator.member(number, self.split).logits.double()
        if m == 1:
            return unscaled
        if self.degree is not None:
            return PowerLaw(unscaled, self.degree).logits(m)
        return self._run(_multiply(self.evaluator.weights(number), m, self.names), m)

    def arithmetic(self, m: float) -> str:
        """How the scaled members' logits are computed: "exact", "float32" or "float64"."""
        if m == 1 or self.degree is not None:
            return "exact"
        return "float64" if self._needs_double(m) else "float32"

    def _scaled_soup(self, weights: State) -> Callable[[float], Tensor]:
        """A soup of members that are all scaled alike: the soup itself, scaled."""
        unscaled = self._soup(weights, 1.0)

        def logits(m: float) -> Tensor:
            if m == 1:
                return unscaled
            if self.degree is not None:
                return PowerLaw(unscaled, self.degree).logits(m)
            return self._soup(_multiply(weights, m, self.names), m)

        return logits

    def _mixed_soup(self, soup: State) -> Callable[[float], Tensor]:
        """A soup of which only some members are scaled: m times their part, and the rest."""
        share = len(self.scaled) / len(self.members)
        part, rest = (uniform_soup(self.evaluator, some) for some in (self.scaled, self.others))

        def logits(m: float) -> Tensor:
            mixed = {
                name: share * m * part[name].double() + (1 - share) * rest[name].double()
                for name in self.names
            }
            return self._soup({**soup, **mixed}, m)

        return logits

    def _soup(self, weights: State, m: float) -> Tensor:
        if self.statistics == "reestimate":
            weights = reestimate_batchnorm(self.evaluator, weights)
        return self._run(weights, m)

    def _run(self, weights: State, m: float) -> Tensor:
        """Logits of any weights: in float64 where the probe asks for it, or if not finite."""
        if m != 1 and self._needs_double(m):
            return self._logits(weights, self.images, torch.float64)
        logits = self._logits(weights, self.images)
        lost = ~logits.isfinite().all(dim=1)
        if bool(lost.any()):
            logits[lost] = self._logits(weights, self.images[lost], torch.float64)
        return logits

    def _logits(self, weights: State, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        self.evaluator.forward_images += len(images)
        return self.evaluator.network.outputs(weights, images, dtype).logits.double()

    def _needs_double(self, m: float) -> bool:
        """Whether float32 would lose the logits of the first scaled member."""
        with self._lock:
            if m not in self._double:
                weights = _multiply(self.evaluator.weights(self.scaled[0]), m, self.names)
                images = self.images[:PROBE_IMAGES]
                single, exact = (
                    self._logits(weights, images, dtype) for dtype in (torch.float32, torch.float64)
                )
                close = bool((single - exact).norm() <= PROBE_TOLERANCE * exact.norm())
                same = torch.equal(single.argmax(dim=1), exact.argmax(dim=1))
                self._double[m] = not (close and same)
            return self._double[m]


@dataclass(frozen=True)
class _Scores:
    """A subject's logits, or its probabilities minus 1/C where it has none."""

    logits: Tensor | None
    excess: Tensor

    @property
    def predictions(self) -> np.ndarray:
        """int64, N."""
        return predicted_classes(self.excess if self.logits is None else self.logits)


def _units(scaling: _Scaling, subjects: _Subjects, m: float) -> list[Callable[[], Tensor]]:
    """What gives the logits of the scaled members, then of the soups."""
    return [
        *(partial(subjects.member, number, m) for number in scaling.scaled),
        *(partial(soup, m) for soup in subjects.soups.values()),
    ]


def _scores(
    scaling: _Scaling, subjects: _Subjects, results: Iterator[_Scores]
) -> Iterator[tuple[str, str, _Scores]]:
    """Subject, what was just computed, and scores: one by one members, soups, then ensembles.

    Args:
        results: of the units of one m.
    """
    members = []
    for number in scaling.others:
        logits = scaling.evaluator.member(number, scaling.split).logits.double()
        members.append(_Scores(logits, excess_over_uniform(logits)))
    for number in scaling.scaled:
        members.append(next(results))
        yield "individuals", f"member {number}", members[-1]
    for name in subjects.soups:
        yield name, SUBJECTS[name], next(results)
    ensemble = torch.stack([one.logits for one in members if one.logits is not None]).mean(dim=0)
    yield "logit_ensemble", "ensembles", _Scores(ensemble, excess_over_uniform(ensemble))
    mean_excess = torch.stack([one.excess for one in members]).mean(dim=0)
    yield "probability_ensemble", "ensembles", _Scores(None, mean_excess)


def _score_logits(logits: Callable[[], Tensor]) -> _Scores:
    value = logits()
    return _Scores(value, excess_over_uniform(value))


def _sweep(
    scaling: _Scaling,
    measured: _Subjects,
    subjects: _Subjects,
    magnitudes: Sequence[float],
    progress: Progress | None,
) -> pd.DataFrame:
    """Measures of every subject at every m, against the predictions measured at m = 1."""
    labels = scaling.evaluator.labels(scaling.split)
    reference = {
        (subject, label): scores.predictions
        for subject, label, scores in _scores(
            scaling, measured, map(_score_logits, _units(scaling, measured, 1.0))
        )
    }
    units = len(scaling.scaled) + len(subjects.soups) + 2
    rows = []
    results = Threads().map(
        _score_logits, (unit for m in magnitudes for unit in _units(scaling, subjects, m))
    )
    for index, m in enumerate(magnitudes):
        for unit, (subject, label, scores) in enumerate(
            _scores(scaling, subjects, results), start=1
        ):
            values = measures(
                labels,
                logits=scores.logits,
                excess=scores.excess,
                reference=reference[subject, label],
            )
            rows.append({"magnitude": float(m), "subject": subject, **values})
            if progress is not None:
                done = index * units + unit
                progress.step(done, len(magnitudes) * units, f"m = {m:.3g}, {label}")
    frame = pd.DataFrame(rows, columns=["magnitude", "subject", *MEASURES])
    # The individuals' rows become their mean; one without any finite image is left out of it.
    return frame.groupby(["magnitude", "subject"], sort=False, as_index=False).mean()


def _check(magnitudes: Sequence[float]) -> None:
    if len(magnitudes) == 0 or not all(0 < m < math.inf for m in magnitudes):
        raise PoolError("Magnitudes must be positive numbers. Correct them.")


@one_thread()
def magnitude_sweep(
    evaluator: PoolEvaluator,
    members: Sequence[int],
    magnitudes: Sequence[float],
    who: Who = "all",
    what: What = "parameters",
    layer: str | None = None,
    split: PoolSplit = "test",
    statistics: Statistics = "average",
    progress: Progress | None = None,
) -> pd.DataFrame:
    """What scaling by m does to individuals, soups and ensembles.

    Args:
        evaluator: of the pool.
        members: member numbers.
        magnitudes: values of m, positive.
        who: whose tensors are scaled; the other members stay as they are.
        what: which tensors, see :func:`scaled_names`.
        layer: for what = "layer".
        split: which images.
        statistics: of the soups' BatchNorm: averaged over the (scaled) members, or re-estimated
            with the scaled weights at every m.
        progress: told after each subject at each m.

    Returns:
        One row per magnitude and subject (see :data:`SUBJECTS`): magnitude, subject, the
        measures of :func:`analysis.magnitude.calibration.measures` (stability against the same
        subject at m = 1; individuals: the mean over the scaled members), arithmetic ("exact":
        cached, or an exact power of m; "float32" or "float64": by a forward pass, in float64 too
        where float32 was not finite). The norm-restored soup is there where all members are scaled.

    Raises:
        PoolError: no members, no layer of that name, magnitudes that are not positive.
        MergeScopeError: unreadable or unfit weights or data.
        Cancelled: by `progress`.

    Source: Rethinking Weight-Averaged Model-merging, arXiv:2411.09263, section 5.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> evaluator = PoolEvaluator(load_pool("digits-mlp-shared"))
        >>> frame = magnitude_sweep(evaluator, [0, 1], magnitudes=[1.0, 10.0])
        >>> soup = frame[frame["subject"] == "uniform_soup"].set_index("magnitude")
        >>> float(soup["stability"][10.0]), bool(soup["confidence"][10.0] > soup["confidence"][1.0])
        (1.0, True)
    """
    _check(magnitudes)
    names = scaled_names(evaluator.network.module, what, layer)
    scaling = _Scaling(evaluator, members, who, names, split, statistics)
    subjects = scaling.subjects()
    frame = _sweep(scaling, subjects, subjects, magnitudes, progress)
    return frame.assign(arithmetic=frame["magnitude"].map(scaling.arithmetic))


def predicted_sweep(
    evaluator: PoolEvaluator,
    members: Sequence[int],
    magnitudes: Sequence[float],
    who: Who = "all",
    what: What = "parameters",
    layer: str | None = None,
    split: PoolSplit = "test",
    statistics: Statistics = "average",
    law: Law = "homogeneous",
) -> pd.DataFrame:
    """What :func:`magnitude_sweep` would give if logits followed a power law of m.

    Args:
        evaluator: of the pool.
        members: as of the sweep, like `magnitudes`, `who`, `what`, `layer`, `split`,
            `statistics`.
        law: see :func:`analysis.magnitude.homogeneity.power_law`.

    Returns:
        One row per magnitude and subject, the columns of the sweep but for arithmetic, and law,
        depth (the power of m). Stability is against the predictions measured at m = 1. Soups are
        there where all members are scaled: else a soup is no scaled network.

    Raises:
        PoolError: as the sweep, or a law that does not hold for this choice.
        MergeScopeError: unreadable or unfit weights or data.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> evaluator = PoolEvaluator(load_pool("digits-mlp-shared"))
        >>> predicted_sweep(evaluator, [0, 1], magnitudes=[2.0])["depth"].unique().tolist()
        [3]
    """
    _check(magnitudes)
    names = scaled_names(evaluator.network.module, what, layer)
    scaling = _Scaling(evaluator, members, who, names, split, statistics)
    measured = scaling.subjects()

    def law_of(weights: State, unscaled: Tensor) -> PowerLaw:
        return power_law(evaluator, weights, unscaled, names, law, split)

    of_members = {
        i: law_of(evaluator.weights(i), evaluator.member(i, split).logits) for i in scaling.scaled
    }
    soups = {}
    if not scaling.others:
        soup = uniform_soup(evaluator, scaling.members)
        states = {
            "uniform_soup": soup,
            "norm_restored": restore_norms(soup, mean_norms(evaluator, scaling.members)),
        }
        soups = {
            name: law_of(state, measured.soups[name](1.0)).logits for name, state in states.items()
        }
    subjects = _Subjects(lambda number, m: of_members[number].logits(m), soups)
    frame = _sweep(scaling, measured, subjects, magnitudes, None)
    depth = next(iter(of_members.values())).degree
    return frame.assign(law=law, depth=depth)


__all__ = [
    "SUBJECTS",
    "WHAT",
    "WHO",
    "What",
    "Who",
    "choose_scaled",
    "layer_names",
    "magnitude_sweep",
    "predicted_sweep",
    "scaled_names",
    "scaled_state",
]

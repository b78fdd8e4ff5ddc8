"""What is asked of a pool's members: soups and ensembles, sizes, scaling and noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import pandas as pd

from analysis.averaging.ensembles import accuracy_over_members, agreement
from analysis.averaging.gaps import covariance_frame, covariance_summary, gap_to_ensemble
from analysis.averaging.soups import Statistics, greedy_soup
from analysis.frames.asking import ask, ask_if_known
from analysis.frames.entries import Frames, Question, Values, frame_question
from analysis.magnitude.homogeneity import Law, What
from analysis.magnitude.norms import histogram_frame, identity_frame, norms_frame
from analysis.magnitude.robustness import Corruption, corruption_sweep, weight_noise_sweep
from analysis.magnitude.sweep import Who, magnitude_sweep, predicted_sweep
from analysis.outputs.inputs import Split
from analysis.outputs.pool_outputs import PoolEvaluator
from analysis.patterns.templates import decay_frame, training_frame
from merge_core.errors import PoolError
from merge_core.files import digest_of, file_digest
from merge_core.progress import Progress
from merge_core.suites.pool import Pool

RULES = frame_question("pool.rules", 1, "the accuracy of every rule")
AGREEMENT = frame_question("pool.agreement", 1, "how often two models predict alike")
GREEDY = frame_question("pool.greedy", 1, "the greedy soup")
COVARIANCE = frame_question("pool.covariance", 1, "the covariance term")
COVARIANCE_SUMMARY = frame_question("pool.covariance_summary", 1, "the covariance term's size")
GAP = frame_question("pool.gap", 1, "soup against ensemble")
SWEEP = frame_question("pool.sweep", 1, "the sweep over m")
PREDICTED = frame_question("pool.predicted", 1, "the sweep that a law predicts")
NOISE = frame_question("pool.noise", 1, "noise on the weights")
CORRUPTED = frame_question("pool.corrupted", 1, "corrupted images")
IDENTITY = frame_question("pool.identity", 1, "the identity of norms")
NORMS = frame_question("pool.norms", 1, "the norms of each parameter")
HISTOGRAM = frame_question("pool.histogram", 1, "the entries of a parameter")
OVER_DECAY = frame_question("pool.over_decay", 1, "templates over weight decay")
OVER_TRAINING = frame_question("pool.over_training", 1, "templates over training")


def pool_inputs(pool: Pool) -> str:
    """Digest (hex) of all of a pool that frames depend on: its description, and all its files.

    Raises:
        PoolError, CheckpointError: a file is missing or cannot be read.

    Example:
        >>> from merge_core.suites.pool import bundled_pools, load_pool
        >>> len(pool_inputs(load_pool(bundled_pools()["digits-linear"])))
        64
    """
    for number in range(len(pool)):
        pool.member(number)  # says which of them is missing
    try:
        files = [file_digest(path) for path in pool.files]
    except OSError as error:
        raise PoolError(
            f"{error.filename}: {error.strerror}. Correct the path in {pool.path}."
        ) from error
    return digest_of("pool-1", pool.spec.model_dump_json(), *files)


class PoolFrames:
    """Frames about a pool's chosen members, read where they are kept.

    Args:
        pool: the pool.
        members: chosen members, from 0, in the order in which they are added.
        frames: where frames are kept.
        evaluator: gives the evaluation, for what has to be computed.
    """

    def __init__(
        self,
        pool: Pool,
        members: Sequence[int],
        frames: Frames,
        evaluator: Callable[[], PoolEvaluator],
    ) -> None:
        self.pool = pool
        self.members = tuple(members)
        self._frames = frames
        self._evaluator = evaluator

    @cached_property
    def inputs(self) -> str:
        """Digest of what all of these frames depend on, but for which members are chosen."""
        return pool_inputs(self.pool)

    def rules(self, split: Split, statistics: Statistics) -> pd.DataFrame:
        """See :func:`analysis.averaging.ensembles.accuracy_over_members`."""
        named = {"split": split, "statistics": statistics}
        return self._ask(
            RULES, named, lambda e: accuracy_over_members(e, self.members, split, statistics)
        )

    def agreement(self, split: Split, statistics: Statistics) -> pd.DataFrame:
        """See :func:`analysis.averaging.ensembles.agreement`."""
        named = {"split": split, "statistics": statistics}
        return self._ask(AGREEMENT, named, lambda e: agreement(e, self.members, split, statistics))

    def greedy(self, statistics: Statistics) -> pd.DataFrame:
        """The trace of :func:`analysis.averaging.soups.greedy_soup`."""
        named = {"statistics": statistics}
        return self._ask(GREEDY, named, lambda e: greedy_soup(e, self.members, statistics)[1])

    def covariance(self, split: Split) -> pd.DataFrame:
        """See :func:`analysis.averaging.gaps.covariance_frame`."""
        named = {"split": split}
        return self._ask(COVARIANCE, named, lambda e: covariance_frame(e, self.members, split))

    def covariance_summary(self, split: Split) -> pd.DataFrame:
        """See :func:`analysis.averaging.gaps.covariance_summary`."""
        named = {"split": split}
        return self._ask(
            COVARIANCE_SUMMARY, named, lambda e: covariance_summary(e, self.members, split)
        )

    def gap(self, split: Split, statistics: Statistics) -> pd.DataFrame:
        """See :func:`analysis.averaging.gaps.gap_to_ensemble`."""
        named = {"split": split, "statistics": statistics}
        return self._ask(GAP, named, lambda e: gap_to_ensemble(e, self.members, split, statistics))

    def sweep_if_known(
        self, magnitudes: Sequence[float], who: Who, what: What, layer: str | None
    ) -> pd.DataFrame | None:
        """The sweep over m, where it was made before."""
        named = _of_sweep(magnitudes, who, what, layer)
        return ask_if_known(self._frames, SWEEP, self.inputs, self._with_members(named), _unknown)

    def sweep(
        self,
        magnitudes: Sequence[float],
        who: Who,
        what: What,
        layer: str | None,
        progress: Progress | None = None,
    ) -> pd.DataFrame:
        """See :func:`analysis.magnitude.sweep.magnitude_sweep`."""
        return self._ask(
            SWEEP,
            _of_sweep(magnitudes, who, what, layer),
            lambda e: magnitude_sweep(
                e, self.members, magnitudes, who, what, layer, progress=progress
            ),
        )

    def predicted(
        self, magnitudes: Sequence[float], who: Who, what: What, layer: str | None, law: Law
    ) -> pd.DataFrame:
        """See :func:`analysis.magnitude.sweep.predicted_sweep`."""
        return self._ask(
            PREDICTED,
            {**_of_sweep(magnitudes, who, what, layer), "law": law},
            lambda e: predicted_sweep(e, self.members, magnitudes, who, what, layer, law=law),
        )

    def noise_if_known(self, sigmas: Sequence[float], relative: bool) -> pd.DataFrame | None:
        """Noise on the weights, where it was measured before."""
        named = self._with_members({"sigmas": list(sigmas), "relative": relative})
        return ask_if_known(self._frames, NOISE, self.inputs, named, _unknown)

    def noise(
        self, sigmas: Sequence[float], relative: bool, progress: Progress | None = None
    ) -> pd.DataFrame:
        """See :func:`analysis.magnitude.robustness.weight_noise_sweep`."""
        return self._ask(
            NOISE,
            {"sigmas": list(sigmas), "relative": relative},
            lambda e: weight_noise_sweep(
                e, self.members, sigmas, relative=relative, progress=progress
            ),
        )

    def corrupted_if_known(self, corruption: Corruption) -> pd.DataFrame | None:
        """Corrupted images, where that was measured before."""
        named = self._with_members({"corruption": corruption})
        return ask_if_known(self._frames, CORRUPTED, self.inputs, named, _unknown)

    def corrupted(self, corruption: Corruption, progress: Progress | None = None) -> pd.DataFrame:
        """See :func:`analysis.magnitude.robustness.corruption_sweep`."""
        return self._ask(
            CORRUPTED,
            {"corruption": corruption},
            lambda e: corruption_sweep(e, self.members, corruption, progress=progress),
        )

    def identity(self) -> pd.DataFrame:
        """See :func:`analysis.magnitude.norms.identity_frame`."""
        return self._ask(IDENTITY, {}, lambda e: identity_frame(e, self.members))

    def norms(self) -> pd.DataFrame:
        """See :func:`analysis.magnitude.norms.norms_frame`."""
        return self._ask(NORMS, {}, lambda e: norms_frame(e, self.members))

    def histogram(self, parameter: str) -> pd.DataFrame:
        """See :func:`analysis.magnitude.norms.histogram_frame`."""
        named = {"parameter": parameter}
        return self._ask(HISTOGRAM, named, lambda e: histogram_frame(e, self.members, parameter))

    def over_decay(self) -> pd.DataFrame:
        """See :func:`analysis.patterns.templates.decay_frame`."""
        return self._ask(OVER_DECAY, {}, decay_frame)

    def over_training(self) -> pd.DataFrame:
        """See :func:`analysis.patterns.templates.training_frame`."""
        return self._ask(OVER_TRAINING, {}, training_frame)

    def _ask(
        self,
        question: Question[pd.DataFrame],
        arguments: Values,
        compute: Callable[[PoolEvaluator], pd.DataFrame],
    ) -> pd.DataFrame:
        named = self._with_members(arguments)
        return ask(self._frames, question, self.inputs, named, lambda: compute(self._evaluator()))

    def _with_members(self, arguments: Values) -> Values:
        return {**arguments, "members": list(self.members)}


def _of_sweep(
    magnitudes: Sequence[float], who: Who, what: What, layer: str | None
) -> dict[str, object]:
    """What a sweep over m is asked by."""
    return {"magnitudes": list(magnitudes), "who": who, "what": what, "layer": layer}


def _unknown() -> None:
    """What is not kept takes a while, and is not computed now."""

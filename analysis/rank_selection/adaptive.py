"""The setting of the best mean score, found with few forward passes.

Few images at a coarse subset of the settings, then more where the best one may be: settings are
promoted through nested sets of images (successive halving) by the chance that they are the best of
all, under a surrogate that says what the images run so far tell about every setting (Thompson
sampling). All settings see the same images, so that differences are paired.

Source: successive halving, Jamieson & Talwalkar, AISTATS 2016; Thompson sampling, Thompson,
Biometrika 25 (1933), 285; the surrogate: :mod:`analysis.rank_selection.surrogate`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import pandas as pd

from analysis.accuracy import CONFIDENCE, Z, mean_interval
from analysis.evaluation.evaluator import Evaluator
from analysis.outputs.inputs import Split
from analysis.outputs.suite_outputs import Images
from analysis.rank_selection.scores import image_scores
from analysis.rank_selection.space import SearchSpace
from analysis.rank_selection.surrogate import Levels, Surrogate, root
from analysis.sign_flips import flip_tail
from merge_core.files import digest_of
from merge_core.merging.engine import MergeSession
from merge_core.progress import Progress

LEVELS = (0.08, 0.28, 0.6, 1.0)
"""Shares of a task's images, each level holding the one before."""
STRIDE = 4
"""Stride of the scales that each rank begins with (larger where they take half of the budget)."""
PROMOTED = 8
"""Settings promoted at once."""
SHARE = 1 / 8
"""Of an exhaustive search's images, at most."""
LEAST = 16
"""Settings whose images may be spent in any case: an eighth of few settings is too few."""
DRAWS = 400
ENOUGH = 0.02
"""The search ends once no other setting is better by TOLERANCE with more than this chance."""
TOLERANCE = 0.007
"""In standard deviations of an image's score: 0.3 points of an accuracy of 75 %."""

Scores = dict[str, np.ndarray]


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        rank, scale: of the setting with the highest mean score among those run on all images (of
            equal ones the lowest rank, then the lowest scale); NaN where the method has none.
        points: one row per setting that was run: rank, scale, images (per task, on average),
            score (mean over images, then over tasks), low, high (95 %, of these images; NaN where
            they are too few), expected, expected_low, expected_high (95 %, by the surrogate: on new
            images of these tasks; the best of many noisy scores is too high, this one is not),
            tied.

            `tied` settings were run on all images, and a paired test on them, exact for hits and
            on the safe side for other scores, does not find them worse than the best one. Its level
            is 5 % over the number of all other settings (Bonferroni), so that the chance to leave
            out the setting that is truly best, if it was run on all images, is at most 5 %.
        curve: at each rank the row of `points` with the highest score among those with the most
            images (all points for methods without a rank).
        asked_images: images that the search took, run now or stored before.
        forward_images: images run now.
        grid_images: images that all settings would take.
    """

    rank: float
    scale: float
    points: pd.DataFrame
    curve: pd.DataFrame
    asked_images: int
    forward_images: int
    grid_images: int


def adaptive_search(
    space: SearchSpace,
    session: MergeSession,
    evaluator: Evaluator,
    score: str = "accuracy",
    split: Split = "val",
    seed: int = 0,
    share: float = SHARE,
    progress: Progress | None = None,
) -> Search:
    """Find the setting of the best mean score.

    What was run before is taken from the store, and does not change the result: a search that was
    cancelled goes on where it stopped.

    Args:
        space: the settings; its recipe is of the session's tasks.
        session: the merges.
        evaluator: runs them, and keeps what they give.
        score: a name of :data:`analysis.rank_selection.scores.SCORES`.
        split: choose on ``val``.
        seed: of the order of images and of the draws.
        share: of the images of an exhaustive search, at most (but see :data:`LEAST`).
        progress: reports images, and cancels between two batches.

    Raises:
        MergeScopeError: an unknown score, or unfit inputs.
        Cancelled: by `progress`.
    """
    run = _Run(space, session, evaluator, score, split, seed, LEVELS, progress)
    budget = max(share * run.grid_images, LEAST * run.all_images)
    first = _coarse_settings(space, budget / 2 / run.cost(0))
    run.begin(first, first, budget)
    # One more look at each rank: few images can hide a peak, and the curve shows every rank.
    peaks = run.posterior()[0].reshape(max(len(space.ranks), 1), -1).argmax(axis=1)
    for setting in peaks + np.arange(len(peaks)) * (space.size // len(peaks)):
        while run.level[setting] < min(2, run.levels):
            run.promote(setting, budget)
    random = np.random.default_rng(seed)
    while not run.full.all():
        mean, covariance = run.posterior()[:2]
        draws = mean + random.standard_normal((DRAWS, space.size)) @ root(covariance).T
        if run.full.any():
            target = run.score[run.full].max() + TOLERANCE * run.surrogate.sigma
            if (draws[:, ~run.full].max(axis=1) > target).mean() <= ENOUGH:
                break
        chance = np.bincount(draws.argmax(axis=1), minlength=space.size) / DRAWS
        order = np.lexsort((-mean, -chance, run.full))
        promoted = [p for p in order[:PROMOTED] if not run.full[p]]
        affordable = [
            p
            for p, spent in zip(promoted, np.cumsum([run.cost(p) for p in promoted]), strict=True)
            if run.spent + spent <= budget
        ]
        # One rank after another: truncations are made once.
        run.promote_all(sorted(affordable), budget)
        if len(affordable) < len(promoted):
            break
    while not run.full.any():  # the budget was too small for one
        run.promote(int(run.posterior()[0].argmax()), budget)
    return run.result()


def exhaustive_search(
    space: SearchSpace,
    session: MergeSession,
    evaluator: Evaluator,
    score: str = "accuracy",
    split: Split = "val",
    seed: int = 0,
    progress: Progress | None = None,
) -> Search:
    """Run every setting on every image (arguments and errors: :func:`adaptive_search`)."""
    run = _Run(space, session, evaluator, score, split, seed, (1.0,), progress)
    run.begin(np.arange(space.size), _coarse_settings(space, space.size), run.grid_images)
    return run.result()


class _Run:
    """The state of a search: which settings were run on which images, and what came out."""

    def __init__(
        self,
        space: SearchSpace,
        session: MergeSession,
        evaluator: Evaluator,
        score: str,
        split: Split,
        seed: int,
        shares: Sequence[float],
        progress: Progress | None,
    ) -> None:
        self._session, self._evaluator = session, evaluator
        self._score_name, self._split = score, split
        self._progress = progress or Progress()
        self._recipes = space.recipes()
        self._axes = [axis for axis, values in enumerate((space.ranks, space.scales)) if values]
        self._settings = np.array(
            [(r, s) for r in space.ranks or (math.nan,) for s in space.scales or (math.nan,)]
        )
        self._order = {
            task: _shuffle(len(numbers), task, seed)
            for task, numbers in evaluator.outputs.images(session.groups.tasks, split).items()
        }
        self._weights = self._unit_weights()
        self._ends = _ends([len(order) for order in self._order.values()], shares)
        self._before = evaluator.outputs.forward_images
        self._known: list[Scores] = [{} for _ in self._recipes]
        self._means = np.full((len(self._recipes), len(self._ends) - 1), math.nan)
        self.levels = len(self._ends) - 1
        self.level = np.zeros(len(self._recipes), dtype=int)
        self.score = np.full(len(self._recipes), math.nan)
        self.spent = 0
        self.all_images = int(self._ends[-1].sum())
        self.grid_images = self.all_images * space.size
        self.surrogate: Surrogate

    @property
    def full(self) -> np.ndarray:
        """Which settings were run on all images."""
        return self.level == self.levels

    def cost(self, setting: int) -> int:
        """Images of the next level."""
        level = self.level[setting]
        return int((self._ends[level + 1] - self._ends[level]).sum())

    def begin(self, settings: np.ndarray, fitted: np.ndarray, budget: float) -> None:
        """Run settings on the first level, and fit the surrogate to some of them."""
        self.promote_all(settings, budget)
        groups = np.diff(self._ends, axis=0)
        levels = Levels(
            images=groups.shape[1] / (1 / groups).mean(axis=1),
            shares=(groups / self._ends[-1]).mean(axis=1),
        )
        scores = [np.stack([self._known[p][task] for p in fitted]) for task in self._order]
        axes = self._settings[:, self._axes]
        if 0 in self._axes:
            axes[:, 0] = np.log(axes[:, 0])
        spans = np.ptp(axes, axis=0)
        places = (axes - axes.min(axis=0)) / np.where(spans > 0, spans, 1)
        self.surrogate = Surrogate(places, self._axes, levels, fitted, scores)

    def promote_all(self, settings: Sequence[int] | np.ndarray, budget: float) -> None:
        """Run settings on their next levels' images, each knowing which one follows."""
        for setting, following in zip_longest(settings, settings[1:]):
            self.promote(setting, budget, following)

    def _next_images(self, setting: int) -> Images:
        level = self.level[setting]
        return {
            task: order[self._ends[level, t] : self._ends[level + 1, t]]
            for t, (task, order) in enumerate(self._order.items())
        }

    def promote(self, setting: int, budget: float, following: int | None = None) -> None:
        """Run a setting on the next level's images; `following` is the one that comes then."""
        level = self.level[setting]
        recipe = self._recipes[setting]
        label = ", ".join(f"{name} {recipe.parameters[name]:g}" for name in self._names)
        self._progress.step(self.spent, round(budget), label)
        images = self._next_images(setting)
        new = image_scores(
            self._score_name,
            recipe,
            self._session,
            self._evaluator,
            images,
            self._split,
            Progress(cancel=self._progress.cancel),
            None if following is None else (self._recipes[following], self._next_images(following)),
        )
        known = self._known[setting]
        for task, values in new.items():
            known[task] = np.concatenate([known.get(task, values[:0]), values])
        self.spent += self.cost(setting)
        self._means[setting, level] = np.mean([values.mean() for values in new.values()])
        self.level[setting] += 1
        self.score[setting] = np.mean([values.mean() for values in known.values()])

    def posterior(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """See :meth:`Surrogate.posterior`."""
        settings, groups = np.nonzero(~np.isnan(self._means))
        return self.surrogate.posterior(settings, groups, self._means[settings, groups])

    def result(self) -> Search:
        """What was found."""
        _, _, expected, error = self.posterior()
        best = int(np.where(self.full, self.score, -np.inf).argmax())
        rows = []
        for setting in np.flatnonzero(self.level):
            known = self._known[setting]
            low, high = mean_interval(known, self._weights_of(known))
            rows.append(
                {
                    "rank": self._settings[setting, 0],
                    "scale": self._settings[setting, 1],
                    "images": float(self._ends[self.level[setting]].mean()),
                    "score": self.score[setting],
                    "low": low,
                    "high": high,
                    "expected": expected[setting],
                    "expected_low": expected[setting] - Z * error[setting],
                    "expected_high": expected[setting] + Z * error[setting],
                    "tied": bool(self.full[setting]) and self._is_tied(known, best),
                }
            )
        points = pd.DataFrame(rows)
        curve = points
        if 0 in self._axes:
            ordered = points.sort_values(["images", "score"], ascending=False, kind="stable")
            curve = ordered.drop_duplicates("rank").sort_values("rank", ignore_index=True)
        self._progress.step(self.spent, self.spent, "done")
        return Search(
            rank=float(self._settings[best, 0]),
            scale=float(self._settings[best, 1]),
            points=points,
            curve=curve,
            asked_images=self.spent,
            forward_images=self._evaluator.outputs.forward_images - self._before,
            grid_images=self.grid_images,
        )

    def _unit_weights(self) -> Scores | None:
        """By what images count, in the order in which they are run; None where all alike."""
        outputs = self._evaluator.outputs
        found = {task: outputs.unit_weights(task, self._split) for task in self._order}
        weights = {task: each for task, each in found.items() if each is not None}
        return {task: each[self._order[task]] for task, each in weights.items()} or None

    def _weights_of(self, known: Mapping[str, np.ndarray]) -> Scores | None:
        """The weights of the images that a setting was run on."""
        if self._weights is None:
            return None
        return {task: self._weights[task][: len(values)] for task, values in known.items()}

    def _is_tied(self, known: Mapping[str, np.ndarray], best: int) -> bool:
        """Whether the best setting is not better beyond chance."""
        gaps = [values.astype(float) - known[task] for task, values in self._known[best].items()]
        return flip_tail(gaps) > (1 - CONFIDENCE) / max(len(self._recipes) - 1, 1)

    @property
    def _names(self) -> list[str]:
        return [("rank", "scale")[axis] for axis in self._axes]


def _coarse_settings(space: SearchSpace, most: float) -> np.ndarray:
    """Settings to begin with, `most` at most: of each rank every fourth scale or fewer, staggered.

    At least one.
    """
    rank, scale = np.divmod(np.arange(space.size), max(len(space.scales), 1))
    stride = min(STRIDE, max(len(space.scales), 1))
    while True:
        # Neighbouring ranks are out of step, by about the golden section of the stride.
        chosen = np.flatnonzero((scale - round(0.4 * stride) * rank) % stride == stride // 2)
        if len(chosen) <= max(most, 1):
            return chosen
        stride *= 2


def _shuffle(count: int, task: str, seed: int) -> np.ndarray:
    """Numbers below `count` in an order of their own for each task, whatever the other tasks."""
    start = int(digest_of("rank selection", str(seed), task)[:15], 16)
    return np.random.default_rng(start).permutation(count)


def _ends(counts: Sequence[int], shares: Sequence[float]) -> np.ndarray:
    """Where levels end in each task's order (levels + 1 x tasks), each level adding to every task.

    Levels that would add nothing to the smallest task are left out.
    """
    sizes = np.array(counts)
    ends = [sizes]
    for share in sorted(shares, reverse=True)[1:]:
        end = np.maximum(np.round(share * sizes).astype(int), 1)
        if (end < ends[0]).all():
            ends.insert(0, end)
    return np.stack([np.zeros_like(sizes), *ends])

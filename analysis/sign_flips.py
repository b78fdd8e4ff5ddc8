"""Whether a mean of paired differences is more than chance: signs drawn at random are the measure.

Of two equal methods each is as likely as the other to be the better one on an image. Given how far
apart they are on each image, the sign of each difference is then a fair coin, whatever the number
of images. Where differences are those of hits this is McNemar's exact test, over several tasks at
once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import ndtr

Gaps = Sequence[np.ndarray]

# Points of the grid on which tasks of different sizes are added up.
POINTS = 1 << 14
# P(Σ ε_i a_i ≥ x ‖a‖) ≤ BOUND · P(N(0, 1) ≥ x) for random signs ε and any a, and no less will do.
BOUND = 1 / (4 * ndtr(-np.sqrt(2)))


def flip_tail(gaps: Gaps) -> float:
    """The chance that random signs give a mean over tasks at least as high as the one found.

    Exact for differences of hits (of tasks that differ in size to the width of a fine grid, on the
    safe side); for other scores an upper bound that holds at every number of images.

    Args:
        gaps: of each task, the differences of its images: n_t numbers.

    Returns:
        In (0, 1]; small where the first of the two is better.

    Source: McNemar, Psychometrika 12 (1947), 153, in its exact form; the bound: Bentkus and
    Dzindzalieta, Bernoulli 21 (2015), 1231.

    Example:
        >>> flip_tail([np.array([1.0, 1.0, 1.0, 0.0])])
        0.125
    """
    if all(np.isin(each, (-1, 0, 1)).all() for each in gaps):
        return _hits_tail(gaps)
    # The mean over tasks is a sum of signs times the absolute differences over n_t.
    weighted = np.concatenate([np.asarray(each, dtype=float) / len(each) for each in gaps])
    size = float(np.linalg.norm(weighted))
    if size == 0 or weighted.sum() <= 0:
        return 1.0
    return float(min(1.0, BOUND * ndtr(-weighted.sum() / size)))


def two_sided(gaps: Gaps) -> float:
    """The chance of a mean over tasks at least as far from zero: twice the smaller tail.

    Example:
        >>> two_sided([np.array([1.0, 1.0, 1.0, 0.0])])
        0.25
    """
    ahead = sum(float(each.mean()) for each in gaps) >= 0
    return min(1.0, 2 * flip_tail(gaps if ahead else [-each for each in gaps]))


def fewest_images(level: float, comparisons: int = 1, hits: bool = True) -> int:
    """Images on which two methods must differ before any difference can count.

    Args:
        level: of the test, below which a two-sided p must lie.
        comparisons: over how many it is shared (Bonferroni, or the first of Holm's steps).
        hits: whether they are told apart by hits, rather than by other scores, whose test is on the
            safe side.

    Example:
        >>> fewest_images(0.05), fewest_images(0.05, comparisons=10)
        (6, 9)
    """
    if not hits:
        count = 1
        while 2 * BOUND * ndtr(-np.sqrt(count)) >= level / comparisons:
            count += 1
        return count
    return int(np.floor(1 - np.log2(level / comparisons))) + 1


def _hits_tail(gaps: Gaps) -> float:
    """The exact tail of differences in −1, 0 and 1."""
    from scipy.stats import binom  # late: it takes most of a second, and pages read what is kept

    unequal: dict[int, int] = {}
    found: dict[int, int] = {}
    for each in gaps:
        size = len(each)
        unequal[size] = unequal.get(size, 0) + int(np.count_nonzero(each))
        found[size] = found.get(size, 0) + int(np.sum(each))
    if len(unequal) == 1:
        ((size, count),) = unequal.items()
        return float(binom.sf((count + found[size]) // 2 - 1, count, 0.5))
    return _sum_of_sizes(unequal, sum(total / size for size, total in found.items()))


def _sum_of_sizes(unequal: Mapping[int, int], least: float) -> float:
    """P(Σ_n S_n / n ≥ least), S_n a sum of `unequal[n]` random signs, rounded up.

    Each S_n / n is moved to the next point of a grid, which shifts the sum by half a step each.
    """
    from scipy.signal import fftconvolve
    from scipy.stats import binom

    reach = sum(count / size for size, count in unequal.items())
    if reach == 0:
        return 1.0
    step = 2 * reach / POINTS
    density, first = np.ones(1), 0
    for size, count in unequal.items():
        sums = np.rint((2 * np.arange(count + 1) - count) / size / step).astype(int)
        mass = np.bincount(sums - sums[0], binom.pmf(np.arange(count + 1), count, 0.5))
        density, first = fftconvolve(density, mass), first + int(sums[0])
    places = (np.arange(len(density)) + first) * step
    reached = places >= least - (len(unequal) / 2 + 1e-9) * step
    return float(min(1.0, max(density[reached].sum(), 0.5 ** sum(unequal.values()))))

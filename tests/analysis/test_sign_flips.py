"""The test of paired differences, against enumeration of all signs and all outcomes."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analysis.accuracy import difference, paired_differences, words_for_few_images
from analysis.sign_flips import BOUND, fewest_images, flip_tail, two_sided

hit_gaps = st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=1, max_size=5)


def enumerate_tail(gaps: list[np.ndarray]) -> float:
    """P(mean over tasks of signed |d| ≥ the one found) over all signs."""
    weights = np.concatenate([np.abs(each) / len(each) for each in gaps])
    found = sum(each.mean() for each in gaps)
    signs = np.array(list(product([-1, 1], repeat=len(weights))))
    return float(np.mean(signs @ weights >= found - 1e-12))


@given(st.lists(hit_gaps, min_size=1, max_size=3))
def test_the_tail_of_hits_is_exact(tasks: list[list[float]]) -> None:
    gaps = [np.array(each) for each in tasks]
    exact = enumerate_tail(gaps)
    got = flip_tail(gaps)
    if len({len(each) for each in gaps}) == 1:
        assert got == pytest.approx(exact)
    else:  # on a grid, never below
        assert exact - 1e-9 <= got <= exact + 1e-9 or got > exact


def test_tasks_of_unequal_sizes_come_to_the_grid_width() -> None:
    source = np.random.default_rng(0)
    gaps = [source.choice([-1.0, 0, 1], size=n, p=[0.1, 0.75, 0.15]) for n in (37, 211, 500)]
    reach = sum(np.count_nonzero(each) / len(each) for each in gaps)
    # Against the convolution of the three binomials, written out.
    parts = []
    for each in gaps:
        count = np.count_nonzero(each)
        at = (2 * np.arange(count + 1) - count) / len(each)
        parts.append((at, stats.binom.pmf(np.arange(count + 1), count, 0.5)))
    sums = parts[0][0][:, None, None] + parts[1][0][None, :, None] + parts[2][0][None, None, :]
    mass = parts[0][1][:, None, None] * parts[1][1][None, :, None] * parts[2][1][None, None, :]
    found = sum(each.mean() for each in gaps)
    assert flip_tail(gaps) >= mass[sums >= found].sum()
    assert flip_tail(gaps) <= mass[sums >= found - 3 * 2 * reach / 2**14].sum() + 1e-9


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=9))
def test_other_scores_have_a_safe_bound(values: list[float]) -> None:
    gaps = [np.array(values)]
    assert flip_tail(gaps) >= enumerate_tail(gaps) - 1e-9


def test_the_bound_is_reached() -> None:
    # Two equal weights at x = √2 are the case for which no smaller factor will do.
    tail = flip_tail([np.array([0.5, 0.5])])
    assert tail == pytest.approx(0.25)
    assert pytest.approx(3.178, abs=1e-3) == BOUND


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("images", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("unequal", [0.2, 0.6, 1.0])
def test_equal_methods_are_seldom_told_apart(tasks: int, images: int, unequal: float) -> None:
    # All counts of images on which the first or the second is better, at their probabilities.
    N = tasks * images
    error = 0.0
    for ahead in range(N + 1):
        for behind in range(N + 1 - ahead):
            chances = [unequal / 2, unequal / 2, 1 - unequal]
            chance = stats.multinomial.pmf([ahead, behind, N - ahead - behind], N, chances)
            d = np.r_[np.ones(ahead), -np.ones(behind), np.zeros(N - ahead - behind)]
            # Tasks of one size: which task an image belongs to does not matter.
            error += chance * (two_sided(np.split(d, tasks)) < 0.05)
    assert error <= 0.05


@pytest.mark.parametrize("images", [1, 3, 10, 40])
def test_equal_methods_are_seldom_called_different(images: int) -> None:
    # Eight tasks of other sizes and accuracies, four methods, Holm over six pairs.
    source = np.random.default_rng(images)
    sizes = images + np.arange(8) % 3
    false = 0
    trials = 60
    for _ in range(trials):
        hits = {
            f"m{i}": {f"t{t}": source.random(n) < 0.2 + 0.1 * t for t, n in enumerate(sizes)}
            for i in range(4)
        }
        false += bool(paired_differences(hits)["real"].any())
    assert stats.binom.sf(false - 1, trials, 0.05) > 1e-3


def test_a_difference_without_variance_is_not_certain() -> None:
    for images in (1, 2, 3, 5):
        found = difference({"t": np.full(images, True)}, {"t": np.full(images, False)})
        assert found.p == 2.0 ** (1 - images)
        assert found.low < 0 < found.gap == found.high == 1
    assert difference({"t": np.full(6, True)}, {"t": np.full(6, False)}).low > 0


@given(st.integers(1, 300), st.floats(0.001, 0.1))
def test_the_fewest_images_are_the_fewest(comparisons: int, level: float) -> None:
    least = fewest_images(level, comparisons)
    assert two_sided([np.ones(least)]) * comparisons < level
    assert two_sided([np.ones(least - 1)]) * comparisons >= level


def test_the_fewest_images_are_said() -> None:
    hits = {name: {"t": np.arange(8) < i} for i, name in enumerate("abc")}
    said = words_for_few_images(hits)
    assert "at least 7 inputs" in said
    assert "3 pairs" in said
    assert "too few" not in said
    few = {name: {"t": each["t"][:6]} for name, each in hits.items()}
    assert "these are 6, too few" in words_for_few_images(few)
    real = paired_differences({"a": {"t": np.ones(6, bool)}, "b": {"t": np.zeros(6, bool)}})
    assert real["real"].tolist() == [True]
    assert len(list(combinations(hits, 2))) == 3

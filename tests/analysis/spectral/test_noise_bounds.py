"""Noise bounds against published constants, closed forms and random matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from analysis.spectral.noise_bounds import (
    gavish_donoho_cut,
    marchenko_pastur_median,
    noise_edge,
    noise_scale,
)


def noise(m: int, n: int, s: float, seed: int = 0) -> np.ndarray:
    return s * np.random.default_rng(seed).standard_normal((m, n))


def omega(beta: float) -> float:
    """ω(β), read off a spectrum whose median is 1."""
    n = 1000
    return gavish_donoho_cut(np.ones(round(beta * n)), round(beta * n), n)


def test_median_of_square_matrices_solves_the_closed_form() -> None:
    # At β = 1 the distribution function is ((π − φ) + sin φ)/π with x = 2 + 2 cos φ.
    phi = brentq(lambda p: ((math.pi - p) + math.sin(p)) / math.pi - 0.5, 0, math.pi)
    assert marchenko_pastur_median(1.0) == pytest.approx(2 + 2 * math.cos(phi), abs=1e-10)


@pytest.mark.parametrize("beta", [0.1, 0.25, 0.5, 1.0])
def test_median_is_that_of_random_matrices(beta: float) -> None:
    n = 800
    eigenvalues = np.linalg.svd(noise(int(beta * n), n, 1.0), compute_uv=False) ** 2 / n
    assert marchenko_pastur_median(beta) == pytest.approx(np.median(eigenvalues), rel=0.02)


def test_median_of_a_thin_matrix_is_near_one() -> None:
    assert marchenko_pastur_median(1e-4) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("beta", [0.0, -0.5, 1.01])
def test_median_refuses_impossible_ratios(beta: float) -> None:
    with pytest.raises(ValueError, match="beta"):
        marchenko_pastur_median(beta)


def test_gavish_donoho_constants_as_published() -> None:
    # Abstract of arXiv:1305.5870: 4/√3 for known noise and 2.858 for unknown noise.
    assert omega(1.0) == pytest.approx(2.858, abs=5e-4)
    known = omega(1.0) * math.sqrt(marchenko_pastur_median(1.0))
    assert known == pytest.approx(4 / math.sqrt(3), abs=1e-9)


@pytest.mark.parametrize("beta", np.linspace(0.05, 1.0, 20))
def test_gavish_donoho_stays_near_the_published_cubic(beta: float) -> None:
    cubic = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    assert omega(beta) == pytest.approx(cubic, abs=0.02)


@pytest.mark.parametrize(("m", "n"), [(300, 300), (150, 600), (600, 150)])
def test_edge_is_the_largest_singular_value_of_noise(m: int, n: int) -> None:
    S = np.linalg.svd(noise(m, n, 0.7), compute_uv=False)
    assert noise_scale(S, m, n) == pytest.approx(0.7, rel=0.02)
    assert noise_edge(S, m, n) == pytest.approx(S[0], rel=0.03)
    assert noise_edge(torch.from_numpy(S), m, n) == noise_edge(S, n, m)


def test_both_bounds_find_the_planted_directions() -> None:
    rng = np.random.default_rng(1)
    left, right = rng.standard_normal((200, 5)), rng.standard_normal((400, 5))
    S = np.linalg.svd(noise(200, 400, 1.0) + 2 * left @ right.T, compute_uv=False)
    assert np.sum(noise_edge(S, 200, 400) * 1.02 < S) == 5
    assert np.sum(gavish_donoho_cut(S, 200, 400) < S) == 5


def test_bounds_of_a_zero_matrix_are_zero() -> None:
    assert noise_edge(np.zeros(4), 4, 7) == gavish_donoho_cut(np.zeros(4), 4, 7) == 0.0

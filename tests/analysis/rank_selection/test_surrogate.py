"""The surrogate against its own definition: images drawn, conditioned by brute force."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.rank_selection.surrogate import Levels, Surrogate, root

SETTINGS = np.linspace(0, 1, 6)[:, None]
COUNTS = np.array([3, 5])
LEVELS = Levels(images=COUNTS.astype(float), shares=COUNTS / 8)


@pytest.fixture
def surrogate() -> Surrogate:
    random = np.random.default_rng(0)
    return Surrogate(SETTINGS, [1], LEVELS, np.arange(6), [random.normal(size=(6, 40))])


def test_posterior_is_that_of_single_images(surrogate: Surrogate) -> None:
    """One Gaussian vector over the surface and each of 8 images, conditioned on group means."""
    M, K, P, n = surrogate.surface, surrogate.deviation, 6, 8
    joint = np.kron(np.ones((n, n)), M) + np.kron(np.eye(n), K)  # image by image
    mean_of = np.zeros((P, n * P))
    for image in range(n):
        mean_of[:, image * P : (image + 1) * P] = np.eye(P) / n
    observed, settings, groups = [], [], []
    for group, (start, end, points) in enumerate([(0, 3, [0, 2, 3, 5]), (3, 8, [2, 5])]):
        for p in points:
            row = np.zeros(n * P)
            row[[i * P + p for i in range(start, end)]] = 1 / (end - start)
            observed.append(row)
            settings.append(p)
            groups.append(group)
    A = np.array(observed)
    values = np.random.default_rng(1).normal(size=len(A))
    S = A @ joint @ A.T
    onto = np.linalg.solve(S, values - surrogate.centre)
    f = surrogate.centre + mean_of @ joint @ A.T @ onto
    f_cov = mean_of @ joint @ mean_of.T - mean_of @ joint @ A.T @ np.linalg.solve(
        S, A @ joint @ mean_of.T
    )
    common = np.kron(np.ones((1, n)), M) @ A.T  # of the surface with what was observed
    m = surrogate.centre + common @ onto
    m_var = np.diag(M - common @ np.linalg.solve(S, common.T))
    got = surrogate.posterior(np.array(settings), np.array(groups), values)
    for mine, expected in zip(got, (f, f_cov, m, np.sqrt(m_var)), strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-6)


def test_what_was_run_on_all_images_is_known(surrogate: Surrogate) -> None:
    values = np.array([0.3, 0.7])
    mean, covariance, _, error = surrogate.posterior(np.array([4, 4]), np.array([0, 1]), values)
    assert mean[4] == pytest.approx((3 * 0.3 + 5 * 0.7) / 8, abs=1e-6)
    assert covariance[4, 4] == pytest.approx(0, abs=1e-6)
    assert error[4] > 0.01  # but not what new images would give
    assert (np.diag(covariance)[:4] > 1e-3).all()


def test_the_deviation_is_learnt_from_the_images() -> None:
    """Its scale, and how close settings go together; against the covariance drawn from."""
    places = np.linspace(0, 1, 20)[:, None]
    truth = 4.0 * np.exp(-np.abs(places - places.T) / 2.1)
    draws = np.linalg.cholesky(truth) @ np.random.default_rng(2).normal(size=(20, 400))
    levels = Levels(np.array([400.0]), np.array([1.0]))
    fitted = Surrogate(places, [1], levels, np.arange(20), [draws]).deviation
    assert np.abs(fitted - truth).max() < 0.8, np.abs(fitted - truth).max()
    assert fitted.diagonal().mean() == pytest.approx(4, rel=0.15)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_scores_that_are_all_alike(value: float) -> None:
    surrogate = Surrogate(SETTINGS, [1], LEVELS, np.arange(6), [np.full((6, 3), value)])
    mean, covariance, _, error = surrogate.posterior(
        np.arange(6), np.zeros(6, dtype=int), np.full(6, value)
    )
    np.testing.assert_allclose(mean, value, atol=1e-6)
    assert np.isfinite(covariance).all()
    assert np.isfinite(error).all()


def test_root_of_a_singular_covariance() -> None:
    matrix = np.ones((4, 4))
    np.testing.assert_allclose(root(matrix) @ root(matrix).T, matrix, atol=1e-6)
    assert np.isfinite(root(np.zeros((3, 3)))).all()

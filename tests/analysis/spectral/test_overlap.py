"""Interference as a share of what it can be, against cosines of matrices and random rotations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from analysis.spectral.interference import interference_over_rank, pair_interference
from analysis.spectral.overlap import overlap_of, random_overlap
from analysis.spectral.overlap_maps import mean_overlap_pairs, overlap_pairs
from merge_core.factors.low_rank import Directions
from merge_core.factors.store import FactorStore
from merge_core.suites.suite import load_suite
from merge_core.task_vectors import TensorGroup, TensorGroups


def decompose(matrix: np.ndarray) -> Directions:
    U, s, Vh = np.linalg.svd(matrix, full_matrices=False)
    return Directions(*(torch.from_numpy(np.ascontiguousarray(x)) for x in (U, s, Vh.T)))


def gram(matrix: np.ndarray, k: int) -> np.ndarray:
    """V S² Vᵀ of the leading directions, of unit Frobenius norm."""
    _, s, Vh = np.linalg.svd(matrix, full_matrices=False)
    P = (Vh[:k].T * s[:k] ** 2) @ Vh[:k]
    return np.asarray(P / np.linalg.norm(P))


def test_overlap_is_the_root_of_a_cosine_of_matrices() -> None:
    rng = np.random.default_rng(0)
    A = [rng.normal(size=(7, 9)), rng.normal(size=(7, 9)), rng.normal(size=(7, 9))]
    found = overlap_of(pair_interference([decompose(a) for a in A]))
    assert np.diagonal(found) == pytest.approx(np.ones((7, 3)))
    for k in (1, 3, 7):
        wanted = [[np.sqrt((gram(a, k) * gram(b, k)).sum()) for b in A] for a in A]
        assert found[:, :, k - 1] == pytest.approx(np.array(wanted), rel=1e-6)


def test_a_task_that_did_not_change_overlaps_with_none() -> None:
    zero = Directions(torch.zeros(4, 1), torch.zeros(1), torch.zeros(4, 1))
    other = Directions(torch.eye(4)[:, :1], torch.ones(1), torch.eye(4)[:, :1])
    pairs = pair_interference([zero, other])
    assert overlap_of(pairs)[:, :, 0].tolist() == [[0, 0], [0, 1]]
    assert random_overlap(pairs, 4)[:, :, 0].tolist() == [[0, 0], [0, 1]]


def test_the_random_level_is_what_random_rotations_give() -> None:
    rng = np.random.default_rng(1)
    n, k = 30, 5
    A, B = rng.normal(size=(12, n)), rng.normal(size=(12, n)) * np.linspace(1, 4, n)
    level = random_overlap(pair_interference([decompose(A), decompose(B)]), n)[0, 1, k - 1]
    P, Q = gram(A, k), gram(B, k)
    squares = []
    for _ in range(2000):
        R, triangle = np.linalg.qr(rng.normal(size=(n, n)))
        R *= np.sign(np.diag(triangle))
        squares.append((P * (R @ Q @ R.T)).sum())
    error = np.std(squares) / np.sqrt(len(squares))
    assert level**2 == pytest.approx(np.mean(squares), abs=5 * error)


def test_frames_are_means_of_pairs() -> None:
    suite = load_suite("vision")
    names = suite.matrices[:2]
    store, tasks = FactorStore(), suite.tasks[:3]
    one = overlap_pairs(TensorGroup(suite, tasks, names[0], store), "base", 20)
    curve = interference_over_rank(TensorGroup(suite, tasks, names[0], store), "base", [0.08])
    others = one[one["first"] != one["second"]]
    assert curve["overlap"].tolist() == pytest.approx([others["overlap"].mean()], rel=1e-6)
    assert curve["random"].tolist() == pytest.approx([others["random"].mean()], rel=1e-6)
    groups = TensorGroups(suite, tasks, store)
    every = [overlap_pairs(TensorGroup(suite, tasks, n, store), "base", 20) for n in suite.matrices]
    whole = mean_overlap_pairs(groups, "base", 0.08)
    wanted = np.mean([frame["overlap"] for frame in every], axis=0)
    assert whole["overlap"].to_numpy() == pytest.approx(wanted, rel=1e-6)
    assert whole["first"].tolist() == one["first"].tolist()

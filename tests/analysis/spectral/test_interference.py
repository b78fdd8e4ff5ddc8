"""Interference against loops over its definition, scipy's angles, and identities."""

from __future__ import annotations

import threading
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles

from analysis.spectral.interference import (
    cosine_similarity,
    interference_over_rank,
    interference_pairs,
    mean_angles,
    mean_over_layers,
    pair_interference,
    principal_angles,
    sign_conflict,
)
from merge_core.errors import Cancelled, SuiteError
from merge_core.factors.decomposition import decompose
from merge_core.factors.low_rank import Directions
from merge_core.factors.store import FactorStore
from merge_core.progress import Progress
from merge_core.suites.suite import Suite
from merge_core.task_vectors import TensorGroup, TensorGroups
from tests.analysis.tiny_suite import (
    BIAS,
    FC,
    MATRICES,
    QKV,
    SHAPES,
    TASKS,
    task_vectors,
    write_suite,
)

ALGEBRA = settings(max_examples=25, deadline=None)
SEEDS = st.integers(0, 10**6)
SIDES = st.integers(2, 9)
T = len(TASKS)


def matrices(seed: int, m: int, n: int, count: int = 3) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(m, n, generator=g, dtype=torch.float64) for _ in range(count)]


def naive(A: np.ndarray, B: np.ndarray, k: int, side: str) -> float:
    """‖S_i V_iᵀ V_j S_j‖_F, entry by entry from numpy's decomposition."""
    if side == "column":
        A, B = A.T, B.T
    _, s, Vh = np.linalg.svd(A, full_matrices=False)
    _, t, Wh = np.linalg.svd(B, full_matrices=False)
    s, t = s[:k] / np.sqrt(np.sum(s[:k] ** 2)), t[:k] / np.sqrt(np.sum(t[:k] ** 2))
    total = 0.0
    for a in range(k):
        for b in range(k):
            total += (s[a] * float(Vh[a] @ Wh[b]) * t[b]) ** 2
    return float(np.sqrt(total))


@ALGEBRA
@given(SEEDS, SIDES, SIDES, st.sampled_from(["row", "column"]))
def test_all_ranks_at_once_equal_the_definition(seed: int, m: int, n: int, side) -> None:
    A = matrices(seed, m, n)
    pairs = pair_interference([decompose(a) for a in A], side)
    r = min(m, n)
    assert pairs.shape == (3, 3, r)
    for i in range(3):
        for j in range(3):
            expected = [naive(A[i].numpy(), A[j].numpy(), k, side) for k in range(1, r + 1)]
            assert pairs[i, j] == pytest.approx(expected, abs=1e-9)


@ALGEBRA
@given(SEEDS, SIDES, SIDES, st.floats(1e-3, 1e3))
def test_interference_is_a_symmetric_share_that_ignores_scale(seed, m, n, scale) -> None:
    A = matrices(seed, m, n)
    pairs = pair_interference([decompose(a) for a in A])
    assert pairs.min() >= 0
    assert pairs.max() <= 1 + 1e-12
    assert np.array_equal(pairs, pairs.transpose(1, 0, 2))
    scaled = pair_interference([decompose(scale * A[0]), *[decompose(a) for a in A[1:]]])
    assert scaled == pytest.approx(pairs, abs=1e-9)


@ALGEBRA
@given(SEEDS, SIDES, SIDES)
def test_row_spaces_do_not_see_rotations_of_outputs(seed: int, m: int, n: int) -> None:
    A = matrices(seed, m, n)
    Q = torch.linalg.qr(matrices(seed + 1, m, m, 1)[0]).Q
    rows = pair_interference([decompose(a) for a in A])
    turned = pair_interference([decompose(Q @ A[0]), *[decompose(a) for a in A[1:]]])
    assert turned == pytest.approx(rows, abs=1e-8)


def test_turning_one_task_changes_its_column_interference() -> None:
    A = matrices(5, 6, 9)
    Q = torch.linalg.qr(matrices(6, 6, 6, 1)[0]).Q
    before = pair_interference([decompose(a) for a in A], "column")
    after = pair_interference([decompose(Q @ A[0]), *[decompose(a) for a in A[1:]]], "column")
    assert np.abs(before[0, 1, 1] - after[0, 1, 1]) > 1e-3


def test_orthogonal_row_spaces_do_not_interfere() -> None:
    A, B = torch.zeros(4, 8), torch.zeros(4, 8)
    A[:, :4], B[:, 4:] = matrices(0, 4, 4, 2)
    pairs = pair_interference([decompose(A), decompose(B)])
    assert np.abs(pairs[0, 1]).max() < 1e-12
    assert np.abs(pair_interference([decompose(A), decompose(B)], "column")[0, 1]).max() > 0.1


def test_identical_tasks_interfere_fully_at_rank_one() -> None:
    (A,) = matrices(2, 5, 7, 1)
    pairs = pair_interference([decompose(A), decompose(A)])
    assert pairs[0, 1, 0] == pytest.approx(1.0)
    assert pairs[0, 1] == pytest.approx(pairs[0, 0])


def test_zero_task_vectors_interfere_with_nothing() -> None:
    zero, other = decompose(torch.zeros(4, 5)), decompose(matrices(0, 4, 5, 1)[0])
    pairs = pair_interference([zero, other])
    assert np.all(pairs[0] == 0)
    assert np.all(pairs[1, 1] > 0)


def test_pairs_at_one_rank_are_a_slice_of_all_ranks(fc: TensorGroup) -> None:
    everything = pair_interference(fc.directions("average"), "column")
    frame = interference_pairs(fc, "average", 3, "column")
    assert list(frame) == ["first", "second", "origin", "k", "interference"]
    assert frame["interference"].to_numpy() == pytest.approx(everything[:, :, 2].ravel())
    assert list(zip(frame["first"], frame["second"], strict=True))[1] == (TASKS[0], TASKS[1])
    assert set(interference_pairs(fc, "average", 99)["k"]) == {9}


@pytest.mark.parametrize("origin", ["base", "average"])
def test_curve_over_rank_equals_the_definitions(suite: Suite, fc: TensorGroup, origin) -> None:
    shares = [0.05, 0.3, 0.75, 1.0]
    frame = interference_over_rank(fc, origin, shares)
    A = [tau.numpy() for tau in task_vectors(suite, FC, origin)]
    energy = sum(float(np.sum(a**2)) for a in A)
    assert frame["k"].tolist() == [1, 2, 6, 9]
    for row in frame.itertuples():
        pairs = [naive(A[i], A[j], row.k, "row") for i, j in combinations(range(T), 2)]
        assert row.interference == pytest.approx(2 * sum(pairs), rel=1e-5)
        assert row.interference_normalised == pytest.approx(2 * sum(pairs) / (T * (T - 1)), 1e-5)
        kept = []
        for a in A:
            U, s, Vh = np.linalg.svd(a, full_matrices=False)
            kept.append((U[:, : row.k] * s[: row.k]) @ Vh[: row.k])
        lost = sum(float(np.sum((a - b) ** 2)) for a, b in zip(A, kept, strict=True))
        assert row.reconstruction == pytest.approx(lost, rel=1e-5, abs=1e-9)
        assert row.reconstruction_share == pytest.approx(lost / energy, rel=1e-5, abs=1e-9)
        assert row.update_norm == pytest.approx(np.linalg.norm(sum(kept)), rel=1e-5, abs=1e-6)


def test_full_rank_loses_nothing_and_centred_updates_cancel(groups: TensorGroups) -> None:
    centred = interference_over_rank(groups, "average", [1.0])
    original = interference_over_rank(groups, "base", [1.0])
    assert centred["reconstruction"].tolist() == [0.0] * 3
    assert centred["update_norm"].tolist() == [0.0] * 3
    assert (original["update_norm"] > 1).all()


def test_reconstruction_falls_with_rank(groups: TensorGroups) -> None:
    frame = interference_over_rank(groups, "average", [0.1, 0.4, 0.7, 1.0])
    for _, part in frame.groupby("parameter"):
        assert (np.diff(part["reconstruction"]) < 0).all()
        assert (part["reconstruction"] < part["energy"]).all()


def test_interference_reports_progress_and_can_be_cancelled(groups: TensorGroups) -> None:
    seen: list[tuple[int, int, str]] = []
    interference_over_rank(groups, "base", [0.5], progress=Progress(lambda *s: seen.append(s)))
    assert [(done, total) for done, total, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        interference_over_rank(groups, "base", [0.5], progress=Progress(cancel=cancel))
    with pytest.raises(Cancelled):
        cosine_similarity(groups, "base", progress=Progress(cancel=cancel))


def test_mean_over_layers_weighs_layers_as_it_says(groups: TensorGroups, suite: Suite) -> None:
    frame = interference_over_rank(groups, "base", [0.3, 1.0])
    mean = mean_over_layers(frame)
    assert mean["share"].tolist() == [0.3, 1.0]
    low = frame[frame["share"] == 0.3]
    first = mean.iloc[0]
    assert first["interference_normalised"] == pytest.approx(low["interference_normalised"].mean())
    assert first["reconstruction_share"] == pytest.approx(
        low["reconstruction"].sum() / low["energy"].sum()
    )
    # At full rank the whole update is the sum of the task vectors of all matrices.
    whole = torch.cat([sum(task_vectors(suite, name, "base")).flatten() for name in MATRICES])
    assert mean.iloc[1]["update_norm"] == pytest.approx(float(whole.norm()), rel=1e-5)


@pytest.mark.parametrize("origin", ["base", "average"])
def test_cosines_of_the_whole_model(suite: Suite, groups: TensorGroups, origin) -> None:
    frame = cosine_similarity(groups, origin)
    vectors = [task_vectors(suite, name, origin) for name in SHAPES]
    whole = np.stack([np.concatenate([v[t].numpy().ravel() for v in vectors]) for t in range(T)])
    whole /= np.linalg.norm(whole, axis=1, keepdims=True)
    assert list(frame) == ["first", "second", "origin", "cosine"]
    assert frame["cosine"].to_numpy() == pytest.approx((whole @ whole.T).ravel(), abs=1e-9)


def test_cosines_of_one_parameter(suite: Suite, groups: TensorGroups) -> None:
    frame = cosine_similarity(groups, "base", BIAS)
    a, b, *_ = (v.numpy() for v in task_vectors(suite, BIAS, "base"))
    expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert frame["cosine"].iloc[1] == pytest.approx(expected)
    with pytest.raises(SuiteError, match="nonsense"):
        cosine_similarity(groups, "base", "nonsense")


def test_centred_cosines_average_to_minus_one_over_t_minus_one(tmp_path: Path) -> None:
    # Vertices of a simplex: equal norms, so the mean holds exactly.
    eye = torch.eye(5)
    suite = write_suite(tmp_path, None, {f"t{i}": {"w": eye[i]} for i in range(5)})
    frame = cosine_similarity(TensorGroups(suite, None, FactorStore(tmp_path / "f")), "average")
    others = frame[frame["first"] != frame["second"]]["cosine"]
    assert others.to_numpy() == pytest.approx(np.full(20, -1 / 4), abs=1e-12)


def test_zero_task_vectors_have_cosine_zero(tmp_path: Path) -> None:
    base = {"w": torch.ones(3)}
    suite = write_suite(tmp_path, base, {"same": base, "other": {"w": torch.zeros(3)}})
    frame = cosine_similarity(TensorGroups(suite, None, FactorStore(tmp_path / "f")), "base")
    assert frame["cosine"].tolist() == pytest.approx([0, 0, 0, 1])


@pytest.mark.parametrize("side", ["row", "column"])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_angles_are_scipys(suite: Suite, fc: TensorGroup, side, k: int) -> None:
    frame = principal_angles(fc, "base", k, side)
    A = [tau.numpy() for tau in task_vectors(suite, FC, "base")]
    for i, j in combinations(range(T), 2):
        spaces = []
        for a in (A[i], A[j]):
            U, _, Vh = np.linalg.svd(a, full_matrices=False)
            spaces.append(Vh[:k].T if side == "row" else U[:, :k])
        part = frame[(frame["first"] == TASKS[i]) & (frame["second"] == TASKS[j])]
        expected = np.degrees(subspace_angles(*spaces))[::-1]
        assert part["angle"].to_numpy() == pytest.approx(expected, abs=2e-4)
        assert part["index"].tolist() == list(range(1, k + 1))


class Held:
    """A group whose factors are given: for subspaces that are known exactly."""

    tasks = ("a", "b")
    stored_transposed = False

    def __init__(self, *factors: Directions) -> None:
        self.held = list(factors)

    def directions(self, origin: str, k: int | None = None) -> list[Directions]:
        return self.held


@pytest.mark.parametrize("degrees", [1e-9, 1e-5, 30.0, 89.9999, 90.0])
def test_small_and_large_angles_are_exact(degrees: float) -> None:
    turn = np.radians(degrees)
    e = torch.eye(5, dtype=torch.float64)
    turned = torch.stack([e[0], np.cos(turn) * e[1] + np.sin(turn) * e[2]], dim=1)
    two = torch.ones(2, dtype=torch.float64)
    group = Held(Directions(e[:, :2], two, e[:, :2]), Directions(e[:, :2], two, turned))
    angles = principal_angles(group, "base", 2)["angle"].to_numpy()
    assert angles[0] == pytest.approx(0, abs=1e-12)
    assert angles[1] == pytest.approx(degrees, rel=1e-6)


def test_directions_of_no_weight_have_no_angle() -> None:
    e = torch.eye(5, dtype=torch.float64)
    full = Directions(e[:, :2], torch.tensor([2.0, 1.0]), e[:, :2])
    thin = Directions(e[:, :1], torch.tensor([2.0]), e[:, 1:2])
    none = full.head(0)
    assert principal_angles(Held(thin, full), "base", 2)["angle"].tolist() == pytest.approx([0])
    assert principal_angles(Held(full, none), "base", 2).empty


def test_sign_conflict_by_hand(tmp_path: Path) -> None:
    base = {"w": torch.zeros(4)}
    experts = {
        "a": {"w": torch.tensor([1.0, 2.0, -3.0, 0.0])},
        "b": {"w": torch.tensor([1.0, -1.0, -1.0, 0.0])},
    }
    groups = TensorGroups(write_suite(tmp_path, base, experts), None, FactorStore(tmp_path / "f"))
    row = sign_conflict(groups, "base").iloc[0]
    # |sums| are 2, 1, 4, 0 and sums of magnitudes 2, 3, 4, 0.
    assert row["conflict"] == pytest.approx(1 - 7 / 9)
    assert row["opposed"] == 1 / 4
    assert row["entries"] == 4
    assert sign_conflict(groups, "average")["conflict"].iloc[0] == pytest.approx(1.0)


def test_sign_conflict_covers_all_weights_or_one(groups: TensorGroups) -> None:
    assert set(sign_conflict(groups, "base")["parameter"]) == set(SHAPES)
    assert sign_conflict(groups, "base", QKV)["parameter"].tolist() == [QKV]


def test_a_suite_without_a_base_says_so(tmp_path: Path) -> None:
    suite = write_suite(tmp_path, None, {t: {"fc1.weight": torch.randn(3, 4)} for t in ("a", "b")})
    groups = TensorGroups(suite, None, FactorStore(tmp_path / "f"))
    for measure in (cosine_similarity, sign_conflict):
        with pytest.raises(SuiteError, match="names no base"):
            measure(groups, "base")
    with pytest.raises(SuiteError, match="names no base"):
        interference_over_rank(groups, "base", [0.5])


def test_one_task_alone_does_not_interfere(suite: Suite, store: FactorStore) -> None:
    alone = TensorGroup(suite, TASKS[:1], FC, store)
    frame = interference_over_rank(alone, "base", [0.5])
    assert frame["interference"].tolist() == [0.0]
    assert principal_angles(alone, "base", 2).empty
    assert list(principal_angles(alone, "base", 2)) == ["first", "second", "index", "angle"]


def test_mean_angles_are_a_symmetric_table_of_scipys_angles(qkv: TensorGroup, suite: Suite) -> None:
    table = mean_angles(principal_angles(qkv, "average", 2))
    square = table.pivot_table(index="first", columns="second", values="angle", sort=False)
    square = square.loc[list(TASKS), list(TASKS)].to_numpy()
    tops = [
        np.linalg.svd(tau.numpy().reshape(tau.shape[0], -1))[2][:2].T
        for tau in task_vectors(suite, QKV, "average")
    ]
    for i, first in enumerate(tops):
        for j, second in enumerate(tops):
            expected = 0.0 if i == j else np.degrees(subspace_angles(first, second)).mean()
            assert square[i, j] == pytest.approx(expected, abs=1e-3)

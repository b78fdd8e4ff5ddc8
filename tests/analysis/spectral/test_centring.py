"""What centring does, against numpy's decomposition and against made task vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.spectral.centring import centring_frame, common_share
from merge_core.errors import SuiteError
from merge_core.factors.store import FactorStore
from merge_core.suites.suite import load_suite
from merge_core.task_vectors import TensorGroup, TensorGroups
from tests.conftest import write_suite

T, SIDE, RANK = 8, 96, 24


def low_rank(g: np.random.Generator, rank: int = RANK) -> np.ndarray:
    """A random matrix of norm 1 whose singular values fall."""
    U, V = (np.linalg.qr(g.standard_normal((SIDE, rank)))[0] for _ in range(2))
    s = np.arange(1, rank + 1) ** -0.7
    return (U * (s / np.linalg.norm(s))) @ V.T


def made_suite(folder: Path, common: float, seed: int = 0) -> TensorGroups:
    """Tasks of which a share of the energy is one and the same matrix, and the rest their own."""
    g = np.random.default_rng(seed)
    shared, base = low_rank(g, 4), g.standard_normal((SIDE, SIDE))
    experts = {
        f"t{i}": base + np.sqrt(common) * shared + np.sqrt(1 - common) * low_rank(g)
        for i in range(T)
    }
    states = {task: {"w.weight": torch.from_numpy(W).float()} for task, W in experts.items()}
    path = write_suite(folder, states, {"w.weight": torch.from_numpy(base).float()})
    suite = load_suite(path)
    return TensorGroups(suite, suite.tasks, FactorStore(folder / "factors"))


def matrix(groups: TensorGroups) -> TensorGroup:
    (group,) = groups
    return group


@pytest.mark.parametrize("k", [1, 9, SIDE])
def test_the_common_share_is_the_mean_over_pairs(tmp_path: Path, k: int) -> None:
    group = matrix(made_suite(tmp_path, 0.2))
    base = group.base.double().numpy()
    tau = [member.double().numpy() - base for member in group.members]
    cut = []
    for each in tau:
        U, s, Vh = np.linalg.svd(each)
        cut.append((U[:, :k] * s[:k]) @ Vh[:k])
    others = [np.vdot(tau[s], cut[t]) for s in range(T) for t in range(T) if s != t]
    wanted = np.mean(others) / np.mean([np.vdot(c, c) for c in cut])
    # Differences of float32 weights of size 1 are known to 1e-7, of entries about 0.01.
    assert common_share(group, k) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    ("common", "falls"), [(0.0, False), (0.03, False), (0.3, True), (0.6, True)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_centring_helps_where_enough_is_in_common(
    tmp_path: Path, common: float, falls: bool, seed: int
) -> None:
    (row,) = centring_frame(made_suite(tmp_path, common, seed), 0.1).to_dict("records")
    assert row["needed"] == 1 / T
    assert (row["common"] > row["needed"]) == falls
    assert (row["centred"] < row["original"]) == falls
    assert row["ratio"] == row["centred"] / row["original"]


def test_equal_experts_have_all_in_common(tmp_path: Path) -> None:
    """Their centred task vectors are zero, and do not interfere."""
    W = torch.randn(SIDE, 8)
    states = {task: {"w.weight": W} for task in ("a", "b", "c")}
    suite = load_suite(write_suite(tmp_path, states, {"w.weight": torch.zeros(SIDE, 8)}))
    groups = TensorGroups(suite, suite.tasks, FactorStore(tmp_path / "factors"))
    (row,) = centring_frame(groups, 0.5).to_dict("records")
    assert row["common"] == pytest.approx(1, abs=1e-6)
    assert row["centred"] == 0 < row["original"]


def test_nothing_learnt_is_nothing_in_common(tmp_path: Path) -> None:
    W = torch.randn(8, 8)
    states = {task: {"w.weight": W} for task in ("a", "b", "c")}
    suite = load_suite(write_suite(tmp_path, states, {"w.weight": W}))
    groups = TensorGroups(suite, suite.tasks, FactorStore(tmp_path / "factors"))
    (row,) = centring_frame(groups, 0.5).to_dict("records")
    assert row["common"] == row["original"] == row["centred"] == 0
    assert np.isnan(row["ratio"])


def test_a_base_is_needed(tmp_path: Path) -> None:
    states = {task: {"w.weight": torch.randn(8, 8)} for task in ("a", "b")}
    suite = load_suite(write_suite(tmp_path / "s", states, None))
    groups = TensorGroups(suite, suite.tasks, FactorStore(tmp_path / "factors"))
    with pytest.raises(SuiteError, match="base"):
        centring_frame(groups, 0.5)

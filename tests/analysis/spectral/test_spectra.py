"""Spectra against numpy's own decomposition and against their definitions."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.spectral.noise_bounds import gavish_donoho_cut, noise_edge
from analysis.spectral.spectra import (
    cumulative_energy,
    cuts,
    effective_rank,
    participation_ratio,
    parts_of,
    spectral_summary,
    spectrum,
    stable_rank,
)
from merge_core.errors import Cancelled, SuiteError
from merge_core.factors.store import FactorStore
from merge_core.progress import Progress
from merge_core.suites.suite import Suite
from merge_core.task_vectors import TensorGroup, TensorGroups
from tests.analysis.tiny_suite import BIAS, CONV, MATRICES, QKV, TASKS, task_vectors, write_suite

SPECTRA = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30).map(
    lambda values: np.sort(values)[::-1]
)
RANKS = (stable_rank, effective_rank, participation_ratio)
ALGEBRA = settings(max_examples=25, deadline=None)


@pytest.mark.parametrize("measure", RANKS)
@pytest.mark.parametrize("k", [1, 3, 8])
def test_k_equal_directions_count_as_k(measure, k: int) -> None:
    S = np.concatenate([np.full(k, 2.5), np.zeros(8 - k)])
    assert measure(S) == pytest.approx(k)
    assert measure(torch.from_numpy(S).float()) == pytest.approx(k)


def test_ranks_of_a_known_spectrum() -> None:
    S = np.array([2.0, 1.0, 1.0])
    assert stable_rank(S) == pytest.approx(6 / 4)
    assert participation_ratio(S) == pytest.approx(36 / 18)
    # p = (1/2, 1/4, 1/4): the entropy is 1.5 bits.
    assert effective_rank(S) == pytest.approx(2**1.5)
    assert cumulative_energy(S) == pytest.approx([4 / 6, 5 / 6, 1])


@ALGEBRA
@given(SPECTRA, st.floats(1e-3, 1e3))
def test_ranks_lie_between_one_and_r_and_ignore_scale(S: np.ndarray, scale: float) -> None:
    for measure in RANKS:
        assert 1 - 1e-9 <= measure(S) <= S.size + 1e-9
        assert measure(scale * S) == pytest.approx(measure(S), rel=1e-9)
    assert stable_rank(S) <= participation_ratio(S) * (1 + 1e-9)


@ALGEBRA
@given(SPECTRA)
def test_energy_adds_up_to_exactly_one(S: np.ndarray) -> None:
    assert cumulative_energy(S)[-1] == 1.0


def test_zero_spectrum_has_zero_of_everything() -> None:
    S = np.zeros(5)
    assert [measure(S) for measure in RANKS] == [0, 0, 0]
    assert cumulative_energy(S).tolist() == [0] * 5


@pytest.mark.parametrize("origin", ["base", "average"])
@pytest.mark.parametrize("name", MATRICES)
def test_spectrum_is_numpys(suite: Suite, store: FactorStore, name: str, origin) -> None:
    frame = spectrum(TensorGroup(suite, TASKS, name, store), origin)
    assert list(frame) == ["task", "origin", "index", "share", "sigma", "energy"]
    for task, tau in zip(TASKS, task_vectors(suite, name, origin), strict=True):
        part = frame[frame["task"] == task]
        S = np.linalg.svd(tau.flatten(1).numpy(), compute_uv=False)
        assert part["sigma"].to_numpy() == pytest.approx(S, rel=1e-5)
        assert part["index"].tolist() == list(range(1, S.size + 1))
        assert part["share"].to_numpy() == pytest.approx(np.arange(1, S.size + 1) / S.size)
        assert part["energy"].to_numpy() == pytest.approx(np.cumsum(S**2) / np.sum(S**2), rel=1e-5)


def test_fused_qkv_splits_by_rows(suite: Suite, qkv: TensorGroup) -> None:
    assert parts_of(qkv) == ("whole", "q", "k", "v")
    energy = {}
    for place, part in enumerate("qkv"):
        frame = spectrum(qkv, "base", part)
        rows = task_vectors(suite, QKV, "base")[1][4 * place : 4 * place + 4]
        S = np.linalg.svd(rows.numpy(), compute_uv=False)
        mine = frame[frame["task"] == TASKS[1]]["sigma"].to_numpy()
        assert mine == pytest.approx(S, rel=1e-4)
        energy[part] = np.sum(mine**2)
    whole = spectrum(qkv, "base")
    assert sum(energy.values()) == pytest.approx(
        np.sum(whole[whole["task"] == TASKS[1]]["sigma"] ** 2), rel=1e-4
    )


def test_only_fused_matrices_have_parts(fc: TensorGroup, suite: Suite, store) -> None:
    assert parts_of(fc) == ("whole",)
    assert parts_of(TensorGroup(suite, TASKS, BIAS, store)) == ("whole",)
    with pytest.raises(ValueError, match="no part 'q'"):
        spectrum(fc, "base", "q")


@pytest.mark.parametrize("part", ["whole", "v"])
def test_cuts_count_what_passes_the_bounds(qkv: TensorGroup, part) -> None:
    frame = cuts(qkv, "average", part)
    assert frame["task"].tolist() == list(TASKS)
    rows = 12 if part == "whole" else 4
    spectra = spectrum(qkv, "average", part)
    for row in frame.itertuples():
        S = spectra[spectra["task"] == row.task]["sigma"].to_numpy()
        assert row.noise_edge == pytest.approx(noise_edge(S, rows, 8))
        assert row.gavish_donoho == pytest.approx(gavish_donoho_cut(S, rows, 8))
        assert row.noise_rank == sum(row.noise_edge < S)
        assert row.gavish_donoho_rank == sum(row.gavish_donoho < S)


def test_summary_has_every_matrix_and_task(suite: Suite, groups: TensorGroups) -> None:
    seen: list[tuple[int, int, str]] = []
    frame = spectral_summary(groups, "base", Progress(lambda *step: seen.append(step)))
    assert len(frame) == len(MATRICES) * len(TASKS)
    assert [step[:2] for step in seen] == [(1, 3), (2, 3), (3, 3)]
    assert {step[2] for step in seen} == set(MATRICES)
    for row in frame.itertuples():
        tau = task_vectors(suite, row.parameter, "base")[TASKS.index(row.task)].flatten(1)
        assert (row.rows, row.columns) == tuple(tau.shape)
        S = np.linalg.svd(tau.numpy(), compute_uv=False)
        assert row.frobenius == pytest.approx(float(tau.norm()), rel=1e-5)
        assert row.spectral_norm == pytest.approx(S[0], rel=1e-5)
        # min(m, n) is below 13 here, so 8 % means one direction.
        assert row.top_share == pytest.approx(1 / row.stable_rank, rel=1e-5)
        assert row.effective_rank == pytest.approx(effective_rank(S), rel=1e-4)
        assert row.participation_ratio == pytest.approx(participation_ratio(S), rel=1e-4)
        assert row.energy_rank_90 == np.sum(np.cumsum(S**2) < 0.9 * np.sum(S**2)) + 1
        assert row.noise_rank == np.sum(noise_edge(S, *tau.shape) < S)
    kernel = frame[frame["parameter"] == CONV].iloc[0]
    assert (kernel["rows"], kernel["columns"]) == (6, 12)


def test_a_summary_of_parts_is_that_of_each(suite: Suite, groups: TensorGroups) -> None:
    frame = spectral_summary(groups, "base", apart=True)
    assert list(frame[frame["parameter"] == QKV]["part"].unique()) == ["q", "k", "v"]
    others = frame[frame["parameter"] != QKV]
    whole = spectral_summary(groups, "base")
    pd.testing.assert_frame_equal(
        others.reset_index(drop=True), whole[whole["parameter"] != QKV].reset_index(drop=True)
    )
    assert set(whole["part"]) == {"whole"}
    fused = task_vectors(suite, QKV, "base")
    for row in frame[frame["parameter"] == QKV].itertuples():
        tau = fused[TASKS.index(row.task)].chunk(3)["qkv".index(row.part)]
        S = np.linalg.svd(tau.numpy(), compute_uv=False)
        assert (row.rows, row.columns) == tuple(tau.shape)
        assert row.spectral_norm == pytest.approx(S[0], rel=1e-5)
        assert row.stable_rank == pytest.approx(float(np.sum(S**2) / S[0] ** 2), rel=1e-5)


def test_summary_stops_when_cancelled(groups: TensorGroups) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        spectral_summary(groups, "average", Progress(cancel=cancel))


def test_a_task_that_changed_nothing_has_zeros_not_nan(tmp_path: Path) -> None:
    base = {"fc1.weight": torch.randn(5, 7, generator=torch.Generator().manual_seed(0))}
    suite = write_suite(tmp_path, base, {"same": base, "other": {"fc1.weight": torch.ones(5, 7)}})
    frame = spectral_summary(TensorGroups(suite, None, FactorStore(tmp_path / "f")), "base")
    same = frame[frame["task"] == "same"].iloc[0]
    numbers = frame.select_dtypes("number")
    assert np.isfinite(numbers.to_numpy()).all()
    assert same[["frobenius", "stable_rank", "effective_rank", "top_share"]].tolist() == [0] * 4
    assert same["noise_rank"] == same["energy_rank_90"] == 0


def test_a_suite_without_a_base_has_spectra_about_the_average_only(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    experts = {t: {"fc1.weight": torch.randn(4, 6, generator=g)} for t in ("a", "b")}
    groups = TensorGroups(write_suite(tmp_path, None, experts), None, FactorStore(tmp_path / "f"))
    frame = spectral_summary(groups, "average")
    # C_1 = −C_2 for two experts.
    assert frame["frobenius"].iloc[0] == pytest.approx(frame["frobenius"].iloc[1])
    with pytest.raises(SuiteError, match="names no base"):
        spectral_summary(groups, "base")

"""A matrix as it is built up, against a float64 decomposition of the stored weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from analysis.figures.pictures.build_up import build_up_figure
from analysis.spectral.build_up import build_up, build_up_shown, counts_shown
from merge_core.errors import SuiteError
from merge_core.factors.store import FactorStore
from merge_core.task_vectors import TensorGroup, TensorGroups
from tests.analysis.tiny_suite import FC, MATRICES, random_states, write_suite


def pictures(group: TensorGroup, task: str, side: int = 100) -> dict[tuple[str, int], np.ndarray]:
    frame = build_up(group, task, side)
    return {
        (part, k): cells.pivot(index="row", columns="column", values="value").to_numpy()
        for (part, k), cells in frame.groupby(["part", "k"])
    }


@pytest.fixture
def group(tmp_path: Path) -> TensorGroup:
    suite = write_suite(tmp_path / "tiny", *random_states())
    return TensorGroup(suite, suite.tasks, FC, FactorStore(tmp_path / "factors"))


def test_it_is_the_truncated_sum_of_a_float64_decomposition(group: TensorGroup) -> None:
    matrices = group.experts.double().numpy()
    mean = matrices.mean(0)
    decomposed = [np.linalg.svd(matrix - mean, full_matrices=False) for matrix in matrices]
    u, s, vt = decomposed[0]
    found = pictures(group, group.tasks[0])
    # The sign of a pair of singular vectors is anyone's choice: rows and columns may be reversed.
    rows, columns = np.argsort(u[:, 0]), np.argsort(vt[0])
    flipped = np.abs(found["average", 0] - mean[rows][:, columns]).max() > 1e-4
    if flipped:
        rows, columns = rows[::-1], columns[::-1]
    np.testing.assert_allclose(found["average", 0], mean[rows][:, columns], atol=1e-6)
    for k in counts_shown(group):
        sums = [(U[:, :k] * S[:k]) @ V[:k] for U, S, V in decomposed]
        for part, wanted in (("change", sums[0]), ("sum", np.sum(sums, 0))):
            np.testing.assert_allclose(
                found[part, k], wanted[rows][:, columns], atol=1e-4 * s[0], err_msg=f"{part} {k}"
            )
    assert np.abs(found["sum", len(s)]).max() < 1e-5 * s[0]


def test_energy_grows_to_one_and_few_entries_are_drawn(group: TensorGroup) -> None:
    frame = build_up(group, group.tasks[1], side=5)
    assert frame["row"].max() == frame["column"].max() == 4
    s = np.linalg.svd(
        (group.experts[1] - group.experts.double().mean(0)).double().numpy(), compute_uv=False
    )
    energies = frame[frame["part"] == "change"].groupby("k")["energy"].first()
    wanted = (np.cumsum(s**2) / np.sum(s**2))[energies.index - 1]
    np.testing.assert_allclose(energies, wanted, rtol=1e-5)


def test_one_expert_and_equal_experts_are_refused(tmp_path: Path) -> None:
    base, states = random_states()
    first = next(iter(states))
    suite = write_suite(tmp_path / "tiny", base, dict.fromkeys(states, states[first]))
    store = FactorStore(tmp_path / "factors")
    with pytest.raises(SuiteError, match="does not differ"):
        build_up(TensorGroup(suite, suite.tasks, FC, store), first)
    with pytest.raises(SuiteError, match="two tasks"):
        build_up(TensorGroup(suite, (first,), FC, store), first)


def test_the_smallest_matrix_that_the_task_changes_is_shown(tmp_path: Path) -> None:
    base, states = random_states()
    smallest, second = sorted(MATRICES, key=lambda name: base[name].numel())[:2]
    for name in (smallest, second):
        suite = write_suite(tmp_path / name, base, states)
        groups = TensorGroups(suite, suite.tasks, FactorStore(tmp_path / "factors"))
        assert build_up_shown(groups, suite.tasks[0])["layer"].unique().tolist() == [name]
        for state in states.values():  # as adapters leave the matrices that they do not adapt
            state[name] = base[name]
    for state in states.values():
        state.update({name: base[name] for name in MATRICES})
    suite = write_suite(tmp_path / "equal", base, states)
    with pytest.raises(SuiteError, match="in no matrix"):
        build_up_shown(TensorGroups(suite, suite.tasks, FactorStore()), suite.tasks[0])


def test_the_figure_adds_up_at_every_step(group: TensorGroup) -> None:
    task, scale = group.tasks[0], 1.5
    found = pictures(group, task)
    frame = build_up(group, task, 100)
    figure = build_up_figure(frame, task, len(group.tasks), scale, "A title")
    assert [f.name for f in figure.frames] == [str(k) for k in counts_shown(group)]
    for each in figure.frames:
        k = int(each.name)
        change, expert, total, merge = (np.asarray(trace.z) for trace in each.data)
        np.testing.assert_allclose(expert, found["average", 0] + found["change", k], atol=1e-6)
        np.testing.assert_allclose(total, scale * found["sum", k], atol=1e-6)
        np.testing.assert_allclose(merge - found["average", 0], total, atol=1e-5)
        np.testing.assert_allclose(expert - found["average", 0], change, atol=1e-5)

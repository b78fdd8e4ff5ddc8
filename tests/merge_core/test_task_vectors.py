"""Task vectors about both origins, and what a streamed merge holds in memory."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.errors import SuiteError
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import make_recipe
from merge_core.suites.estimates import IMPORTS_BYTES
from merge_core.suites.suite import Suite
from merge_core.task_vectors import Origin, TensorGroup, TensorGroups, mean
from tests.merge_core.float64_reference import svd_k

Make = Callable[..., Suite]


def group_of(suite: Suite, name: str, tasks: list[str] | None = None) -> TensorGroup:
    return TensorGroup(suite, suite.select(tasks), name, FactorStore())


def test_task_vectors_about_both_origins(synthetic_suite: Make) -> None:
    suite = synthetic_suite(seed=2)
    assert suite.base is not None
    for name in suite.parameters:
        if not suite.base.info(name).is_floating:
            continue
        group = group_of(suite, name)
        thetas = np.stack([suite.expert(t).tensor(name).double().numpy() for t in suite.tasks])
        base = suite.base.tensor(name).double().numpy()
        for origin, about in (("base", base), ("average", thetas.mean(0))):
            np.testing.assert_allclose(group.origin(origin).numpy(), about, atol=1e-6)
            np.testing.assert_allclose(
                group.task_vectors(origin).numpy(), thetas - about, atol=1e-6
            )
        assert group.task_vectors("average").sum(0).abs().max() < 1e-5


def test_the_average_is_of_the_chosen_tasks_only(synthetic_suite: Make) -> None:
    suite = synthetic_suite(4, seed=2)
    group = group_of(suite, "norm.weight", ["task3", "task1"])
    expected = (
        suite.expert("task1").tensor("norm.weight") + suite.expert("task3").tensor("norm.weight")
    ) / 2
    torch.testing.assert_close(group.average, expected)
    assert group.tasks == ("task1", "task3")


@pytest.mark.parametrize("origin", ["base", "average"])
def test_sums_of_truncations_keep_the_kernels_shape_and_follow_the_rank(
    synthetic_suite: Make, origin: str
) -> None:
    suite = synthetic_suite(seed=3)
    group = group_of(suite, "conv.weight")
    vectors = group.task_vectors(origin).double().numpy().reshape(3, 5, 27)
    for k in (1, 2, 1, 3, 4, 5, 9, 2):  # back and forth, to and beyond r = 5
        got = group.sum_of_truncations(origin, k)
        assert got.shape == (5, 3, 3, 3)
        expected = sum(svd_k(v, k) for v in vectors)
        np.testing.assert_allclose(got.numpy().reshape(5, 27), expected, atol=2e-5)


def test_a_group_forgets_what_it_read_and_reads_it_again(
    synthetic_suite: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = synthetic_suite(seed=3)
    reads: list[str] = []
    original = Checkpoint.read_unchecked

    def counted(self: Checkpoint, name: str) -> torch.Tensor:
        reads.append(name)
        return original(self, name)

    monkeypatch.setattr(Checkpoint, "read_unchecked", counted)
    group = group_of(suite, "norm.weight")
    first = group.average.clone()
    _ = group.experts, group.base, group.average
    assert len(reads) == 4
    group.release()
    assert torch.equal(group.average, first)
    assert len(reads) == 7


def test_iterating_holds_one_parameter_at_a_time_unless_asked_to_keep(
    synthetic_suite: Make,
) -> None:
    suite = synthetic_suite(3, shapes={f"l{i}.weight": (8, 8) for i in range(12)}, counter=False)
    gc.collect()
    gc.freeze()  # what was there before is not looked through again each time
    for keep in (False, True):
        stacks, alive = [], []
        groups = TensorGroups(suite, None, FactorStore(), keep=keep)
        for group in groups:
            stacks += [weakref.ref(group.experts), weakref.ref(group.average)]
            gc.collect()
            alive.append(sum(stack() is not None for stack in stacks))
        assert alive == ([2 * i for i in range(1, 13)] if keep else [2] * 12)
        assert len(groups) == 12
    gc.unfreeze()


def test_shapes_that_differ_and_missing_bases_are_told(suite_of: Make) -> None:
    suite = suite_of({"x": {"w": torch.ones(2)}, "y": {"w": torch.ones(3)}})
    with pytest.raises(SuiteError, match=r"'w'.*'y'.*\(3,\), others have \(2,\)"):
        _ = group_of(suite, "w").experts
    suite = suite_of({"x": {"w": torch.ones(2)}, "y": {"w": torch.ones(2)}})
    with pytest.raises(SuiteError, match="no base"):
        _ = group_of(suite, "w").base
    with pytest.raises(SuiteError, match="no base"):
        group_of(suite, "w").truncations("base", 1)
    with pytest.raises(SuiteError, match="'nope' is not merged: no member has it"):
        group_of(suite, "nope")


STREAMED_METHODS = ("average", "task_arithmetic", "ties", "cart")
STREAMED = """
    import json, sys, threading, time
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from merge_core.output.model_folder import merge_to_folder
    from merge_core.factors.store import FactorStore
    from merge_core.suites.preflight import preflight
    from merge_core.merging.recipe import make_recipe
    from merge_core.suites.suite import load_suite

    def anonymous():  # resident memory that is not a mapped file
        resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
        return (resident - shared) * 4096

    def merge(method, folder):
        recipe = make_recipe({"suite": str(suite.path), "method": method})
        merge_to_folder(recipe, suite, Path(folder), FactorStore(memory_bytes=0))

    suite = load_suite(sys.argv[1])
    found = {}
    for method in sys.argv[2:]:
        peak, done = [anonymous()], threading.Event()
        def watch():
            while not done.wait(0.001):
                peak.append(anonymous())
        watcher = threading.Thread(target=watch)
        watcher.start()
        merge(method, suite.root / f"out-{method}")
        done.set()
        watcher.join()
        found[method] = max(peak) - peak[0]
    report = preflight(suite)
    print(json.dumps({"peaks": found, "estimate": report.memory_bytes, "disk": report.disk_bytes}))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_a_streamed_merge_takes_less_memory_than_one_model(
    synthetic_suite: Make, tmp_path: Path
) -> None:
    shapes: dict[str, tuple[int, ...]] = {f"l{i}.weight": (256, 256) for i in range(8)}
    shapes |= {f"l{i}.embed": (512, 512) for i in range(48)}
    suite = synthetic_suite(3, shapes=shapes, counter=False)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STREAMED), str(suite.path), *STREAMED_METHODS],
        capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "MERGESCOPE_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["disk"] == 4 * (8 * 256 * 256 + 48 * 512 * 512)
    # In memory it takes three experts, the base and the result: five times the model at least.
    for method, peak in found["peaks"].items():
        assert peak < 0.8 * found["disk"], method
        assert peak < 1.25 * (found["estimate"] - IMPORTS_BYTES), method


def test_a_sum_asked_for_in_one_thread_is_not_another_threads(
    synthetic_suite: Make, tmp_path: Path
) -> None:
    suite = synthetic_suite(tasks=4)
    group = TensorGroup(suite, suite.tasks, suite.matrices[0], FactorStore(tmp_path))
    expected = {k: group.sum_of_truncations("average", k).clone() for k in (1, 2)}
    assert not torch.equal(expected[1], expected[2])

    class Overtaken(dict[Origin, tuple[int, torch.Tensor]]):
        """Whatever is kept, another thread keeps its own at once."""

        def __setitem__(self, origin: Origin, held: tuple[int, torch.Tensor]) -> None:
            super().__setitem__(origin, (2, expected[2]))

    group._sums = Overtaken()
    torch.testing.assert_close(group.sum_of_truncations("average", 1), expected[1])


def test_a_large_suite_is_not_held_in_memory(
    synthetic_suite: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = synthetic_suite(tasks=3)
    recipe = make_recipe({"suite": str(suite.path), "method": "cart"})
    held = MergeSession(suite, None, FactorStore(tmp_path))
    small = held.merge(recipe)
    monkeypatch.setattr("merge_core.merging.engine.HELD_BYTES", 100)
    streamed = MergeSession(suite, None, FactorStore(tmp_path))
    again = streamed.merge(recipe)
    assert all(torch.equal(again[name], value) for name, value in small.items())
    assert any("members" in vars(group) for group in held.groups)
    assert not any("members" in vars(group) for group in streamed.groups)


@given(st.integers(1, 5), st.integers(0, 400), st.integers(0, 99))
def test_the_mean_does_not_depend_on_its_pieces(T: int, n: int, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    members = [torch.randn(n, 3, generator=source) for _ in range(T)]
    exact = np.mean([m.double().numpy() for m in members], axis=0)
    for piece in (7, 1 << 17):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("merge_core.means.PIECE", piece)
            np.testing.assert_allclose(mean(members).numpy(), exact, rtol=1e-6, atol=1e-6)

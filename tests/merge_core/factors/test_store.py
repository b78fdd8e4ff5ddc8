"""Factors are computed once, kept by content, and repaired when damaged."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from merge_core.errors import SuiteError
from merge_core.factors.low_rank import Directions, Truncations
from merge_core.factors.store import FactorStore, TaskMatrix
from merge_core.suites.suite import Suite
from merge_core.task_vectors import TensorGroups

A = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def of(value: Tensor, *key: str) -> TaskMatrix:
    member, origin, name = key
    return TaskMatrix(
        (member, origin, name),
        (6, 4),
        torch.float32,
        lambda dtype, part: value[part].to(dtype),
        lambda: 0.0,
    )


def ask(store: FactorStore, name: str = "w", value: Tensor = A) -> Truncations:
    return store.truncations(of(value, "expert", "base", name), 2)


def ask_again(store: FactorStore, name: str = "w", value: Tensor = A) -> Truncations:
    before = store.decompositions
    found = ask(store, name, value)
    assert store.decompositions == before, "decomposed again"
    return found


def check(found: Truncations, expected: Tensor = A) -> None:
    np.testing.assert_allclose(found.truncate(99).numpy(), expected.numpy(), atol=1e-5)


def stored_files(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file()]


def test_a_second_request_never_decomposes_again(tmp_path: Path) -> None:
    store = FactorStore(tmp_path)
    check(ask(store))
    check(ask_again(store))
    assert store.decompositions == 1


def test_factors_survive_the_process_that_made_them(tmp_path: Path) -> None:
    def parts(store: FactorStore) -> tuple[Tensor, ...]:
        found: Directions = store.directions(of(A, "expert", "base", "w"))
        return found.U, found.S, found.V

    first, fresh = parts(FactorStore(tmp_path)), FactorStore(tmp_path)
    second = parts(fresh)
    assert fresh.decompositions == 0
    for a, b in zip(first, second, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_every_part_of_the_key_counts(tmp_path: Path) -> None:
    store = FactorStore(tmp_path)
    keys = [("m", "o", "p"), ("M", "o", "p"), ("m", "O", "p"), ("m", "o", "P"), ("mo", "", "p")]
    for i, key in enumerate(keys):
        check(store.truncations(of((i + 1) * A, *key), 2), (i + 1) * A)
    assert store.decompositions == len(keys)
    for i, key in enumerate(keys):
        check(store.truncations(of((i + 1) * A, *key), 2), (i + 1) * A)
    assert store.decompositions == len(keys)


def test_the_two_routes_do_not_share_factors(tmp_path: Path) -> None:
    ask(FactorStore(tmp_path, route="gram"))
    other = FactorStore(tmp_path, route="svd")
    check(ask(other))
    assert other.decompositions == 1


@pytest.mark.parametrize(
    "damage",
    ["empty", "cut", "text", "zeroed", "foreign", "nan", "another dtype", "of another matrix"],
)
def test_a_damaged_file_is_computed_afresh_and_repaired(tmp_path: Path, damage: str) -> None:
    ask(FactorStore(tmp_path))
    (path,) = stored_files(tmp_path)
    good = path.read_bytes()
    damaged = {
        "empty": b"",
        "cut": good[: len(good) // 2],
        "text": b"hello",
        "zeroed": good[:-64] + bytes(64),  # what a power cut leaves of the last pages
        "foreign": good.replace(b'"vectors"', b'"vektors"'),
        "nan": good[:-64] + b"\xff" * 64,
        "another dtype": good.replace(b'"F32"', b'"I32"'),
        "of another matrix": good.replace(b"[4,4]", b"[2,8]"),
    }[damage]
    path.write_bytes(damaged)
    fresh = FactorStore(tmp_path)
    check(ask(fresh))
    assert fresh.decompositions == 1
    assert path.read_bytes() == good
    check(ask_again(FactorStore(tmp_path)))


def test_random_damage_to_a_stored_header_never_escapes(tmp_path: Path) -> None:
    ask(FactorStore(tmp_path))
    (path,) = stored_files(tmp_path)
    good, source = path.read_bytes(), random.Random(0)
    for _ in range(200):
        data = bytearray(good)
        data[source.randrange(len(good) // 2)] = source.randrange(256)
        path.write_bytes(data)
        check(ask(FactorStore(tmp_path)))


def test_a_folder_that_cannot_be_written_only_costs_time(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    store = FactorStore(blocked / "factors")
    check(ask(store))
    check(ask_again(store))  # still remembered in memory
    check(ask(FactorStore(blocked / "factors")))
    assert blocked.read_text() == "not a folder"


def test_the_memory_limit_evicts_what_was_used_longest_ago(tmp_path: Path) -> None:
    one = (4 + 4 + 4 * 4) * 4  # bytes of S, errors and the short side
    store = FactorStore(tmp_path, memory_bytes=2 * one)
    for name in ("a", "b"):
        ask(store, name=name)
    ask_again(store, "a")  # now b is the oldest
    ask(store, name="c")
    for path in stored_files(tmp_path):
        path.unlink()
    for name in ("a", "c"):
        ask_again(store, name)
    with pytest.raises(AssertionError, match="decomposed again"):
        ask_again(store, "b")


def test_factors_beyond_the_memory_limit_still_come_from_disk(tmp_path: Path) -> None:
    store = FactorStore(tmp_path, memory_bytes=10)
    check(ask(store))
    check(ask_again(store))
    assert store.decompositions == 1


def test_many_threads_get_the_same_right_answers(tmp_path: Path) -> None:
    store = FactorStore(tmp_path, memory_bytes=1000)
    start, faults = threading.Barrier(4), []

    def work() -> None:
        start.wait()
        try:
            for i in range(20):
                check(ask(store, str(i), (i + 1) * A), (i + 1) * A)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert all(
        p.suffix == ".safetensors" and not p.name.startswith(".") for p in stored_files(tmp_path)
    )
    assert len(stored_files(tmp_path)) == 20


def test_a_failing_matrix_leaves_nothing_behind(tmp_path: Path) -> None:
    store = FactorStore(tmp_path)

    def fails(dtype: torch.dtype, part: slice) -> Tensor:
        raise SuiteError("unreadable")

    with pytest.raises(SuiteError):
        store.truncations(TaskMatrix(("e", "b", "w"), (6, 4), torch.float32, fails, float), 2)
    assert stored_files(tmp_path) == []
    check(ask(store))


@pytest.mark.parametrize("origin", ["base", "average"])
def test_a_suites_factors_are_those_of_its_task_vectors(
    synthetic_suite: Callable[..., Suite], tmp_path: Path, origin: str
) -> None:
    suite = synthetic_suite()
    store = FactorStore(tmp_path)
    for group in TensorGroups(suite, None, store):
        if not group.decomposed:
            continue
        states = [suite.expert(t).tensor(group.name).double().numpy() for t in suite.tasks]
        assert suite.base is not None
        about = (
            suite.base.tensor(group.name).double().numpy() if origin == "base" else sum(states) / 3
        )
        for place, state in enumerate(states):
            expected = np.linalg.svd((state - about).reshape(len(state), -1), full_matrices=False)
            values = group.singular_values(origin)[place]
            np.testing.assert_allclose(values.numpy(), expected[1], atol=1e-5)
            k = 2
            best = (expected[0][:, :k] * expected[1][:k]) @ expected[2][:k]
            got = group.truncations(origin, k)[place].truncate(k)
            np.testing.assert_allclose(got.numpy(), best, atol=2e-5)
    assert store.decompositions == 3 * len(suite.matrices)


def test_factors_are_shared_between_suites_with_the_same_content_only(
    synthetic_suite: Callable[..., Suite], tmp_path: Path
) -> None:
    def decompositions(suite: Suite, tasks: list[str] | None, origin: str) -> int:
        store = FactorStore(tmp_path)
        for group in TensorGroups(suite, tasks, store):
            if group.decomposed:
                group.singular_values(origin)
        return store.decompositions

    n = len(synthetic_suite().matrices)
    assert decompositions(synthetic_suite(seed=5), None, "average") == 3 * n
    assert decompositions(synthetic_suite(seed=5, name="moved"), None, "average") == 0
    assert decompositions(synthetic_suite(seed=5), ["task2", "task1"], "average") == 2 * n
    assert decompositions(synthetic_suite(seed=5), ["task1", "task2"], "average") == 0
    assert decompositions(synthetic_suite(seed=5), ["task0", "task1"], "average") == 2 * n
    assert decompositions(synthetic_suite(seed=5), None, "base") == 3 * n
    assert decompositions(synthetic_suite(seed=5), ["task1"], "base") == 0
    assert decompositions(synthetic_suite(seed=6), None, "base") == 3 * n

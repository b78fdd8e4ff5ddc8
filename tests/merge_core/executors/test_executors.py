"""The same results from every executor; a worker that is killed loses nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from merge_core.errors import Cancelled, ExecutorError, SuiteError
from merge_core.executors import base
from merge_core.executors.base import Executor
from merge_core.executors.choose import choose_executor
from merge_core.executors.local import Processes, Serial, Threads
from merge_core.executors.ray import Ray
from merge_core.factors.store import FactorStore
from merge_core.merging.recipe import make_recipe
from merge_core.output.model_folder import merge_to_folder
from merge_core.progress import Progress
from merge_core.suites.suite import Suite
from tests.work import dies, dies_once, square

Make = Callable[..., Suite]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def plain_main(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of pages leave a page as ``__main__``, which spawned processes would run."""
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))


@pytest.fixture(scope="module")
def ray() -> Iterator[Ray]:
    yield Ray(workers=2)
    sys.modules["ray"].shutdown()


def markers(folder: Path) -> list[str]:
    folder.mkdir()
    return [str(folder / f"{i}{'.dies' if i in (2, 3) else ''}") for i in range(7)]


class TestThreads:
    def test_results_come_in_the_items_order(self, two_threads: None) -> None:
        def slow_first(item: int) -> tuple[int, int, str]:
            time.sleep(0.02 if item % 2 == 0 else 0)
            return item, torch.get_num_threads(), threading.current_thread().name

        results = list(Threads().map(slow_first, range(9)))
        assert [item for item, _, _ in results] == list(range(9))
        assert {threads for _, threads, _ in results} == {1}
        assert len({name for _, _, name in results}) == 2
        assert torch.get_num_threads() == 2  # the caller's own number stays

    def test_threads_that_begin_later_have_torchs_own_number(self, two_threads: None) -> None:
        for _ in Threads().map(lambda item: item, range(4)):
            pass
        seen: list[int] = []
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert seen == [2]

    def test_one_worker_works_in_place(self) -> None:
        names = list(Threads(1).map(lambda _: threading.current_thread().name, range(3)))
        assert set(names) == {threading.current_thread().name}

    def test_a_fault_is_raised_where_it_belongs(self) -> None:
        done = []

        def third_fails(item: int) -> int:
            if item == 2:
                raise ValueError("the third")
            done.append(item)
            return item

        results = Threads(2).map(third_fails, range(100))
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(ValueError, match="the third"):
            next(results)
        assert len(done) < 10  # what waited was dropped

    def test_items_are_taken_only_a_few_ahead(self) -> None:
        taken = []

        def items() -> Iterator[int]:
            for item in range(1000):
                taken.append(item)
                yield item

        results = Threads(2).map(lambda item: item, items())
        next(results)
        assert len(taken) <= 7
        results.close()  # type: ignore[attr-defined]  # a generator

    def test_cancelling_ends_the_wait(self) -> None:
        cancel, release = threading.Event(), threading.Event()
        results = Threads(2).map(lambda _: release.wait(30), range(9), cancel)
        timers = [threading.Timer(0.2, cancel.set), threading.Timer(0.6, release.set)]
        for timer in timers:
            timer.start()
        begun = time.monotonic()
        with pytest.raises(Cancelled):
            next(results)
        # What was begun is let finish, so the wait is the second timer's, not the function's.
        assert time.monotonic() - begun < 20


def test_serial_stops_between_two_items() -> None:
    cancel = threading.Event()
    results = Serial().map(square, range(3), cancel)
    assert next(results) == (0, 1)
    cancel.set()
    with pytest.raises(Cancelled):
        next(results)


class TestProcesses:
    def test_a_killed_process_is_replaced_and_its_item_run_again(self, tmp_path: Path) -> None:
        items = [*markers(tmp_path / "m"), str(tmp_path / "m/7.fails")]
        results = Processes(2).map(dies_once, items)
        assert [next(results) for _ in range(7)] == items[:7]
        with pytest.raises(SuiteError, match="no such suite"):
            next(results)
        assert not multiprocessing.active_children()

    def test_one_that_always_dies_is_given_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(base, "RETRIES", 0)
        with pytest.raises(ExecutorError, match="died 1 times around 5"):
            list(Processes(1).map(dies, [5]))


class TestRay:
    def test_results_are_in_order_and_killed_workers_lose_nothing(
        self, ray: Ray, tmp_path: Path
    ) -> None:
        assert list(ray.map(square, range(9))) == [(i * i, 1) for i in range(9)]
        items = [*markers(tmp_path / "m"), str(tmp_path / "m/7.fails")]
        results = ray.map(dies_once, items)
        assert [next(results) for _ in range(7)] == items[:7]
        with pytest.raises(SuiteError, match="no such suite"):
            next(results)

    def test_one_that_always_dies_is_given_up(
        self, ray: Ray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("merge_core.executors.ray.RETRIES", 0)
        with pytest.raises(ExecutorError, match="died 1 times"):
            list(ray.map(dies, [5]))

    def test_a_cluster_that_does_not_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import ray as library

        def refuse(**options: Any) -> None:
            assert options["address"] == "ray://nowhere:10001"
            raise ConnectionError("ray client connection timeout")

        monkeypatch.setattr(library, "is_initialized", lambda: False)
        monkeypatch.setattr(library, "init", refuse)
        with pytest.raises(ExecutorError, match=r"ray://nowhere:10001 does not answer.*timeout"):
            choose_executor("ray://nowhere:10001")

    def test_without_ray_it_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(ExecutorError, match=r"pip install 'mergescope\[cluster\]'"):
            choose_executor("ray:2")


class TestNames:
    def test_names_with_a_number_of_workers(self) -> None:
        assert type(choose_executor("serial")) is Serial
        threads, processes = choose_executor("threads:3"), choose_executor("processes:2")
        assert isinstance(threads, Threads)
        assert threads.workers == 3
        assert isinstance(processes, Processes)
        assert processes.workers == 2

    @pytest.mark.parametrize("text", ["", "gpu", "threads:0", "threads:-1", "serial:2", "ray:x"])
    def test_others_are_refused(self, text: str) -> None:
        with pytest.raises(ExecutorError):
            choose_executor(text)


def merge_bytes(
    suite: Suite, folder: Path, where: Executor, progress: Progress | None = None
) -> bytes:
    """The bytes of a merge by TIES, whose threshold comes from a pass of its own, then rescaled."""
    document = {
        "suite": str(suite.path),
        "method": "ties",
        "then": [{"method": "subspace_boosting"}],
    }
    store = FactorStore(folder / "factors")
    merge_to_folder(make_recipe(document), suite, folder / "out", store, progress, executor=where)
    return (folder / "out/model.safetensors").read_bytes()


class TestMerges:
    @pytest.fixture
    def suite(self, synthetic_suite: Make) -> Suite:
        return synthetic_suite(3, seed=4)

    @pytest.fixture
    def alone(self, suite: Suite, tmp_path: Path) -> bytes:
        return merge_bytes(suite, tmp_path / "serial", Serial())

    def test_threads_write_the_same_bytes(self, suite: Suite, alone: bytes, tmp_path: Path) -> None:
        assert merge_bytes(suite, tmp_path / "threads", Threads(3)) == alone

    def test_so_do_processes_of_which_one_is_killed(
        self, suite: Suite, alone: bytes, tmp_path: Path
    ) -> None:
        killed = []

        def kill(done: int, total: int, label: str) -> None:
            children = multiprocessing.active_children()
            if children and not killed:
                killed.append(children[0].pid)
                children[0].kill()

        assert merge_bytes(suite, tmp_path / "processes", Processes(2), Progress(kill)) == alone
        assert killed

    def test_so_does_ray_of_which_a_worker_is_killed(
        self, suite: Suite, alone: bytes, tmp_path: Path, ray: Ray
    ) -> None:
        killed = []

        def kill(done: int, total: int, label: str) -> None:
            workers = ray_workers()
            if done >= 1 and workers and not killed:
                os.kill(workers[0], signal.SIGKILL)
                killed.append(workers[0])

        assert merge_bytes(suite, tmp_path / "ray", ray, Progress(kill)) == alone
        assert killed


def ray_workers() -> list[int]:
    """Processes that Ray runs tasks in."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if line.startswith((b"ray::_remotely", b"ray::IDLE")):
                found.append(int(entry.name))
    return found

"""Background jobs: order, sharing, progress, cancelling, and failures in words."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from merge_core.errors import MergeScopeError, SuiteError
from merge_core.progress import Progress
from ui.server import jobs
from ui.server.jobs import QUEUE_LIMIT, Job, JobRunner


@pytest.fixture
def runner() -> Iterator[JobRunner]:
    runner = JobRunner(threads=1)
    yield runner
    for job in list(runner._jobs.values()):
        job.progress.cancel.set()
    runner._pool.shutdown(wait=True, cancel_futures=True)


def wait_finished(job: Job) -> Job:
    """Wait for a job to end."""
    end = time.monotonic() + 20
    while job.finished is None:
        assert time.monotonic() < end, f"{job} does not end"
        time.sleep(0.002)
    return job


class Gate:
    """Work that says when it runs and goes on when it is let."""

    def __init__(self, result: object = None) -> None:
        self.running, self.open, self.result = threading.Event(), threading.Event(), result

    def __call__(self, progress: Progress) -> object:
        self.running.set()
        while not self.open.wait(0.002):
            progress.step(1, 4, "waiting")
        progress.step(4, 4, "end")
        return self.result


def test_progress_and_result(runner: JobRunner) -> None:
    gate = Gate({"accuracy": 0.5})
    job = runner.submit("k", "A sweep", gate)
    assert gate.running.wait(20)
    end = time.monotonic() + 20
    while job.label != "waiting":
        assert time.monotonic() < end
        time.sleep(0.002)
    assert (job.state, job.active, job.done, job.total, job.share) == ("running", True, 1, 4, 0.25)
    assert job.result is None
    assert runner.get("k") is job
    gate.open.set()
    wait_finished(job)
    assert (job.state, job.active, job.share, job.error) == ("done", False, 1.0, "")
    assert job.result == {"accuracy": 0.5}
    assert runner.get("other") is None


def test_the_share_is_a_share() -> None:
    assert Job("k", "t").share == 0.0
    assert Job("k", "t", done=3, total=2).share == 1.0


def test_equal_keys_share_one_job(runner: JobRunner) -> None:
    gate, calls = Gate("one"), []
    job = runner.submit("k", "A", gate)
    again = runner.submit("k", "A", lambda progress: calls.append(1))
    assert again is job
    gate.open.set()
    wait_finished(job)
    assert runner.submit("k", "A", lambda progress: calls.append(1)) is job  # done: kept
    other = wait_finished(runner.submit("l", "B", lambda progress: "two"))
    assert (job.result, other.result, calls) == ("one", "two", [])


def test_one_at_a_time_in_the_order_of_arrival(runner: JobRunner) -> None:
    seen: list[str] = []
    active = 0

    def work(name: str) -> Callable[[Progress], None]:
        def run(progress: Progress) -> None:
            nonlocal active
            active += 1
            assert active == 1
            seen.append(name)
            time.sleep(0.01)
            active -= 1

        return run

    submitted = [runner.submit(name, name, work(name)) for name in "abcde"]
    assert submitted[-1].state == "queued"
    assert all(wait_finished(job).state == "done" for job in submitted)
    assert seen == list("abcde")


def test_a_users_mistake_is_told_in_its_own_words(runner: JobRunner) -> None:
    def work(progress: Progress) -> None:
        raise SuiteError("suite.yaml names no base. Add one.")

    job = wait_finished(runner.submit("k", "A", work))
    assert (job.state, job.error, job.result) == (
        "failed",
        "suite.yaml names no base. Add one.",
        None,
    )
    assert (
        wait_finished(runner.submit("k", "A", lambda progress: 1)).result == 1
    )  # may be tried again


def test_the_unexpected_is_told_without_a_traceback(
    runner: JobRunner, caplog: pytest.LogCaptureFixture
) -> None:
    def work(progress: Progress) -> None:
        raise ZeroDivisionError("secret /home/someone/path")

    job = wait_finished(runner.submit("k", "The sweep", work))
    assert job.state == "failed"
    assert job.error == (
        "The sweep failed unexpectedly (ZeroDivisionError). The server's log has the details."
    )
    assert "secret /home/someone/path" in caplog.text
    assert (
        wait_finished(runner.submit("l", "B", lambda progress: 2)).result == 2
    )  # the worker lives


def test_cancel_while_running(runner: JobRunner) -> None:
    gate = Gate()
    job = runner.submit("k", "A", gate)
    assert gate.running.wait(20)
    runner.cancel("k")
    assert wait_finished(job).state == "cancelled"
    assert job.error.startswith("Cancelled after 1 of 4")
    assert job.result is None
    runner.cancel("no such key")


def test_cancel_while_queued(runner: JobRunner) -> None:
    gate, calls = Gate(), []
    first = runner.submit("k", "A", gate)
    second = runner.submit("l", "B", lambda progress: calls.append(1))
    runner.cancel("l")
    gate.open.set()
    assert wait_finished(second).state == "cancelled"
    assert wait_finished(first).state == "done"
    assert calls == []


def test_a_wish_after_cancelling_is_a_new_job(runner: JobRunner) -> None:
    gate = Gate()
    first = runner.submit("k", "A", gate)
    assert gate.running.wait(20)
    runner.cancel("k")
    second = runner.submit("k", "A", lambda progress: "afresh")
    assert second is not first
    assert wait_finished(first).state == "cancelled"
    assert (wait_finished(second).state, second.result) == ("done", "afresh")
    assert runner.get("k") is second


def test_the_queue_has_an_end(runner: JobRunner) -> None:
    gate = Gate()
    for i in range(QUEUE_LIMIT):
        runner.submit(str(i), str(i), gate)
    with pytest.raises(MergeScopeError, match=f"{QUEUE_LIMIT} jobs are waiting already"):
        runner.submit("one more", "X", gate)
    assert runner.get("one more") is None
    assert runner.submit("0", "0", gate) is runner.get("0")  # joining is always allowed
    gate.open.set()
    for i in range(QUEUE_LIMIT):
        job = runner.get(str(i))
        assert job is not None
        assert wait_finished(job).state == "done"
    assert wait_finished(runner.submit("one more", "X", gate)).state == "done"


def test_old_jobs_are_forgotten(runner: JobRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    old = wait_finished(runner.submit("old", "A", lambda progress: 1))
    running = runner.submit("running", "B", gate)
    monkeypatch.setattr(jobs, "KEPT_SECONDS", 3600.0)
    runner.submit("x", "X", gate)
    assert runner.get("old") is old
    monkeypatch.setattr(jobs, "KEPT_SECONDS", 0.0)
    time.sleep(0.002)
    runner.submit("y", "Y", gate)
    assert runner.get("old") is None
    assert runner.get("running") is running  # however long it takes
    gate.open.set()


def test_the_worker_leaves_a_core_to_the_pages() -> None:
    runner = JobRunner(threads=3)
    try:
        assert wait_finished(runner.submit("k", "A", lambda p: torch.get_num_threads())).result == 3
    finally:
        runner._pool.shutdown()
        torch.set_num_threads(1)


def finish_order(runner: JobRunner, *asked: tuple[str, str, str]) -> list[str]:
    """Keys in the order in which they are run, asked for (key, title, session) at once."""
    gate, seen = Gate(), list[str]()
    first = runner.submit("first", "Anything", gate, "nobody")
    assert gate.running.wait(20)

    def work(key: str) -> Callable[[Progress], None]:
        return lambda progress: seen.append(key)

    jobs = [runner.submit(key, title, work(key), session) for key, title, session in asked]
    gate.open.set()
    for job in (first, *jobs):
        wait_finished(job)
    return seen


def test_what_took_little_before_comes_first(
    runner: JobRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(jobs.time, "monotonic", lambda: clock[0])

    def taking(seconds: float) -> Callable[[Progress], None]:
        def work(progress: Progress) -> None:
            clock[0] += seconds

        return work

    runner.submit("a", "A sweep", taking(100.0))
    runner.submit("b", "A glance", taking(1.0))
    runner._pool.submit(lambda: None).result(20)
    monkeypatch.undo()
    order = finish_order(
        runner, ("long", "A sweep", "one"), ("new", "New", "two"), ("short", "A glance", "three")
    )
    assert order == ["short", "new", "long"]


def test_everyones_first_comes_before_anyones_second(runner: JobRunner) -> None:
    order = finish_order(
        runner,
        ("one 1", "A", "one"),
        ("one 2", "A", "one"),
        ("one 3", "A", "one"),
        ("two 1", "A", "two"),
        ("three 1", "A", "three"),
        ("two 2", "A", "two"),
    )
    assert order == ["one 1", "two 1", "three 1", "one 2", "two 2", "one 3"]


def test_one_session_does_not_fill_the_queue_of_others(runner: JobRunner) -> None:
    gate = Gate()
    for i in range(QUEUE_LIMIT):
        runner.submit(str(i), str(i), gate, "one")
    with pytest.raises(MergeScopeError, match="are waiting already"):
        runner.submit("one more", "X", gate, "one")
    assert runner.submit("theirs", "X", gate, "two").state == "queued"
    gate.open.set()


@pytest.mark.parametrize("joined", [False, True])
def test_a_job_that_nobody_waits_for_ends(monkeypatch: pytest.MonkeyPatch, joined: bool) -> None:
    there = {"one", "two"}
    runner = JobRunner(threads=1, is_active=there.__contains__)
    monkeypatch.setattr(jobs, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(jobs, "LEFT_SECONDS", 0.05)
    gate = Gate("kept")
    try:
        job = runner.submit("k", "A", gate, "one")
        if joined:
            runner.join("k", "two")
        assert gate.running.wait(20)
        there.remove("one")
        time.sleep(0.2)
        assert job.active == joined
        there.clear()
        assert wait_finished(job).state == "cancelled"
    finally:
        gate.open.set()
        runner._pool.shutdown()

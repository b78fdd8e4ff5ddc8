"""A merge killed at any moment: the output is absent or complete, and the next run goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.errors import Cancelled, CheckpointError, OutputError
from merge_core.executors.local import Processes, Serial, Threads
from merge_core.merging.recipe import Recipe, make_recipe
from merge_core.output.model_folder import merge_to_folder
from merge_core.progress import Progress
from merge_core.suites.suite import Suite, load_suite

KILLS = 50
CHAIN = 2  # kills in a row before a run is left in peace
SHARD_BYTES = 100_000
# Small and large tensors: a kill hits buffered and unbuffered writes, and ends of shards.
SHAPES = {f"w{i:02}": (s, 64) for i, s in enumerate([1, 9, 120, 300, 2, 500, 70, 33, 1, 400] * 2)}

Content = dict[str, bytes]


def content(folder: Path) -> Content:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def suite(synthetic_suite: Callable[..., Suite]) -> Suite:
    return synthetic_suite(3, SHAPES)


def recipe_of(suite: Suite, method: str = "task_arithmetic") -> Recipe:
    return make_recipe({"suite": str(suite.path), "method": method})


def child(work: Callable[[], object]) -> int:
    """A process of its own that has everything imported already."""
    number = os.fork()
    if number == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return number


def run(
    suite: Suite,
    output: Path,
    pause: float = 0.0,
    recipe: Recipe | None = None,
    told: int | None = None,
) -> list[str]:
    """A whole merge, from the reading of suite.yaml on; names what it merged.

    With a pipe to tell, a byte says that the first parameter's turn has come.
    """
    merged: list[str] = []

    def listen(done: int, total: int, label: str) -> None:
        assert total == len(suite.parameters)
        if told is not None and not merged:
            os.write(told, b"x")
        merged.append(label)
        time.sleep(pause)

    fresh = load_suite(suite.path)
    merge_to_folder(
        recipe or recipe_of(fresh),
        fresh,
        output,
        progress=Progress(listen),
        shard_bytes=SHARD_BYTES,
        executor=Threads(2),
    )
    return merged[:-1]


def whole(folder: Path) -> set[str]:
    """Names of the tensors that a killed run left complete in its hidden folder."""
    names: set[str] = set()
    for path in folder.glob(".out.*.partial/**/*.safetensors"):
        data = path.read_bytes()
        if len(data) < 8 or len(data) < 8 + (length := int.from_bytes(data[:8], "little")):
            continue
        header = json.loads(data[8 : 8 + length])
        left = len(data) - 8 - length
        names |= {n for n, t in header.items() if "shape" in t and t["data_offsets"][1] <= left}
    return names


def test_fifty_kills_leave_nothing_or_all_and_nothing_finished_is_done_again(
    suite: Suite, tmp_path: Path
) -> None:
    source, pause = random.Random(0), 0.001
    run(suite, tmp_path / "undisturbed")
    expected = content(tmp_path / "undisturbed")
    start = time.perf_counter()
    os.waitpid(child(lambda: run(suite, tmp_path / "timed", pause)), 0)
    duration = time.perf_counter() - start
    assert content(tmp_path / "timed") == expected
    taken_over, states = 0, []
    while len(states) < KILLS:
        folder = tmp_path / f"after-{len(states)}"
        folder.mkdir()
        output = folder / "out"
        finished: set[str] = set()
        for _ in range(CHAIN):
            begun, told = os.pipe()
            number = child(lambda to=output, told=told: run(suite, to, pause, told=told))
            os.close(told)
            if source.random() < 0.8:  # the others die while inputs are looked at
                os.read(begun, 1)
            time.sleep(source.uniform(0, 0.4 * duration))
            os.kill(number, signal.SIGKILL)
            os.waitpid(number, 0)
            os.close(begun)
            if output.exists():
                assert content(output) == expected
                assert set(listing(folder)) <= {"out", ".out.lock"}  # an empty file, at most
                states.append("complete")
                break
            now = whole(folder)
            assert now >= finished  # what one run finished, the next ones keep
            states.append("begun" if now else "nothing")
            finished = now
        else:
            merged = run(suite, output)
            assert not finished & set(merged)
            assert finished | set(merged) == set(suite.parameters)
            taken_over += len(finished)
            assert content(output) == expected
            assert listing(folder) == ["out"]
    assert states.count("begun") > KILLS // 5, states
    assert taken_over > 0


@pytest.fixture
def killed(suite: Suite, tmp_path: Path) -> Callable[..., Path]:
    """A merge that was killed after some tensors; gives its hidden folder."""

    def kill(recipe: Recipe | None = None, after: int = 9) -> Path:
        def die(done: int, total: int, label: str) -> None:
            if done == after:
                os.kill(os.getpid(), signal.SIGKILL)

        def merge() -> None:
            merge_to_folder(
                recipe or recipe_of(suite),
                suite,
                tmp_path / "out",
                progress=Progress(die),
                shard_bytes=SHARD_BYTES,
                executor=Serial(),
            )

        before = set(tmp_path.glob(".out.*.partial"))
        _, status = os.waitpid(child(merge), 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        (left,) = set(tmp_path.glob(".out.*.partial")) - before
        return left

    return kill


def test_another_recipe_leaves_it_alone_until_the_output_is_there(
    suite: Suite, tmp_path: Path, killed: Callable[..., Path]
) -> None:
    mine, other = recipe_of(suite), recipe_of(suite, "average")
    left = killed()
    before = content(left)
    elsewhere = killed(other, after=3)
    assert content(left) == before
    assert left != elsewhere
    assert run(suite, tmp_path / "out", recipe=mine) == list(suite.parameters)[9:]
    assert listing(tmp_path) == ["out"]  # what can never be finished there is gone as well


def test_what_belongs_to_another_output_stays(
    suite: Suite, tmp_path: Path, killed: Callable[..., Path]
) -> None:
    for name in (".out.v2.0123.partial", ".out2.0123.partial", ".out.partial", "out.0123.partial"):
        (tmp_path / name).mkdir()
    killed()
    run(suite, tmp_path / "out")
    kept = [".out.partial", ".out.v2.0123.partial", ".out2.0123.partial", "out", "out.0123.partial"]
    assert listing(tmp_path) == kept


def test_other_inputs_or_shard_sizes_begin_anew(
    suite: Suite, tmp_path: Path, killed: Callable[..., Path]
) -> None:
    killed()
    merged: list[str] = []
    progress = Progress(lambda done, total, label: merged.append(label))
    merge_to_folder(recipe_of(suite), suite, tmp_path / "out", progress=progress)
    assert merged[:-1] == list(suite.parameters)


@pytest.mark.parametrize("damage", ["cut", "longer", "header", "empty"])
def test_a_damaged_rest_is_not_trusted(
    suite: Suite, tmp_path: Path, killed: Callable[..., Path], damage: str
) -> None:
    run(suite, tmp_path / "undisturbed")
    left = killed()
    for path in left.glob("*.safetensors"):
        data = path.read_bytes()
        path.write_bytes(
            {"cut": data[:-5], "longer": data + b"junk", "header": b"x" + data[1:], "empty": b""}[
                damage
            ]
        )
    run(suite, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


def test_one_model_per_task_goes_on_too(
    suite: Suite, tmp_path: Path, killed: Callable[..., Path]
) -> None:
    recipe = recipe_of(suite, "cart_indexing")
    run(suite, tmp_path / "undisturbed", recipe=recipe)
    left = killed(recipe, after=15)  # of the first task's model
    assert listing(left) == ["task0"]
    merged = run(suite, tmp_path / "out", recipe=recipe)
    total = len(suite.parameters)
    assert sum(name != "merged" for name in merged) == 3 * total - 15
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


def test_a_cancelled_run_takes_the_killed_ones_rest_with_it(
    suite: Suite, tmp_path: Path, killed: Callable[..., Path]
) -> None:
    killed()
    progress = Progress()
    progress.cancel.set()
    with pytest.raises(Cancelled):
        merge_to_folder(
            recipe_of(suite), suite, tmp_path / "out", progress=progress, shard_bytes=SHARD_BYTES
        )
    assert listing(tmp_path) == []


@pytest.fixture
def busy(suite: Suite, tmp_path: Path) -> Iterator[Callable[[Recipe], int]]:
    """Another process that is merging to the same place, and waits in the middle."""
    started: list[int] = []

    def begin(recipe: Recipe) -> int:
        inside, told = os.pipe()

        def hold(done: int, total: int, label: str) -> None:
            if done == 5:
                os.write(told, b"x")
                time.sleep(60)

        started.append(
            child(
                lambda: merge_to_folder(
                    recipe, suite, tmp_path / "out", progress=Progress(hold), executor=Serial()
                )
            )
        )
        os.close(told)
        assert os.read(inside, 1) == b"x"
        return started[-1]

    yield begin
    for number in started:
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)


@pytest.mark.parametrize("method", ["task_arithmetic", "average"])
def test_two_runs_to_one_place_do_not_meet(
    suite: Suite, tmp_path: Path, busy: Callable[[Recipe], int], method: str
) -> None:
    busy(recipe_of(suite))
    before = {p: p.stat().st_size for p in tmp_path.rglob("*")}
    with pytest.raises(OutputError, match="being written by another process"):
        run(suite, tmp_path / "out", recipe=recipe_of(suite, method))
    assert {p: p.stat().st_size for p in tmp_path.rglob("*")} == before
    run(suite, tmp_path / "other")
    assert (tmp_path / "other").is_dir()


def test_many_runs_at_once_give_one_whole_result(suite: Suite, tmp_path: Path) -> None:
    run(suite, tmp_path / "undisturbed")
    numbers = [child(lambda: run(suite, tmp_path / "out", 0.001)) for _ in range(6)]
    ends = [os.waitpid(number, 0)[1] for number in numbers]
    assert 0 in ends
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")
    assert listing(tmp_path) == ["out", "undisturbed"]


def test_someone_elses_folder_is_not_written_to(
    suite: Suite, tmp_path: Path, killed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = killed()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(OutputError, match="not yours"):
        run(suite, tmp_path / "out")
    monkeypatch.undo()
    aside = left.rename(tmp_path / "aside")
    left.symlink_to(aside)
    before = content(aside)
    with pytest.raises(OutputError, match="not yours"):
        run(suite, tmp_path / "out")
    assert content(aside) == before


def test_a_half_written_file_is_never_read_as_a_model(
    suite: Suite, tmp_path: Path, killed: Callable[..., Path]
) -> None:
    left = killed()
    last = max(left.glob("*.safetensors"))
    with pytest.raises(SafetensorError):
        load_file(last)
    with pytest.raises(CheckpointError, match="truncated|a part of a model"):
        Checkpoint(last)


def descendants(number: int) -> set[int]:
    """Process ids below a process, as the kernel lists them."""
    listed = Path(f"/proc/{number}/task/{number}/children")
    below = {int(text) for text in listed.read_text().split()}
    return below.union(*(descendants(each) for each in below))


def alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_workers_end_with_the_process_that_started_them(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each killed merge would leave processes that hold memory for ever."""
    # Tests of pages leave a page as __main__, which spawned processes would run.
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    inside, told = os.pipe()

    def hold(done: int, total: int, label: str) -> None:
        if done == 1:
            os.write(told, b"x")
            time.sleep(60)

    number = child(
        lambda: merge_to_folder(
            recipe_of(suite),
            suite,
            tmp_path / "out",
            progress=Progress(hold),
            executor=Processes(1),
        )
    )
    os.close(told)
    assert os.read(inside, 1) == b"x"
    workers = descendants(number)
    assert workers
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)
    deadline = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))

"""Full, small, foreign and vanishing disks: one clear sentence, and nothing half-written."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.errors import CheckpointError, MergeScopeError, OutputError
from merge_core.executors.base import Executor
from merge_core.executors.local import Threads
from merge_core.merging.recipe import make_recipe
from merge_core.output.model_folder import merge_to_folder
from merge_core.progress import Progress
from merge_core.suites.suite import Suite, load_suite
from tests.reliability.limits import Result, run_confined

SHAPES = {f"w{i}": (40, 64) for i in range(12)}  # 10 kB each


@pytest.fixture
def suite(synthetic_suite: Callable[..., Suite]) -> Suite:
    return synthetic_suite(2, SHAPES, counter=False)


def merge(
    suite: Suite,
    output: Path,
    listen: Callable[[int, int, str], None] | None = None,
    executor: Executor | None = None,
    shard_bytes: int = 50_000,
) -> str | None:
    """None if the merge ended well, else the sentence."""
    recipe = make_recipe({"suite": str(suite.path), "method": "task_arithmetic"})
    try:
        merge_to_folder(
            recipe,
            suite,
            output,
            progress=Progress(listen),
            shard_bytes=shard_bytes,
            executor=executor or Threads(1),
        )
    except MergeScopeError as error:
        return str(error)
    return None


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("most", [0, 1, 5_000, 20_000, 40_000])
def test_no_file_may_grow(suite: Suite, tmp_path: Path, most: int) -> None:
    """The system's own limit on the size of files, in a process of its own."""

    def limited() -> str | None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        return merge(suite, tmp_path / "out")

    message = run_confined(limited, 30)
    assert message is not None
    assert f"{tmp_path / 'out'} could not be written: File too large" in message
    assert listing(tmp_path) == []


def test_a_disk_that_is_really_full(suite: Suite, tmp_path: Path) -> None:
    """A small disk in memory, where this machine allows to mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mounted() -> str | None:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        apart = 0x00020000  # CLONE_NEWNS: nobody else sees the mount
        if libc.unshare(apart) != 0 or libc.mount(None, b"/", None, 1 << 18 | 1 << 14, None) != 0:
            return "no rights"
        if libc.mount(b"tmpfs", str(disk).encode(), b"tmpfs", 0, b"size=80k") != 0:
            return "no rights"
        first = merge(suite, disk / "out")
        assert first is not None
        assert re.search(
            r"The disk has [\d.]+ [KM]B free and the merged model takes [\d.]+ [KM]B", first
        )  # told before any work
        assert listing(disk) == []
        plenty = shutil.disk_usage("/")._replace(free=1 << 40)  # as if another had filled it since
        shutil.disk_usage = lambda path: plenty  # type: ignore[assignment]
        second = merge(suite, disk / "out")
        assert listing(disk) == []
        assert merge(suite, disk) is not None
        return second

    message = run_confined(mounted, 30)
    if message == "no rights":
        pytest.skip("this user may not mount a disk")
    assert message == (
        f"The disk is full: {disk / 'out'} was not written. Free some space or choose another "
        "folder."
    )


def test_a_disk_that_is_too_small_is_told_before_any_work(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = merge(suite, tmp_path / "out", lambda *event: pytest.fail("work was begun"))
    assert message is not None
    assert re.search(r"has [\d.]+ [KM]B free", message)
    assert "Free some space" in message
    assert listing(tmp_path) == []


@pytest.fixture
def public(suite: Suite) -> Iterator[Path]:
    """A folder that every user may enter, with the suite in ``suite/``."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(suite.root, folder / "suite")
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield folder


def as_nobody(work: Callable[[], Result]) -> Result:
    """Run work as a user without rights, whoever runs the tests."""

    def unprivileged() -> Result:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        return work()

    return run_confined(unprivileged, 30)


def test_a_folder_without_permission(public: Path) -> None:
    locked = public / "locked"
    locked.mkdir(mode=0o555)
    message = as_nobody(lambda: merge(load_suite(public / "suite"), locked / "out"))
    assert message is not None
    assert "no permission" in message
    assert listing(locked) == []


@pytest.mark.parametrize(
    "what", ["suite/suite.yaml", "suite", "suite/task1.safetensors", "suite/task1", "suite/base"]
)
@pytest.mark.parametrize("mode", [0, 0o444])
def test_inputs_that_may_not_be_read(public: Path, what: str, mode: int) -> None:
    path = public / what
    if path.suffix == "" and what != "suite":  # a folder of its own
        path.mkdir()
        path.with_suffix(".safetensors").rename(path / "model.safetensors")
        text = (public / "suite" / "suite.yaml").read_text()
        name = Path(what).name
        (public / "suite" / "suite.yaml").write_text(text.replace(f"{name}.safetensors", name))
    if path.is_file():
        mode &= 0o333  # a file needs no more than to be read
    path.chmod(mode)

    def use() -> str | None:
        try:
            suite = load_suite(public / "suite")
            assert [suite.base, *map(suite.expert, suite.tasks)]
        except MergeScopeError as error:
            return str(error)
        return None

    message = as_nobody(use)
    path.chmod(0o755)
    assert message is not None
    assert what in message or "suite.yaml" in message
    assert "ermission" in message, message


@pytest.mark.parametrize(
    ("place", "words"),
    [("file/out", "could not be written"), ("file", "is a file"), ("x" * 300, "File name too long"),
     ("/proc/out", "could not be written"), ("/dev/null", "is a file"), ("a\0b", "null")],
)  # fmt: skip
def test_places_where_no_folder_can_be(
    suite: Suite, tmp_path: Path, place: str, words: str
) -> None:
    (tmp_path / "file").write_text("mine")
    message = merge(suite, tmp_path / place)
    assert message is not None
    assert words in message
    assert listing(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_place_where_a_disk_is_mounted(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(()))  # an empty one
    message = merge(suite, Path("/proc"), lambda *event: pytest.fail("work was begun"))
    assert message == "/proc is where a disk is mounted. Name a folder below it."


def test_a_link_to_an_empty_folder_is_followed(suite: Suite, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert merge(suite, tmp_path / "link") is None
    assert (tmp_path / "link").is_symlink()
    assert len(Checkpoint(tmp_path / "real")) == len(SHAPES)
    assert listing(tmp_path) == ["link", "real"]


def test_the_folder_one_stands_in(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert merge(suite, Path()) is None
    assert len(Checkpoint(tmp_path / "here")) == len(SHAPES)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.ESTALE])
@pytest.mark.parametrize("at", [0, 3])
def test_writes_that_fail_at_any_time(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, at: int
) -> None:
    """The last resort for what cannot be had for real: disks that break or go away."""
    import merge_core.output.model_folder as export

    original, calls = export.write_tensor, []

    def write(*args: object) -> None:
        calls.append(args)
        if len(calls) > at:
            raise OSError(code, os.strerror(code))
        original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(export, "write_tensor", write)
    message = merge(suite, tmp_path / "out")
    assert message is not None
    assert str(tmp_path / "out") in message
    assert message.endswith(".")
    assert listing(tmp_path) == []


def test_a_staging_folder_that_is_taken_away(suite: Suite, tmp_path: Path) -> None:
    def meddle(done: int, total: int, label: str) -> None:
        if done == 6:
            for path in tmp_path.glob(".out.*.partial"):
                shutil.rmtree(path)

    message = merge(suite, tmp_path / "out", meddle)
    assert message is not None
    assert "could not be written" in message
    assert listing(tmp_path) == []


@pytest.mark.parametrize("act", ["removed", "replaced", "rewritten", "folder"])
@pytest.mark.parametrize("where", [Threads(1), Threads(2)], ids=["one", "two"])
@pytest.mark.parametrize("who", ["task1", "base"])
def test_inputs_that_change_meanwhile(
    suite: Suite, tmp_path: Path, act: str, where: Executor, who: str
) -> None:
    victim = suite.root / f"{who}.safetensors"

    def meddle(done: int, total: int, label: str) -> None:
        if done != 4:
            return
        changed = {name: value + 1 for name, value in load_file(victim).items()}
        if act == "rewritten":
            # Never cut short: where a thread reads it, the system would end the process (SIGBUS).
            with victim.open("r+b") as stream:
                stream.seek(-1, os.SEEK_END)
                (last,) = stream.read(1)
                stream.seek(-1, os.SEEK_END)
                stream.write(bytes([last ^ 1]))
            return
        victim.unlink()
        if act == "replaced":
            save_file(changed, victim)
        elif act == "folder":
            victim.mkdir()

    message = merge(suite, tmp_path / "out", meddle, where)
    assert message is not None
    assert f"{who}.safetensors" in message
    assert "changed" in message or "removed" in message
    assert listing(tmp_path) == []


def test_an_input_that_changes_after_it_was_read_for_the_last_time(
    suite: Suite, tmp_path: Path
) -> None:
    """The digests in the output would be another file's than its weights."""

    def meddle(done: int, total: int, label: str) -> None:
        if done == total:
            (suite.root / "task0.safetensors").touch()

    with pytest.raises(CheckpointError, match=r"task0\.safetensors has changed"):
        merge_to_folder(
            make_recipe({"suite": str(suite.path), "method": "average"}),
            suite,
            tmp_path / "out",
            progress=Progress(meddle),
        )
    assert listing(tmp_path) == []


def test_output_errors_are_of_one_kind(suite: Suite, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(OutputError):
        merge_to_folder(
            make_recipe({"suite": str(suite.path), "method": "average"}), suite, tmp_path / "out"
        )
    assert listing(tmp_path / "out") == ["mine"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_written_to_all_the_same(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert merge(suite, tmp_path / "out") is None
    assert listing(tmp_path) == ["out"]


def test_a_lock_whose_holder_has_just_finished_is_no_lock(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the lock's file and locking it, another process removes the file."""

    def late(handle: int, operation: int) -> None:
        (tmp_path / ".out.lock").unlink()

    monkeypatch.setattr(fcntl, "flock", late)
    message = merge(suite, tmp_path / "out", lambda *event: pytest.fail("work was begun"))
    assert message is not None
    assert "being written by another process" in message
    assert listing(tmp_path) == []


def test_a_lock_that_is_a_link_is_not_followed(suite: Suite, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".out.lock").symlink_to(tmp_path / "precious")
    message = merge(suite, tmp_path / "out", lambda *event: pytest.fail("work was begun"))
    assert message is not None
    assert "could not be written" in message
    assert (tmp_path / "precious").read_text() == "mine"

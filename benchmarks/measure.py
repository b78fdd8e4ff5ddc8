"""Seconds and memory of work in a fresh process, with files cold or warm and threads fixed."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.02
LIMIT_SECONDS = 3600
# Enough for all factors of the vision models; those of the decoder would take several times more.
FACTORS_GB = 2
_LIBC = ctypes.CDLL(None, use_errno=True)


class FailedError(Exception):
    """A measured process ended badly; the message is the end of what it said."""


@dataclass(frozen=True)
class Measurement:
    """One measurement.

    Attributes:
        seconds: of the work, imports apart; one value per repeat.
        process: seconds of each whole process.
        anonymous: highest anonymous memory in bytes that any repeat reached, child processes
            included; pages of mapped files, which the system can drop, do not count.
        answer: what the last repeat returned.
        cached: share of the files' pages in memory before each repeat, where files were named.
    """

    seconds: tuple[float, ...]
    process: tuple[float, ...]
    anonymous: int
    answer: Any
    cached: float | None = None

    @property
    def best(self) -> float:
        """The fastest repeat, in seconds."""
        return min(self.seconds)

    @property
    def imports(self) -> float:
        """The least that a process took beside the work, in seconds."""
        return min(p - s for p, s in zip(self.process, self.seconds, strict=True))


def weights_below(*places: Path) -> list[Path]:
    """The files of checkpoints: the named ones, and those below named folders."""
    files: list[Path] = []
    for place in places:
        files += sorted(place.rglob("*.safetensors")) if place.is_dir() else [place]
    return files


def cached_share(paths: Sequence[Path]) -> float:
    """Share of the pages of files that are in the system's cache (in [0, 1]).

    Asked by ``mincore``, which reads nothing: a read that must not wait would have some systems
    fetch the pages around it, so that a second look would find what the first one fetched.
    """
    found = asked = 0
    for path in paths:
        if not (size := path.stat().st_size):
            continue
        with (
            path.open("rb") as stream,
            mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_COPY) as mapped,
        ):
            pages = -(-size // mmap.PAGESIZE)
            state = (ctypes.c_ubyte * pages)()
            start = ctypes.c_char.from_buffer(mapped)
            address = ctypes.c_void_p(ctypes.addressof(start))
            failed = _LIBC.mincore(address, ctypes.c_size_t(size), state)
            code = ctypes.get_errno()
            del start  # a mapping that is pointed to cannot be closed
            if failed:
                raise OSError(code, os.strerror(code), str(path))
            asked += pages
            found += sum(page & 1 for page in state)
    return found / asked if asked else 0.0


def drop(paths: Sequence[Path]) -> None:
    """Have the system forget the cached pages of files, so that they are read from the disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)  # only clean pages can be dropped
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def warm(paths: Sequence[Path]) -> None:
    """Read files once, so that they lie in the system's cache."""
    for path in paths:
        with path.open("rb", buffering=0) as stream:
            while stream.read(1 << 22):
                pass


def _family(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208 - polled, so kept light
            children = Path(f"/proc/{pid}/task/{thread}/children").read_text()
            for child in children.split():
                found += _family(int(child))
    except OSError:
        pass  # it ended meanwhile
    return found


def _anonymous(pid: int) -> int:
    """Anonymous memory of a process and those below it, in bytes."""
    total = 0
    for member in _family(pid):
        try:
            status = Path(f"/proc/{member}/status").read_text()
        except OSError:
            continue
        for line in status.splitlines():
            if line.startswith("RssAnon:"):
                total += 1024 * int(line.split()[1])
                break
    return total


def watch(
    command: Sequence[str], environment: dict[str, str], given: str = ""
) -> tuple[float, int]:
    """Run a command to its end.

    Args:
        command: and its arguments; it runs in the repository's root.
        environment: of the process.
        given: on standard input.

    Returns:
        Seconds, and the highest anonymous memory in bytes, looked at every 20 ms.

    Raises:
        FailedError: another exit code than 0, or more than an hour.
    """
    with tempfile.TemporaryFile("w+") as said:
        start = time.perf_counter()
        process = subprocess.Popen(
            list(command), cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=said, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(given)
        process.stdin.close()
        peak = 0
        while True:
            peak = max(peak, _anonymous(process.pid))
            try:
                process.wait(POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                if time.perf_counter() - start > LIMIT_SECONDS:
                    process.kill()
        seconds = time.perf_counter() - start
        if process.returncode != 0:
            said.seek(0)
            end = "\n".join(said.read().splitlines()[-8:])
            raise FailedError(f"{' '.join(command[:4])} ended with {process.returncode}: {end}")
    return seconds, peak


@dataclass(frozen=True)
class Laboratory:
    """Where and how measurements run.

    Attributes:
        work: folder for everything that is written.
        threads: of every measured process.
        quick: small sizes and single repeats, to see that everything works.
        mergekit: a Python in which mergekit can be imported, if there is one.
        complete: the authors' route on every matrix instead of a sample.
    """

    work: Path
    threads: int = 2
    quick: bool = False
    mergekit: Path | None = None
    complete: bool = False

    @property
    def cache(self) -> Path:
        """MergeScope's cache folder during measurements."""
        return self.work / "cache"

    def environment(self) -> dict[str, str]:
        """The variables of a measured process."""
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        threads = dict.fromkeys(names, str(self.threads))
        own = {"MERGESCOPE_CACHE": str(self.cache), "MERGESCOPE_FACTORS_GB": str(FACTORS_GB)}
        return {**os.environ, **threads, **own}

    def fresh_cache(self) -> None:
        """Forget everything that MergeScope has stored."""
        remove(self.cache)
        self.cache.mkdir(parents=True)

    def run(
        self,
        job: str,
        arguments: dict[str, Any],
        *,
        repeats: int = 1,
        cold: Sequence[Path] = (),
        before: Callable[[], None] | None = None,
        python: str | Path = sys.executable,
    ) -> Measurement:
        """Run a job in a fresh process, again and again.

        Args:
            job: ``module:function``.
            arguments: of the function; they travel as JSON.
            repeats: how often (once where measurements are quick).
            cold: files to drop from the system's cache before each repeat.
            before: what to do before each repeat.
            python: interpreter.

        Raises:
            FailedError: the process failed.
        """
        seconds, process, peak, cached = [], [], 0, 0.0
        answer = None
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "answer.json"
            for _ in range(1 if self.quick else repeats):
                if before is not None:
                    before()
                os.sync()  # what was written before must not compete with what is measured
                drop(cold)
                cached = max(cached, cached_share(cold))
                command = [str(python), "-m", "benchmarks.child", job, str(target)]
                took, most = watch(command, self.environment(), json.dumps(arguments))
                result = json.loads(target.read_text())
                seconds.append(float(result["seconds"]))
                process.append(took)
                peak = max(peak, most)
                answer = result["answer"]
        return Measurement(tuple(seconds), tuple(process), peak, answer, cached if cold else None)

    def command(self, command: Sequence[str], repeats: int = 1) -> Measurement:
        """Run a command line, again and again; `seconds` are those of the whole process."""
        runs = [watch(command, self.environment()) for _ in range(1 if self.quick else repeats)]
        times = tuple(took for took, _ in runs)
        return Measurement(times, times, max(most for _, most in runs), None)


def remove(place: Path) -> None:
    """Delete a folder or file below the work folder, if it is there."""
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)

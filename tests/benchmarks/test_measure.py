"""Measuring and comparing: known memory is seen, dropped pages are gone, changes are told."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.compare import compare_results, verdict
from benchmarks.measure import FailedError, Laboratory, cached_share, drop, warm, watch
from benchmarks.record import Part, Results, Row, Sheet, load, table

HOLD = "import time; data = bytearray({} << 20); data[::4096] = b'x' * len(data[::4096])\n"
CHILD = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"


def test_peak_memory_counts_the_process_and_its_children() -> None:
    hold = HOLD.format(200) + "time.sleep(0.6)"
    _, alone = watch([sys.executable, "-c", hold], dict(os.environ))
    _, below = watch([sys.executable, "-c", CHILD, hold], dict(os.environ))
    assert 200 << 20 <= alone < 260 << 20
    assert 200 << 20 <= below < 280 << 20


def test_mapped_files_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100 << 20))
    code = (
        "import mmap, sys, time; f = open(sys.argv[1], 'rb'); "
        "m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ); sum(m[::4096]); time.sleep(0.2)"
    )
    _, peak = watch([sys.executable, "-c", code, str(path)], dict(os.environ))
    assert peak < 60 << 20


def test_a_failing_process_says_why() -> None:
    with pytest.raises(FailedError, match="out of luck"):
        watch([sys.executable, "-c", "raise SystemExit('out of luck')"], dict(os.environ))


def test_jobs_run_in_fresh_processes_with_fixed_threads(tmp_path: Path) -> None:
    laboratory = Laboratory(tmp_path, threads=3)
    laboratory.fresh_cache()
    run = laboratory.run("os:getenv", {"key": "OMP_NUM_THREADS"}, repeats=2)
    assert run.answer == "3"
    assert len(run.seconds) == 2
    assert run.best < run.process[0]
    assert laboratory.run("os:getpid", {}).answer != os.getpid()


def test_files_are_flushed_and_dropped_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, ...]] = []

    def name(handle: int) -> str:
        return Path(f"/proc/self/fd/{handle}").readlink().name

    def advise(handle: int, offset: int, length: int, advice: int) -> None:
        assert (offset, length) == (0, 0)  # from the start to the end
        assert advice == os.POSIX_FADV_DONTNEED
        done.append(("drop", name(handle)))

    monkeypatch.setattr(os, "fsync", lambda handle: done.append(("flush", name(handle))))
    monkeypatch.setattr(os, "posix_fadvise", advise)
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(b"x")
    drop(paths)
    assert done == [("flush", "a"), ("drop", "a"), ("flush", "b"), ("drop", "b")]


def test_the_cache_is_looked_at_and_not_changed() -> None:
    # The system's temporary folder may lie in memory, where nothing can be dropped.
    path = Path(__file__).parent / f".dropped-{os.getpid()}"
    try:
        path.write_bytes(os.urandom(4 << 20))
        warm([path])
        assert cached_share([path]) > 0.9
        drop([path])
        # Dropping is advice: the system, or the file system, may keep what it likes.
        if (left := cached_share([path])) > 0.5:
            pytest.skip("this file system keeps its pages")
        assert cached_share([path]) <= left
        warm([path])
        assert cached_share([path]) > 0.9
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("before", "after", "better", "spread", "said"),
    [
        (1.0, 1.05, "lower", 0.0, ""),
        (1.0, 1.3, "lower", 0.0, "worse"),
        (1.0, 1.3, "higher", 0.0, "better"),
        (1.3, 1.0, "higher", 0.0, "worse"),
        (1.0, 1.3, "lower", 0.4, ""),
        (1.0, 0.7, "lower", 0.0, "better"),
        (1.0, 2.0, "neither", 0.0, "differs"),
        (1.0, 0.0, "higher", 0.0, "worse"),
        (0.0, 0.0, "lower", 0.0, ""),
    ],
)
def test_verdicts(before: float, after: float, better: str, spread: float, said: str) -> None:
    row = Row("part", "what", before, better=better, spread=spread)  # type: ignore[arg-type]
    assert verdict(row, replace(row, value=after, spread=0.0)) == said


def _results(value: float) -> Results:
    sheet = Sheet("cart")
    sheet.speedup("against the SVD", value, 5)
    sheet.seconds("merge", [1.0, 1.2], "a note")
    return Results({"torch": "2"}, False, {"cart": Part(sheet.rows, "today", 3.0)})


def test_results_are_written_and_read_again(tmp_path: Path) -> None:
    results = _results(6.0)
    results.save(tmp_path / "RESULTS.json")
    assert load(tmp_path / "RESULTS.json") == results
    text = (tmp_path / "RESULTS.md").read_text()
    assert text == table(results)
    assert "| against the SVD | 6.00 x | ≥ 5 | yes |" in text
    assert "| merge | 1.00 s ± 20% |" in text
    assert "**no**" in table(_results(4.0))
    assert "**no**" not in table(replace(_results(4.0), quick=True))


def test_a_bar_that_is_lost_is_told() -> None:
    lines, broken = compare_results(_results(6.0), _results(4.0))
    assert broken == 1
    assert any("worse (asked: ≥ 5)" in line for line in lines)
    assert compare_results(_results(6.0), _results(7.0))[1] == 0

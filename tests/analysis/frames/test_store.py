"""The store of frames: whole files or none, bounded, shared, and never believed blindly."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.frames.asking import ask, ask_if_known
from analysis.frames.entries import Asked, Kept, frame_question
from analysis.frames.pack import pack
from analysis.frames.store import FrameStore, frames_limit

QUESTION = frame_question("test.numbers", 1, "the numbers")


def numbers(count: int = 3, start: float = 0.0) -> pd.DataFrame:
    return pd.DataFrame({"value": start + np.arange(float(count))})


def asked(**arguments: object) -> Asked:
    return Asked(QUESTION.name, QUESTION.version, "inputs", arguments)


def files(store: FrameStore) -> list[Path]:
    return sorted(path for path in store.folder.rglob("*") if path.is_file())


def test_an_answer_is_computed_once_and_read_by_another_store(tmp_path: Path) -> None:
    calls = []

    def compute() -> pd.DataFrame:
        calls.append(1)
        return numbers()

    for _ in range(2):
        store = FrameStore(tmp_path)
        for _ in range(2):
            frame = ask(store, QUESTION, "inputs", {"rank": 1}, compute)
            pd.testing.assert_frame_equal(frame, numbers())
    assert calls == [1]


def test_what_is_shipped_is_read_last_and_never_written(tmp_path: Path) -> None:
    shipped, damaged = tmp_path / "shipped.mergescope", tmp_path / "damaged.mergescope"
    mine, theirs = asked(rank=1), asked(rank=2)
    shipped.write_bytes(
        pack([(mine, QUESTION.pack(numbers(3))), (theirs, QUESTION.pack(numbers(4)))])
    )
    damaged.write_bytes(shipped.read_bytes()[:50])
    before = shipped.read_bytes()
    store = FrameStore(tmp_path / "own", shipped=[tmp_path / "absent", damaged, shipped])
    store.put(mine, QUESTION.pack(numbers(5)))
    found = [store.get(each) for each in (mine, theirs, asked(rank=3))]
    assert [kept and len(kept.frames["frame"]) for kept in found] == [5, 4, None]
    assert shipped.read_bytes() == before
    assert len(files(store)) == 1  # what was only read is not kept twice


def test_what_is_not_known_now_is_not_kept(tmp_path: Path) -> None:
    store = FrameStore(tmp_path)
    assert ask_if_known(store, QUESTION, "inputs", {}, lambda: None) is None
    assert ask_if_known(store, QUESTION, "inputs", {}, numbers) is not None


@pytest.mark.parametrize(
    "other",
    [
        Asked("test.other", 1, "inputs", {"rank": 1}),
        Asked(QUESTION.name, 2, "inputs", {"rank": 1}),
        Asked(QUESTION.name, 1, "others", {"rank": 1}),
        asked(rank=1.0),
        asked(rank="1"),
        asked(rank=None),
        asked(scale=1),
        asked(rank=1, scale=None),
        asked(),
    ],
)
def test_any_change_makes_another_question(other: Asked) -> None:
    assert other.key != asked(rank=1).key
    assert asked(rank=1, scale=2).key == asked(scale=2, rank=1).key


def test_writing_to_an_answer_changes_no_other_session(tmp_path: Path) -> None:
    store = FrameStore(tmp_path)
    store.put(asked(), QUESTION.pack(numbers()))
    first = ask(store, QUESTION, "inputs", {}, numbers)
    first.loc[0, "value"] = 99.0
    first["more"] = 1
    pd.testing.assert_frame_equal(ask(store, QUESTION, "inputs", {}, numbers), numbers())


def test_damaged_and_foreign_files_are_computed_anew(tmp_path: Path) -> None:
    FrameStore(tmp_path).put(asked(), QUESTION.pack(numbers()))
    (path,) = files(FrameStore(tmp_path))
    whole = path.read_bytes()
    foreign = pack([(asked(rank=9), QUESTION.pack(numbers(start=5)))])
    older = pack([(Asked(QUESTION.name, 0, "inputs", {}), QUESTION.pack(numbers(start=7)))])
    unfit = pack([(asked(), Kept(values={"frame": 1}))])
    for data in (b"", whole[:-30], whole[:40], b"x" * 100, foreign, older, unfit):
        path.write_bytes(data)
        frame = ask(FrameStore(tmp_path), QUESTION, "inputs", {}, lambda: numbers(start=1))
        pd.testing.assert_frame_equal(frame, numbers(start=1))


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    store = FrameStore(tmp_path)
    store.put(asked(), QUESTION.pack(numbers()))
    (path,) = files(store)
    path.unlink()
    os.mkfifo(path)
    assert FrameStore(tmp_path).get(asked()) is None


def test_a_folder_that_cannot_be_written_costs_no_result(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = FrameStore(tmp_path / "file" / "frames")
    pd.testing.assert_frame_equal(ask(store, QUESTION, "inputs", {}, numbers), numbers())


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random(5_000)  # some 40 KB that do not pack
    frame = pd.DataFrame({"value": values})
    limit = 400_000
    store = FrameStore(tmp_path, disk_bytes=limit)
    for number in range(20):
        store.put(asked(number=number), QUESTION.pack(frame))
        for path in files(store):  # as if a second had passed
            state = path.stat()
            os.utime(path, (state.st_atime - 1, state.st_mtime - 1))
        assert FrameStore(tmp_path).get(asked(number=0)) is not None  # it is in use
    held = sum(path.stat().st_size for path in files(store))
    assert held <= limit * 1.25 + 50_000  # it is looked after at every quarter of the limit
    assert FrameStore(tmp_path).get(asked(number=1)) is None
    assert FrameStore(tmp_path).get(asked(number=19)) is not None


def test_the_limit_is_the_variable_in_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGESCOPE_FRAMES_GB", "0.5")
    assert frames_limit() == 1 << 29
    monkeypatch.setenv("MERGESCOPE_FRAMES_GB", "much")
    assert frames_limit() == 2 << 30


WRITER = """
    import sys
    from pathlib import Path
    import numpy as np
    import pandas as pd
    from analysis.frames.entries import Asked, Kept
    from analysis.frames.store import FrameStore

    store = FrameStore(Path(sys.argv[1]), disk_bytes=2_000_000, memory_bytes=0)
    for turn in range(60):
        for number in range(6):
            asked = Asked("test.numbers", 1, "inputs", {"number": number})
            kept = store.get(asked)
            if kept is not None:
                assert (kept.frames["frame"]["value"] == number).all(), number
            frame = pd.DataFrame({"value": np.full(2_000, float(number))})
            store.put(asked, Kept({"frame": frame}))
    print("done")
"""


def test_two_processes_write_and_read_the_same_answers(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path)]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert out.strip() == "done", err
    left = files(FrameStore(tmp_path))
    assert len(left) == 6
    assert all(zipfile.is_zipfile(path) for path in left)


def test_reading_a_small_answer_takes_milliseconds(tmp_path: Path) -> None:
    store = FrameStore(tmp_path, memory_bytes=0)
    store.put(asked(), QUESTION.pack(numbers(100)))
    start = time.process_time()
    for _ in range(20):
        assert store.get(asked()) is not None
    assert time.process_time() - start < 20 * 0.1

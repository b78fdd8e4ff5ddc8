"""The store of outputs: it keeps what was put, and failing it costs only time."""

from __future__ import annotations

import itertools
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.outputs.prediction_store import (
    PredictionStore,
    empty_vector,
    fill_missing,
    is_missing,
    output_key,
)
from merge_core.files import digest_of

LABELS = np.array([0, 1, 999, 32767, 3], dtype=np.int16)


def put(store: PredictionStore, key: str, classes: list[int] | np.ndarray) -> None:
    store.put({key: np.asarray(classes, dtype=np.int16)})


def read_back(store: PredictionStore, key: str, dtype: str = "int16") -> list[float] | None:
    found = store.get({key: dtype})
    assert set(found) <= {key}
    return found[key].tolist() if key in found else None


def columns(path: Path) -> dict[str, bytes]:
    with closing(sqlite3.connect(path)) as connection:
        return dict(connection.execute("SELECT key, labels FROM predictions").fetchall())


def test_what_is_put_comes_back_in_another_instance_too(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "p.sqlite"
    store = PredictionStore(path)
    assert read_back(store, "a") is None
    store.put({"a": LABELS, "f": np.float32([0.1, np.nan, -3])})
    for each in (store, PredictionStore(path)):
        found = each.get({"a": "int16", "f": "float32", "b": "int16"})
        assert set(found) == {"a", "f"}
        np.testing.assert_array_equal(found["a"], LABELS)
        np.testing.assert_array_equal(found["f"], np.float32([0.1, np.nan, -3]))
    put(store, "a", LABELS[::-1])
    assert read_back(PredictionStore(path), "a") == LABELS[::-1].tolist()


@given(st.lists(st.integers(0, 32767), min_size=1, max_size=50))
def test_any_classes_come_back(classes: list[int]) -> None:
    store = PredictionStore()
    store.path.unlink(missing_ok=True)
    put(store, "any", classes)
    assert read_back(store, "any") == classes


@given(
    st.lists(
        st.dictionaries(st.integers(0, 12), st.integers(0, 9), max_size=8), min_size=1, max_size=4
    ),
    st.sampled_from(["int16", "float32"]),
)
def test_parts_add_up_to_the_whole(parts: list[dict[int, int]], dtype: str) -> None:
    """Against a dictionary: later values win, gaps stay as they were, the end is the furthest."""
    store = PredictionStore()
    store.path.unlink(missing_ok=True)
    expected: dict[int, int] = {}
    for part in parts:
        vector = empty_vector(max(part, default=-1) + 1, dtype)
        vector[list(part)] = list(part.values())
        store.put({"whole": vector})
        expected |= part
    vector = store.get({"whole": dtype}).get("whole", empty_vector(0, dtype))
    assert len(vector) == max(expected, default=-1) + 1
    known = np.flatnonzero(~is_missing(vector))
    assert {int(i): int(vector[i]) for i in known} == expected


def test_what_is_missing() -> None:
    assert is_missing(np.array([-1, 0, 3], dtype=np.int16)).tolist() == [True, False, False]
    assert is_missing(np.float32([np.nan, -1, 0])).tolist() == [True, False, False]
    assert is_missing(empty_vector(3, "int16")).all()
    assert is_missing(empty_vector(3, "float32")).all()
    both = fill_missing(np.float32([1, np.nan]), np.float32([5, 6, 7]))
    assert both.tolist() == [1, 6, 7]


def test_its_place_is_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
    put(PredictionStore(), "a", LABELS)
    assert list(columns(tmp_path / "cache" / "predictions.sqlite")) == ["a"]


@pytest.mark.parametrize("content", [b"", b"not a database at all" * 100, None])
def test_a_damaged_file_holds_nothing(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "p.sqlite"
    if content is None:
        put(PredictionStore(path), "a", LABELS)
        content = path.read_bytes()[:4096]  # cut off
    path.write_bytes(content)
    store = PredictionStore(path)
    assert read_back(store, "a") is None
    put(store, "a", LABELS)  # neither raises
    assert read_back(store, "a") in (None, LABELS.tolist())


@pytest.mark.parametrize("blob", [b"junk", b"", "text", 7])
def test_a_damaged_row_is_unknown_and_replaced(tmp_path: Path, blob: object) -> None:
    path = tmp_path / "p.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE predictions (key TEXT PRIMARY KEY, labels BLOB NOT NULL)")
        connection.execute("INSERT INTO predictions VALUES ('a', ?)", (blob,))
    assert read_back(PredictionStore(path), "a") is None
    put(PredictionStore(path), "a", LABELS)
    assert read_back(PredictionStore(path), "a") == LABELS.tolist()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file" / "p.sqlite", tmp_path):  # below a file; a folder
        store = PredictionStore(path)
        put(store, "a", LABELS)
        assert read_back(store, "a") is None


def test_putting_nothing_makes_no_file(tmp_path: Path) -> None:
    PredictionStore(tmp_path / "p.sqlite").put({})
    assert not (tmp_path / "p.sqlite").exists()


def test_the_key_depends_on_each_of_its_parts() -> None:
    parts = list(itertools.product(("w", "x"), ("d", "e"), ("val", "test"), ("classes", "l2")))
    assert len({output_key(*each) for each in parts}) == len(parts)
    assert output_key("w", "d", "val") == output_key("w", "d", "val", "classes")
    assert output_key("wd", "", "val") != output_key("w", "d", "val")


def test_classes_of_all_images_have_the_key_of_stores_in_use() -> None:
    assert output_key("w", "d", "val") == digest_of("predictions-1", "w", "d", "val", "None")


def test_threads_write_at_the_same_time(tmp_path: Path) -> None:
    """Also into one vector: each writes an entry of its own, and none is lost."""
    path = tmp_path / "p.sqlite"
    stores = [PredictionStore(path), PredictionStore(path)]  # no lock in common
    start = threading.Barrier(4)
    failures: list[BaseException] = []

    def write(worker: int) -> None:
        try:
            start.wait()
            for i in range(15):
                vector = empty_vector(60, "int16")
                vector[4 * i + worker] = worker
                stores[worker % 2].put({f"{worker}-{i}": np.int16([worker, i]), "common": vector})
                assert read_back(stores[(worker + 1) % 2], f"{worker}-{i}") == [worker, i]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert read_back(PredictionStore(path), "common") == [0, 1, 2, 3] * 15
    assert len(columns(path)) == 61


def test_a_damaged_store_is_replaced_by_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "predictions.sqlite"
    path.write_bytes(b"this is no database, and long enough to be read as one" * 100)
    store = PredictionStore(path)
    assert read_back(store, "key") is None
    put(store, "key", [1, 2, 3])
    assert read_back(PredictionStore(path), "key") == [1, 2, 3]

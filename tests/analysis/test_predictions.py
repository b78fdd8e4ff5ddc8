"""The store of predictions: it keeps what was put, and failing it costs only time."""

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

from analysis.predictions import PredictionStore, prediction_key

LABELS = np.array([0, 1, 999, 32767, 3], dtype=np.int64)


def columns(path: Path) -> dict[str, bytes]:
    with closing(sqlite3.connect(path)) as connection:
        return dict(connection.execute("SELECT key, labels FROM predictions").fetchall())


def test_what_is_put_comes_back_in_another_instance_too(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "p.sqlite"
    store = PredictionStore(path)
    assert store.get("a") is None
    store.put("a", LABELS)
    for each in (store, PredictionStore(path)):
        got = each.get("a")
        assert got is not None
        assert got.dtype == np.int64
        np.testing.assert_array_equal(got, LABELS)
        assert each.get("b") is None
    store.put("a", LABELS[::-1])
    np.testing.assert_array_equal(PredictionStore(path).get("a"), LABELS[::-1])


@given(st.lists(st.integers(0, 32767), min_size=1, max_size=50))
def test_any_classes_come_back(classes: list[int]) -> None:
    store = PredictionStore()
    store.put("any", np.array(classes))
    got = store.get("any")
    assert got is not None
    assert got.tolist() == classes


def test_its_place_is_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
    PredictionStore().put("a", LABELS)
    assert list(columns(tmp_path / "cache" / "predictions.sqlite")) == ["a"]


def test_the_shipped_store_is_read_first_and_never_written(tmp_path: Path) -> None:
    shipped, mine = tmp_path / "shipped.sqlite", tmp_path / "mine.sqlite"
    PredictionStore(shipped).put("both", np.array([1, 1]))
    PredictionStore(mine).put("both", np.array([2, 2]))
    PredictionStore(mine).put("only mine", np.array([3]))
    before = shipped.read_bytes()
    shipped.chmod(0o444)
    store = PredictionStore(mine, shipped=(tmp_path / "absent.sqlite", shipped))
    assert store.get("both").tolist() == [1, 1]  # type: ignore[union-attr]
    assert store.get("only mine").tolist() == [3]  # type: ignore[union-attr]
    store.put("both", np.array([4]))
    store.put("new", np.array([5]))
    assert store.get("both").tolist() == [1, 1]  # type: ignore[union-attr]
    assert shipped.read_bytes() == before
    assert set(columns(mine)) == {"both", "only mine", "new"}
    assert [file.name for file in tmp_path.iterdir() if "shipped" in file.name] == [shipped.name]


@pytest.mark.parametrize("content", [b"", b"not a database at all" * 100, None])
def test_a_damaged_file_holds_nothing(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "p.sqlite"
    if content is None:
        PredictionStore(path).put("a", LABELS)
        content = path.read_bytes()[:4096]  # cut off
    path.write_bytes(content)
    store = PredictionStore(path, shipped=(path,))
    assert store.get("a") is None
    store.put("a", LABELS)  # neither raises
    assert store.get("a") is None or store.get("a").tolist() == LABELS.tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize("blob", [b"junk", b"", "text", 7, None])
def test_a_damaged_row_is_unknown(tmp_path: Path, blob: object) -> None:
    path = tmp_path / "p.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE predictions (key TEXT PRIMARY KEY, labels BLOB)")
        connection.execute("INSERT INTO predictions VALUES ('a', ?)", (blob,))
    assert PredictionStore(path).get("a") is None
    assert PredictionStore(tmp_path / "x", shipped=(path,)).get("a") is None


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file" / "p.sqlite", tmp_path):  # below a file; a folder
        store = PredictionStore(path)
        store.put("a", LABELS)
        assert store.get("a") is None


def test_the_key_depends_on_each_of_its_parts() -> None:
    parts = list(itertools.product(("w", "x"), ("d", "e"), ("val", "test"), (None, 1, 11)))
    assert len({prediction_key(*each) for each in parts}) == len(parts)
    assert prediction_key("w", "d", "val", 1) == prediction_key("w", "d", "val", 1)
    assert prediction_key("wd", "", "val", 1) != prediction_key("w", "d", "val", 1)


def test_threads_write_at_the_same_time(tmp_path: Path) -> None:
    path = tmp_path / "p.sqlite"
    stores = [PredictionStore(path), PredictionStore(path)]  # no lock in common
    start = threading.Barrier(4)
    failures: list[BaseException] = []

    def write(worker: int) -> None:
        try:
            start.wait()
            for i in range(15):
                stores[worker % 2].put(f"{worker}-{i}", np.array([worker, i]))
                assert stores[(worker + 1) % 2].get(f"{worker}-{i}") is not None
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for worker, i in itertools.product(range(4), range(15)):
        got = PredictionStore(path).get(f"{worker}-{i}")
        assert got is not None
        assert got.tolist() == [worker, i]


def test_a_damaged_store_is_replaced_by_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "predictions.sqlite"
    path.write_bytes(b"this is no database, and long enough to be read as one" * 100)
    store = PredictionStore(path)
    assert store.get("key") is None
    store.put("key", np.array([1, 2, 3]))
    assert PredictionStore(path).get("key").tolist() == [1, 2, 3]

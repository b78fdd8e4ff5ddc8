"""Results made once: known by all of their arguments, waited for by who asks the same alone."""

from __future__ import annotations

import pickle
import threading
import time

import numpy as np
import pandas as pd
import pytest

from ui.server.once import Results

calls: list[str] = []
gate = threading.Event()


@pytest.fixture(autouse=True)
def forget() -> None:
    calls.clear()
    gate.clear()


def total(values: np.ndarray | pd.DataFrame, name: str = "") -> float:
    calls.append(name)
    return float(np.asarray(values).sum())


def wait(name: str) -> str:
    calls.append(name)
    assert gate.wait(20)
    return name


def fail(name: str) -> str:
    calls.append(name)
    raise ValueError(name)


def frame_of(size: int) -> pd.DataFrame:
    calls.append("frame")
    return pd.DataFrame({"a": range(size)})


def test_equal_arguments_are_computed_once() -> None:
    results = Results()
    assert results.get(total, np.ones(4), name="x") == 4.0
    assert results.get(total, np.ones(4), name="x") == 4.0
    assert calls == ["x"]
    assert results.get(total, np.ones(4), name="y") == 4.0
    assert calls == ["x", "y"]


def test_one_entry_of_a_large_array_makes_another_result() -> None:
    # Streamlit's caches look at a sample of arrays of this size.
    results, values = Results(), np.zeros((800, 800))
    other = values.copy()
    other[400, 400] = 1.0
    assert results.get(total, values) == 0.0
    assert results.get(total, other) == 1.0
    frame, longer = pd.DataFrame({"a": np.zeros(60_000)}), pd.DataFrame({"a": np.zeros(60_000)})
    longer.loc[30_000, "a"] = 1.0
    assert results.get(total, frame) != results.get(total, longer)


def test_a_frame_is_not_changed_by_who_got_it() -> None:
    results = Results()
    mine = results.get(frame_of, 3)
    mine["b"] = 1
    mine.loc[0, "a"] = 7
    theirs = results.get(frame_of, 3)
    assert theirs.to_dict("list") == {"a": [0, 1, 2]}
    assert calls == ["frame"]


def test_who_asks_the_same_waits_and_others_do_not() -> None:
    results, found = Results(), list[str]()

    def ask() -> None:
        found.append(results.get(wait, "slow"))

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    assert results.get(total, np.ones(2), "other") == 2.0  # while they wait
    gate.set()
    for thread in threads:
        thread.join(20)
    assert found == ["slow"] * 5
    assert sorted(calls) == ["other", "slow"]


def test_a_failure_is_everyones_own_and_may_be_tried_again() -> None:
    results = Results()
    for _ in range(2):
        with pytest.raises(ValueError, match="bad"):
            results.get(fail, "bad")
    assert calls == ["bad", "bad"]


def test_what_was_not_asked_for_longest_goes_first() -> None:
    size = len(pickle.dumps(pd.DataFrame({"a": range(1000)}), protocol=5))
    results = Results(limit=int(2.5 * size))
    for count in (1000, 1001, 1000, 1002, 1000):
        results.get(frame_of, count)
    assert len(calls) == 3
    results.get(frame_of, 1001)
    assert len(calls) == 4
    results.get(frame_of, 100_000)  # more than all may take: given, not kept
    assert len(results.get(frame_of, 100_000)) == 100_000
    assert len(calls) == 6


def test_what_has_no_content_of_its_own_is_refused() -> None:
    with pytest.raises((pickle.PicklingError, AttributeError)):
        Results().get(lambda: time.monotonic())

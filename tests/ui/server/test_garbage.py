"""Collections of garbage: rare, and complete when they come."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from tests.pages.test_pages import assert_healthy, open_page
from ui.server import garbage


class Loop:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_objects_are_hidden_until_a_collection_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(garbage.time, "monotonic", lambda: now)
    monkeypatch.setattr(garbage, "_last", now)
    loop = Loop()
    watched = weakref.ref(loop)
    del loop
    garbage.freeze_objects()
    gc.collect()  # as Streamlit does after each run
    assert watched() is not None
    assert gc.get_freeze_count() > 10_000
    now += garbage.INTERVAL_SECONDS
    garbage.freeze_objects()
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert watched() is None
    garbage.freeze_objects()
    assert gc.get_freeze_count() > 0


def test_a_run_of_a_page_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(garbage, "freeze_objects", lambda: calls.append(1))
    assert_healthy(open_page("merge_lab"))
    assert calls == [1]


def test_what_is_hidden_is_released_once_everybody_has_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(garbage, "_last", garbage.time.monotonic())
    loop = Loop()
    watched = weakref.ref(loop)
    del loop
    garbage.freeze_objects()
    gc.collect()
    assert watched() is not None
    garbage.release(complete=False)
    assert watched() is None
    collected: list[int] = []
    monkeypatch.setattr(garbage.gc, "collect", lambda: collected.append(1))
    garbage.release(complete=True)
    garbage.release(complete=True)  # nothing has run since
    assert collected == [1]
    garbage.freeze_objects()
    garbage.release(complete=True)
    assert collected == [1, 1]

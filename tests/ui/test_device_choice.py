"""The sidebar's choice of a device: what it is, kept for the session, never in a link."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from merge_core import devices
from merge_core.devices import CPU, Device, current_device, use_device
from merge_core.progress import Progress
from tests.fake_accelerator import fake
from tests.pages.test_pages import installed_components
from ui.server.jobs import JobRunner


def draw() -> None:
    """A page with the choice, and one that is a fragment's rerun without it."""
    import streamlit as st

    from merge_core.devices import current_device
    from ui import kept, sidebar

    kept.enter(st.session_state.get("test_page", "one"))
    if st.session_state.get("test_page") == "fragment":
        sidebar.use_kept_device()
    else:
        with st.sidebar:
            sidebar.choose_device()
    st.session_state["test_device"] = current_device().name
    st.session_state["test_address"] = kept.address()


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "find_devices", lambda: (fake(), CPU))
    monkeypatch.setattr("ui.sidebar.find_devices", lambda: (fake(), CPU))
    monkeypatch.delenv(devices.VARIABLE, raising=False)


def app(**query: Any) -> AppTest:
    at = AppTest.from_function(draw, default_timeout=30)
    at._bidi_component_manager = installed_components()
    at.query_params.update(query)
    at.run()
    assert not at.exception
    return at


@pytest.mark.usefixtures("two")
def test_it_says_what_there_is_and_is_kept_but_in_no_link() -> None:
    at = app()
    box = at.sidebar.selectbox(key="device")
    assert box.options == ["Fake Accelerator 3000 (cuda:0)", CPU.title]
    assert at.sidebar.caption[0].value == "8.0 GiB of memory free"
    assert at.session_state["test_device"] == "cuda:0"
    box.select("cpu").run()
    assert at.session_state["test_device"] == "cpu"
    assert "device" not in at.session_state["test_address"]
    assert "device" not in at.query_params
    for page in ("two", "fragment", "one"):  # other pages, and reruns of a fragment alone
        at.session_state["test_page"] = page
        at.run()
        assert at.session_state["test_device"] == "cpu", page


def test_one_device_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "find_devices", lambda: (CPU,))
    monkeypatch.setattr("ui.sidebar.find_devices", lambda: (CPU,))
    monkeypatch.delenv(devices.VARIABLE, raising=False)
    at = app()
    assert not at.sidebar.selectbox
    assert at.session_state["test_device"] == "cpu"


@pytest.mark.usefixtures("two")
def test_a_link_does_not_choose_it() -> None:
    assert app(device="cpu", page="x").session_state["test_device"] == "cuda:0"


def test_a_job_computes_where_it_was_asked_for() -> None:
    done, seen = threading.Event(), list[str]()

    def work(progress: Progress) -> None:
        seen.append(current_device().name)
        done.set()

    with use_device(Device("cuda:0", "First")):
        JobRunner(threads=1).submit("a", "A", work)
    assert done.wait(10)
    assert seen == ["cuda:0"]

"""The one mechanism that keeps controls: links, pages, slots, and values at rest."""

from __future__ import annotations

from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from tests.pages.test_pages import installed_components


def draw(method: str = "a", page: str = "one") -> None:
    """A page with one control of each kind."""
    import streamlit as st

    from ui import controls, kept
    from ui.widgets import share_slider

    method, page = (
        st.session_state.get("test_method", method),
        st.session_state.get("test_page", page),
    )
    kept.enter(page)
    if st.session_state.pop("test_reset", False):
        kept.reset()
    values = {
        "select": controls.selectbox("S", ["x", "y"], "select"),
        "side": controls.choice("C", {1: "One", 2: "Two"}, "side"),
        "pills": controls.pills("P", range(3), "pills"),
        "many": controls.multiselect("M", ["x", "y"], "many", rest=["x"]),
        "share": share_slider("R", "share", "", slot=f"share of {method}"),
        "scale": controls.slider("L", 0.0, 8.0, "scale", rest=1.0, step=0.05, slot=method),
        "count": controls.count("N", 1, "count", rest=16),
        "on": controls.toggle("T", "on"),
        "text": controls.text("X", "text"),
        "suite": controls.selectbox("U", ["vision", "mine"], "suite"),
    }
    st.session_state["test_values"] = values
    st.session_state["test_unread"] = kept.take_unread()


REST = {
    "select": "x", "side": 1, "pills": [0, 1, 2], "many": ["x"], "share": 0.08, "scale": 1.0,
    "count": 16, "on": False, "text": "", "suite": "vision",
}  # fmt: skip
LINK = {
    "select": "y", "side": "Two", "pills": ["0", "2"], "many": [""], "share": "11.3456 %",
    "scale": "5.637", "count": "17", "on": "true", "text": "a&b=ü", "suite": "mine",
}  # fmt: skip
LINKED = {
    "select": "y", "side": 2, "pills": [0, 2], "many": [], "share": 0.113456, "scale": 5.637,
    "count": 17, "on": True, "text": "a&b=ü", "suite": "mine",
}  # fmt: skip


def app(**query: Any) -> AppTest:
    at = AppTest.from_function(draw, default_timeout=30)
    at._bidi_component_manager = installed_components()
    at.query_params.update(query)
    return run(at)


def run(at: AppTest, **state: str) -> AppTest:
    for name, value in state.items():
        at.session_state[name] = value
    at.run()
    assert not at.exception, at.exception
    return at


def values(at: AppTest) -> dict[str, Any]:
    return dict(at.session_state["test_values"])


def test_an_address_at_rest_is_empty() -> None:
    at = app()
    assert values(at) == REST
    assert at.query_params == {}


def test_a_link_is_read_exactly_and_stays_as_it_is() -> None:
    at = app(**LINK)
    assert values(at) == LINKED
    kept = {name: words for name, words in at.query_params.items() if name != "_page"}
    assert {n: [w] if isinstance(w, str) else w for n, w in kept.items()} == {
        n: [w] if isinstance(w, str) else w for n, w in LINK.items()
    }
    assert values(run(at)) == LINKED


@pytest.mark.parametrize("name", sorted(set(LINK) - {"text", "many"}))
def test_what_does_not_fit_is_at_rest_and_said(name: str) -> None:
    at = app(**{name: "9999 nonsense"})
    assert values(at) == REST
    assert len(at.session_state["test_unread"]) == 1


def test_another_page_keeps_its_own_and_what_is_shared() -> None:
    at = app(**LINK)
    at.query_params.clear()  # the navigation leads to an address that says nothing
    other = values(run(at, test_page="two"))
    assert other == {**REST, "suite": "mine"}
    at.slider(key="scale").set_value(2.0)
    assert values(run(at))["scale"] == 2.0
    at.query_params.clear()
    assert values(run(at, test_page="one")) == LINKED
    at.query_params.clear()
    assert values(run(at, test_page="two")) == {**REST, "suite": "mine", "scale": 2.0}


def test_a_link_says_everything_of_its_page() -> None:
    at = app(**LINK)
    at.query_params.clear()
    run(at, test_page="two")
    at.query_params.clear()
    at.query_params["scale"] = "3"
    # What the page stood at before does not change what the link means.
    assert values(run(at, test_page="one")) == {**REST, "scale": 3.0, "suite": "mine"}


def test_a_page_is_put_to_rest_and_its_suite_stays() -> None:
    at = app(**LINK)
    at.session_state["test_reset"] = True
    at = run(at)
    assert at.session_state["test_values"] == REST | {"suite": "mine"}
    assert dict(at.query_params) == {"suite": "mine", "_page": "one"}
    at.session_state["test_page"] = "two"
    assert run(at).session_state["test_values"]["suite"] == "mine"
    at.session_state["test_page"] = "one"
    assert run(at).session_state["test_values"] == REST | {"suite": "mine"}


def test_each_method_keeps_values_of_its_own() -> None:
    at = app(scale="5.637", share="11.3 %")
    assert values(run(at, test_method="b"))["scale"] == 1.0
    at.slider(key="scale").set_value(2.0)
    run(at)
    assert values(run(at, test_method="a"))["scale"] == 5.637
    assert values(run(at, test_method="b"))["scale"] == 2.0

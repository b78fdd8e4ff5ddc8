"""Panels: what stands in them, in which order, and what a click hands on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import plotly.graph_objects as go
import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from ui import charts


def empty() -> go.Figure:
    """A figure with nothing in it."""
    return go.Figure()


def script() -> None:
    """Two charts side by side, a place that is empty, and what is said of all."""
    import pandas as pd
    import streamlit as st

    from tests.ui.test_charts import empty
    from ui import charts

    frame = pd.DataFrame({"place": [1, 2]})
    left = charts.Chart(charts.drawn(empty), "left", "On the left", 300, "Small letters")
    right = charts.Chart(
        charts.drawn(empty), "right", "On the right", numbers=charts.Numbers(frame, "right")
    )
    explained = charts.HowToRead("Read **this**", r"\pi")
    charts.panel(
        left, None, right, columns=2, how_to_read=explained, numbers=charts.Numbers(frame, "both")
    )
    charts.panel(None, key="empty", columns=st.columns(1), how_to_read=explained)


def opened(*keys: str) -> AppTest:
    at = AppTest.from_function(script, default_timeout=30)
    for key in keys:
        at.session_state[key] = True
    at.run()
    assert not at.exception
    return at


def test_charts_stand_in_turn_with_what_belongs_to_them() -> None:
    at = opened()
    first, second = at.columns[:2], at.columns[2:4]
    alts = [[chart.proto.alt for chart in c.get("plotly_chart")] for c in (*first, *second)]
    assert alts == [["On the left"], [], ["On the right"], []]
    assert [caption.value for caption in first[0].caption] == ["Small letters"]
    assert [e.label for e in second[0].expander] == ["The numbers"]
    labels = [expander.label for expander in at.expander]
    assert labels == ["The numbers", "How to read this", "The numbers", "How to read this"]


def test_expanders_are_filled_when_they_are_opened() -> None:
    at = opened()
    assert not at.latex
    assert not at.dataframe
    at = opened("how_left", "numbers_left")
    assert [formula.value for formula in at.latex] == ["$$\n\\pi\n$$"]
    assert at.dataframe[0].value["place"].tolist() == [1, 2]
    assert len(opened("how_empty", "numbers_right").dataframe) == 1


@pytest.mark.parametrize(
    ("points", "told"),
    [
        ([{"customdata": ["a", 2]}], [["a", 2]]),
        # What was drawn from an array comes back by place.
        ([{"customdata": {"0": "a", "1": 2}}], [["a", 2]]),
        ([], []),
    ],
)
def test_a_click_hands_on_what_the_mark_carries(
    monkeypatch: pytest.MonkeyPatch, points: list[Any], told: list[list[Any]]
) -> None:
    clicked: list[Callable[[], None]] = []
    monkeypatch.setattr(
        st, "plotly_chart", lambda _, **options: clicked.append(options["on_select"])
    )
    monkeypatch.setattr(st, "session_state", {"map": {"selection": {"points": points}}})
    heard: list[Any] = []
    charts.panel(charts.Chart(charts.drawn(empty), "map", "A map", on_click=heard.append))
    clicked[0]()
    assert heard == told

"""Panels: figures with how to read them, their numbers, CSV and a link to the view."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import cycle, repeat
from typing import Any, Literal, NamedTuple, ParamSpec

import pandas as pd
import plotly.graph_objects as go
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from analysis.figures.legible import INK, colour_texts, enlarge
from analysis.metrics import Metric
from ui import kept, presenting
from ui.plain_text import plain_figure
from ui.server.once import once
from ui.words.glossary import link_terms

P = ParamSpec("P")
CARD = 130  # pixels: half a phone's width
# Columns that many tables have: shares, shown in percent, and those whose name says too little.
SHARES = {"accuracy", "low", "high", "normalised", "worst"}
WORDS = {
    "seconds": "Time (s)",
    "peak_mb": "Peak memory (MB)",
    "storage_mb": "Storage (MB)",
    "images": "Inputs",  # which may be texts
}


def heading(question: str, purpose: str) -> None:
    """A page's title, a question, and one line on what it shows."""
    st.header(question, anchor=False)
    st.markdown(purpose)


def cards(count: int) -> DeltaGenerator:
    """Room for so many metrics side by side, two beside each other on a phone.

    Args:
        count: most of them in a row.
    """
    return st.grid(count, min_column_width=CARD)


def accuracy_card(
    cards: DeltaGenerator, label: str, value: str, split: str, setting: str, **options: Any
) -> None:
    """An accuracy, with a chip that says of which images and at which setting it is.

    Args:
        cards: of :func:`cards`.
        label: whose accuracy.
        value: in words.
        split: of the images, such as ``test``.
        setting: how the setting came about, such as ``default setting``; may be empty.
        options: of Streamlit's metric.
    """
    border = bool(options.pop("border", False))
    with cards.container(border=border, height="stretch", gap="xxsmall"):
        st.metric(label, value, **options)
        chips = f":{'blue' if split == 'test' else 'orange'}-badge[{split}]"
        st.markdown(f"{chips} :gray-badge[{setting}]" if setting else chips)


def delta_colour(metric: Metric) -> Literal["normal", "inverse"]:
    """Of a difference: green where it is the better way."""
    return "inverse" if metric.lower_is_better else "normal"


def interval_words(metric: Metric, row: pd.Series) -> str:
    """A row's interval in the metric's unit."""
    return metric.show_interval(row["low"], row["high"]) + metric.ending


def unit_words(metric: Metric) -> str:
    """In what differences are."""
    return f"in {metric.unit}" if metric.unit else "differences in percentage points"


def which_way(metric: Metric) -> str:
    """A sentence about which way is better, where it is not the usual one."""
    return f" {metric.label}: lower is better." if metric.lower_is_better else ""


class HowToRead(NamedTuple):
    """What a panel shows, in Markdown, and its formula, in LaTeX."""

    text: str
    formula: str


class Numbers(NamedTuple):
    """The frame that is drawn, and the name of its CSV file without the ending."""

    frame: pd.DataFrame
    name: str


@dataclass(frozen=True)
class Drawn:
    """A figure as the browser is sent it; read-only, for all sessions are sent the same.

    Attributes:
        spec: its data and layout, of texts, numbers, lists and dictionaries.
    """

    spec: Mapping[str, Any]

    def with_height(self, height: int | None) -> Drawn:
        """The same figure, so many pixels high; itself at None."""
        if height is None:
            return self
        return Drawn({**self.spec, "layout": {**self.spec["layout"], "height": height}})


class _AsDrawn(go.Figure):
    """Lets Streamlit send a figure as it is, where it would check every value of it again."""

    def __init__(self, drawn: Drawn) -> None:
        self._drawn = drawn

    def to_dict(self) -> dict[str, Any]:
        return dict(self._drawn.spec)


def drawn(make: Callable[P, go.Figure], *args: P.args, **kwargs: P.kwargs) -> Drawn:
    """A figure, which is made once for all sessions.

    Args:
        make: one of :mod:`analysis.figures`.
        args, kwargs: its arguments.
    """
    return once(_write, make, args, kwargs)


def _write(
    make: Callable[..., go.Figure], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Drawn:
    return Drawn(json.loads(plain_figure(make(*args, **kwargs)).to_json(validate=False)))


def _enlarge(figure: Drawn) -> Drawn:
    return Drawn(enlarge(figure.spec, presenting.FACTOR))


@dataclass(frozen=True)
class Chart:
    """A figure as it stands in a panel.

    Attributes:
        figure: of :func:`drawn`; as wide as its place.
        key: unique on the page; the PNG file is named after it.
        alt: what a screen reader says.
        height: in pixels; the figure's own when None.
        caption: Markdown in small letters below it.
        numbers: the figure's own, where charts that stand side by side show different ones.
        on_click: called with the ``customdata`` of a mark that is clicked, before the next run.
    """

    figure: Drawn
    key: str
    alt: str
    height: int | None = None
    caption: str = ""
    numbers: Numbers | None = None
    on_click: Callable[[Sequence[Any]], None] | None = None


def panel(
    *charts: Chart | None,
    key: str = "",
    columns: int | Sequence[DeltaGenerator] = 1,
    how_to_read: HowToRead | None = None,
    numbers: Numbers | None = None,
) -> None:
    """Draw charts, and below them how they are read and the numbers that they show.

    Explanation and numbers are in expanders that are filled when they are opened: formulas and
    tables that nobody looks at would double the time until a page's first figure.

    Args:
        charts: drawn in this order; None leaves a place empty, where nothing is computed yet.
        key: unique on the page, of the expanders; the first chart's when empty.
        columns: how many charts stand side by side (below each other on a phone), or the columns
            themselves, which may hold controls already; they are filled in turn.
        how_to_read: of all charts together.
        numbers: of all charts together.
    """
    for chart, place in zip(charts, _places(columns, len(charts)), strict=False):
        if chart is not None:
            with place:
                _draw(chart)
    key = key or next((chart.key for chart in charts if chart is not None), "")
    if how_to_read is not None:
        _explain(how_to_read, key)
    if numbers is not None:
        _tabulate(numbers, key)


def _places(
    columns: int | Sequence[DeltaGenerator], count: int
) -> Iterable[AbstractContextManager[Any]]:
    """Where each of so many charts is drawn; rows of columns are made one below the other."""
    if not isinstance(columns, int):
        return cycle(columns)
    if columns == 1:
        return repeat(nullcontext())
    return [place for _ in range(0, count, columns) for place in st.columns(columns)]


def _draw(chart: Chart) -> None:
    """The figure with a PNG button, its caption and its own numbers."""
    image = {"format": "png", "filename": f"mergescope_{chart.key}", "scale": 2}
    options: dict[str, Any] = {}
    if chart.on_click is not None:
        clicked = partial(_pass_on, chart.key, chart.on_click)
        options = {"on_select": clicked, "selection_mode": "points"}
    ink = INK["dark" if st.context.theme.type == "dark" else "light"]
    figure = Drawn(colour_texts(chart.figure.with_height(chart.height).spec, ink))
    if presenting.is_on():
        figure = once(_enlarge, figure)
    st.plotly_chart(
        _AsDrawn(figure),
        key=chart.key,
        alt=chart.alt,
        config={"toImageButtonOptions": image, "displaylogo": False},
        **options,
    )
    if chart.caption:
        st.caption(chart.caption)
    if chart.numbers is not None:
        _tabulate(chart.numbers, chart.key)


def _pass_on(key: str, on_click: Callable[[Sequence[Any]], None]) -> None:
    """Hand the data of a clicked mark on; a click beside all marks selects none."""
    points = st.session_state[key]["selection"]["points"]
    if points:
        data = points[0]["customdata"]
        # Streamlit gives what was drawn from an array as a dictionary by place.
        values = data if isinstance(data, list) else [data[str(i)] for i in range(len(data))]
        on_click([v.replace("&lt;", "<") if isinstance(v, str) else v for v in values])


def _explain(how_to_read: HowToRead, key: str) -> None:
    label, icon = "How to read this", ":material/menu_book:"
    with st.expander(label, icon=icon, key=f"how_{key}", on_change="rerun") as opened:
        if opened.open:
            st.markdown(link_terms(how_to_read.text))
            st.latex(how_to_read.formula)


def _tabulate(numbers: Numbers, key: str) -> None:
    label, icon = "The numbers", ":material/table:"
    with st.expander(label, icon=icon, key=f"numbers_{key}", on_change="rerun") as opened:
        if opened.open:
            table(numbers.frame, numbers.name, key)


def table(frame: pd.DataFrame, name: str, key: str, words: Mapping[str, str] | None = None) -> None:
    """A table, its CSV, and a link to the view.

    Args:
        frame: the numbers.
        name: file name of the CSV, without ending.
        key: unique on the page.
        words: what stands above columns whose name says too little; the CSV keeps the names.
    """
    above = {name: name.replace("_", " ").capitalize() for name in map(str, frame)}
    above |= WORDS | dict(words or {})
    columns: dict[str, Any] = dict(above)
    for column in SHARES & set(frame) if "accuracy" in frame else ():
        if frame[column].dropna().between(0, 1).all():
            columns[column] = st.column_config.NumberColumn(above[column], format="percent")
    st.dataframe(frame, hide_index=True, column_config=columns, key=f"table_{key}")
    left, right = st.columns([1, 2], vertical_alignment="center")
    left.download_button(
        "Download CSV",
        data=lambda: frame.to_csv(index=False).encode(),
        file_name=f"{name}.csv",
        mime="text/csv",
        key=f"csv_{key}",
        on_click="ignore",
    )
    right.code(link(), language=None)


def link() -> str:
    """The address of the current view."""
    base, query = st.context.url or "", kept.address()
    return f"{base}?{query}" if query else base

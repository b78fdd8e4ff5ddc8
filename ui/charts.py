"""A figure with what belongs to it: how to read it, its numbers, CSV and a link to the view."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

import pandas as pd
import plotly.graph_objects as go
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

CARD = 130  # pixels: half a phone's width
# Columns that many tables have: shares, shown in percent, and those with a unit.
SHARES = {"accuracy", "low", "high", "normalised", "worst"}
UNITS = {"seconds": "Time (s)", "peak_mb": "Peak memory (MB)", "storage_mb": "Storage (MB)"}


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


def show(figure: go.Figure, key: str, alt: str, height: int | None = None, **options: Any) -> Any:
    """Draw a figure at full width, with a PNG button named after it.

    Args:
        figure: the figure.
        key: unique on the page.
        alt: what a screen reader says.
        height: in pixels; the figure's own when None.
        options: of ``st.plotly_chart`` (``on_select``, ``selection_mode``).

    Returns:
        What ``st.plotly_chart`` returns (the selection, if asked for).
    """
    if height is not None:
        figure.update_layout(height=height)
    image = {"format": "png", "filename": f"mergescope_{key}", "scale": 2}
    return st.plotly_chart(
        figure,
        key=key,
        alt=alt,
        config={"toImageButtonOptions": image, "displaylogo": False},
        **options,
    )


def how_to_read(key: str, text: str, formula: str) -> None:
    """The expander under a figure: what it shows, and its formula.

    Like :func:`numbers` it is filled when it is opened: formulas and tables that nobody looks at
    would double the time until a page's first figure.

    Args:
        key: unique on the page.
        text: Markdown.
        formula: LaTeX.
    """
    label, icon = "How to read this", ":material/menu_book:"
    with st.expander(label, icon=icon, key=f"how_{key}", on_change="rerun") as opened:
        if opened.open:
            st.markdown(text)
            st.latex(formula)


def numbers(frame: pd.DataFrame, name: str, key: str) -> None:
    """The drawn numbers as a table, as CSV, and a link to the view.

    Args:
        frame: the frame that is drawn.
        name: file name of the CSV, without ending.
        key: unique on the page.
    """
    label, icon = "The numbers", ":material/table:"
    with st.expander(label, icon=icon, key=f"numbers_{key}", on_change="rerun") as opened:
        if opened.open:
            table(frame, name, key)


def table(frame: pd.DataFrame, name: str, key: str, words: Mapping[str, str] | None = None) -> None:
    """A table, its CSV, and a link to the view.

    Args:
        frame: the numbers.
        name: file name of the CSV, without ending.
        key: unique on the page.
        words: what stands above columns whose name says too little; the CSV keeps the names.
    """
    above = {name: name.replace("_", " ").capitalize() for name in map(str, frame)}
    above |= UNITS | dict(words or {})
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
    query = urlencode(
        [(name, value) for name in st.query_params for value in st.query_params.get_all(name)]
    )
    base = st.context.url or ""
    return f"{base}?{query}" if query else base

"""Glossary: every word of the field that the pages use, explained once."""

from __future__ import annotations

import streamlit as st

from ui import charts, shell
from ui.words.glossary import TERMS

shell.enter()


def page() -> None:
    """The page."""
    charts.heading(
        "What do the words mean?",
        "The field's words as these pages use them. In the texts below figures they say their "
        "meaning on hover, and lead here.",
    )
    for term in sorted(TERMS, key=lambda term: term.name):
        st.subheader(term.name.capitalize(), anchor=term.anchor)
        more = "" if term.source is None else f" [{term.source[0]}]({term.source[1]})"
        st.markdown(f"{term.meaning}{more}")


page()

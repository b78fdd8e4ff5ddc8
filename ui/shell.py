"""The shell around every page: navigation, the shared sidebar, and errors in words.

Streamlit runs a file of ``pages/`` without the entry when it is the first request to a fresh
server, and in every AppTest. Each page therefore begins with :func:`enter`, which runs the shell
(and through it the page) if the shell is not running already.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import streamlit as st

from merge_core.errors import MergeScopeError
from merge_core.recipe import Recipe
from ui import resources
from ui.resources import View
from ui.suites import offered
from ui.widgets import share_label

ROOT = Path(__file__).resolve().parent.parent
RUNNING = "_shell_is_running"
VIEW = "_view"
log = logging.getLogger(__name__)

PAGES = (
    ("overview", "Overview", ":material/biotech:", "The suite and a first result"),
    ("spectra", "Spectra", ":material/show_chart:", "How many directions a task vector has"),
    ("interference", "Interference", ":material/grid_on:", "How tasks get into each other's way"),
    ("rank_and_scale", "Rank and scale", ":material/tune:", "Which rank and scale merge best"),
    ("merge_lab", "Merge lab", ":material/science:", "Merge, compare, download"),
)


def pages() -> list[Any]:
    """The registered pages; the first is the default."""
    return [
        st.Page(ROOT / "pages" / f"{name}.py", title=title, icon=icon, help=help, default=i == 0)
        for i, (name, title, icon, help) in enumerate(PAGES)
    ]


def page(name: str) -> Any:
    """The registered page of that file name."""
    return pages()[[entry[0] for entry in PAGES].index(name)]


def explain_no_evaluation(view: View) -> None:
    """Say what a suite lacks for evaluation, and what can be done with it all the same."""
    st.info(
        f"The suite **{view.name}** can be analysed and merged but not evaluated: "
        f"{view.suite.why_not_evaluated}. Add it to `{view.suite.path.name}` to see accuracies "
        "here; Spectra, Interference and the Merge lab's download work without it."
    )


def lab_query(recipe: Recipe) -> dict[str, str | list[str]]:
    """The Merge lab's link parameters for a recipe (widgets are in links by their labels)."""
    method = recipe.declaration
    query: dict[str, str | list[str]] = {"suite": recipe.suite, "method": method.title}
    if recipe.tasks is not None:
        query["tasks"] = list(recipe.tasks)
    for spec in method.specs:
        value = recipe.parameters[spec.name]
        query[spec.name] = share_label(value) if spec.kind == "rank" else str(value)
    return query


def run() -> None:
    """Draw the shell, then the page that was asked for."""
    st.set_page_config(page_title="MergeScope", page_icon="🔬", layout="wide")
    page = st.navigation(pages())
    st.session_state[RUNNING] = True
    try:
        _in_words(lambda: _run_page(page))
    finally:
        st.session_state[RUNNING] = False


def enter() -> None:
    """First line of every page: run the shell if this page was started without it."""
    if not st.session_state.get(RUNNING):
        run()
        st.stop()


def view() -> View:
    """What the sidebar and the link say (also inside fragments)."""
    chosen: View = st.session_state[VIEW]
    return chosen


def fragment(function: Callable[..., None] | None = None, *, run_every: float | None = None) -> Any:
    """Like ``st.fragment``, with errors shown in words on reruns of the fragment alone too."""

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        @wraps(body)
        def guarded(*args: Any, **kwargs: Any) -> None:
            _in_words(lambda: body(*args, **kwargs))

        return st.fragment(guarded, run_every=run_every)

    return decorate if function is None else decorate(function)


def _run_page(page: Any) -> None:
    st.session_state[VIEW] = _sidebar()
    page.run()


def _sidebar() -> View:
    """The global choices, kept across pages and in the link."""
    with st.sidebar:
        names = list(offered())
        name = st.selectbox(
            "Suite",
            names,
            key="suite",
            bind="query-params",
            help="Experts fine-tuned from one base. Start with `mergescope app my/suite.yaml` "
            "to see your own.",
        )
        key = resources.suite_key(name)
        suite = resources.open_suite(name, key)
        chosen = st.pills(
            "Tasks to merge",
            suite.tasks,
            selection_mode="multi",
            default=suite.tasks,
            key="tasks",
            bind="query-params",
            help="Which experts take part. CART needs three or more: with two it equals the "
            "average.",
        )
        if not chosen:
            st.info("Choose at least one task.")
            st.stop()
        layer = st.selectbox(
            "Layer",
            suite.matrices,
            key="layer",
            bind="query-params",
            help="The weight matrix that Spectra and Interference look into.",
        )
        if layer is None:
            st.warning("This suite has no weight matrix to decompose.")
            st.stop()
    return View(name, key, suite, suite.select(chosen), layer)


def _in_words(body: Callable[[], None]) -> None:
    """Run a body; what goes wrong becomes a sentence on the page, never a traceback."""
    try:
        body()
    except MergeScopeError as error:
        st.error(str(error), icon=":material/error:")
    except Exception as error:
        log.exception("page failed")
        st.error(
            f"This view failed unexpectedly ({type(error).__name__}). The server's log has the "
            "details; other pages still work.",
            icon=":material/error:",
        )

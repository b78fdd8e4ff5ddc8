"""The shell around every page: navigation, the shared sidebar, and errors in words.

Streamlit runs a file of ``pages/`` without the entry when it is the first request to a fresh
server, and in every AppTest. Each page therefore begins with :func:`enter`, which runs the shell
(and through it the page) if the shell is not running already.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Literal

import streamlit as st

from analysis.frames.entries import NotRecorded
from merge_core.errors import MergeScopeError
from merge_core.merging.recipe import Recipe
from merge_core.suites.bundled import bundled_title
from merge_core.suites.recorded import RecordedSuite
from ui import brand, history, kept, presenting, sidebar
from ui.plain_text import code, plain, show_error, show_info
from ui.server import garbage, session_files
from ui.server.catalog import POOLS, SUITES
from ui.server.pool_resources import PoolView
from ui.server.resources import View
from ui.widgets import RANK_UNITS, share_words

ROOT = Path(__file__).resolve().parent.parent
RUNNING = "_shell_is_running"
VIEW = "_view"
POOL_VIEW = "_pool_view"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PageEntry:
    """A page of the navigation.

    Attributes:
        name: its file in ``pages/``.
        title: in the menu.
        icon: in the menu.
        help: one line on what it shows.
        subject: what the sidebar chooses for it (``own``: the page itself chooses).
        opened: the pool that it opens on.
    """

    name: str
    title: str
    icon: str
    help: str
    subject: Literal["suite", "pool", "own"]
    opened: str = ""


MERGING = (
    PageEntry(
        "overview", "Overview", ":material/biotech:", "The suite and a first result", "suite"
    ),
    PageEntry(
        "open_checkpoints",
        "Open checkpoints",
        ":material/folder_open:",
        "Your own models: what fits, and a suite of them",
        "own",
    ),
    PageEntry(
        "spectra",
        "Spectra",
        ":material/show_chart:",
        "How many directions a task vector has",
        "suite",
    ),
    PageEntry(
        "interference",
        "Interference",
        ":material/grid_on:",
        "How tasks get into each other's way",
        "suite",
    ),
    PageEntry(
        "rank_and_scale",
        "Rank and scale",
        ":material/tune:",
        "Which rank and scale merge best",
        "suite",
    ),
    PageEntry("merge_lab", "Merge lab", ":material/science:", "Merge, compare, download", "suite"),
    PageEntry(
        "compare", "Compare", ":material/leaderboard:", "All methods on the same inputs", "suite"
    ),
    PageEntry(
        "how_does_it_scale",
        "How does it scale?",
        ":material/stacked_line_chart:",
        "Accuracy over the number of tasks and the size of models",
        "suite",
    ),
)
AVERAGING = (
    PageEntry(
        "patterns",
        "Patterns in weights",
        ":material/image_search:",
        "Classifiers and filters as pictures",
        "own",
    ),
    PageEntry(
        "weights_or_features",
        "Weights or features?",
        ":material/call_merge:",
        "Averaging weights against averaging outputs",
        "pool",
        "digits-resnet-shared",
    ),
    PageEntry(
        "magnitude_and_stability",
        "Magnitude and stability",
        ":material/zoom_out_map:",
        "What scaling and noise do to predictions",
        "pool",
        "digits-vgg-shared",
    ),
)
WORDS = (
    PageEntry(
        "glossary", "Glossary", ":material/dictionary:", "What the words of the field mean", "own"
    ),
)
SECTIONS = {"Merging experts": MERGING, "Averaging weights": AVERAGING, "Words": WORDS}
PAGES = tuple(entry for entries in SECTIONS.values() for entry in entries)


def _page(entry: PageEntry) -> Any:
    return st.Page(
        ROOT / "pages" / f"{entry.name}.py",
        title=entry.title,
        icon=entry.icon,
        help=entry.help,
        default=entry is first_page(),
    )


def first_page() -> PageEntry:
    """What is shown first: pools that were named at the start, else the overview of a suite."""
    if POOLS.opened() and not SUITES.opened():
        return next(entry for entry in PAGES if entry.subject == "pool")
    return PAGES[0]


def page(name: str) -> Any:
    """The registered page of that file name."""
    return _page(next(entry for entry in PAGES if entry.name == name))


def explain_no_evaluation(view: View) -> None:
    """Say what a suite lacks for evaluation, and what can be done with it all the same."""
    name = bundled_title(view.name)
    if isinstance(view.suite, RecordedSuite):
        st.info(
            f"The record **{plain(name)}** holds no accuracies: "
            f"{plain(view.suite.why_not_evaluated)}. Spectra and Interference show what it holds."
        )
        return
    if view.suite.can_evaluate:
        st.info(
            f"The {plain(view.suite.inputs)} of the suite **{plain(name)}** have no labels, "
            "so no accuracy can be measured. Add `val_labels` and `test_labels` to its data to see "
            "accuracies here; Rank and scale chooses both from inputs without labels."
        )
        return
    st.info(
        f"The suite **{plain(name)}** can be analysed and merged but not evaluated: "
        f"{plain(view.suite.why_not_evaluated)}. Add it to {code(view.suite.path.name)} to see "
        "accuracies here; Spectra, Interference and the Merge lab's download work without it."
    )


def lab_query(recipe: Recipe) -> dict[str, str | list[str]]:
    """The Merge lab's link parameters for a recipe (widgets are in links by their labels)."""
    method = recipe.declaration
    query: dict[str, str | list[str]] = {"suite": recipe.suite, "method": method.title}
    if recipe.tasks is not None:
        query["tasks"] = list(recipe.tasks)
    for spec in method.specs:
        value = recipe.parameters[spec.name]
        if spec.kind != "rank":
            query[spec.name] = str(value)
        elif isinstance(value, int):
            query |= {f"{spec.name}_unit": RANK_UNITS["count"], f"{spec.name}_count": str(value)}
        else:
            query[spec.name] = share_words(value)
    return query


def run() -> None:
    """Draw the shell, then the page that was asked for."""
    with suppress(OSError, MergeScopeError):  # said on the page that needs it
        session_files.janitor()
    # Before the navigation, which would have the browser fetch the page's icon from elsewhere.
    st.set_page_config(page_title="MergeScope", page_icon=brand.MARK, layout="wide")
    groups = {title: [_page(e) for e in entries] for title, entries in SECTIONS.items()}
    page = st.navigation(groups)
    entry = next(entry for entry in PAGES if entry.title == page.title)
    st.set_page_config(
        page_title=f"{entry.title} · MergeScope", page_icon=brand.MARK, layout="wide"
    )
    st.logo(brand.LOGO, size="large", icon_image=brand.MARK)
    history.keep_one_entry_a_page([first_page().name, *(each.name for each in PAGES)])
    kept.enter(entry.name)
    st.session_state[RUNNING] = True
    try:
        _explain_errors(lambda: _run_page(page, entry))
    finally:
        st.session_state[RUNNING] = False
        garbage.freeze_objects()


def enter() -> None:
    """First line of every page: run the shell if this page was started without it."""
    if not st.session_state.get(RUNNING):
        run()
        st.stop()


def view() -> View:
    """The suite, tasks and layer that the sidebar and the link say (also inside fragments)."""
    chosen: View = st.session_state[VIEW]
    return chosen


def pool_view() -> PoolView:
    """The pool and members that the sidebar and the link say (also inside fragments)."""
    chosen: PoolView = st.session_state[POOL_VIEW]
    return chosen


def fragment(function: Callable[..., None] | None = None, *, run_every: float | None = None) -> Any:
    """Like ``st.fragment``, with errors shown in words on reruns of the fragment alone too."""

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        def run_there(*args: Any, **kwargs: Any) -> None:
            sidebar.use_kept_device()  # a rerun of the fragment alone draws no sidebar
            body(*args, **kwargs)

        @wraps(body)
        def run_guarded(*args: Any, **kwargs: Any) -> None:
            try:
                _explain_errors(lambda: run_there(*args, **kwargs))
            finally:
                if not st.session_state.get(RUNNING):  # else the shell's own run does it
                    garbage.freeze_objects()

        return st.fragment(run_guarded, run_every=run_every)

    return decorate if function is None else decorate(function)


def _run_page(page: Any, entry: PageEntry) -> None:
    note, missing = st.container(), ""
    with st.sidebar:
        try:
            if entry.subject == "suite":
                st.session_state[VIEW] = sidebar.choose_suite()
            elif entry.subject == "pool":
                st.session_state[POOL_VIEW] = sidebar.choose_pool(entry.opened)
        except sidebar.NothingChosen as error:
            missing = str(error)
        sidebar.choose_device()
        presenting.choose()
        st.button(
            "Reset this page",
            icon=":material/restart_alt:",
            type="tertiary",
            help="Every control of this page as it was at first, and the usual tasks and layer.",
            on_click=kept.reset,
        )
    presenting.show()
    if missing:
        show_info(missing)
        return
    if entry.subject == "suite" and len(view().tasks) == 2:
        note.info(
            "Two tasks are chosen. Their changes about the average are opposite, so CART is the "
            "average at every rank and scale; choose three tasks or more to see it differ."
        )
    page.run()
    if unread := kept.take_unread():
        note.warning(
            f"This link asks for something that is not on offer here ({plain(', '.join(unread))}). "
            "The usual choice is shown instead."
        )


def _explain_errors(body: Callable[[], None]) -> None:
    """Run a body; what goes wrong becomes a sentence on the page, never a traceback."""
    try:
        body()
    except NotRecorded as error:
        show_info(error)
    except MergeScopeError as error:
        show_error(error)
    except Exception as error:
        log.exception("page failed")
        show_error(
            f"This view failed unexpectedly ({type(error).__name__}). The server's log has the "
            "details; other pages still work."
        )

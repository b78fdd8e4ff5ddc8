"""Rank and scale: the setting that merges best, how sure that is, and what finds it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pandas as pd
import streamlit as st

from analysis.figures import rank_evidence
from analysis.figures import rank_selection as figures
from analysis.frames.entries import NotRecorded
from analysis.metrics import mean_over_tasks, metric_of
from analysis.rank_selection.rule import Mode
from analysis.rank_selection.select import (
    Selection,
    SelectionOptions,
    recipe_at,
    selectable_methods,
    with_weight_picks,
)
from analysis.rank_selection.space import search_space
from analysis.rank_selection.weight_proxies import PROXIES, defined_for
from analysis.rank_selection.weight_response import PROPORTIONAL
from merge_core.files import digest_of
from merge_core.methods import get_method
from merge_core.progress import Progress
from ui import charts, shell
from ui.controls import choice, selectbox, tabs, toggle
from ui.plain_text import plain, show_info, show_warning
from ui.progress import run_job
from ui.sections.rank_evidence import evidence_section, more_tasks_section
from ui.sections.rank_layers import layers_section
from ui.sections.rank_settings import settings_section
from ui.server import resources
from ui.server.once import once
from ui.server.resources import View
from ui.widgets import share_label
from ui.words.rank_selection import (
    MOST,
    candidates,
    describe_evidence,
    describe_spread,
    setting_in_words,
)

shell.enter()

MODES: dict[Mode, str] = {
    "labels": "With labels",
    "inputs": "Inputs only",
    "weights": "Weights only",
}
SEARCHES = {False: "Adaptive", True: "Full grid"}
# The same low-rank sum about the other origin: drawn beside the method's curve where it is known.
SISTER = {"cart": "low_rank_task_arithmetic", "low_rank_task_arithmetic": "cart"}
SHOWN = ("reconstruction", "interference_row", "update_norm", "alignment")
EVERY_NOTE = (
    "The rules that read inputs each take a search of their own; what other searches have run is "
    "not run again."
)


def choose(view: View) -> tuple[str, Mode, bool]:
    """Method, what may be looked at, and how thoroughly."""
    offered = selectable_methods(view.suite, view.tasks)
    if not view.suite.can_evaluate:
        offered = {name: title for name, title in offered.items() if name in PROPORTIONAL}
    left, middle, right = st.columns([3, 5, 2])
    with left:
        method = selectbox(
            "Method",
            offered,
            "method",
            rest="cart",
            words=offered.__getitem__,
            help="Methods with a rank or a scale that make one model from weights alone.",
        )
    modes = {
        mode: words
        for mode, words in MODES.items()
        if (method in PROPORTIONAL if mode == "weights" else view.suite.can_evaluate)
    }
    with middle:
        mode: Mode = choice(
            "What may be looked at",
            modes,
            "mode",
            "With labels: accuracy on the labelled validation inputs. Inputs only: the same "
            "ones, their labels unread. Weights only: the checkpoints alone, for methods that "
            "add λ times an update to their origin.",
        )
    full_grid = False
    if mode != "weights":
        known = (view.key, view.tasks, method, mode)
        stored = mode == "labels" and stored_choice(*known, True, False, view) is not None
        with right:
            full_grid = choice(
                "Search",
                SEARCHES,
                "search",
                "Adaptive spends inputs where they can change the answer; the full grid runs "
                "every input at every setting, and is shown at first where it is stored.",
                rest=stored,
            )
    return method, mode, full_grid


@st.cache_resource(max_entries=32, show_spinner="Looking up what is known …")
def stored_choice(
    key: str,
    tasks: tuple[str, ...],
    method: str,
    mode: Mode,
    full_grid: bool,
    every_proxy: bool,
    _view: View,
) -> Selection | None:
    """The selection if it takes no forward pass (and the model is small)."""
    space = search_space(method, _view.name, tasks)
    options = SelectionOptions(mode, full_grid, every_proxy, only_rule=not every_proxy)
    live = resources.is_small(_view)
    return resources.output_frames(_view).select_if_known(space, options, live)


@st.cache_data(max_entries=16, show_spinner="Asking the rules that need weights alone …")
def picks_from_weights(key: str, tasks: tuple[str, ...], method: str, _view: View) -> pd.DataFrame:
    """What every rule that needs weights alone picks."""
    space = search_space(method, _view.name, tasks)
    return resources.weight_frames(_view).weight_picks(space)


@st.cache_data(max_entries=16, show_spinner="Following the rules over the rank …")
def curves_over_rank(key: str, tasks: tuple[str, ...], method: str, _view: View) -> pd.DataFrame:
    """What rules that need weights alone say about every rank."""
    space = search_space(method, _view.name, tasks)
    return resources.weight_frames(_view).proxy_curves(space)


def find_selection(
    view: View, method: str, mode: Mode, full_grid: bool, every_proxy: bool = False
) -> Selection | None:
    """The selection, or None while it has still to be found (and offers that)."""
    known = stored_choice(view.key, view.tasks, method, mode, full_grid, every_proxy, view)
    if known is not None:
        return known
    frames = resources.output_frames(view)
    space = search_space(method, view.name, view.tasks)
    options = SelectionOptions(mode, full_grid, every_proxy, only_rule=not every_proxy)
    frames.expect_selection(space, options)

    def work(progress: Progress) -> Selection:
        return frames.select(space, options, progress)

    choices = (method, mode, str(full_grid), str(every_proxy))
    job = run_job(
        digest_of("select", view.key, *view.tasks, *choices),
        "Every rule's pick" if every_proxy else "Rank and scale",
        "Find every rule's pick" if every_proxy else "Find rank and scale",
        EVERY_NOTE if every_proxy else note(space.size, mode, full_grid),
        work,
    )
    if job is None:
        return None
    stored_choice.clear()
    found: Selection = job.result
    return found


def note(size: int, mode: Mode, full_grid: bool) -> str:
    """What the button will do, before it is pressed."""
    if mode == "weights":
        return (
            "Decomposes the task vectors and asks the rule that the evidence recommends; the "
            "others are asked when they are looked at. No input is run."
        )
    how = (
        f"Evaluates all {size} settings on every input of the validation split."
        if full_grid
        else f"Searches {size} settings: few inputs everywhere, more where it matters."
    )
    return f"{how} It runs in the background, can be cancelled, and goes on from where it stopped."


def answer(selection: Selection) -> None:
    """The recommendation, what it rests on, and what it costs."""
    axes = [
        (name, words)
        for name, words in (
            ("Recommended rank", "" if math.isnan(selection.rank) else share_label(selection.rank)),
            ("Recommended λ", "" if math.isnan(selection.scale) else f"{selection.scale:g}"),
        )
        if words
    ]
    cards = charts.cards(4)
    for name, words in axes:
        cards.metric(name, words)
    if selection.accuracy is not None:
        mean, metric = selection.accuracy, metric_of(selection.accuracy)
        charts.accuracy_card(
            cards,
            f"Validation {metric.noun}",
            metric.show(mean[metric.column]),
            "validation",
            "tuned on these" if selection.mode == "labels" else "labels not used",
            delta=interval(mean),
            delta_color="off",
            delta_arrow="off",
            help=f"Mean over tasks at the recommended setting with its 95 % interval; "
            f"{charts.unit_words(metric)}. "
            + (
                f"It was chosen for being {metric.best_word} on these inputs, so the test split "
                "is the fairer number."
                if selection.mode == "labels"
                else "Labels were not used to choose; they only show what came of it."
            ),
        )
    if selection.report is not None:
        test = once(mean_over_tasks, selection.report).iloc[0]
        metric = metric_of(test)
        charts.accuracy_card(
            cards,
            f"Test {metric.noun}",
            metric.show(test[metric.column]),
            "test",
            "tuned on validation" if selection.mode == "labels" else "labels not used",
            delta=interval(test),
            delta_color="off",
            delta_arrow="off",
            help="Of the recommended setting alone, looked at after choosing.",
        )
    if selection.at_edge:
        show_info(selection.at_edge)
    st.markdown(plain(selection.why))


def interval(mean: pd.Series) -> str:
    """An interval in words."""
    metric = metric_of(mean)
    return metric.show_interval(mean["low"], mean["high"]) + metric.ending


def offer_selection(view: View, selection: Selection) -> None:
    """What to do with it: open it in the Merge lab, download its recipe; what it costs."""
    left, middle, right = st.columns([3, 2, 6], vertical_alignment="center")
    left.page_link(
        shell.page("merge_lab"),
        label="Use this in the Merge lab",
        icon=":material/science:",
        query_params=shell.lab_query(selection.recipe),
    )
    middle.download_button(
        "Recipe (YAML)",
        data=lambda: selection.recipe.publish(view.suite).to_yaml(),
        file_name=f"{view.name}_{selection.recipe.method}.yaml",
        mime="text/yaml",
        on_click="ignore",
        icon=":material/download:",
    )
    right.caption(cost(selection))


def judge(view: View, selection: Selection) -> None:
    """How far the rules agree, other settings that are worth a look, and where all that is from."""
    method = selection.recipe.declaration
    if spread := once(describe_spread, selection.picks):
        show_info(spread)
    found = once(
        candidates,
        selection.rank,
        selection.scale,
        selection.points,
        selection.picks,
        selection.rule,
    )
    for each, place in zip(found, st.columns(MOST), strict=False):
        recipe = recipe_at(selection.space, each.rank, each.scale)
        place.page_link(
            shell.page("merge_lab"),
            label=setting_in_words(each.rank, each.scale),
            icon=":material/science:",
            query_params=shell.lab_query(recipe),
        )
        place.caption(plain(each.why))
    st.markdown(once(describe_evidence, view.name, method.name, method.title))


def cost(selection: Selection) -> str:
    """Inputs, seconds and bytes in words."""
    parts = []
    if selection.mode != "weights":
        parts.append(
            f"{selection.asked_images:,} inputs decided "
            f"({selection.asked_images / selection.grid_images:.0%} of the full grid's); "
            + (
                f"{selection.forward_images:,} were run just now, in {selection.seconds:.1f} s."
                if selection.seconds
                else "none was run just now."
            )
        )
    else:
        parts.append(
            f"No input was run; {selection.seconds:.1f} s."
            if selection.seconds
            else "No input was run."
        )
    if selection.low_rank_bytes is not None:
        parts.append(
            f"The kept directions take {size_words(selection.low_rank_bytes)} in factored form,"
        )
    parts.append(f"the merged model {size_words(selection.model_bytes)}.")
    return " ".join(parts)


def size_words(count: float) -> str:
    """A number of bytes in words."""
    return f"{count / 1e6:.3g} MB" if count < 1e9 else f"{count / 1e9:.3g} GB"


def curve_and_map(selection: Selection, view: View) -> None:
    """The section of settings, with the curve about the other origin where that is known."""
    method, mode = SISTER.get(selection.recipe.method), selection.mode
    other = None
    if method in selectable_methods(view.suite, view.tasks) and mode == "labels":
        known = (view.key, view.tasks, method, mode)
        other = stored_choice(*known, selection.full_grid, False, view)
        other = other or stored_choice(*known, False, False, view)
    if toggle(
        "Mark every rule's pick",
        "marks",
        "Rules that read weights take seconds; those that read inputs take a search each.",
    ):
        selection = add_every_pick(selection, view)
    settings_section(selection, other, view)


def add_every_pick(selection: Selection, view: View) -> Selection:
    """The selection with the picks of all rules, once they have been found."""
    method, mode = selection.recipe.method, selection.mode
    if not view.suite.can_evaluate:
        return add_weight_picks(selection, view)
    try:
        found = find_selection(view, method, mode, selection.full_grid, every_proxy=True)
    except NotRecorded as error:
        show_info(error)
        return add_weight_picks(selection, view)
    return found or add_weight_picks(selection, view)


def add_weight_picks(selection: Selection, view: View) -> Selection:
    """The selection with the picks of all rules that need weights alone, where it lacks them."""
    method = selection.recipe.method
    asked = {name for name in PROXIES if defined_for(name, method)}
    if len(asked.intersection(selection.picks["proxy"])) > 1 or not asked:
        return selection  # they were looked at together
    try:
        picks = picks_from_weights(view.key, view.tasks, method, view)
    except NotRecorded as error:
        show_info(error)
        return selection
    return with_weight_picks(selection, picks)


@shell.fragment
def proxies(selection: Selection, view: View) -> None:
    """Every proxy on the rank axis, and what each picks."""
    selection = add_every_pick(selection, view)
    curves = curves_over_rank(view.key, view.tasks, selection.recipe.method, view)
    measured = selection.curve if selection.space.ranks else selection.curve.iloc[:0]
    over_rank, picked = None, None
    if len(curves):
        over_rank = charts.Chart(
            charts.drawn(
                rank_evidence.proxies_over_rank,
                curves,
                measured,
                title="Do proxies from weights know the best rank?",
                shown=SHOWN,
            ),
            key="proxies",
            alt="Proxies over rank, each stretched to the unit interval",
            height=620,
        )
    if selection.picks["rank"].notna().any():
        picked = charts.Chart(
            charts.drawn(
                rank_evidence.picks_over_rank,
                selection.picks,
                title="Which rank does each pick?",
                chosen=selection.rank,
            ),
            key="picks",
            alt="The rank that each proxy picks",
        )
    charts.panel(over_rank, picked, columns=2)
    charts.table(
        selection.picks[
            [
                *("title", "mode", "rank", "scale", "at_edge"),
                *(metric_of(selection.picks).column, "why", "source"),
            ]
        ],
        "picks",
        key="picks",
    )


@shell.fragment
def tasks(selection: Selection, view: View) -> None:
    """Which task wants which rank, and what more tasks do."""
    axis = "rank" if selection.space.ranks else "scale"
    metric = metric_of(selection.picks)
    if selection.score == metric.rule and len(selection.curve):
        frame = resources.output_frames(view).task_curves(selection)
        relative = toggle(
            f"As a share of each expert's {metric.noun}",
            "relative",
            f"Sets it against the expert's own {metric.noun}, so that hard and easy tasks compare.",
        )
        charts.panel(
            charts.Chart(
                charts.drawn(
                    figures.tasks_over_rank,
                    frame,
                    "normalised" if relative else metric.column,
                    title=f"Which task wants which {axis}?",
                    axis=axis,
                    chosen=selection.rank if axis == "rank" else selection.scale,
                ),
                key="task_curves",
                alt=f"{metric.title} of each task over {axis}",
                caption="At each place the setting that is best on average; only settings that "
                "were evaluated on every input are drawn (the full grid has them all). A task's "
                "best is enlarged.",
            ),
            numbers=charts.Numbers(frame, "tasks"),
        )
    more_tasks_section(selection.recipe.method)


def page() -> None:
    """The page."""
    view = shell.view()
    charts.heading(
        "Which rank, and which scale?",
        "Two numbers decide a low-rank merge: how many directions of each task are kept, and how "
        "strongly they are added. Both can be found with labels, with inputs alone, or with no "
        "data at all.",
    )
    if not view.suite.can_evaluate:
        shell.explain_no_evaluation(view)
    method, mode, full_grid = choose(view)
    for warning in get_method(method).warnings(len(view.tasks), None):
        show_warning(warning)
    selection = find_selection(view, method, mode, full_grid)
    if selection is None:
        st.subheader("What the rules have lost so far", anchor=False)
        evidence_section(method)
        return
    answer(selection)
    offer_selection(view, selection)
    judge(view, selection)
    # Only what is looked at is computed and sent.
    for tab, draw in zip(tabs(TABS, "show"), TABS.values(), strict=True):
        if tab.open:
            with tab:
                draw(selection, view)


TABS: dict[str, Callable[[Selection, View], None]] = {
    "Curve and map": curve_and_map,
    "Proxies": proxies,
    "Tasks": tasks,
    "Layers": layers_section,
    "Evidence": lambda selection, _: evidence_section(selection.recipe.method),
}
page()

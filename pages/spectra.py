"""Spectra: how many directions a task vector has, about the base and about the average."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import streamlit as st

from analysis.figures import spectra as figures
from analysis.spectral.spectra import Part, parts_of
from merge_core.checkpoints.parameter_roles import describe
from merge_core.task_vectors import Origin
from ui import charts, shell
from ui.controls import choice, selectbox
from ui.server import resources
from ui.server.resources import View
from ui.widgets import share_label, share_slider

shell.enter()

ORIGINS: dict[str, tuple[Origin, ...]] = {
    "both": ("average", "base"),
    "average": ("average",),
    "base": ("base",),
}
ORIGIN_LABELS = {"both": "Both", "average": "Centred", "base": "Original"}
CLICKED = "_layer_clicked"
FUSED_HELP = "Query, key and value share one fused matrix; CART decomposes it whole."
QUANTITIES = {
    "stable_rank": "Stable rank",
    "effective_rank": "Effective rank",
    "participation_ratio": "Participation ratio",
    "top_share": "Energy in the leading 8 %",
    "energy_rank_90": "Directions for 90 % energy",
    "frobenius": "Norm",
}


@st.cache_data(max_entries=64, show_spinner=False)
def spectrum_frames(
    key: str, tasks: tuple[str, ...], layer: str, origin: Origin, part: Part, _view: View
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Spectrum and cuts of one layer."""
    frames = resources.weight_frames(_view)
    return frames.spectrum(layer, origin, part), frames.cuts(layer, origin, part)


@st.cache_data(max_entries=32, show_spinner="Decomposing every layer …")
def summary_frame(
    key: str, tasks: tuple[str, ...], origin: Origin, apart: bool, _view: View
) -> pd.DataFrame:
    """Scalars of all layers and tasks."""
    return resources.weight_frames(_view).summary(origin, apart)


def has_fused(view: View) -> bool:
    """Whether a matrix of the suite fuses queries, keys and values."""
    expert = view.suite.expert(view.tasks[0])
    return any(describe(name, expert.info(name)).parts for name in view.suite.matrices)


def open_cell(cell: Sequence[str]) -> None:
    """A click on the map opens that layer (by keyboard, the sidebar's selectbox does).

    The selectbox stands outside the fragment, so the whole page has to run again: see
    :data:`CLICKED`.

    Args:
        cell: layer and task.
    """
    st.session_state["layer"] = cell[0]
    st.session_state[CLICKED] = True


@shell.fragment
def energy_section(drawn: pd.DataFrame) -> None:
    """Cumulative energy and what the marked rank keeps of it (alone when the rank moves)."""
    share = share_slider(
        "Rank to mark (share of directions)",
        "share",
        "Draws the rank at which a merge would cut. CART's paper uses 8 %.",
    )
    kept = drawn[drawn["share"] <= share + 1e-9].groupby(["origin", "task"])["energy"].max()
    cards = charts.cards(2)
    for origin in drawn["origin"].unique():
        known = origin in kept.index.get_level_values("origin")
        cards.metric(
            f"Energy kept, {ORIGIN_LABELS[origin].lower()}",
            f"{kept[origin].mean():.1%}" if known else "0 %",
            help=f"Share of Σσ² in the leading {share_label(share)} of directions, task mean.",
        )
    charts.panel(
        charts.Chart(
            charts.drawn(
                figures.cumulative_energy,
                drawn,
                title="How many directions hold the energy?",
                chosen_share=share,
            ),
            key="energy",
            alt=f"Cumulative energy of {shell.view().layer} over rank",
            height=460,
        )
    )


@shell.fragment
def layer_section() -> None:
    """Scree and cumulative energy of the chosen layer."""
    view = shell.view()
    parts = parts_of(resources.group(view))
    part: Part = parts[0]
    if len(parts) > 1:
        part = choice(
            "Part of the fused matrix",
            {name: name for name in parts},
            "part",
            FUSED_HELP,
        )
    scree, energy = st.columns(2, vertical_alignment="bottom")
    with scree:
        which = choice(
            "Task vectors",
            ORIGIN_LABELS if view.suite.base is not None else {"average": "Centred"},
            "origin",
            "Centred: about the average of the chosen experts (CART). "
            "Original: about the base they were fine-tuned from.",
        )
        frames = [
            spectrum_frames(view.key, view.tasks, view.layer, origin, part, view)
            for origin in ORIGINS[which]
        ]
        drawn = pd.concat([frame for frame, _ in frames], ignore_index=True)
        lines = frames[0][1]
        cards = charts.cards(2)
        about = f"({ORIGIN_LABELS[ORIGINS[which][0]].lower()}, mean over tasks)."
        cards.metric(
            "Gavish-Donoho rank",
            f"{lines['gavish_donoho_rank'].mean():.0f}",
            help="Directions above the optimal hard threshold if the rest were white noise "
            + about,
        )
        cards.metric(
            "Rank above noise",
            f"{lines['noise_rank'].mean():.0f}",
            help="Directions above the Marchenko-Pastur edge, the noise estimated from the median "
            + about,
        )
    charts.panel(
        charts.Chart(
            charts.drawn(
                figures.scree, drawn, lines, title="How fast do the singular values fall?"
            ),
            key="scree",
            alt=f"Singular values of {view.layer} per task on a log axis",
            height=460,
        ),
        key="spectrum",
        columns=[scree],
        how_to_read=charts.HowToRead(
            "Each line is one task's difference to the **average** of the experts (centred, "
            "solid) or to the **base** (original, dashed), in the chosen layer. A line that falls "
            "steeply, or an energy curve that rises steeply, means that a few directions hold "
            "most of the difference, so that cutting the rest changes it little. The dotted lines "
            "are where white noise of the same median would end; trained weights are not white "
            "noise, so read them as orientation, not as a rule.",
            r"A = U\Sigma V^\top,\qquad "
            r"E(k) = \frac{\sum_{i\le k}\sigma_i^2}{\sum_i \sigma_i^2}",
        ),
        numbers=charts.Numbers(drawn, f"spectrum_{view.layer}"),
    )
    with energy:
        energy_section(drawn)


@shell.fragment
def map_section() -> None:
    """Layer x task map of one scalar."""
    if st.session_state.pop(CLICKED, False):
        st.rerun()
    view = shell.view()
    st.subheader("Where in the network is a task's change concentrated?", anchor=False)
    left, middle, right = st.columns([2, 2, 3])
    with left:
        labels: dict[Origin, str] = {"average": "Centred"}
        if view.suite.base is not None:
            labels["base"] = "Original"
        origin = choice("Task vectors of the map", labels, "map_origin")
    apart = False
    if has_fused(view):
        with middle:
            shown = {"whole": "Fused", "apart": "Apart"}
            apart = choice("Query, key and value", shown, "fused", FUSED_HELP) == "apart"
    with right:
        quantity = selectbox(
            "Quantity",
            QUANTITIES,
            "quantity",
            words=QUANTITIES.__getitem__,
            help="Ranks count directions: stable rank ‖A‖²_F/σ₁², effective rank the exponential "
            "of the spectrum's entropy, participation ratio (Σσ²)²/Σσ⁴.",
        )
    frame = summary_frame(view.key, view.tasks, origin, apart, view)
    charts.panel(
        charts.Chart(
            charts.drawn(
                figures.summary_map,
                frame,
                quantity,
                title=f"{QUANTITIES[quantity]} per layer and task",
            ),
            key="summary_map",
            alt=f"{QUANTITIES[quantity]} for each layer and task",
            caption="Click a cell to open its layer above, or choose it in the sidebar.",
            on_click=open_cell,
        ),
        how_to_read=charts.HowToRead(
            "One cell is one task's difference in one weight matrix. Of the ranks, small numbers "
            "mean that the change lies in few directions; of the energy in the leading 8 %, large "
            "ones do. The norm says how large the change is, not how it is spread.",
            r"\text{stable rank} = \frac{\|A\|_F^2}{\sigma_1^2},\qquad "
            r"\text{effective rank} = \exp\Bigl(-\sum_i p_i \log p_i\Bigr),\; p_i = "
            r"\frac{\sigma_i}{\sum_j \sigma_j}",
        ),
        numbers=charts.Numbers(frame, f"spectral_summary_{origin}"),
    )


charts.heading(
    "How many directions does a task need?",
    "Fine-tuning changes each weight matrix along a few strong directions and many weak ones. "
    "The spectrum of that change says how low a rank can be before a task is lost.",
)
layer_section()
map_section()

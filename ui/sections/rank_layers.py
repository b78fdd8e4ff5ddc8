"""The part of "Rank and scale" about ranks of their own for the layers."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from analysis.figures import rank_evidence as figures
from analysis.frames.usual import BUDGETS, SCALES
from analysis.rank_selection.select import Selection
from merge_core.files import digest_of
from ui import charts, shell
from ui.controls import multiselect
from ui.progress import run_job
from ui.server import resources
from ui.server.resources import View

SHOWN = 2
EXPLAINED = charts.HowToRead(
    "A row is a weight matrix, a mark the share of its directions that a rule keeps. Allocations "
    "spend the storage of the uniform rank (dotted) where the next direction is worth most per "
    "number stored; the other rules look at each matrix alone and take what they take. On the "
    "right each allocation and the uniform rank get the same storage, and the best of the same "
    "three λ, on the validation split; bars are 95 % intervals.",
    r"\max_{k} \sum_l \sum_{i \le k_l} g_{li}\quad\text{with}\quad "
    r"\sum_l k_l (m_l + n_l + 1) \le \text{budget}",
)


@st.cache_data(max_entries=16, show_spinner="Looking at every layer …")
def layers_frame(
    key: str, tasks: tuple[str, ...], method: str, share: float, _selection: Selection, _view: View
) -> pd.DataFrame:
    """Directions of each matrix by every rule."""
    return resources.weight_frames(_view).ranks_per_layer(_selection.space, share)


@shell.fragment
def layers_section(selection: Selection, view: View) -> None:
    """What rules keep of every layer, and whether that helps at equal storage."""
    if not selection.space.ranks:
        st.info("This method has no rank.")
        return
    method = selection.recipe.method
    frame = layers_frame(view.key, view.tasks, method, selection.rank, selection, view)
    rules = list(dict.fromkeys(frame["rule"]))
    chosen = multiselect("Rules", rules, "layer_rules", rest=rules[:SHOWN])
    left, right = st.columns(2)
    charts.panel(
        charts.Chart(
            charts.drawn(
                figures.layer_ranks,
                frame[frame["rule"].isin(chosen)],
                "How many directions does each layer keep?",
                uniform=selection.rank,
            ),
            key="layers",
            alt="Share of directions kept of each matrix by the chosen rules",
        ),
        columns=[left],
        how_to_read=EXPLAINED,
        numbers=charts.Numbers(frame, "ranks_per_layer"),
    )
    if view.suite.can_evaluate:
        with right:
            storage(selection, view)


@st.cache_data(max_entries=16, show_spinner=False)
def stored_comparison(
    key: str, tasks: tuple[str, ...], query: str, _selection: Selection, _view: View
) -> pd.DataFrame | None:
    """The comparison at equal storage if it takes no forward pass."""
    return resources.output_frames(_view).storage_if_known(_selection)


def storage(selection: Selection, view: View) -> None:
    """Allocated ranks against the uniform one at equal storage."""
    frames, query = resources.output_frames(view), selection.recipe.to_query()
    frame = stored_comparison(view.key, view.tasks, query, selection, view)
    if frame is None:
        frames.expect_storage(selection)
        job = run_job(
            digest_of("layers", view.key, *view.tasks, query),
            "Ranks per layer",
            "Compare with the uniform rank",
            f"Evaluates three allocations and the uniform rank at {len(BUDGETS)} budgets and "
            f"{len(SCALES)} λ on the validation split.",
            lambda progress: frames.storage(selection, progress),
        )
        if job is None:
            return
        frame = job.result
    charts.panel(
        charts.Chart(
            charts.drawn(
                figures.accuracy_over_storage, frame, "Do ranks per layer help at equal storage?"
            ),
            key="storage",
            alt="Accuracy over storage for allocated ranks and the uniform rank",
        ),
        numbers=charts.Numbers(frame, "ranks_per_layer_accuracy"),
    )

"""The part of "Rank and scale" about ranks of their own for the layers."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from analysis.evaluation.evaluator import Evaluator
from analysis.figures import rank_evidence as figures
from analysis.outputs.suite_outputs import NotStored
from analysis.rank_selection.allocation import compare_with_uniform
from analysis.rank_selection.per_layer import ranks_per_layer
from analysis.rank_selection.select import Selection
from merge_core.files import digest_of
from merge_core.merging.engine import MergeSession
from merge_core.progress import Progress
from ui import charts, shell
from ui.controls import multiselect
from ui.progress import run_job
from ui.server import resources
from ui.server.resources import View

SHOWN = 2
BUDGETS = (0.5, 1.0, 2.0)  # of the recommended rank
SCALES = (0.7, 1.0, 1.4)  # of the recommended scale
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
    return ranks_per_layer(resources.session(_view).groups, _selection.space, share)


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
            figures.layer_ranks(
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
    evaluator = resources.evaluator(_view).stored_only()
    try:
        return compare_allocations(_selection, resources.session(_view), evaluator, Progress())
    except NotStored:
        return None


def compare_allocations(
    selection: Selection, session: MergeSession, evaluator: Evaluator, progress: Progress
) -> pd.DataFrame:
    """Allocated ranks against the uniform one, around the recommended setting."""
    shares = [min(1.0, budget * selection.rank) for budget in BUDGETS]
    highest = max(selection.space.scales)
    scales = list(dict.fromkeys(min(factor * selection.scale, highest) for factor in SCALES))
    return compare_with_uniform(
        selection.space, session, evaluator, shares, scales, progress=progress
    )


def storage(selection: Selection, view: View) -> None:
    """Allocated ranks against the uniform one at equal storage."""
    session, evaluator = resources.session(view), resources.evaluator(view)
    query = selection.recipe.to_query()
    frame = stored_comparison(view.key, view.tasks, query, selection, view)
    if frame is None:
        job = run_job(
            digest_of("layers", view.key, *view.tasks, query),
            "Ranks per layer",
            "Compare with the uniform rank",
            f"Evaluates three allocations and the uniform rank at {len(BUDGETS)} budgets and "
            f"{len(SCALES)} λ on the validation split.",
            lambda progress: compare_allocations(selection, session, evaluator, progress),
        )
        if job is None:
            return
        frame = job.result
    charts.panel(
        charts.Chart(
            figures.accuracy_over_storage(frame, "Do ranks per layer help at equal storage?"),
            key="storage",
            alt="Accuracy over storage for allocated ranks and the uniform rank",
        ),
        numbers=charts.Numbers(frame, "ranks_per_layer_accuracy"),
    )

"""The part of "Magnitude and stability" about averaging as a smaller norm."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
import streamlit as st

from analysis.figures import regularisation as figures
from analysis.magnitude.norms import TOTAL
from ui import charts, shell
from ui.controls import choice, selectbox
from ui.server import pool_resources
from ui.server.pool_resources import PoolView


@st.cache_data(max_entries=64, show_spinner=False)
def norm_frames(
    key: str, members: tuple[int, ...], _view: PoolView
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The identity of norms, and norms per parameter."""
    frames = pool_resources.frames(_view)
    return frames.identity(), frames.norms()


@st.cache_data(max_entries=64, show_spinner=False)
def histogram(key: str, members: tuple[int, ...], parameter: str, _view: PoolView) -> pd.DataFrame:
    """The distribution of one parameter's entries."""
    return pool_resources.frames(_view).histogram(parameter)


@shell.fragment
def norms_section() -> None:
    """Averaging as regularisation."""
    view = shell.pool_view()
    st.subheader("What does averaging do to the size of the weights?", anchor=False)
    identity, norms = norm_frames(view.key, view.members, view)
    draw_sizes(identity, len(view.members))
    draw_norms(norms, view)
    draw_entries(identity, norms, view)


def draw_sizes(identity: pd.DataFrame, n: int) -> None:
    """The sizes of n members and of their average, all parameters together."""
    total = identity[identity["parameter"] == TOTAL].iloc[0]
    ratio = float(np.sqrt(total["soup_square"] / total["mean_square"]))
    cards = charts.cards(4)
    cards.metric("Mean ‖θᵢ‖²", f"{total['mean_square']:.4g}")
    cards.metric("‖average‖²", f"{total['soup_square']:.4g}")
    cards.metric(
        "Mean ‖θᵢ − average‖²",
        f"{total['spread']:.4g}",
        help="Computed apart from the other two: the identity says that it is their difference.",
    )
    cards.metric(
        "Identity holds to",
        f"{identity['deviation'].max():.0e}",
        help="Largest relative deviation over all parameters, float64.",
    )
    st.markdown(
        f"The average of {n} members keeps **{ratio:.0%}** of their norm (root mean square over "
        f"members; {1 / np.sqrt(n):.0%} would be left of independent ones of mean zero)."
    )


def draw_norms(norms: pd.DataFrame, view: PoolView) -> None:
    """Each parameter of the average beside the members'."""
    quantity: Literal["norm", "variance"] = choice(
        "Members and their average compared by",
        {"norm": "Norms", "variance": "Variances"},
        "size",
    )
    height = max(430, 26 * len(norms) + 160)
    charts.panel(
        charts.Chart(
            charts.drawn(
                figures.norm_ratios, norms, title="How much of its norm does each tensor keep?"
            ),
            key="ratios",
            alt="Norm of the average as a share of the members', per parameter",
            height=height,
        ),
        charts.Chart(
            charts.drawn(figures.norm_ranges, norms, quantity, title="Members and their average"),
            key="ranges",
            alt=f"{quantity} of members and average per parameter",
            height=height,
        ),
        key="norms",
        columns=2,
        how_to_read=charts.HowToRead(
            "What the members do not share is averaged away: the squared norm falls by exactly "
            "the members' mean squared distance to their average. Where a dot lies on the line "
            "1/√N, the members have nothing in common in that tensor.",
            r"\tfrac1N\sum_i\|\theta_i\|^2 - \|\bar\theta\|^2 "
            r"= \tfrac1N\sum_i\|\theta_i-\bar\theta\|^2",
        ),
        numbers=charts.Numbers(norms, f"norms_{view.name}"),
    )


def draw_entries(identity: pd.DataFrame, norms: pd.DataFrame, view: PoolView) -> None:
    """The entries of one parameter, and the identity of norms for it."""
    weights = norms[norms["weight"]]["parameter"].tolist()
    parameter = selectbox(
        "Parameter",
        weights + [p for p in norms["parameter"] if p not in weights],
        "parameter",
        slot=f"parameter of {view.name}",
    )
    charts.panel(
        charts.Chart(
            charts.drawn(
                figures.weight_histogram,
                histogram(view.key, view.members, parameter, view),
                title=f"Entries of {parameter}",
            ),
            key="histogram",
            alt=f"Distribution of the entries of {parameter}",
            height=420,
        ),
        charts.Chart(
            charts.drawn(
                figures.identity_bar,
                identity,
                parameter,
                title=f"Both sides of the identity for {parameter}",
            ),
            key="identity",
            alt="Mean squared norm beside squared norm of the average plus spread",
            height=420,
        ),
        key="identity",
        columns=2,
        numbers=charts.Numbers(identity, f"identity_{view.name}"),
    )

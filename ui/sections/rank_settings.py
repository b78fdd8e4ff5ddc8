"""The part of "Rank and scale" with the curve, the map, and one chosen setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import streamlit as st

from analysis.figures import rank_map
from analysis.figures import rank_selection as figures
from analysis.metrics import METRICS, metric_of
from analysis.rank_selection.select import Selection
from ui import charts, shell
from ui.controls import grid
from ui.server import resources
from ui.server.resources import View
from ui.widgets import share_label, share_slider

EXPLAINED = (
    "At rank 100 % the centred vectors cancel and CART is the plain average. Where accuracy rises "
    "and falls in between, one sees **the bell**: little of each task is kept on its left, and a "
    "large λ overstretches that little; on its right the vectors cancel more and more. Original "
    "vectors (about the base) do not cancel: at full rank they end at Task Arithmetic on the "
    "matrices. The curve takes at each rank the best λ that was tried; its band is the 95 % "
    "sampling interval of the mean over these tasks, and hollow points rest on fewer inputs. A "
    "mark says which rank a rule picks; its own λ may be another one (see the tab Proxies). On "
    "the map a cell is a setting, small where only part of the inputs was run, blank where none "
    "was; colours end 15 points below the best. The red line encloses what these inputs do not "
    "tell from the recommended setting (★)."
)


def references(view: View) -> dict[str, float]:
    """Horizontal lines: the experts' mean accuracy, or other metric, each on its own task."""
    experts = resources.output_frames(view).experts("val")
    return {"Experts": float(experts[metric_of(experts).column].mean())}


def pick(setting: Sequence[float]) -> None:
    """Take a setting over into the two sliders, which are the map's keyboard twins.

    Args:
        setting: rank and scale.
    """
    st.session_state["at_rank"], st.session_state["at_scale"] = map(float, setting)


def nearest_option(value: float, options: Sequence[float]) -> float:
    """The option next to a value."""
    return min(options, key=lambda option: abs(option - value))


def setting_sliders(selection: Selection) -> dict[str, float]:
    """One slider per axis, at the recommended setting until it is moved."""
    space = selection.space
    slot = f"chosen of {selection.recipe.method}"
    chosen = {}
    columns = st.columns(2)
    if space.ranks:
        ranks = [float(rank) for rank in space.ranks]
        with columns[0]:
            chosen["rank"] = share_slider(
                "Rank (share of directions)",
                "at_rank",
                "Directions kept of each task vector, as a share of min(m, n) of each matrix.",
                nearest_option(selection.rank, ranks),
                tuple(ranks),
                slot=f"{slot}, rank",
            )
    if space.scales:
        with columns[1]:
            chosen["scale"] = grid(
                "Scaling coefficient λ",
                space.scales,
                "at_scale",
                rest=nearest_option(selection.scale, space.scales),
                high=max(space.scales),
                words=lambda scale: f"{scale:.12g}",
                number=float,
                help="How strongly the kept directions are added.",
                slot=f"{slot}, scale",
            )
    return chosen


@shell.fragment
def settings_section(selection: Selection, other: Selection | None, view: View) -> None:
    """The curve with every pick, the map, and one setting of it in detail."""
    space, points = selection.space, selection.points
    if points.empty:
        draw_picks(selection)
        return
    places = st.columns(2)
    chosen = setting_sliders(selection)
    here = points
    for name, value in chosen.items():
        here = here[np.isclose(here[name], value)]
    detail(selection, chosen, here, view)
    cells = None
    if space.ranks and space.scales:
        cells = charts.Chart(
            charts.drawn(
                rank_map.evaluated_map,
                points,
                [float(rank) for rank in space.ranks],
                space.scales,
                title="Which settings merge best?",
                value=selection.score,
                recommended=(selection.rank, selection.scale),
                chosen=(chosen["rank"], chosen["scale"]),
            ),
            key="rank_scale_map",
            alt="Score over rank and scale: what was evaluated, and what is tied",
            height=500,
            on_click=pick,
        )
    charts.panel(
        chart_curve(selection, other, chosen, view),
        cells,
        key="points",
        columns=places,
        how_to_read=charts.HowToRead(EXPLAINED, selection.recipe.declaration.formula),
        numbers=charts.Numbers(points, "rank_and_scale"),
    )


def chart_curve(
    selection: Selection, other: Selection | None, chosen: Mapping[str, float], view: View
) -> charts.Chart:
    """The best of each rank (or scale), the other selection's too, and what every rule picks."""
    axis = "rank" if selection.space.ranks else "scale"
    curves = [
        each.curve.assign(method=each.recipe.method)
        for each in (selection, other)
        if each is not None
    ]
    return charts.Chart(
        charts.drawn(
            figures.score_curve,
            pd.concat(curves),
            title=f"How does it move with the {axis}?",
            axis=axis,
            value=selection.score,
            picks=selection.picks,
            references=references(view) if selection.score in METRICS else None,
            chosen=chosen[axis],
        ),
        key="curve",
        alt=f"{selection.score} over {axis} with every proxy's pick",
        height=500,
    )


def draw_picks(selection: Selection) -> None:
    """Where nothing was evaluated: the settings that rules pick from weights."""
    space, cells = selection.space, None
    if space.ranks and space.scales:
        cells = charts.Chart(
            charts.drawn(
                rank_map.evaluated_map,
                selection.points,
                [float(rank) for rank in space.ranks],
                space.scales,
                title="Which setting does each rule pick?",
                recommended=(selection.rank, selection.scale),
                picks=selection.picks,
            ),
            key="picked",
            alt="Rank and scale that each rule picks",
            height=500,
        )
    charts.panel(
        cells,
        key="points",
        how_to_read=charts.HowToRead(EXPLAINED, selection.recipe.declaration.formula),
        numbers=charts.Numbers(selection.picks, "picks"),
    )


def detail(
    selection: Selection, chosen: Mapping[str, float], here: pd.DataFrame, view: View
) -> None:
    """The chosen setting: what was measured there, and its way to the Merge lab."""
    left, right = st.columns([6, 3], vertical_alignment="center")
    words = ", ".join(
        f"rank {share_label(value)}" if name == "rank" else f"λ = {value:g}"
        for name, value in chosen.items()
    )
    if here.empty:
        left.markdown(f"**Chosen: {words}**: not evaluated in this search.")
    else:
        row, best = here.iloc[0], (selection.rank, selection.scale)
        told = "these inputs do not tell it from the best" if row["tied"] else "not tied"
        if np.isclose([row["rank"], row["scale"]], best, equal_nan=True).all():
            told = "the recommended setting"
        shares = selection.score in figures.SHARES
        score = f"{row['score']:.1%}" if shares else f"{row['score']:.4g}"
        left.markdown(
            f"**Chosen: {words}**: {selection.score} {score} on {row['images']:.0f} inputs a "
            f"task; {told}."
        )
    right.page_link(
        shell.page("merge_lab"),
        label="The chosen setting in the Merge lab",
        icon=":material/science:",
        query_params=shell.lab_query(selection.space.recipe(**chosen)),
    )

"""Interference: how tasks get into each other's way, and what a rank cut does about it."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from analysis.figures import interference as figures
from analysis.figures.spectra import short_name
from analysis.spectral.interference import Side
from merge_core.task_vectors import Origin
from ui import charts, shell
from ui.controls import choice, toggle
from ui.plain_text import plain
from ui.server import resources
from ui.server.once import once
from ui.server.resources import View
from ui.widgets import share_label, share_slider
from ui.words.interference import (
    describe_centring,
    describe_condition,
    describe_cosines,
    describe_level,
    describe_rank,
    different,
)

shell.enter()

SHORT = {"average": "Centred", "base": "Original"}
LABELS = {"average": "Centred (about the average)", "base": "Original (about the base)"}


def origins(view: View) -> tuple[Origin, ...]:
    """The origins that the suite has."""
    return ("average", "base") if view.suite.base is not None else ("average",)


@st.cache_data(max_entries=32, show_spinner="Comparing task vectors …")
def cosine_frame(
    key: str, tasks: tuple[str, ...], layer: str | None, origin: Origin, _view: View
) -> pd.DataFrame:
    """Cosines of the whole model (layer None) or of one layer."""
    return resources.weight_frames(_view).cosines(layer, origin)


@st.cache_data(max_entries=256, show_spinner=False)
def pairs_frame(
    key: str,
    tasks: tuple[str, ...],
    layer: str | None,
    origin: Origin,
    share: float,
    side: Side,
    _view: View,
) -> pd.DataFrame:
    """Overlap of each pair at one rank, in one layer or averaged over all (layer None)."""
    return resources.weight_frames(_view).pairs(layer, origin, share, side)


@st.cache_data(max_entries=32, show_spinner="Measuring interference over rank …")
def over_rank_frame(
    key: str, tasks: tuple[str, ...], layer: str | None, origin: Origin, side: Side, _view: View
) -> pd.DataFrame:
    """I(k), R(k) and overlap over the offered ranks, of one layer or averaged over all."""
    return resources.weight_frames(_view).over_rank(layer, origin, side)


@st.cache_data(max_entries=32, show_spinner="Looking at centring in every layer …")
def centring_frame(
    key: str, tasks: tuple[str, ...], share: float, side: Side, _view: View
) -> pd.DataFrame:
    """What centring does to each layer, and how much its tasks have in common."""
    return resources.weight_frames(_view).centring(share, side)


@st.cache_data(max_entries=64, show_spinner=False)
def angles_frame(
    key: str, tasks: tuple[str, ...], layer: str, origin: Origin, k: int, side: Side, _view: View
) -> pd.DataFrame:
    """Mean principal angle of each pair at one rank."""
    return resources.weight_frames(_view).angles(layer, origin, k, side)


@st.cache_data(max_entries=16, show_spinner="Comparing signs …")
def sign_frame(key: str, tasks: tuple[str, ...], _view: View) -> pd.DataFrame:
    """Sign conflict of every weight matrix about the base."""
    return resources.weight_frames(_view).signs()


def controls(view: View) -> tuple[str | None, float, Side]:
    """Layer (None for all), share of directions, side."""
    left, middle, right = st.columns([2, 3, 2])
    with left:
        scope = choice(
            "Where",
            {"layer": "Chosen layer", "model": "Whole model"},
            "scope",
            "The layer is chosen in the sidebar; the whole model averages over all layers.",
        )
    with middle:
        share = share_slider(
            "Rank (share of directions)",
            "share",
            "How many leading directions of each task vector are kept. Raising it keeps "
            "more of each task.",
        )
    with right:
        sides: dict[Side, str] = {"row": "Row (inputs)", "column": "Column (outputs)"}
        side = choice(
            "Space",
            sides,
            "side",
            "Row space: which input directions a task reads (CART's measure). "
            "Column space: which output directions it writes.",
        )
    return (view.layer if scope == "layer" else None), share, side


@shell.fragment
def section() -> None:
    """Maps at the chosen rank, curves over rank, and the trade-off."""
    view = shell.view()
    if len(view.tasks) < 2:
        st.info("Interference needs at least two tasks; choose more in the sidebar.")
        return
    layer, share, side = controls(view)
    k = resources.weight_frames(view).directions(view.layer, share)
    draw_pairs(view, layer, share, side)
    draw_centring(view, share, side)
    draw_curves(view, layer, share, side)
    draw_cosines(view, layer)
    draw_angles_and_signs(view, share, k, side)


def place_of(layer: str | None) -> str:
    """What was looked at, in words."""
    return "whole model" if layer is None else short_name(layer)


def draw_pairs(view: View, layer: str | None, share: float, side: Side) -> None:
    """Overlap of each pair of tasks at one rank, about each origin."""
    st.subheader("Do two tasks use the same directions?", anchor=False)
    where = place_of(layer)
    pairs = [
        pairs_frame(view.key, view.tasks, layer, origin, share, side, view)
        for origin in origins(view)
    ]
    ranks = sorted(set(pairs[0]["k"]))
    rank = f"k\u00a0=\u00a0{ranks[0]:.0f}" if float(ranks[0]).is_integer() else share_label(share)

    def chart(origin: Origin, frame: pd.DataFrame) -> charts.Chart:
        mean = different(frame)["overlap"].mean()
        figure = charts.drawn(
            figures.pair_map,
            frame,
            "overlap",
            title=f"{SHORT[origin]}, {where}: mean {mean:.3f} at {rank}",
            zmin=0,
            zmax=1,
        )
        alt = f"{side.capitalize()}-space overlap of each pair of tasks, {LABELS[origin]}, in "
        return charts.Chart(
            figure,
            key=f"pairs_{origin}",
            alt=f"{alt}{layer or where} at {rank}: mean {mean:.3f}",
            height=480,
        )

    st.markdown(once(describe_level, pairs))
    charts.panel(
        *(chart(origin, frame) for origin, frame in zip(origins(view), pairs, strict=True)),
        key="pairs",
        columns=len(pairs),
        how_to_read=charts.HowToRead(
            f"Each cell compares the leading {side} directions ({rank}) of two tasks, weighted by "
            f"their singular values: 0 means that they share none, 1 that they have the same ones "
            "with the same relative strengths, as a task has with itself. Where several matrices "
            "are looked at, it is the mean over them. A merge adds all tasks up, so what is shared "
            f"is what gets mixed. {once(describe_centring, pairs, plain(where))}",
            r"\frac{I_{ij}(k)}{\sqrt{I_{ii}(k)\,I_{jj}(k)}},\qquad "
            r"I_{ij}(k) = \| S_i V_i^\top V_j S_j \|_F,\quad S_i = "
            r"\mathrm{diag}\Bigl(\sigma_i / \sqrt{\textstyle\sum_{a\le k}\sigma_{i,a}^2}\Bigr)"
            r",\qquad \text{random: } \frac{1}{\sqrt{n\,I_{ii}\,I_{jj}}}",
        ),
        numbers=charts.Numbers(pd.concat(pairs, ignore_index=True), "interference_pairs"),
    )


def draw_centring(view: View, share: float, side: Side) -> None:
    """Whether centring can help, by how much the tasks have in common, and what it does."""
    if "base" not in origins(view):
        return
    st.subheader("Can centring help here?", anchor=False)
    if not resources.is_small(view) and not toggle(
        "Look at every layer",
        "layers",
        "Every layer's directions are compared about the base and about the average, which takes "
        "a while for models of this size.",
    ):
        return
    frame = centring_frame(view.key, view.tasks, share, side, view)
    st.markdown(once(describe_condition, frame))
    rank = share_label(share)
    falls, count = int((frame["ratio"] < 1).sum()), len(frame)
    charts.panel(
        charts.Chart(
            charts.drawn(
                figures.centring_map, frame, title=f"Interference in every layer, {rank} kept"
            ),
            key="centring_map",
            alt=f"Mean interference of a pair about the average against about the base: lower in "
            f"{falls} of {count} layers",
            height=420,
        ),
        charts.Chart(
            charts.drawn(
                figures.centring_condition, frame, title="What must be in common for it to fall?"
            ),
            key="centring_condition",
            alt="Interference about the average over that about the base, against the common "
            f"share of the leading directions: {frame['common'].mean():.1%} in the mean, "
            f"{float(frame['needed'].iloc[0]):.1%} needed",
            height=420,
        ),
        key="centring",
        columns=2,
        how_to_read=charts.HowToRead(
            "A point is a layer. Centring takes away what all tasks have in common and puts "
            "−1/T of every task into all others. Tasks that have nothing in common get more "
            "alike by it: T independent task vectors have cosines of −1/(T−1) afterwards. So "
            "interference falls (left: below the line; right: below 1) only where the common "
            "share ρ of the leading directions is above about 1/T; near that bound either may "
            "happen.",
            r"\rho(k) = \frac{\tfrac{1}{T(T-1)}\sum_{s\ne t}\langle \tau_s, "
            r"\mathrm{SVD}_k(\tau_t)\rangle}{\tfrac1T\sum_t \|\mathrm{SVD}_k(\tau_t)\|_F^2}"
            r"\;\gtrsim\; \frac1T",
        ),
        numbers=charts.Numbers(frame, "centring"),
    )


def draw_curves(view: View, layer: str | None, share: float, side: Side) -> None:
    """Interference, what is left out and the size of the update over rank, and the trade-off."""
    st.subheader("What does a higher rank cost?", anchor=False)
    curves = pd.concat(
        [over_rank_frame(view.key, view.tasks, layer, o, side, view) for o in origins(view)],
        ignore_index=True,
    )
    where = place_of(layer)

    def chart(key: str, value: str, title: str, alt: str) -> charts.Chart:
        figure = charts.drawn(
            figures.curves_over_rank, curves, value, title=title, chosen_share=share
        )
        return charts.Chart(figure, key=key, alt=alt, height=400)

    charts.panel(
        chart(
            "over_rank",
            "overlap",
            f"Overlap of two tasks, {where}",
            f"Mean overlap of two tasks over rank in {where}",
        ),
        chart(
            "reconstruction",
            "reconstruction_share",
            f"What the cut leaves out, {where}",
            f"Reconstruction error over rank in {where}",
        ),
        charts.Chart(
            charts.drawn(
                figures.trade_off,
                curves,
                title=f"The trade-off along the rank, {where}",
                chosen_share=share,
            ),
            key="trade_off",
            alt=f"Interference against reconstruction error in {where}, one curve per origin",
            height=400,
        ),
        chart(
            "update_norm",
            "update_norm",
            f"Size of the merged update, {where}",
            f"Norm of the summed truncated task vectors over rank in {where}",
        ),
        key="curves",
        columns=2,
        how_to_read=charts.HowToRead(
            f"A higher rank always leaves less of each task out. {once(describe_rank, curves)} "
            "Down and to the left on the trade-off curve is better: little left out, little "
            "shared. The size of the centred update is zero at full rank, because the centred task "
            "vectors cancel: that is why CART at full rank is the plain average.",
            r"\text{overlap: } \frac{1}{T(T-1)}\sum_{i\ne j} \frac{I_{ij}}{\sqrt{I_{ii} I_{jj}}},"
            r"\qquad \text{trade-off: } \frac{\sum_{i\ne j} I_{ij}(k)}{T(T-1)} \text{ against } "
            r"\frac{R(k)}{R(0)},\quad R(k) = \sum_t \sum_{i>k} \sigma_{t,i}^2",
        ),
        numbers=charts.Numbers(curves, "interference_over_rank"),
    )


def draw_cosines(view: View, layer: str | None) -> None:
    """Cosines of whole task vectors, about each origin."""
    st.subheader("Do whole task vectors point the same way?", anchor=False)
    cosines = [cosine_frame(view.key, view.tasks, layer, origin, view) for origin in origins(view)]
    charts.panel(
        *(
            charts.Chart(
                charts.drawn(
                    figures.pair_map,
                    frame,
                    "cosine",
                    title=f"{LABELS[origin]}, {place_of(layer)}",
                    diverging=True,
                    zmin=-1,
                    zmax=1,
                ),
                key=f"cosine_{origin}",
                alt=f"Cosine similarity of task vectors in {place_of(layer)}, {LABELS[origin]}",
                height=480,
            )
            for origin, frame in zip(origins(view), cosines, strict=True)
        ),
        key="cosines",
        columns=len(cosines),
        how_to_read=charts.HowToRead(
            once(describe_cosines, cosines),
            r"\cos(\tau_i, \tau_j) = \frac{\langle \tau_i, \tau_j\rangle}"
            r"{\|\tau_i\|\,\|\tau_j\|}",
        ),
        numbers=charts.Numbers(pd.concat(cosines, ignore_index=True), "cosine_similarity"),
    )


def draw_angles_and_signs(view: View, share: float, k: int, side: Side) -> None:
    """Two further looks at the same question, computed only when asked for."""
    st.subheader("Angles between subspaces, clashes of signs", anchor=False)
    more = toggle(
        "Show angles and signs",
        "more",
        "Principal angles ignore how strong a direction is; signs are what TIES elects.",
    )
    if not more:
        return
    origin = origins(view)[0]
    angles = angles_frame(view.key, view.tasks, view.layer, origin, k, side, view)
    clashes = None
    if "base" in origins(view):
        signs = sign_frame(view.key, view.tasks, view)
        clashes = charts.Chart(
            charts.drawn(figures.conflict_bars, signs, title="Where do signs clash? (original)"),
            key="signs",
            alt="Share of magnitude that cancels and of entries with both signs per matrix",
            height=480,
            numbers=charts.Numbers(signs, "sign_conflict"),
        )
    charts.panel(
        charts.Chart(
            charts.drawn(
                figures.pair_map,
                angles,
                "angle",
                title=f"{SHORT[origin]}, {short_name(view.layer)}: angles at k = {k}",
                zmax=90,
            ),
            key="angles",
            alt=f"Mean principal angle of each pair of tasks, {LABELS[origin]}, in "
            f"{view.layer}, k = {k}",
            height=480,
            numbers=charts.Numbers(angles, f"principal_angles_k{k}"),
        ),
        clashes,
        columns=2,
        how_to_read=charts.HowToRead(
            f"Left: the mean angle between the leading {k} directions ({share_label(share)}) of "
            "two tasks, however strong each is; 90° means that they share none, which random "
            "subspaces approach only where the matrix is much wider than k. Right: adding the "
            "task vectors up cancels this share of their magnitude, and in this share of the "
            "entries at least two tasks pull in opposite directions.",
            r"\cos\theta_a = \sigma_a(V_i^\top V_j),\qquad "
            r"1 - \frac{\sum_e |\sum_t \tau_{t,e}|}{\sum_e \sum_t |\tau_{t,e}|}",
        ),
    )


charts.heading(
    "Where do the tasks get into each other's way?",
    "Merging adds the tasks' changes up. Where two tasks use the same directions, one spoils the "
    "other. Here is how much they share, about the average and about the base, and what cutting "
    "the rank does to it.",
)
section()

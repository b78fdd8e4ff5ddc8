"""Figures of soups and ensembles: accuracy per rule, differences of logits, greedy soups."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from analysis.figures.style import (
    DASHES,
    OKABE_ITO,
    REFERENCE,
    layout,
    percent,
    set_axes,
    thin_indices,
)

ACCURACY = "Accuracy (%)"
BAND = "rgba(136,136,136,0.22)"
MOST_POINTS = 1500
# Colour, marker and dash of each rule, the same on every page: individuals grey, soups warm,
# ensembles of outputs blue, of features green.
RULE_LOOKS: dict[str, tuple[str, str, str]] = {
    "individuals": (REFERENCE, "circle", DASHES[0]),
    "best_individual": (REFERENCE, "star", DASHES[2]),
    "uniform_soup": (OKABE_ITO[3], "square", DASHES[0]),
    "greedy_soup": (OKABE_ITO[1], "diamond", DASHES[1]),
    "logit_ensemble": (OKABE_ITO[0], "triangle-up", DASHES[0]),
    "probability_ensemble": (OKABE_ITO[5], "triangle-down", DASHES[1]),
    "feature_ensemble_first_head": (OKABE_ITO[4], "x", DASHES[2]),
    "feature_ensemble_averaged_head": (OKABE_ITO[2], "cross", DASHES[3]),
}


def rules_dots(frame: pd.DataFrame, title: str = "", chance: float | None = None) -> go.Figure:
    """Accuracy of each rule with its interval, over the band of individuals.

    Args:
        frame: of :func:`analysis.averaging.ensembles.rules_frame`.
        title: the figure's title.
        chance: accuracy of guessing (a share), drawn as a line.
    """
    figure = go.Figure()
    _draw_band(figure, frame)
    for row in frame.to_dict("records"):
        colour, symbol, _ = RULE_LOOKS[row["rule"]]
        figure.add_scatter(
            x=np.array([100 * row["accuracy"]]),
            y=[row["label"]],
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": 11},
            error_x=_error([row["accuracy"]], [row["low"]], [row["high"]], colour),
            hovertemplate=f"{_hover(row)}<extra></extra>",
            name=row["label"],
            showlegend=False,
        )
    _mark_non_finite(figure, frame)
    layout(figure, title, x=ACCURACY, y="", height=130 + 40 * len(frame), legend=False)
    if chance is not None:
        figure.layout.margin.t += 16  # its label stands between the title and the plot
    _mark_chance(figure, chance, vertical=True)
    # Long names would leave no room on a phone: broken before the comma or the bracket.
    texts = [label.replace(", ", ",<br>").replace(" (", "<br>(") for label in frame["label"]]
    set_axes(
        figure,
        y={
            "type": "category",
            "tickmode": "array",
            "tickvals": list(frame["label"]),
            "ticktext": texts,
            "autorange": "reversed",
            "showgrid": False,
        },
        x={"range": _range(frame, chance)},
    )
    return figure


def accuracy_over_n(frame: pd.DataFrame, title: str = "", chance: float | None = None) -> go.Figure:
    """Accuracy of each rule over the number of members, with the band of individuals.

    Args:
        frame: of :func:`analysis.averaging.ensembles.accuracy_over_members`.
        title: the figure's title.
        chance: accuracy of guessing (a share), drawn as a line.
    """
    figure = go.Figure()
    single = frame[frame["rule"] == "individuals"]
    if len(single):
        n = single["n"].to_numpy()
        figure.add_scatter(
            x=np.concatenate([n, n[::-1]]),
            y=100 * np.concatenate([single["best"].to_numpy(), single["worst"].to_numpy()[::-1]]),
            fill="toself",
            fillcolor=BAND,
            line={"width": 0},
            mode="lines",
            name="worst to best individual",
            hoverinfo="skip",
        )
    for rule, mine in frame.groupby("rule", sort=False):
        colour, symbol, dash = RULE_LOOKS[str(rule)]
        figure.add_scatter(
            x=mine["n"].to_numpy(),
            y=100 * mine["accuracy"].to_numpy(),
            mode="lines+markers",
            name=mine["label"].iloc[0],
            line={"color": colour, "dash": dash, "width": 2},
            marker={"symbol": symbol, "size": 7},
            text=[_hover(row) for row in mine.to_dict("records")],
            hovertemplate="%{x} members<br>%{text}<extra></extra>",
        )
    _mark_chance(figure, chance, vertical=False)
    layout(figure, title, x="Members N", y=ACCURACY, height=520)
    set_axes(figure, x={"dtick": 1}, y={"range": _range(frame, chance)})
    return figure


def accuracy_against_cost(
    frame: pd.DataFrame, title: str = "", chance: float | None = None
) -> go.Figure:
    """Accuracy against forward passes per image.

    Ensembles are curves, as they pay for each member; what costs one pass is drawn once, for all
    members, the markers a little apart.

    Args:
        frame: of :func:`analysis.averaging.ensembles.accuracy_over_members`.
        title: the figure's title.
        chance: accuracy of guessing (a share), drawn as a line.
    """
    figure = go.Figure()
    last = frame[frame["n"] == frame["n"].max()]
    one_pass = list(last.loc[~last["rule"].str.contains("ensemble"), "rule"])
    for rule, mine in frame.groupby("rule", sort=False):
        colour, symbol, dash = RULE_LOOKS[str(rule)]
        aside = 0.0
        if rule in one_pass:
            mine = last[last["rule"] == rule]
            aside = 0.1 * (one_pass.index(rule) - (len(one_pass) - 1) / 2)
        accuracy = mine["accuracy"].to_numpy()
        errors = _error(accuracy, mine["low"], mine["high"], colour) if rule in one_pass else None
        figure.add_scatter(
            x=mine["passes"].to_numpy() + aside,
            y=100 * accuracy,
            error_y=errors,
            mode="lines+markers",
            name=mine["label"].iloc[0],
            line={"color": colour, "dash": dash, "width": 2},
            marker={"symbol": symbol, "size": 9},
            text=[_hover(row) for row in mine.to_dict("records")],
            hovertemplate="%{text}<extra></extra>",
        )
    _mark_chance(figure, chance, vertical=False)
    layout(figure, title, x="Forward passes per image", y=ACCURACY, height=520)
    set_axes(figure, x={"dtick": 1}, y={"range": _range(last, chance)})
    return figure


def covariance_scatter(frame: pd.DataFrame, title: str = "") -> go.Figure:
    """Logits of the averaged-head feature ensemble against those of the logit ensemble.

    What lies off the line is the covariance term.

    Args:
        frame: of :func:`analysis.averaging.gaps.covariance_frame`.
        title: the figure's title.
    """
    return _diagonal(
        frame,
        ("logit_ensemble", "Logit of the logit ensemble"),
        ("averaged_head", "Logit of the averaged-head ensemble"),
        title,
    )


def gap_scatter(frame: pd.DataFrame, title: str = "") -> go.Figure:
    """A difference of two rules' logits, measured against predicted.

    Args:
        frame: of :func:`analysis.averaging.curvature.predicted_gap` or
            :func:`analysis.averaging.gaps.covariance_frame`.
        title: the figure's title.

    Example:
        >>> frame = pd.DataFrame({"measured": [0.1, 0.2], "predicted": [0.1, 0.3]})
        >>> gap_scatter(frame.assign(**{"image": 0, "class": [0, 1]})).data[-1].name
        'one image and class (2 of 2)'
    """
    return _diagonal(
        frame,
        ("predicted", "Predicted difference (logits)"),
        ("measured", "Measured difference (logits)"),
        title,
    )


def greedy_trace(trace: pd.DataFrame, title: str = "") -> go.Figure:
    """The greedy soup's steps: accuracy of each candidate, kept or not, and of each member alone.

    Args:
        trace: of :func:`analysis.averaging.soups.greedy_soup`.
        title: the figure's title.
    """
    names = [f"member {member}" for member in trace["member"]]
    figure = go.Figure()
    figure.add_scatter(
        x=names,
        y=100 * trace["member_accuracy"].to_numpy(),
        mode="lines+markers",
        name="member alone",
        line={"color": REFERENCE, "dash": "dot", "width": 1.5},
        marker={"symbol": "circle", "size": 7},
        hovertemplate="%{x} alone: %{y:.1f} %<extra></extra>",
    )
    best = trace["accuracy"].where(trace["kept"]).ffill().to_numpy()
    figure.add_scatter(
        x=names,
        y=100 * best,
        mode="lines",
        name="soup so far",
        line={"color": OKABE_ITO[1], "width": 2, "shape": "hv"},
        hoverinfo="skip",
    )
    for kept, name, symbol, colour in (
        (True, "joins", "diamond", OKABE_ITO[1]),
        (False, "does not join", "x", OKABE_ITO[3]),
    ):
        mine = trace["kept"].to_numpy() == kept
        figure.add_scatter(
            x=[n for n, use in zip(names, mine, strict=True) if use],
            y=100 * trace["accuracy"].to_numpy()[mine],
            mode="markers",
            name=name,
            marker={"symbol": symbol, "size": 11, "color": colour},
            hovertemplate=f"soup with %{{x}}: %{{y:.1f}} %<br>{name}<extra></extra>",
        )
    label = "Validation accuracy (%)"
    layout(figure, title, x="Members, best first on validation", y=label, height=460)
    set_axes(figure, x={"type": "category", "categoryorder": "array", "categoryarray": names})
    return figure


def _diagonal(frame: pd.DataFrame, x: tuple[str, str], y: tuple[str, str], title: str) -> go.Figure:
    """At most :data:`MOST_POINTS` logits, and the line on which both sides are equal."""
    finite = np.isfinite(frame[[x[0], y[0]]].to_numpy(dtype=float)).all(axis=1)
    whole = frame[finite]
    some = whole.iloc[thin_indices(len(whole), MOST_POINTS)] if len(whole) else whole
    figure = go.Figure()
    if len(some):
        ends = some[[x[0], y[0]]].to_numpy()
        line = np.array([ends.min(), ends.max()])
        figure.add_scatter(
            x=line,
            y=line,
            mode="lines",
            name="equal",
            line={"color": REFERENCE, "dash": "dash", "width": 1.5},
            hoverinfo="skip",
        )
    figure.add_scatter(
        x=some[x[0]].to_numpy(),
        y=some[y[0]].to_numpy(),
        customdata=some[["image", "class"]].to_numpy(),
        mode="markers",
        name=f"one image and class ({len(some)} of {len(frame)})",
        marker={"color": OKABE_ITO[0], "size": 5, "opacity": 0.75},
        hovertemplate="image %{customdata[0]}, class %{customdata[1]}<br>"
        f"{x[1]}: %{{x:.4g}}<br>{y[1]}: %{{y:.4g}}<extra></extra>",
    )
    return layout(figure, title, x=x[1], y=y[1], height=460)


def _hover(row: dict) -> str:
    """A rule's numbers in words."""
    text = (
        f"{row['label']}: {percent(row['accuracy'])} "
        f"({percent(row['low'])} to {percent(row['high'])})"
        f"<br>{row['passes']} forward pass{'es' if row['passes'] > 1 else ''} per image, "
        f"rests on {row['models']} model{'s' if row['models'] > 1 else ''}"
    )
    if np.isfinite(row["worst"]):
        text += f"<br>worst {percent(row['worst'])}, best {percent(row['best'])}"
    if row["non_finite"]:
        text += f"<br>{row['non_finite']} of {row['images']} images without finite logits"
    return text


def _error(accuracy: ArrayLike, low: ArrayLike, high: ArrayLike, colour: str) -> dict:
    """Error bars in percent from shares."""
    middle = np.asarray(accuracy)
    return {
        "type": "data",
        "symmetric": False,
        "array": 100 * (np.asarray(high) - middle),
        "arrayminus": 100 * (middle - np.asarray(low)),
        "thickness": 1.4,
        "width": 0,
        "color": colour,
    }


def _draw_band(figure: go.Figure, frame: pd.DataFrame) -> None:
    """From the worst to the best individual."""
    for row in frame[frame["rule"] == "individuals"].to_dict("records"):
        figure.add_vrect(
            x0=100 * row["worst"], x1=100 * row["best"], fillcolor=BAND, line_width=0, layer="below"
        )


def _mark_non_finite(figure: go.Figure, frame: pd.DataFrame) -> None:
    """Images that a rule could not predict, in words beside its dot."""
    for row in frame[frame["non_finite"] > 0].to_dict("records"):
        figure.add_annotation(
            x=100 * row["accuracy"],
            y=row["label"],
            text=f"{row['non_finite']} of {row['images']} images without finite logits",
            showarrow=False,
            xanchor="left" if row["accuracy"] < 0.5 else "right",
            yshift=16,
            font={"size": 11},
        )


def _mark_chance(figure: go.Figure, chance: float | None, vertical: bool) -> None:
    if chance is None:
        return
    look = {"color": REFERENCE, "dash": "dot", "width": 1.5}
    name = f"chance {percent(chance)}"
    if vertical:
        note = {"text": name, "font": {"size": 11}}
        figure.add_vline(x=100 * chance, line=look, annotation=note, annotation_position="top")
    else:  # in the legend: rules that fail lie on the line and would cover a label
        figure.add_hline(y=100 * chance, line=look, name=name, showlegend=True)


def _range(frame: pd.DataFrame, chance: float | None) -> list[float]:
    """Axis range in percent that holds intervals, the band and the chance line."""
    low = float(np.nanmin(frame[["low", "worst"]].to_numpy(dtype=float)))
    high = float(np.nanmax(frame[["high", "best"]].to_numpy(dtype=float)))
    low = low if chance is None else min(low, chance)
    return [max(0.0, 100 * low - 3), min(101.0, 100 * high + 2)]

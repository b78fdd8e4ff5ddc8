"""Figures of averaging as regularisation: norms, histograms, the identity, robustness."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.figures.magnitude import COLOURS, LINES, SYMBOLS
from analysis.figures.style import OKABE_ITO, REFERENCE, add_line, layout, set_axes
from analysis.magnitude.robustness import CORRUPTIONS, Corruption
from analysis.magnitude.sweep import SUBJECTS

NAMES = SUBJECTS | {"individuals": "individuals"}


def _labels(frame: pd.DataFrame) -> list[str]:
    return [parameter.removesuffix(".weight") for parameter in frame["parameter"]]


def norm_ratios(frame: pd.DataFrame, title: str = "") -> go.Figure:
    """Per parameter: the average's norm as a share of the members', with the line 1/√N.

    Args:
        frame: of :func:`analysis.magnitude.norms.norms_frame`.
        title: the figure's title.

    Example:
        >>> frame = pd.DataFrame({"parameter": ["head.weight"], "weight": True, "ratio": 0.8})
        >>> norm_ratios(frame.assign(independent=0.5)).data[0].x.tolist()
        [0.8]
    """
    labels = np.array(_labels(frame))
    figure = go.Figure()
    for weight, name, colour, symbol in (
        (True, "weights", OKABE_ITO[0], "circle"),
        (False, "biases and norm parameters", OKABE_ITO[1], "diamond"),
    ):
        kind = (frame["weight"] == weight).to_numpy()
        if not kind.any():
            continue
        figure.add_scatter(
            x=frame["ratio"].to_numpy()[kind],
            y=labels[kind],
            mode="markers",
            name=name,
            marker={"color": colour, "symbol": symbol, "size": 10},
            hovertemplate="%{y}: %{x:.3f}<extra>" + name + "</extra>",
        )
    independent = float(frame["independent"].iloc[0])
    layout(
        figure,
        title,
        x="‖average‖ / √mean‖member‖² (0 to 1)",
        y="",
        height=160 + 24 * len(labels),
    )
    figure.layout.margin.t += 14
    add_line(figure, {"color": REFERENCE, "dash": "dash", "width": 1.5}, x=independent)
    figure.add_annotation(
        x=independent,
        y=1,
        yref="paper",
        yanchor="bottom",
        text="1/√N: independent members",
        showarrow=False,
        font={"size": 11},
    )
    set_axes(figure, x={"range": [0, 1.04]})
    _set_parameter_axis(figure, labels)
    return figure


def norm_ranges(
    frame: pd.DataFrame, quantity: Literal["norm", "variance"] = "norm", title: str = ""
) -> go.Figure:
    """Per parameter: norm or variance of the members (mean, least to most) and of the average.

    Args:
        frame: of :func:`analysis.magnitude.norms.norms_frame`.
        quantity: "norm" (Frobenius) or "variance" (of the entries).
        title: the figure's title.
    """
    labels = np.array(_labels(frame))
    mean = frame[f"{quantity}_mean"].to_numpy()
    figure = go.Figure()
    figure.add_scatter(
        x=mean,
        y=labels,
        mode="markers",
        name="individuals (mean, least to most)",
        marker={"color": COLOURS["individuals"], "symbol": "circle-open", "size": 9},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": frame[f"{quantity}_max"].to_numpy() - mean,
            "arrayminus": mean - frame[f"{quantity}_min"].to_numpy(),
            "thickness": 1.5,
        },
        hovertemplate="%{y}: %{x:.4g}<extra>individuals</extra>",
    )
    figure.add_scatter(
        x=frame[f"{quantity}_soup"].to_numpy(),
        y=labels,
        mode="markers",
        name="average",
        marker={"color": COLOURS["uniform_soup"], "symbol": "circle", "size": 9},
        hovertemplate="%{y}: %{x:.4g}<extra>average</extra>",
    )
    what = "Frobenius norm" if quantity == "norm" else "Variance of the entries"
    layout(figure, title, x=f"{what} (log scale)", y="", height=160 + 24 * len(labels))
    set_axes(
        figure, x={"type": "log", "nticks": 6, "exponentformat": "power", "minorloglabels": "none"}
    )
    _set_parameter_axis(figure, labels)
    return figure


def _set_parameter_axis(figure: go.Figure, labels: np.ndarray) -> None:
    """A y axis of all parameters in the network's order, whatever trace names them first."""
    set_axes(
        figure,
        y={
            "type": "category",
            "categoryorder": "array",
            "categoryarray": list(labels),
            "autorange": "reversed",
            "tickfont": {"size": 10},
        },
    )


def weight_histogram(frame: pd.DataFrame, title: str = "") -> go.Figure:
    """The distribution of one parameter's entries, in steps.

    Args:
        frame: of :func:`analysis.magnitude.norms.histogram_frame`.
        title: the figure's title.
    """
    figure = go.Figure()
    for subject, part in frame.groupby("subject", sort=False):
        key = str(subject)
        edges = np.append(part["left"].to_numpy(), part["right"].to_numpy()[-1:])
        density = part["density"].to_numpy()
        figure.add_scatter(
            x=edges,
            y=np.append(density, density[-1:]),
            mode="lines",
            name=NAMES[key],
            line={"color": COLOURS[key], "dash": LINES[key], "width": 2, "shape": "hv"},
            hovertemplate=f"{NAMES[key]}<br>from %{{x:.4g}}: %{{y:.4g}}<extra></extra>",
        )
    layout(figure, title, x="Weight", y="Density (per unit of weight)")
    set_axes(figure, y={"rangemode": "tozero"})
    return figure


def identity_bar(frame: pd.DataFrame, parameter: str, title: str = "") -> go.Figure:
    """mean‖θ_i‖² beside the sum of ‖θ̄‖² and mean‖θ_i − θ̄‖².

    Args:
        frame: of :func:`analysis.magnitude.norms.identity_frame`.
        parameter: one of its rows.
        title: the figure's title.
    """
    row = frame[frame["parameter"] == parameter].iloc[0]
    figure = go.Figure()
    for column, name, side, colour in (
        ("mean_square", "mean‖θ<sub>i</sub>‖²", "members", OKABE_ITO[0]),
        ("soup_square", "‖average‖²", "average + spread", OKABE_ITO[1]),
        ("spread", "mean‖θ<sub>i</sub> − average‖²", "average + spread", OKABE_ITO[5]),
    ):
        figure.add_bar(
            x=[row[column]],
            y=[side],
            orientation="h",
            name=name,
            marker={"color": colour},
            hovertemplate=f"{name}: %{{x:.8g}}<extra></extra>",
        )
    layout(figure, title, x="Squared norm (squared weight units)", y="", height=280)
    figure.layout.barmode = "stack"
    set_axes(figure, y={"type": "category", "autorange": "reversed", "showgrid": False})
    return figure


def noise_lines(frame: pd.DataFrame, relative: bool = True, title: str = "") -> go.Figure:
    """Accuracy over the strength of noise on the weights, with the range over seeds.

    Args:
        frame: of :func:`analysis.magnitude.robustness.weight_noise_sweep`.
        relative: as the sweep's.
        title: the figure's title.
    """
    own = "own" if relative else "members'"
    figure = go.Figure()
    _draw_accuracy(figure, frame, "sigma", "σ = %{x:.3g}", "over seeds")
    layout(figure, title, x=f"Noise σ (× {own} RMS of each tensor)", y="")
    return _set_accuracy_axis(figure)


def corruption_lines(frame: pd.DataFrame, corruption: Corruption, title: str = "") -> go.Figure:
    """Accuracy over the severity of a corruption, individuals with their range.

    Args:
        frame: of :func:`analysis.magnitude.robustness.corruption_sweep`.
        corruption: which one it is.
        title: the figure's title.
    """
    figure = go.Figure()
    _draw_accuracy(figure, frame, "severity", "severity %{x}", "over members")
    layout(figure, title, x=f"Severity of {CORRUPTIONS[corruption].replace(' (', '<br>(')}", y="")
    steps = frame.drop_duplicates("severity")
    set_axes(
        figure,
        x={
            "tickmode": "array",
            "tickvals": steps["severity"].to_numpy(),
            "ticktext": [
                f"{s}<br>({x:g})" for s, x in zip(steps["severity"], steps["level"], strict=True)
            ],
        },
    )
    return _set_accuracy_axis(figure)


def _draw_accuracy(
    figure: go.Figure, frame: pd.DataFrame, axis: str, where: str, spread: str
) -> None:
    """A line a subject, with bars from low to high where there is a range."""
    for subject, part in frame.groupby("subject", sort=False):
        key = str(subject)
        accuracy = part["accuracy"].to_numpy()
        above = part["high"].to_numpy() - accuracy
        below = accuracy - part["low"].to_numpy()
        figure.add_scatter(
            x=part[axis].to_numpy(),
            y=accuracy,
            customdata=part[["low", "high", "non_finite"]].to_numpy(dtype=float),
            mode="lines+markers",
            name=NAMES[key],
            line={"color": COLOURS[key], "dash": LINES[key], "width": 2},
            marker={"symbol": SYMBOLS[key], "size": 7},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": above,
                "arrayminus": below,
                "thickness": 1,
                "width": 3,
                "visible": bool((above + below).max() > 0),
            },
            hovertemplate=f"{NAMES[key]}<br>{where}: %{{y:.1%}}<br>{spread} "
            "%{customdata[0]:.1%} to %{customdata[1]:.1%}"
            "<br>non-finite: %{customdata[2]:.1%} of images<extra></extra>",
        )


def _set_accuracy_axis(figure: go.Figure) -> go.Figure:
    set_axes(
        figure, y={"title": {"text": "Accuracy (%)"}, "tickformat": ".0%", "rangemode": "tozero"}
    )
    return figure

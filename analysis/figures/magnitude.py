"""Figures of scaled weights: measures over m, and who dominates an average."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analysis.figures.style import OKABE_ITO, REFERENCE, layout, set_axes
from analysis.magnitude.homogeneity import LAWS, Law
from analysis.magnitude.sweep import SUBJECTS

# Column of the frame: label with unit, and tick format of its axis.
QUANTITIES: dict[str, tuple[str, str]] = {
    "accuracy": ("Accuracy (%)", ".0%"),
    "stability": ("Predictions as at m = 1 (%)", ".0%"),
    "confidence": ("Mean confidence (%)", ".0%"),
    "entropy": ("Mean entropy (nats)", ""),
    "ece": ("Expected calibration error (0 to 1)", ""),
    "log10_logit_norm": ("Mean logit norm (log₁₀)", ""),
}
# The colours that the rules have elsewhere (analysis.figures.ensembles); grey is the prediction's.
COLOURS = {
    "individuals": OKABE_ITO[2],
    "uniform_soup": OKABE_ITO[3],
    "norm_restored": OKABE_ITO[4],
    "logit_ensemble": OKABE_ITO[0],
    "probability_ensemble": OKABE_ITO[5],
}
LINES = dict(zip(COLOURS, ("dot", "solid", "longdash", "solid", "dash"), strict=True))
SYMBOLS = dict(
    zip(COLOURS, ("circle-open", "square", "diamond", "triangle-up", "triangle-down"), strict=True)
)
BROKEN = OKABE_ITO[1]
M_AXIS = "Factor m (log scale)"


def magnitude_grid(
    frame: pd.DataFrame,
    prediction: pd.DataFrame | None = None,
    title: str = "",
    chosen: float | None = None,
) -> go.Figure:
    """Six measures over m as small multiples, two beside each other.

    Args:
        frame: of :func:`analysis.magnitude.sweep.magnitude_sweep`.
        prediction: of :func:`analysis.magnitude.sweep.predicted_sweep`, drawn over it in dashed
            grey.
        title: the figure's title.
        chosen: the m that the page has chosen.
    """
    figure = make_subplots(
        rows=3,
        cols=2,
        shared_xaxes=True,
        vertical_spacing=0.08,
        horizontal_spacing=0.14,
        subplot_titles=[label for label, _ in QUANTITIES.values()],
    )
    # Titles of half a phone's width.
    figure.update_annotations(font_size=11)
    for index, quantity in enumerate(QUANTITIES):
        cell = {"row": index // 2 + 1, "col": index % 2 + 1}
        _draw(figure, frame, quantity, prediction, cell)
        _set_y_axis(figure, quantity, **cell)
    layout(figure, title, x="", y="", height=860)
    figure.layout.margin.t += 24
    _set_axes(figure, frame, chosen, every=3)
    figure.update_xaxes(title={"text": M_AXIS, "font": {"size": 11}}, row=3)
    return figure


def _draw(
    figure: go.Figure,
    frame: pd.DataFrame,
    quantity: str,
    prediction: pd.DataFrame | None,
    cell: dict[str, int],
) -> None:
    """Lines of all subjects, the prediction over them, and marks of what is not finite."""
    first = cell == {"row": 1, "col": 1}
    label, ticks = QUANTITIES[quantity]
    shown = f"%{{y:{ticks.replace('.0', '.1') or '.4g'}}}"
    for subject, part in frame.groupby("subject", sort=False):
        if part[quantity].isna().all():
            continue  # probabilities alone have no logit norm
        key = str(subject)
        figure.add_scatter(
            x=part["magnitude"].to_numpy(),
            y=part[quantity].to_numpy(dtype=float),
            customdata=100 * part[["non_finite"]].to_numpy(dtype=float),
            mode="lines+markers",
            name=SUBJECTS[key],
            legendgroup=key,
            showlegend=first,
            line={"color": COLOURS[key], "dash": LINES[key], "width": 2},
            marker={"symbol": SYMBOLS[key], "size": 6},
            hovertemplate=f"{SUBJECTS[key]}<br>m = %{{x:.4g}}<br>{label}: {shown}"
            "<br>non-finite: %{customdata[0]:.3g} % of images<extra></extra>",
            **cell,
        )
    if prediction is not None:
        _draw_prediction(figure, prediction, quantity, first, cell)
    lost = frame[frame["non_finite"] > 0]
    if len(lost):
        values = frame[quantity].to_numpy(dtype=float)
        floor = float(np.nanmin(values)) if np.isfinite(values).any() else 0.0
        figure.add_scatter(
            x=lost["magnitude"].to_numpy(),
            y=lost[quantity].fillna(floor).to_numpy(dtype=float),
            customdata=[
                [SUBJECTS[subject], 100 * share]
                for subject, share in zip(lost["subject"], lost["non_finite"], strict=True)
            ],
            mode="markers",
            name="some logits not finite",
            legendgroup="non-finite",
            showlegend=first,
            marker={"symbol": "x", "size": 9, "color": BROKEN},
            hovertemplate="%{customdata[0]}<br>m = %{x:.4g}<br>%{customdata[1]:.3g} % of images "
            "have non-finite logits<extra></extra>",
            **cell,
        )


def _draw_prediction(
    figure: go.Figure,
    prediction: pd.DataFrame,
    quantity: str,
    first: bool,
    cell: dict[str, int],
) -> None:
    named = not first
    for (law, subject), part in prediction.groupby(["law", "subject"], sort=False):
        if part[quantity].isna().all():
            continue
        kind: Law = law  # type: ignore[assignment]  # a label of the frame
        figure.add_scatter(
            x=part["magnitude"].to_numpy(),
            y=part[quantity].to_numpy(dtype=float),
            mode="lines",
            name=f"prediction: {LAWS[kind]}",
            legendgroup="prediction",
            showlegend=not named,
            line={"color": REFERENCE, "dash": "dash", "width": 1.5},
            hovertemplate=f"{SUBJECTS[str(subject)]}, predicted ({LAWS[kind]})"
            "<br>m = %{x:.4g}: %{y:.4g}<extra></extra>",
            **cell,
        )
        named = True


def _set_y_axis(figure: go.Figure, quantity: str, **cell: int) -> None:
    """Shares run from none to all, so that no small change looks large."""
    ticks = QUANTITIES[quantity][1]
    figure.update_yaxes(tickformat=ticks, range=[-0.03, 1.05] if ticks else None, **cell)


def _set_axes(figure: go.Figure, frame: pd.DataFrame, chosen: float | None, every: int = 1) -> None:
    """A log axis with a tick at every n-th power of ten, m = 1 among them, and the chosen m."""
    powers = np.log10(frame["magnitude"].to_numpy(dtype=float))
    low, high = float(powers.min()), float(powers.max())
    ticks = np.arange(np.ceil(low - 1e-9), np.floor(high + 1e-9) + 1)
    if len(ticks) > every:
        ticks = ticks[ticks % every == 0]
    set_axes(
        figure,
        x={
            "type": "log",
            "tickmode": "array",
            "tickvals": 10**ticks,
            "ticktext": [f"{10**tick:g}" for tick in ticks],
            "range": [low - 0.05 * (high - low + 0.1), high + 0.05 * (high - low + 0.1)],
        },
    )
    if chosen is not None:
        figure.add_vline(x=chosen, line={"color": REFERENCE, "dash": "dot", "width": 1.5})


def dominance_lines(frame: pd.DataFrame, title: str = "", chosen: float | None = None) -> go.Figure:
    """The scaled member's part of the average, in weights and in logits.

    Args:
        frame: of :func:`analysis.magnitude.homogeneity.dominance`.
        title: the figure's title.
        chosen: the m that the page has chosen.

    Example:
        >>> from analysis.magnitude.homogeneity import dominance
        >>> len(dominance_lines(dominance([3], members=10, magnitudes=[1.0, 2.0])).data)
        2
    """
    figure = go.Figure()
    colours = iter((OKABE_ITO[0], OKABE_ITO[5], OKABE_ITO[2], OKABE_ITO[1]) * 4)
    for (mean, depth), part in frame.groupby(["mean", "depth"], sort=False):
        soup = mean == "soup"
        name = (
            "soup: of the weights, m : 1"
            if soup
            else f"ensemble: of the logits, m<sup>{depth}</sup> : 1"
        )
        figure.add_scatter(
            x=part["magnitude"].to_numpy(),
            y=part["share"].to_numpy(),
            mode="lines",
            name=name,
            line={
                "color": COLOURS["uniform_soup"] if soup else next(colours),
                "dash": "solid" if soup else "dash",
                "width": 2,
            },
            hovertemplate=f"{name}<br>m = %{{x:.4g}}: %{{y:.2%}}<extra></extra>",
        )
    layout(figure, title, x=M_AXIS, y="Part of the scaled member (%)")
    _set_axes(figure, frame, chosen)
    set_axes(figure, y={"tickformat": ".0%", "range": [-0.02, 1.02]})
    return figure

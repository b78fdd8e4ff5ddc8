"""Figures of what chooses a rank: proxies, their picks and regrets, and ranks per layer."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analysis.figures.rank_selection import (
    MODE_LOOKS,
    SHARE_OF_RANK,
    rank_words,
    setting_words,
)
from analysis.figures.style import (
    DASHES,
    MARKERS,
    OKABE_ITO,
    REFERENCE,
    add_line,
    layout,
    mark_share,
    percent,
    set_axes,
    share_axis,
)
from analysis.metrics import metric_of

# Regrets beyond this many points are drawn at the edge: settings that destroy the model would
# otherwise leave no room for the differences that matter.
REGRET_SPAN = 12.0
ROW = 28  # pixels, which hold a name in two lines
LETTERS = 20
RANK_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def proxies_over_rank(
    proxies: pd.DataFrame, curve: pd.DataFrame, title: str, shown: Collection[str]
) -> go.Figure:
    """Each proxy over rank, stretched to [0, 1], and so what a search expects.

    Args:
        proxies: rows with proxy, title, rank, value.
        curve: rows with rank and expected, of a search; may be empty.
        title: the question answered.
        shown: the proxies drawn at first; the others are a click on the legend away.
    """
    figure = go.Figure()
    names = list(dict.fromkeys(proxies["proxy"]))
    for i, proxy in enumerate(names):
        mine = proxies[proxies["proxy"] == proxy].sort_values("rank")
        name = str(mine["title"].iloc[0])
        figure.add_scatter(
            x=mine["rank"].to_numpy(),
            y=stretch(mine["value"].to_numpy()),
            mode="lines",
            name=name,
            visible=True if proxy in shown else "legendonly",
            line={
                "color": OKABE_ITO[i % len(OKABE_ITO)],
                "dash": DASHES[1 + i // len(OKABE_ITO) % (len(DASHES) - 1)],
                "width": 2,
            },
            customdata=mine["value"].to_numpy(),
            text=[rank_words(r) for r in mine["rank"]],
            hovertemplate="rank %{text}: %{customdata:.4g}<extra>" + name + "</extra>",
        )
    if len(curve):
        mine = curve.sort_values("rank")
        figure.add_scatter(
            x=mine["rank"].to_numpy(),
            y=stretch(mine["expected"].to_numpy()),
            mode="lines",
            name="by the search",
            line={"color": REFERENCE, "width": 4},
            text=[rank_words(r) for r in mine["rank"]],
            customdata=mine["expected"].to_numpy(),
            hovertemplate="rank %{text}: %{customdata:.3f}<extra>by the search</extra>",
        )
    layout(figure, title, x=SHARE_OF_RANK, y="From its lowest (0) to its highest (1)", height=480)
    _set_rank_axis(figure)
    return figure


def _set_rank_axis(figure: go.Figure) -> None:
    """A logarithmic axis of shares with round ticks: picks lie anywhere."""
    text = [percent(share) for share in RANK_TICKS]
    set_axes(
        figure, x={"type": "log", "tickmode": "array", "tickvals": RANK_TICKS, "ticktext": text}
    )


def _set_name_axis(figure: go.Figure, names: Sequence[str]) -> None:
    """A row per name, the last on top; long names in two lines, which leaves room on a phone."""
    set_axes(
        figure,
        y={
            "type": "category",
            "categoryorder": "array",
            "categoryarray": names,
            "tickmode": "array",
            "tickvals": names,
            "ticktext": ["<br>".join(textwrap.wrap(name, LETTERS)) for name in names],
            "tickfont": {"size": 10},
        },
    )


def stretch(values: np.ndarray) -> np.ndarray:
    """Values moved to [0, 1]; 0 where they are all equal (up to rounding)."""
    low, high = np.nanmin(values), np.nanmax(values)
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        return np.zeros(len(values))
    return (values - low) / (high - low)


def picks_over_rank(picks: pd.DataFrame, title: str, chosen: float) -> go.Figure:
    """A row per proxy with a mark at the rank that it picks, by mode.

    Args:
        picks: rows with proxy, title, mode, rank, scale, accuracy (NaN where not measured).
        title: the question answered.
        chosen: the recommended rank, a vertical line.
    """
    frame = picks.dropna(subset=["rank"]).sort_values("rank", ascending=False, kind="stable")
    figure, metric = go.Figure(), metric_of(picks)
    for mode, (name, colour, symbol) in MODE_LOOKS.items():
        mine = frame[frame["mode"] == mode]
        if len(mine):
            figure.add_scatter(
                x=mine["rank"].to_numpy(),
                y=mine["title"],
                mode="markers",
                name=name,
                marker={"symbol": symbol, "size": 11, "color": colour},
                text=[
                    setting_words(row)
                    + (
                        ""
                        if np.isnan(row[metric.column])
                        else f": {metric.show(row[metric.column])}"
                    )
                    for row in mine.to_dict("records")
                ],
                hovertemplate="%{y}<br>%{text}<extra></extra>",
            )
    layout(figure, title, x="Rank (log scale)", y="", height=150 + ROW * len(frame))
    _set_rank_axis(figure)
    _set_name_axis(figure, frame["title"].tolist())
    add_line(figure, {"color": REFERENCE, "dash": "dot", "width": 1.5}, x=chosen)
    return figure


def regret_dots(table: pd.DataFrame, title: str, value: str = "test_regret") -> go.Figure:
    """A row per proxy, a dot per suite and subset, a bar at the mean; the smallest mean on top.

    Args:
        table: rows with proxy, title, mode, suite, subset and `value` (shares).
        title: the question answered.
        value: the column drawn.

    Example:
        >>> from analysis.rank_selection.evidence.shipped import evidence
        >>> table = evidence().assign(title=lambda frame: frame["proxy"])
        >>> [trace.name for trace in regret_dots(table, "What does each rule lose?").data][:2]
        ['labels', 'inputs only']
    """
    frame = table.dropna(subset=[value])
    means = frame.groupby("title")[value].mean().sort_values(ascending=False)
    figure = go.Figure()
    for mode, (name, colour, symbol) in MODE_LOOKS.items():
        mine = frame[frame["mode"] == mode]
        if len(mine):
            points = 100 * mine[value].to_numpy()
            beyond = points > REGRET_SPAN
            figure.add_scatter(
                x=np.minimum(points, REGRET_SPAN),
                y=mine["title"],
                mode="markers",
                name=name,
                marker={
                    "symbol": np.where(beyond, "triangle-right-open", f"{symbol}-open"),
                    "size": 9,
                    "color": colour,
                    "line": {"width": 1.5},
                },
                customdata=points,
                text=[f"{row['suite']} {row['subset']}" for row in mine.to_dict("records")],
                hovertemplate="%{y}<br>%{text}: %{customdata:.2f} points<extra></extra>",
            )
    figure.add_scatter(
        x=np.minimum(100 * means.to_numpy(), REGRET_SPAN),
        y=means.index,
        mode="markers",
        name="mean",
        marker={"symbol": "line-ns-open", "size": 15, "color": REFERENCE, "line": {"width": 3}},
        customdata=100 * means.to_numpy(),
        hovertemplate="%{y}<br>mean %{customdata:.2f} points<extra></extra>",
    )
    layout(
        figure,
        title,
        x=f"Regret (points, ▷ beyond {REGRET_SPAN:g})",
        y="",
        height=150 + ROW * len(means),
    )
    _set_name_axis(figure, means.index.tolist())
    set_axes(figure, x={"range": [min(-0.5, 100 * frame[value].min() - 0.3), REGRET_SPAN + 0.5]})
    return figure


def best_over_tasks(frame: pd.DataFrame, title: str) -> go.Figure:
    """Best rank and best scale over the number of tasks, with the range of tied settings.

    Args:
        frame: of :func:`analysis.rank_selection.regret.tasks_effect`, of one method; an axis that
            the method lacks is left out.
        title: the question answered.
    """
    axes = [
        (axis, label, factor)
        for axis, label, factor in (
            ("rank", "Best rank, share of directions (%)", 100),
            ("scale", "Best λ", 1),
        )
        if frame[f"best_{axis}"].notna().any()
    ]
    figure = make_subplots(rows=1, cols=len(axes), horizontal_spacing=0.2)
    # Sets of one size stand a little apart, so that their ranges do not cover each other.
    place = (
        frame.groupby("tasks").cumcount()
        - (frame.groupby("tasks")["tasks"].transform("size") - 1) / 2
    )
    looks = dict(
        zip(dict.fromkeys(frame["suite"]), zip(OKABE_ITO, MARKERS, strict=True), strict=False)
    )
    for column, (axis, _, factor) in enumerate(axes, start=1):
        for suite, mine in frame.assign(x=frame["tasks"] + 0.2 * place).groupby(
            "suite", sort=False
        ):
            colour, symbol = looks[suite]
            y = factor * mine[f"best_{axis}"].to_numpy()
            figure.add_scatter(
                x=mine["x"].to_numpy(),
                y=y,
                mode="markers",
                row=1,
                col=column,
                name=str(suite),
                showlegend=column == 1 and len(looks) > 1,
                marker={"color": colour, "symbol": symbol, "size": 11},
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": factor * mine[f"tied_{axis}_high"].to_numpy() - y,
                    "arrayminus": y - factor * mine[f"tied_{axis}_low"].to_numpy(),
                    "thickness": 1.4,
                    "width": 0,
                },
                text=mine["subset"],
                hovertemplate="%{text}: %{y:.3g}<extra>" + str(suite) + "</extra>",
            )
    layout(figure, title, x="Number of tasks", y="", height=380)
    set_axes(figure, x={"tickmode": "array", "tickvals": sorted(set(frame["tasks"]))})
    for column, (_, label, _) in enumerate(axes, start=1):
        figure.update_yaxes(title={"text": label}, row=1, col=column)
    return figure


def layer_ranks(frame: pd.DataFrame, title: str, uniform: float) -> go.Figure:
    """A row per matrix, a mark per rule at the share of directions that it keeps there.

    Args:
        frame: rows with rule, parameter, rank (directions), share.
        title: the question answered.
        uniform: the same share everywhere, a vertical line.
    """
    figure = go.Figure()
    parameters = list(dict.fromkeys(frame["parameter"]))
    for i, (rule, mine) in enumerate(frame.groupby("rule", sort=False)):
        figure.add_scatter(
            x=mine["share"].to_numpy(),
            y=mine["parameter"],
            mode="markers",
            name=str(rule),
            marker={
                "color": OKABE_ITO[i % len(OKABE_ITO)],
                "symbol": ("circle", "diamond", "square", "triangle-up", "x")[i % 5],
                "size": 10,
            },
            text=[f"{r:.0f} directions" for r in mine["rank"]],
            hovertemplate="%{y}<br>%{x:.1%}, %{text}<extra>" + str(rule) + "</extra>",
        )
    layout(
        figure, title, x="Share of directions (log scale)", y="", height=150 + ROW * len(parameters)
    )
    set_axes(
        figure,
        y={"type": "category", "categoryorder": "array", "categoryarray": parameters[::-1]},
        x=share_axis([*frame["share"], uniform]),
    )
    mark_share(figure, uniform, "uniform")
    return figure


def accuracy_over_storage(frame: pd.DataFrame, title: str) -> go.Figure:
    """Mean accuracy over the numbers stored, a line per rule with its interval.

    Args:
        frame: of :func:`analysis.rank_selection.allocation.compare_with_uniform`.
        title: the question answered.
    """
    figure, metric = go.Figure(), metric_of(frame)
    for i, (rule, mine) in enumerate(frame.groupby("title", sort=False)):
        mine = mine.sort_values("numbers")
        accuracy = metric.factor * mine[metric.column].to_numpy()
        figure.add_scatter(
            x=mine["numbers"].to_numpy() / 1e6,
            y=accuracy,
            mode="lines+markers",
            name=str(rule),
            line={"color": OKABE_ITO[i % len(OKABE_ITO)], "dash": DASHES[i % len(DASHES)]},
            marker={"size": 9, "symbol": MARKERS[i % len(MARKERS)]},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": metric.factor * mine["high"].to_numpy() - accuracy,
                "arrayminus": accuracy - metric.factor * mine["low"].to_numpy(),
                "thickness": 1,
                "width": 0,
            },
            text=[
                f"{row['numbers'] / 1e6:.2f} million, as rank {percent(row['share'])} everywhere, "
                f"λ = {row['scale']:.3g}"
                for row in mine.to_dict("records")
            ],
            hovertemplate=f"%{{text}}: %{{y:{metric.of_hover}}}{metric.ending}<extra>"
            + str(rule)
            + "</extra>",
        )
    label = "Numbers that the kept directions take (millions)"
    return layout(figure, title, x=label, y=metric.axis, height=420)

"""What "How does it scale?" says of its figures, made from the frames that are drawn."""

from __future__ import annotations

import pandas as pd

from analysis.comparison.scaling import summarise_over


def describe_tasks(frame: pd.DataFrame) -> str:
    """Which method keeps most at the fewest and at the most tasks, and what more tasks cost.

    Args:
        frame: of :func:`analysis.comparison.scaling.accuracy_over_tasks`.
    """
    summary = summarise_over(frame, "count", "normalised")
    fewest, most = summary["count"].min(), summary["count"].max()
    first, last = (
        summary[summary["count"] == count].sort_values("mean", ascending=False).iloc[0]
        for count in (fewest, most)
    )
    if fewest == most:
        return f"Of {most} tasks {last['method']} keeps most: {last['mean']:.1%} of the experts."
    start = summary[(summary["count"] == fewest) & (summary["method"] == last["method"])]
    words = f"With {fewest} tasks {first['method']} keeps most ({first['mean']:.1%} of the experts"
    words += f", in the mean over {first['subsets']:.0f} subsets)" if first["subsets"] > 1 else ")"
    words += f", with {most} tasks {last['method']} ({last['mean']:.1%}). "
    if start.empty:
        return words.strip()
    lost = 100 * (float(start["mean"].iloc[0]) - float(last["mean"]))
    change = f"loses {lost:.1f} points" if lost > 0 else f"gains {-lost:.1f} points"
    return f"{words}From {fewest} to {most} tasks {last['method']} {change} of that share."


def describe_sizes(frame: pd.DataFrame) -> str:
    """How much of the experts each size keeps at its best method.

    Args:
        frame: as of :func:`analysis.comparison.scaling.accuracy_over_tasks`, with a column
            parameters.
    """
    best = frame.loc[frame.groupby("parameters")["normalised"].idxmax()]
    parts = [
        f"{size / 1e6:.3g} M parameters: {method} ({kept:.1%})"
        for size, method, kept in zip(
            best["parameters"].astype(float), best["method"], best["normalised"], strict=True
        )
    ]
    return f"What keeps most of the experts, by size: {'; '.join(parts)}."

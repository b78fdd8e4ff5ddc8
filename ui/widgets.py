"""Widgets whose values stand in the link, and those made from a method's declaration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import streamlit as st

from merge_core.methods.declaration import Method, ParameterSpec, Postprocessor

# Shares of min(m, n) that a slider offers: finer where the published ranks lie.
SHARES = (
    0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.12, 0.16, 0.2, 0.24, 0.32, 0.4, 0.5, 0.6,
    0.7, 0.8, 0.9, 1.0,
)  # fmt: skip
RANK_UNITS = {"share": "Share", "count": "Number"}
Value = TypeVar("Value")


def share_label(share: float) -> str:
    """A share of directions in words with three digits, such as ``8 %`` or ``8.34 %``."""
    return f"{100 * share:.3g} %"


def shares_including(key: str) -> list[float]:
    """:data:`SHARES` and the share that the link gives, which may be any."""
    asked = st.query_params.get(key, "").removesuffix("%")
    try:
        # As many digits as the label has: the value stands in the link by its label.
        share = round(float(asked) / 100, 6)
    except ValueError:
        return list(SHARES)
    return sorted({*SHARES, share} if 0 < share <= 1 else SHARES)


def choice(label: str, options: Mapping[Value, str], key: str, help: str | None = None) -> Value:
    """One of a few options side by side; the first is the default.

    Args:
        label: above the control.
        options: value to what is written on it.
        key: name in the link.
        help: tooltip.
    """
    values = list(options)
    chosen: Value = st.segmented_control(
        label,
        values,
        default=values[0],
        required=True,
        format_func=options.__getitem__,
        key=key,
        bind="query-params",
        help=help,
    )
    return chosen


def share_slider(label: str, key: str, help: str, default: float = 0.08) -> float:
    """A rank as a share of min(m, n): one of :data:`SHARES`, or the link's own."""
    return float(
        st.select_slider(
            label,
            shares_including(key),
            value=default,
            format_func=share_label,
            key=key,
            bind="query-params",
            help=help,
        )
    )


def controls(method: Method | Postprocessor, prefix: str = "") -> dict[str, Any]:
    """One widget per declared parameter, named in the link as in recipes.

    Args:
        method: what declares them.
        prefix: of the names in the link, where two declarations stand on one page.

    Returns:
        Values by parameter name, ready for a recipe.
    """
    return {spec.name: _widget(spec, prefix + spec.name) for spec in method.specs}


def _widget(spec: ParameterSpec, key: str) -> Any:
    help = spec.help + (f" Typical: {spec.typical}." if spec.typical else "")
    label = spec.name.replace("_", " ").capitalize()
    if spec.kind == "rank":
        return _rank(spec, label, help, key)
    if spec.kind == "choice":
        ordered = sorted(spec.choices, key=lambda option: option != spec.default)
        return choice(label, {option: option for option in ordered}, key, help)
    span = spec.high - spec.low
    if spec.kind == "integer":
        return st.slider(
            label,
            int(spec.low),
            int(spec.high),
            int(spec.default),
            key=key,
            bind="query-params",
            help=help,
        )
    return st.slider(
        label,
        spec.low,
        spec.high,
        float(spec.default),
        step=0.05 if span > 1 else 0.01,
        key=key,
        bind="query-params",
        help=help,
    )


def _rank(spec: ParameterSpec, label: str, help: str, key: str) -> float | int:
    """A rank as a share (a float) or as a number of directions (an integer)."""
    if choice(f"{label} given as", RANK_UNITS, f"{key}_unit") == "share":
        return share_slider(f"{label} (share of directions)", key, help, spec.default)
    return int(
        st.number_input(
            f"{label} (directions)",
            min_value=1,
            value=16,
            step=1,
            key=f"{key}_count",
            bind="query-params",
            help=f"{help} Matrices with fewer directions keep all of theirs.",
        )
    )

"""Widgets made from a method's declaration."""

from __future__ import annotations

from typing import Any

import streamlit as st

from merge_core.methods.declaration import Method, ParameterSpec

# Shares of min(m, n) that a slider offers: finer where the published ranks lie.
SHARES = (
    0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.12, 0.16, 0.2, 0.24, 0.32, 0.4, 0.5, 0.6,
    0.7, 0.8, 0.9, 1.0,
)  # fmt: skip


def share_label(share: float) -> str:
    """A share of directions in words, such as ``8 %``."""
    return f"{share:.1%}".replace(".0%", "%").replace("%", " %")


def controls(method: Method, key_prefix: str = "") -> dict[str, Any]:
    """One widget per declared parameter; the values are in the link.

    Args:
        method: the method.
        key_prefix: before each parameter's name in widget keys (and in the link).

    Returns:
        Values by parameter name, ready for a recipe.
    """
    return {spec.name: _widget(spec, f"{key_prefix}{spec.name}") for spec in method.specs}


def _widget(spec: ParameterSpec, key: str) -> Any:
    help = spec.help + (f" Typical: {spec.typical}." if spec.typical else "")
    label = spec.name.replace("_", " ").capitalize()
    if spec.kind == "rank":
        return st.select_slider(
            f"{label} (share of directions)",
            SHARES,
            value=spec.default,
            format_func=share_label,
            key=key,
            bind="query-params",
            help=help,
        )
    if spec.kind == "choice":
        return st.segmented_control(
            label,
            spec.choices,
            default=spec.default,
            required=True,
            key=key,
            bind="query-params",
            help=help,
        )
    span = spec.high - spec.low
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

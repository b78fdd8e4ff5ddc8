"""Controls that are made from a method's declaration, and ranks as shares of directions."""

from __future__ import annotations

from typing import Any

from analysis.frames.usual import SHARES
from merge_core.methods.declaration import Method, ParameterSpec, Postprocessor
from ui.controls import choice, count, grid, slider

RANK_UNITS = {"share": "Share", "count": "Number"}


def share_label(share: float) -> str:
    """A share of directions in words with three digits, such as ``8 %`` or ``8.34 %``."""
    return f"{100 * share:.3g} %"


def share_words(share: float) -> str:
    """A share of directions in words with all its digits, as it stands in an address."""
    return f"{round(100 * share, 10):.12g} %"


def share_of_words(words: str) -> float:
    """The share that words say.

    Raises:
        ValueError: they are no number.
    """
    return round(float(words.removesuffix("%")) / 100, 14)


def share_slider(
    label: str,
    name: str,
    help: str,
    rest: float = 0.08,
    options: tuple[float, ...] = SHARES,
    slot: str = "",
) -> float:
    """A rank as a share of min(m, n): one of a grid, or whatever a link says."""
    return grid(
        label,
        options,
        name,
        rest=rest,
        high=1.0,
        words=share_words,
        number=share_of_words,
        help=help,
        slot=slot,
    )


def controls(method: Method | Postprocessor, prefix: str = "") -> dict[str, Any]:
    """One widget per declared parameter, named in the link as in recipes.

    Args:
        method: what declares them; each method keeps values of its own.
        prefix: of the names in the link, where two declarations stand on one page.

    Returns:
        Values by parameter name, ready for a recipe.
    """
    return {
        spec.name: _widget(spec, prefix + spec.name, f"{prefix}{method.title}: {spec.name}")
        for spec in method.specs
    }


def _widget(spec: ParameterSpec, name: str, slot: str) -> Any:
    help = spec.help + (f" Typical: {spec.typical}." if spec.typical else "")
    label = spec.name.replace("_", " ").capitalize()
    if spec.kind == "rank":
        return _rank(spec, label, help, name, slot)
    if spec.kind == "choice":
        ordered = sorted(spec.choices, key=lambda option: option != spec.default)
        return choice(label, {option: option for option in ordered}, name, help, slot)
    if spec.kind == "integer":
        low, high, rest = int(spec.low), int(spec.high), int(spec.default)
        return int(slider(label, low, high, name, rest=rest, step=1, help=help, slot=slot))
    step = 0.05 if spec.high - spec.low > 1 else 0.01
    return slider(
        label,
        float(spec.low),
        float(spec.high),
        name,
        rest=float(spec.default),
        step=step,
        help=help,
        slot=slot,
    )


def _rank(spec: ParameterSpec, label: str, help: str, name: str, slot: str) -> float | int:
    """A rank as a share (a float) or as a number of directions (an integer)."""
    unit = choice(f"{label} given as", RANK_UNITS, f"{name}_unit", slot=f"{slot}, unit")
    if unit == "share":
        return share_slider(f"{label} (share of directions)", name, help, spec.default, slot=slot)
    return count(
        f"{label} (directions)",
        1,
        f"{name}_count",
        rest=16,
        help=f"{help} Matrices with fewer directions keep all of theirs.",
        slot=f"{slot}, number",
    )

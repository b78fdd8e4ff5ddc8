"""The recommended setting of a method, where it is known, one click away in the Merge lab."""

from __future__ import annotations

import math

import streamlit as st

from analysis.rank_selection.select import selectable_methods
from analysis.rank_selection.space import search_space
from merge_core.merging.recipe import Recipe
from ui import kept
from ui.server import resources
from ui.server.resources import View
from ui.widgets import RANK_UNITS, share_words
from ui.words.rank_selection import setting_in_words

FRESH = 20  # seconds until a search that ended meanwhile is seen


@st.cache_data(max_entries=64, show_spinner="Looking up the recommended setting …", ttl=FRESH)
def find_suggestion(key: str, tasks: tuple[str, ...], method: str, _view: View) -> Recipe | None:
    """The recipe that the stored search for rank and scale recommends; None where none is stored.

    Args:
        key: of the view.
        tasks: of the view.
        method: by name.
    """
    if not resources.is_measurable(_view) or method not in selectable_methods(_view.suite, tasks):
        return None
    live = resources.is_small(_view)
    space = search_space(method, _view.name, tasks)
    return resources.output_frames(_view).suggestion(space, live)


def describe_setting(recipe: Recipe, suggestion: Recipe | None) -> str:
    """Whether a recipe stands at the recommended setting, at the default, or elsewhere."""
    if recipe.overrides or recipe.then or recipe.weights or recipe.origin:
        return "own setting"
    if suggestion is not None and recipe.parameters == suggestion.parameters:
        return "tuned on validation"
    specs = recipe.declaration.specs
    if not specs:
        return "nothing to set"
    if all(recipe.parameters[spec.name] == spec.default for spec in specs):
        return "default setting"
    return "own setting"


def offer_suggestion(recipe: Recipe, suggestion: Recipe | None) -> None:
    """A button that takes the recommended setting over, where the recipe has another one."""
    if suggestion is None or recipe.parameters == suggestion.parameters:
        return
    rank, scale = (float(suggestion.parameters.get(name, math.nan)) for name in ("rank", "scale"))
    words = setting_in_words(rank, scale)
    st.button(
        "Use the recommended setting",
        on_click=_take,
        args=(suggestion,),
        icon=":material/tune:",
        width="stretch",
        help="As Rank and scale found it for these tasks.",
    )
    st.caption(f"Recommended, the best on the validation split: {words}.")


def _take(suggestion: Recipe) -> None:
    """Let the method's controls stand at a recipe's parameters."""
    for spec in suggestion.declaration.specs:
        value = suggestion.parameters[spec.name]
        if spec.kind != "rank":
            kept.move(spec.name, str(value))
        elif isinstance(value, int):
            kept.move(f"{spec.name}_unit", RANK_UNITS["count"])
            kept.move(f"{spec.name}_count", str(value))
        else:
            kept.move(f"{spec.name}_unit", RANK_UNITS["share"])
            kept.move(spec.name, share_words(value))

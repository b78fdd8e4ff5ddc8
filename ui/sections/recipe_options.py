"""A recipe besides method and parameters, as widgets: origin, weights, overrides, chain."""

from __future__ import annotations

from typing import Any

import yaml

from merge_core.errors import RecipeError
from merge_core.methods import postprocessors
from merge_core.methods.declaration import Method
from merge_core.task_vectors import Origin
from merge_core.yaml_text import load_yaml
from ui.controls import choice, multiselect
from ui.controls import text as text_control
from ui.server.resources import View
from ui.widgets import controls

ORIGINS: dict[Origin, str] = {"base": "The base", "average": "The average"}


def recipe_options(view: View, method: Method) -> dict[str, Any]:
    """Widgets for what the method can take of it; what is left at rest is left out.

    Args:
        view: the suite and tasks.
        method: the chosen method.

    Returns:
        Fields of a recipe.

    Raises:
        RecipeError: a text that cannot be read.
    """
    found: dict[str, Any] = {}
    origins = [o for o in method.origins if o != "base" or view.suite.base is not None]
    if len(origins) > 1:
        origin = choice(
            "Task vectors about",
            {origin: ORIGINS[origin] for origin in origins},
            "origin",
            "The point that the experts' differences are taken from, and added to.",
        )
        if origin != method.origins[0]:
            found["origin"] = origin
    if method.weighted:
        text = text_control(
            "Per-task weights",
            "weights",
            placeholder=", ".join(f"{task}=1" for task in view.tasks[:2]),
            help="A factor for each task's vector; tasks that are not named count 1.",
        )
        if weights := parse_weights(text):
            found["weights"] = weights
    text = text_control(
        "Other values for some layers",
        "overrides",
        placeholder="blocks.0.*: {rank: 0.2}" if "rank" in method.parameters.model_fields else "",
        help="Pattern and parameters, such as `blocks.0.*: {scale: 2}`; several are separated by "
        "semicolons, and the last one that matches a layer counts.",
        disabled=not method.specs,
    )
    if method.specs and (overrides := parse_overrides(text)):
        found["overrides"] = overrides
    known = postprocessors()
    chosen = multiselect(
        "Then",
        known,
        "then",
        words=lambda name: known[name].title,
        help="Post-processors of the merged update of each weight matrix, in this order.",
    )
    if chosen:
        found["then"] = [
            {"method": name, "parameters": controls(known[name], f"{name}_")} for name in chosen
        ]
    return found


def parse_weights(text: str) -> dict[str, float]:
    """``digits=2, dots=0.5`` as a mapping.

    Raises:
        RecipeError: not of that form.
    """
    weights = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        task, sign, value = part.partition("=")
        try:
            weights[task.strip()] = float(value)
        except ValueError:
            sign = ""
        if not sign:
            raise RecipeError(
                f"Per-task weights: {part!r} is not of the form task=number, such as digits=2."
            )
    return weights


def parse_overrides(text: str) -> list[dict[str, Any]]:
    """``blocks.0.*: {rank: 0.2}; head*: {scale: 0}`` as a recipe's overrides.

    Raises:
        RecipeError: not of that form.
    """
    overrides = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        match, _, values = part.partition(":")
        try:
            parameters = load_yaml(values)
        except yaml.YAMLError:
            parameters = None
        if not isinstance(parameters, dict) or not parameters:
            raise RecipeError(
                f"Other values: {part!r} is not of the form pattern: {{parameter: value}}, such "
                "as blocks.0.*: {scale: 2}."
            )
        overrides.append({"match": match.strip(), "parameters": parameters})
    return overrides

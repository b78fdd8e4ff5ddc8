"""Merge methods, one small file each; a file in this folder that defines METHOD is registered.

A method is declared once: formula, source, parameters with range, default and help. The command
line, the check of recipes, the widgets of the pages and the documentation derive from that.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from merge_core.errors import RecipeError
from merge_core.methods.declaration import Method


@cache
def methods() -> dict[str, Method]:
    """All registered methods by name, plain ones first (in the order of their `place`)."""
    found: list[Method] = []
    for module in pkgutil.iter_modules(__path__):
        method = getattr(importlib.import_module(f"{__name__}.{module.name}"), "METHOD", None)
        if isinstance(method, Method):
            found.append(method)
    return {method.name: method for method in sorted(found, key=lambda m: (m.place, m.name))}


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        RecipeError: there is none.
    """
    known = methods()
    if name not in known:
        raise RecipeError(f"There is no method {name!r}. Known: {', '.join(known)}.")
    return known[name]

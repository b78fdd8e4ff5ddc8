"""Merge methods, one small file each; what a file in this folder declares is registered.

A method is declared once: formula, source, parameters with range, default and help. The command
line, the check of recipes, the widgets of the pages and the documentation derive from that.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from merge_core.errors import RecipeError
from merge_core.methods.declaration import Method, Postprocessor


def _find_declarations() -> list[Method | Postprocessor]:
    """Everything that the files of this folder declare: METHOD, METHODS or POSTPROCESSOR."""
    found: list[Method | Postprocessor] = []
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        single = [getattr(module, name, None) for name in ("METHOD", "POSTPROCESSOR")]
        found += [entry for entry in single if entry is not None]
        found += getattr(module, "METHODS", ())
    return sorted(found, key=lambda entry: (entry.order, entry.name))


@cache
def methods() -> dict[str, Method]:
    """All registered methods by name, plain ones first (in the order of their `place`).

    Example:
        >>> list(methods())[:2], methods()["cart"].title
        (['average', ...], 'CART')
    """
    return {entry.name: entry for entry in _find_declarations() if isinstance(entry, Method)}


@cache
def postprocessors() -> dict[str, Postprocessor]:
    """All registered post-processors of a merged update by name.

    Example:
        >>> sorted(postprocessors())
        ['subspace_boosting', 'svc']
    """
    return {entry.name: entry for entry in _find_declarations() if isinstance(entry, Postprocessor)}


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        RecipeError: there is none.

    Example:
        >>> get_method("ties").source
        '...arXiv:2306.01708...'
    """
    known = methods()
    if name not in known:
        raise RecipeError(f"There is no method {name!r}. Known: {', '.join(known)}.")
    return known[name]


def get_postprocessor(name: str) -> Postprocessor:
    """The post-processor of that name.

    Raises:
        RecipeError: there is none.

    Example:
        >>> [spec.name for spec in get_postprocessor("svc").specs]
        ['floor']
    """
    known = postprocessors()
    if name not in known:
        raise RecipeError(f"There is no post-processor {name!r}. Known: {', '.join(known)}.")
    return known[name]

"""What a merge is: checkpoints, suites, task vectors, factors, methods, recipes, streaming.

The four names that a merge from Python takes are here, imported when they are first asked for::

    from merge_core import FactorStore, MergeSession, load_suite, make_recipe
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from merge_core.factors.store import FactorStore
    from merge_core.merging.engine import MergeSession
    from merge_core.merging.recipe import make_recipe
    from merge_core.suites.suite import load_suite

__all__ = ["FactorStore", "MergeSession", "load_suite", "make_recipe"]

_HOMES = {
    "FactorStore": "merge_core.factors.store",
    "MergeSession": "merge_core.merging.engine",
    "load_suite": "merge_core.suites.suite",
    "make_recipe": "merge_core.merging.recipe",
}


def __getattr__(name: str) -> object:
    """One of the names above, imported when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

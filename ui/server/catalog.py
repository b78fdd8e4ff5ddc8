"""Which suites and pools the dashboard offers: bundled ones, and those named at its start.

A link names a suite or a pool by its name, never by a path, so that no link can open a file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from merge_core.errors import MergeScopeError
from merge_core.suites.bundled import bundled_records, bundled_suites
from merge_core.suites.pool import bundled_pools


@dataclass(frozen=True)
class Catalog:
    """What of one kind is on offer.

    Attributes:
        variable: the environment variable that carries the paths to the server.
        usual_name: how the describing file is usually called.
        bundled: gives name to path of what comes with MergeScope.
    """

    variable: str
    usual_name: str
    bundled: Callable[[], dict[str, Path]]

    def environment(self, paths: Sequence[Path]) -> dict[str, str]:
        """The variable that makes the dashboard offer these files too.

        Raises:
            MergeScopeError: a path holds the character that separates paths.
        """
        for path in paths:
            if os.pathsep in str(path):
                raise MergeScopeError(
                    f"{path}: the path holds {os.pathsep!r}. Rename or move the folder."
                )
        return {self.variable: os.pathsep.join(str(path) for path in paths)}

    def opened(self) -> str | None:
        """The name of the first one that was named at the start, if any was."""
        named = [text for text in os.environ.get(self.variable, "").split(os.pathsep) if text]
        if not named:
            return None
        return next((n for n, path in self.list_offered().items() if path == Path(named[0])), None)

    def list_offered(self) -> dict[str, Path]:
        """Name to path; the bundled ones first."""
        found = self.bundled()
        known = set(found.values())
        for text in filter(None, os.environ.get(self.variable, "").split(os.pathsep)):
            path = Path(text)
            if path in known:
                continue
            stem = path.parent.name if path.name == self.usual_name else path.stem
            name, number = stem, 2
            while name in found:
                name, number = f"{stem}-{number}", number + 1
            found[name] = path
        return found


SUITES = Catalog(
    "MERGESCOPE_SUITES", "suite.yaml", lambda: {**bundled_suites(), **bundled_records()}
)
POOLS = Catalog("MERGESCOPE_POOLS", "pool.yaml", bundled_pools)

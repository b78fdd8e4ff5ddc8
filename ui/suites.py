"""Which suites the dashboard offers: the bundled one, and those named when it was started.

A link names a suite by its name, never by a path, so that no link can open a file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from merge_core.errors import SuiteError
from merge_core.suite import BUNDLED, BUNDLED_PATH

VARIABLE = "MERGESCOPE_SUITES"


def environment_for(paths: Sequence[Path]) -> dict[str, str]:
    """The environment in which the dashboard offers these suite files too.

    Raises:
        SuiteError: a path holds the character that separates paths.
    """
    for path in paths:
        if os.pathsep in str(path):
            raise SuiteError(f"{path}: the path holds {os.pathsep!r}. Rename or move the folder.")
    return {**os.environ, VARIABLE: os.pathsep.join(str(path) for path in paths)}


def offered() -> dict[str, Path]:
    """Name to path of each suite on offer; the bundled one first."""
    suites = {BUNDLED: BUNDLED_PATH}
    for text in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        path = Path(text)
        if path == BUNDLED_PATH:
            continue
        stem = path.parent.name if path.name == "suite.yaml" else path.stem
        name, number = stem, 2
        while name in suites:
            name, number = f"{stem}-{number}", number + 1
        suites[name] = path
    return suites

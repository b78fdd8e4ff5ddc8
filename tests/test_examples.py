"""The examples in docstrings run, and what a user calls has one."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch

import merge_core

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("merge_core", "analysis")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

# Files of which every public function has an example: the mathematics, and what asks for a merge.
WHOLE = (
    "merge_core.executors.choose",
    "merge_core.factors.decomposition",
    "merge_core.factors.low_rank",
    "merge_core.merging.*",
    "merge_core.methods",
    "merge_core.opening.draft",
    "merge_core.suites.pool",
    "merge_core.suites.suite",
    "analysis.accuracy",
    "analysis.averaging.*",
    "analysis.comparison.run",
    "analysis.comparison.tuning",
    "analysis.data_sources",
    "analysis.magnitude.*",
    "analysis.patterns.*",
    "analysis.rank_selection.select",
    "analysis.rank_selection.space",
    "analysis.spectral.*",
)
# Of the other files: every function that the command line and the dashboard take.
USERS = ("mergescope", "pages", "ui")
# One example a file is enough: their functions are alike.
ALIKE = "analysis.figures.*"
# What only asks the hub, or fetches.
NETWORK = ("merge_core.hub.*", "merge_core.opening.download.*", "analysis.data_sources.download")


class Docstring(NamedTuple):
    """A docstring: whose it is, what it says, and where."""

    name: str
    text: str
    line: int


def files_of(part: str) -> Iterator[tuple[str, Path]]:
    """Name and file of every module of a package, itself included."""
    folder = ROOT / part
    yield part, folder / "__init__.py"
    for info in pkgutil.walk_packages([str(folder)], f"{part}."):
        path = ROOT.joinpath(*info.name.split("."))
        yield info.name, path / "__init__.py" if info.ispkg else path.with_suffix(".py")


FILES = dict(entry for part in PARTS for entry in files_of(part))


def docstrings(source: str) -> Iterator[Docstring]:
    """The docstrings of a file's module, classes, methods and functions, however decorated."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield Docstring(getattr(node, "name", "module"), text, node.body[0].lineno)


def with_examples(source: str) -> list[Docstring]:
    return [each for each in docstrings(source) if ">>>" in each.text]


def failures(source: str, names: Mapping[str, object], what: str) -> list[str]:
    """What the examples of a file give besides what they say; each begins with the same names."""
    said: list[str] = []
    for each in with_examples(source):
        test = doctest.DocTestParser().get_doctest(
            each.text, dict(names), f"{what}.{each.name}", what, each.line
        )
        doctest.DocTestRunner(verbose=False, optionflags=FLAGS).run(test, out=said.append)
    return said


def functions_of(source: str) -> set[str]:
    """The public functions of a file."""
    nodes = ast.parse(source).body
    return {n.name for n in nodes if isinstance(n, ast.FunctionDef) and n.name[0] != "_"}


def taken_by(source: str) -> set[str]:
    """What a file takes from elsewhere: ``module.name``, imported so or written out later."""
    tree = ast.parse(source)
    taken: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            taken |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    written = {
        f"{taken[node.value.id]}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in taken
    }
    return {*taken.values(), *written}


def lacking(sources: Mapping[str, str], used: set[str]) -> list[str]:
    """Public functions that users call and that have no example."""
    found = []
    for module, source in sources.items():
        own = functions_of(source)
        shown = {each.name for each in with_examples(source)}
        if fnmatchcase(module, ALIKE):
            found += [] if not own or own & shown else [f"{module}: any function"]
            continue
        whole = any(fnmatchcase(module, pattern) for pattern in WHOLE)
        wanted = {f"{module}.{name}" for name in own - shown}
        found += [
            name
            for name in sorted(wanted if whole else wanted & used)
            if not any(fnmatchcase(name, pattern) for pattern in NETWORK)
        ]
    return found


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {module: file.read_text(encoding="utf-8") for module, file in FILES.items()}


@pytest.fixture(scope="module")
def used() -> set[str]:
    files = (file for part in USERS for file in (ROOT / part).rglob("*.py"))
    return {name for file in files for name in taken_by(file.read_text(encoding="utf-8"))}


@pytest.mark.parametrize(
    "module", [module for module, file in FILES.items() if ">>>" in file.read_text("utf-8")]
)
def test_the_examples_give_what_they_say(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {name: getattr(merge_core, name) for name in merge_core.__all__}
    names = {"torch": torch, "np": np, "pd": pd, **given, **vars(importlib.import_module(module))}
    said = failures(FILES[module].read_text(encoding="utf-8"), names, module)
    assert not said, "".join(said)


def test_what_users_call_has_an_example(sources: dict[str, str], used: set[str]) -> None:
    assert lacking(sources, used) == []


def test_every_file_that_is_named_is_there() -> None:
    for pattern in (*WHOLE, ALIKE):
        assert any(fnmatchcase(module, pattern) for module in FILES), pattern


EXAMPLE = '''
@decorated
def f(x):
    """Twice.

    Example:
        >>> f(2)
        4
    """
'''


def test_a_wrong_example_would_be_found() -> None:
    assert failures(EXAMPLE, {"f": lambda x: 2 * x}, "m") == []
    assert "Got:\n    6" in "".join(failures(EXAMPLE, {"f": lambda x: 3 * x}, "m"))


def test_a_function_without_example_would_be_found() -> None:
    bare = "def g(x): ...\ndef _h(x): ..."
    sources = {"analysis.accuracy": bare, "merge_core.files": bare, "analysis.figures.a": bare}
    everywhere = ["analysis.accuracy.g", "analysis.figures.a: any function"]
    assert lacking(sources, set()) == everywhere
    used = taken_by("from merge_core import files\nfrom merge_core.hub.a import g\nfiles.g(1)")
    assert lacking(sources | {"merge_core.hub.a": bare}, used) == [
        everywhere[0], "merge_core.files.g", everywhere[1],
    ]  # fmt: skip
    assert lacking(dict.fromkeys(sources, bare + EXAMPLE), set()) == everywhere[:1]

"""The house's plan: layers, no circle of imports between files, folders that can be surveyed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What each part of the product may import besides itself.
BELOW: dict[str, set[str]] = {
    "merge_core": set(),
    "analysis": {"merge_core"},
    "data": {"merge_core", "analysis"},
    "ui": {"merge_core", "analysis"},
    "pages": {"merge_core", "analysis", "ui"},
    "app": {"ui"},
    "mergescope": {"merge_core", "analysis", "data", "ui"},
}
# Where a library that draws may be imported.
DRAWN_IN = {
    "streamlit": ("ui", "pages", "app"),
    "plotly": ("analysis.figures", "ui", "pages"),
}
MOST_FILES = 15
# One file a merge method: that is the register, and their number grows with the literature.
MAY_HOLD_MORE = {"merge_core/methods"}

IMPORT_ALL = """
    import importlib, pkgutil, sys

    for name in sys.argv[2].split(","):
        sys.modules[name] = None  # importing it now raises ImportError
    package = importlib.import_module(sys.argv[1])
    names = [sys.argv[1]]
    for module in pkgutil.walk_packages(package.__path__, sys.argv[1] + "."):
        importlib.import_module(module.name)
        names.append(module.name)
    print(len(names))
"""


def product_files() -> Iterator[Path]:
    """Every Python file of the product."""
    for part in BELOW:
        yield from [ROOT / f"{part}.py"] if part == "app" else sorted((ROOT / part).rglob("*.py"))


def module_of(file: Path) -> str:
    """The name by which a file of the product is imported."""
    names = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imports(source: str) -> Iterator[tuple[str, str]]:
    """Module and name of all that a file imports: at its top, in functions, for type checkers.

    The name is empty in ``import module``.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None and node.level == 0, "no relative imports"  # noqa: PT018
            yield from ((node.module, alias.name) for alias in node.names)


def graph_of(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Module to the modules among `sources` that it takes something from."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        taken = {
            f"{of}.{name}" if f"{of}.{name}" in sources else of for of, name in imports(source)
        }
        graph[module] = (taken & sources.keys()) - {module}
    return graph


def circle(graph: Mapping[str, Collection[str]]) -> list[str]:
    """Files that import each other in a circle, the first one found; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def crossings(graph: Mapping[str, Collection[str]]) -> list[str]:
    """Imports from a layer that stands above, or beside."""

    def layer(module: str) -> str:
        return module.partition(".")[0]

    return sorted(
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if layer(other) not in BELOW[layer(module)] | {layer(module)}
    )


def drawing(sources: Mapping[str, str]) -> list[str]:
    """Imports of a library that draws by files that are not to know it."""
    return sorted(
        f"{module} imports {library}"
        for module, source in sources.items()
        for library, places in DRAWN_IN.items()
        if library in {of.partition(".")[0] for of, _ in imports(source)}
        and not any(f"{module}.".startswith(f"{place}.") for place in places)
    )


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {module_of(file): file.read_text(encoding="utf-8") for file in product_files()}


def test_no_files_import_each_other_in_a_circle(sources: dict[str, str]) -> None:
    assert circle(graph_of(sources)) == []


def test_each_layer_imports_only_what_is_below(sources: dict[str, str]) -> None:
    assert crossings(graph_of(sources)) == []


def test_what_draws_stays_above(sources: dict[str, str]) -> None:
    assert drawing(sources) == []


def test_no_folder_holds_more_files_than_can_be_surveyed() -> None:
    files = Counter(file.parent.relative_to(ROOT).as_posix() for file in product_files())
    assert {
        folder: count
        for folder, count in files.items()
        if count > MOST_FILES and folder not in MAY_HOLD_MORE
    } == {}
    assert all(files[folder] > MOST_FILES for folder in MAY_HOLD_MORE)


@pytest.mark.parametrize(
    "line",
    [
        "from ui.a import f",
        "import ui.a",
        "from ui import a",
        "def g():\n    from ui.a import f",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ui.a import f",
    ],
)
def test_a_circle_would_be_found(line: str) -> None:
    sources = {"ui": "", "ui.a": "from ui.b import g", "ui.b": "import ui.c", "ui.c": line}
    assert set(circle(graph_of(sources))) == {"ui.a", "ui.b", "ui.c"}
    assert circle(graph_of({**sources, "ui.c": ""})) == []


def test_a_layer_that_looks_up_would_be_found() -> None:
    sources = {"merge_core.a": "from analysis.b import f", "analysis.b": "import merge_core.a"}
    assert crossings(graph_of(sources)) == ["merge_core.a imports analysis.b"]


def test_a_figure_in_the_wrong_place_would_be_found() -> None:
    sources = {
        "merge_core.a": "import plotly.graph_objects as go",
        "analysis.b": "def f():\n    from streamlit import cache_data",
        "analysis.figures.c": "import plotly.express",
        "ui.d": "import streamlit as st",
    }
    assert drawing(sources) == ["analysis.b imports streamlit", "merge_core.a imports plotly"]


def import_all(package: str, *blocked: str) -> subprocess.CompletedProcess[str]:
    """Import every module of a package in a fresh interpreter that lacks some others."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(IMPORT_ALL), package, ",".join(blocked)],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=120,
    )  # fmt: skip


def test_the_core_needs_neither_pages_nor_tables_nor_models() -> None:
    done = import_all(
        "merge_core", "streamlit", "plotly", "pandas", "timm", "matplotlib", "sklearn", "ray",
        "analysis", "ui", "pages", "data", "mergescope",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    files = [p for p in (ROOT / "merge_core").rglob("*.py") if p.name != "__main__.py"]
    assert int(done.stdout) == len(files)


def test_the_analysis_needs_no_page() -> None:
    done = import_all("analysis", "streamlit", "ui", "pages")
    assert done.returncode == 0, done.stderr


def test_the_block_itself_works() -> None:
    done = import_all("merge_core", "torch")
    assert done.returncode != 0
    assert "import of torch halted" in done.stderr


def test_the_names_that_users_take_are_imported_when_asked_for() -> None:
    code = """
        import sys, merge_core
        assert "torch" not in sys.modules
        for name in merge_core.__all__:
            assert getattr(merge_core, name).__name__ == name
        assert not hasattr(merge_core, "load_suit")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


KEPT_WIDGETS = {
    "selectbox", "multiselect", "pills", "segmented_control", "radio", "slider", "select_slider",
    "number_input", "text_input", "text_area", "toggle", "checkbox", "tabs", "date_input",
    "time_input", "datetime_input", "color_picker", "feedback", "chat_input",
}  # fmt: skip
# What must be confirmed each time anew.
NOT_KEPT = {("pages.open_checkpoints", "checkbox")}


def unkept(module: str, source: str) -> list[str]:
    """Streamlit's widgets that a file draws itself, whose values nothing keeps."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    named = [call.func.attr for call in calls if isinstance(call.func, ast.Attribute)]
    drawn = [name for name in named if name in KEPT_WIDGETS and (module, name) not in NOT_KEPT]
    bound = [word.arg for call in calls for word in call.keywords if word.arg == "bind"]
    return [f"{module} draws {name}" for name in drawn + bound]


def test_every_control_is_drawn_by_the_one_mechanism_that_keeps_it() -> None:
    files = [
        file for file in product_files() if module_of(file).partition(".")[0] in ("ui", "pages")
    ]
    own = {module_of(file): file.read_text() for file in files}
    drawing_them = own.pop("ui.controls")
    assert [line for module, source in own.items() for line in unkept(module, source)] == []
    assert len(unkept("ui.controls", drawing_them)) >= 8


# Where a device may be named: the one module, and a table of the modules that pickled files name.
NAMES_DEVICES = {"merge_core.devices", "merge_core.checkpoints.pickled.tensors"}
ASKED_OF_TORCH = {"cuda", "mps", "is_cuda", "is_mps", "xpu"}


def device_names(source: str) -> list[str]:
    """Where a file names a kind of accelerator: in a string, or by asking torch for it."""
    tree = ast.parse(source)
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, owners) and node.body and isinstance(node.body[0], ast.Expr)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ASKED_OF_TORCH:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            named = re.search(r"\b(cuda|mps)\b", node.value.lower())
            found += [node.value] if named and id(node) not in prose else []
    return found


def test_one_module_alone_knows_devices(sources: dict[str, str]) -> None:
    benchmarks = {
        module_of(file): file.read_text() for file in sorted((ROOT / "benchmarks").rglob("*.py"))
    }
    everything = {**sources, **benchmarks}
    found = {module: device_names(source) for module, source in everything.items()}
    assert {m: names for m, names in found.items() if names and m not in NAMES_DEVICES} == {}
    assert found["merge_core.devices"]


@pytest.mark.parametrize(
    "line",
    [
        "place = 'cuda:1'", "there = torch.cuda.is_available()", "B = B.cuda()",
        "fast = A.is_cuda", "x = torch.backends.mps", "help = 'cpu or CUDA'",
    ],
)  # fmt: skip
def test_a_device_named_elsewhere_would_be_found(line: str) -> None:
    assert device_names(line)
    assert device_names(f"'''About {line.replace(chr(39), '')} in prose.'''") == []

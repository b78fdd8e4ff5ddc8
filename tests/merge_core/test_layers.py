"""Data flows one way: the core knows no analysis and no page, the analysis knows no page."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

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

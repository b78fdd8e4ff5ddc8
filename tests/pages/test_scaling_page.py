"""The page How does it scale? on two tiny suites of the same tasks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from tests.evaluable import TASKS, write_evaluable
from tests.pages.test_pages import assert_healthy, figures, finish, open_page

PAGE = "how_does_it_scale"


def titles(at: AppTest) -> list[str]:
    return [figure["layout"]["title"]["text"] for figure in figures(at)]


def test_tasks_and_sizes_are_measured_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write_evaluable(tmp_path / name, seed=i) for i, name in enumerate(("mine", "other"))]
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MERGESCOPE_SUITES", ":".join(map(str, paths)))
    at = assert_healthy(open_page(PAGE, suite="mine"))
    assert titles(at) == []
    first, second = (button for button in at.button if button.label == "Merge and evaluate")
    at = assert_healthy(finish(first.click().run()))
    (figure,) = figures(at)
    lines = [trace for trace in figure["data"] if trace.get("mode") == "lines+markers"]
    assert {trace["name"] for trace in lines} >= {"Weight average", "CART", "TSV-M"}
    assert any("With 2 tasks" in text.value for text in at.markdown)
    (second,) = (button for button in at.button if button.label == "Merge and evaluate")
    at = assert_healthy(finish(second.click().run()))
    assert len(titles(at)) == 2
    # Another session finds what was measured.
    assert len(titles(assert_healthy(open_page(PAGE, suite="mine", shown="Accuracy")))) == 2


def test_suites_on_the_same_data_stand_beside_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write_evaluable(tmp_path / name, seed=i) for i, name in enumerate(("a", "b", "c"))]
    for task in TASKS:  # c has the inputs of a
        shutil.copy(tmp_path / f"a/inputs/{task}.npz", tmp_path / f"c/inputs/{task}.npz")
    monkeypatch.setenv("MERGESCOPE_SUITES", ":".join(map(str, paths)))
    for name, beside in (("a", ["c"]), ("b", ["a", "c"])):
        at = assert_healthy(open_page(PAGE, suite=name))
        assert set(at.multiselect(key="beside").options) > set("abc") - {name}
        assert [n for n in at.multiselect(key="beside").value if n in "abc"] == beside


def test_a_single_task_is_no_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_evaluable(tmp_path / "mine")
    monkeypatch.setenv("MERGESCOPE_SUITES", str(path))
    at = assert_healthy(open_page(PAGE, suite="mine", tasks=["digits"]))
    assert any("at least two tasks" in info.value for info in at.info)

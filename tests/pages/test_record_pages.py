"""Pages show a record as they show the suite, without its weights; no text in it is Markdown."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pyarrow as pa
import pytest
from streamlit.testing.v1 import AppTest

from analysis.frames.record import load_record
from analysis.frames.recording import record_suite, write_record
from analysis.frames.store import FrameStore
from analysis.frames.tables import read_table
from analysis.frames.tables import write_table as table_bytes
from merge_core.errors import SuiteError
from merge_core.factors.store import FactorStore
from merge_core.suites.suite import load_suite
from tests.evaluable import write_evaluable
from tests.pages.test_foreign_texts import HOSTILE, assert_no_markdown
from tests.pages.test_pages import assert_healthy, figures, finish, metrics, open_page
from ui.sections.opening import record as open_record
from ui.shell import PAGES

SHOWN = ("overview", "spectra", "interference", "rank_and_scale", "merge_lab", "compare")


@cache
def recorded(only: tuple[str, ...] | None = None) -> bytes:
    """A record of a suite that is no longer there."""
    folder = Path(mkdtemp())
    suite = load_suite(write_evaluable(folder / "suite"))
    stores = FrameStore(folder / "frames"), FactorStore(folder / "f")
    data = record_suite(suite, "mine", *stores, only=only)
    shutil.rmtree(folder)
    return data


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    def make(data: bytes | None = None) -> Path:
        path = tmp_path / "mine.mergescope"
        write_record(path, recorded() if data is None else data)
        monkeypatch.setenv("MERGESCOPE_SUITES", str(path))
        monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
        return path

    return make


def infos(at: AppTest) -> str:
    return " ".join(info.value for info in at.info)


def open_record_at(name: str, **query: Any) -> AppTest:
    if name == "compare":
        query.setdefault("methods", ["Weight average", "Task Arithmetic", "CART"])
    return finish(open_page(name, suite="mine", **query))


@pytest.mark.parametrize("name", SHOWN)
def test_each_page_draws_a_record(name: str, offer: Callable[..., Path], tmp_path: Path) -> None:
    offer()
    at = assert_healthy(open_record_at(name))
    assert figures(at), name
    assert "does not hold" not in infos(at)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))  # nothing was decomposed


@pytest.mark.parametrize("name", [page.name for page in PAGES if page.subject == "suite"])
def test_every_page_of_suites_opens_on_a_record(name: str, offer: Callable[..., Path]) -> None:
    offer()
    at = assert_healthy(open_record_at(name))
    assert figures(at) or "This record does not hold" in infos(at)


def test_the_numbers_are_those_of_the_suite(offer: Callable[..., Path], tmp_path: Path) -> None:
    path = offer()
    mine = metrics(open_record_at("merge_lab"))
    path.unlink()
    write_evaluable(path.parent / "mine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGESCOPE_SUITES", str(path.parent / "mine/suite.yaml"))
        assert metrics(finish(open_page("merge_lab", suite="mine"))) == mine


@pytest.mark.parametrize("layer", [True, False])
def test_ranks_and_sides_of_the_slider_are_recorded(
    offer: Callable[..., Path], layer: bool
) -> None:
    offer()
    scope = "Chosen layer" if layer else "Whole model"
    asked = {"scope": scope, "share": "16 %", "side": "Column (outputs)", "more": "true"}
    at = assert_healthy(open_record_at("interference", **asked))
    assert "does not hold" not in infos(at)


def test_a_setting_that_is_not_recorded_is_said_and_the_nearest_offered(
    offer: Callable[..., Path],
) -> None:
    offer()
    at = assert_healthy(open_record_at("merge_lab", method="CART", rank="33 %", scale="1.35"))
    assert "does not hold the accuracy of this setting" in infos(at)
    labels = [link.proto.label for link in at.get("page_link")]
    assert "Show the nearest setting that is recorded" in labels
    at = assert_healthy(open_record_at("interference", share="8.5 %"))
    assert "nearest that it holds is share 0.08" in infos(at)


def test_other_tasks_than_all_are_said_to_be_missing(offer: Callable[..., Path]) -> None:
    offer()
    for name in ("spectra", "interference", "overview", "rank_and_scale"):
        at = assert_healthy(open_record_at(name, tasks=["digits", "shapes"]))
        assert "Choose all tasks" in infos(at), name


def test_methods_that_were_not_compared_are_said_to_be_missing(
    offer: Callable[..., Path],
) -> None:
    offer()
    at = assert_healthy(open_record_at("compare", budget="Best of 16"))
    assert "does not hold this comparison" in infos(at)


def test_a_record_compares_the_methods_that_it_holds_and_names_the_others(
    offer: Callable[..., Path],
) -> None:
    offer(recorded(("average", "task_arithmetic", "cart")))
    at = assert_healthy(finish(open_page("compare", suite="mine")))
    (chosen,) = (each for each in at.multiselect if each.label == "Methods")
    assert sorted(chosen.value) == ["average", "cart", "task_arithmetic"]
    assert figures(at)
    assert not infos(at)
    at = assert_healthy(open_record_at("compare", methods=["CART", "Weight average", "TIES"]))
    assert "does not hold the comparison of TIES" in infos(at)
    assert figures(at)


def test_a_damaged_record_is_told_on_the_page(offer: Callable[..., Path]) -> None:
    path = offer()
    path.write_bytes(path.read_bytes()[:5000])
    at = open_page("spectra", suite="mine")
    assert not at.exception
    assert "is not a record that can be opened" in " ".join(e.value for e in at.error)


def with_hostile_texts(data: bytes) -> bytes:
    """The record with each text that a page could show made one that tries to be Markdown."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w") as new:
        for name in old.namelist():
            part = old.read(name)
            if name == "card.json":
                card = json.loads(part)
                card |= {"name": HOSTILE[:200], "description": HOSTILE}
                for task in card["tasks"].values():
                    task["title"] = HOSTILE
                part = json.dumps(card).encode()
            elif name == "index.json":
                index = json.loads(part)
                for entry in index["entries"]:
                    if "why" in entry.get("values", {}):
                        entry["values"]["why"] = HOSTILE
                part = json.dumps(index).encode()
            else:
                part = table_bytes(_forge(read_table(part)))
            new.writestr(name, part, zipfile.ZIP_DEFLATED)
    return stream.getvalue()


def _forge(table: pa.Table) -> pa.Table:
    for place, column in enumerate(table.schema.names):
        if column in ("title", "why", "source", "at_edge", "setting", "needs", "rule", "kind"):
            table = table.set_column(place, column, pa.array([HOSTILE] * len(table), pa.string()))
    return table


def test_an_uploaded_record_is_kept_in_its_session_if_it_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_record.session_files, "folder", lambda: tmp_path)
    path = open_record._keep("../../mine (1).mergescope", recorded())
    assert path.parent == tmp_path / "records"
    assert load_record(path).suite.tasks == ("digits", "shapes", "lines")
    assert open_record._keep("../../mine (1).mergescope", recorded()) != path
    for name, data in (("bad.mergescope", b"x"), ("long.mergescope", bytes(65_000_000))):
        with pytest.raises(SuiteError, match="mergescope'") as caught:
            open_record._keep(name, data)
        assert str(tmp_path) not in str(caught.value)
    assert len(list((tmp_path / "records").iterdir())) == 2


@pytest.mark.parametrize("name", SHOWN)
def test_no_text_of_a_record_is_markdown(name: str, offer: Callable[..., Path]) -> None:
    offer(with_hostile_texts(recorded()))
    shown = ("Proxies", "Layers") if name == "rank_and_scale" else ("",)
    for tab in shown:
        at = open_record_at(name, **({"show": tab} if tab else {}))
        assert_no_markdown(at)


def test_a_record_is_offered_by_the_page_that_opens_models(
    offer: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = offer()
    monkeypatch.delenv("MERGESCOPE_SUITES")
    monkeypatch.setenv("MERGESCOPE_ROOTS", str(path.parent))
    at = open_page("open_checkpoints", **{"from": "Record"})
    at = assert_healthy(at.selectbox[0].set_value(f"{path.parent.name}/mine.mergescope").run())
    button = next(b for b in at.button if b.label == "Open this record")
    assert_healthy(button.click().run())

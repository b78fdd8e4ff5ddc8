"""The page "Rank and scale", on a tiny suite: it shows what the library finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import numpy as np
import pytest
import streamlit as st
import yaml
from streamlit.testing.v1 import AppTest

from analysis.evaluation.evaluator import Evaluator
from analysis.frames.from_outputs import OutputFrames
from analysis.frames.store import FrameStore
from analysis.outputs.prediction_store import PredictionStore
from analysis.rank_selection import space as spaces
from analysis.rank_selection.rule import Mode
from analysis.rank_selection.select import (
    Selection,
    SelectionOptions,
    select_rank,
    task_curves,
)
from analysis.rank_selection.space import search_space
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.suites.suite import load_suite
from tests.evaluable import edit_arrays, write_evaluable
from tests.pages.test_pages import array, assert_healthy, figures, finish, metrics, open_page, trace
from ui.sections import rank_settings
from ui.widgets import share_label

Offer = Callable[..., Path]
BUTTON = "Find rank and scale"


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Offer:
    """Write a suite named ``mine`` and offer it; fewer settings than usual, to be quick."""
    monkeypatch.setattr(spaces, "RANKS", (0.07, 0.26, 0.6, 1.0))
    monkeypatch.setattr(spaces, "POINTS", 5)

    def make() -> Path:
        path = write_evaluable(tmp_path / "mine")
        monkeypatch.setenv("MERGESCOPE_SUITES", str(path))
        monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
        return path

    return make


def library(path: Path, mode: Mode, method: str = "cart", **options: Any) -> Selection:
    """The same from Python, with stores of its own."""
    suite = load_suite(path)
    evaluator = Evaluator(suite, PredictionStore(path.parent / "own.sqlite"))
    session = MergeSession(suite, None, FactorStore(path.parent / "own"))
    space = search_space(method, "mine", suite.tasks)
    return select_rank(space, session, evaluator, SelectionOptions(mode, **options))


def find(at: AppTest, label: str = BUTTON) -> AppTest:
    """Press the button, and wait until the job has ended."""
    button = next(button for button in at.button if button.label == label)
    return assert_healthy(finish(button.click().run()))


def figure_titled(at: AppTest, words: str) -> dict[str, Any]:
    """The figure with these words in its title."""
    return next(f for f in figures(at) if words in f["layout"]["title"]["text"])


@pytest.mark.parametrize("mode", ["labels", "inputs", "weights"])
def test_it_shows_what_the_library_finds(offer: Offer, mode: Mode) -> None:
    path = offer()
    words = {"labels": "With labels", "inputs": "Inputs only", "weights": "Weights only"}[mode]
    at = assert_healthy(open_page("rank_and_scale", suite="mine", mode=words))
    assert figure_titled(at, "each rule lose")  # the evidence needs no search
    at = find(at)
    wanted = library(path, mode)
    shown = metrics(at)
    assert shown["Recommended rank"] == share_label(wanted.rank)
    assert shown["Recommended λ"] == f"{wanted.scale:g}"
    assert wanted.accuracy is not None
    assert shown["Validation accuracy"] == f"{wanted.accuracy['accuracy']:.1%}"
    assert wanted.report is not None
    assert shown["Test accuracy"] == f"{wanted.report['accuracy'].mean():.1%}"
    assert wanted.why in [text.value for text in at.markdown]
    title = "does each rule pick" if mode == "weights" else "settings merge best"
    star = trace(figure_titled(at, title), name="recommended")
    assert array(star["x"])[0] == pytest.approx(
        np.interp(np.log(wanted.rank), np.log(wanted.space.ranks), range(4))
    )
    if mode != "weights":
        line = figure_titled(at, "move with the rank")["data"][1]
        score = wanted.curve.sort_values("rank")["expected"]
        factor = 100 if wanted.score in ("accuracy", "agreement", "overlap") else 1
        np.testing.assert_allclose(array(line["y"]), factor * score)
    recipe = yaml.safe_load(wanted.recipe.to_yaml())
    assert recipe["parameters"] == {"rank": wanted.rank, "scale": wanted.scale}
    # What was computed is known from now on, also after the server's caches are gone.
    st.cache_data.clear()
    st.cache_resource.clear()
    again = assert_healthy(open_page("rank_and_scale", suite="mine", mode=words))
    assert not [button for button in again.button if button.label == BUTTON]
    assert metrics(again) == shown


def test_the_full_grid_fills_the_map(offer: Offer) -> None:
    path = offer()
    at = find(open_page("rank_and_scale", suite="mine", search="Full grid"))
    cells = array(trace(figure_titled(at, "settings merge best"), type="heatmap")["z"])
    wanted = library(path, "labels", full_grid=True)
    assert cells.shape == (5, 4)
    assert not np.isnan(cells.astype(float)).any()
    assert cells.max() == pytest.approx(100 * wanted.points["score"].max())
    # At rank 100 % CART is the average, whatever the scale.
    assert np.ptp(cells[:, -1].astype(float)) == pytest.approx(0)


def test_a_setting_can_be_chosen_by_link_and_opened_in_the_lab(offer: Offer) -> None:
    path = offer()
    query = {"suite": "mine", "at_rank": "26 %", "at_scale": "3.2", "search": "Full grid"}
    at = find(open_page("rank_and_scale", **query))
    wanted = library(path, "labels", full_grid=True).points
    row = wanted[np.isclose(wanted["rank"], 0.26) & np.isclose(wanted["scale"], 3.2)].iloc[0]
    text = next(t.value for t in at.markdown if "Chosen: rank 26 %, λ = 3.2" in t.value)
    assert f"accuracy {row['score']:.1%} on 20 inputs a task" in text
    links = [link for link in at.get("page_link") if "merge_lab" in link.proto.page]
    queries = [parse_qs(urlparse("?" + link.proto.query_string).query) for link in links]
    assert any(q["rank"] == ["26 %"] and q["scale"] == ["3.2"] for q in queries)


def test_any_recommended_rank_opens_in_the_lab(offer: Offer) -> None:
    offer()
    at = assert_healthy(
        open_page("merge_lab", suite="mine", method="CART", rank="8.34 %", scale="2.87")
    )
    recipe = yaml.safe_load(next(c.value for c in at.code if "method:" in c.value))
    assert recipe["parameters"] == {"rank": 0.0834, "scale": 2.87}
    strange = assert_healthy(open_page("merge_lab", suite="mine", method="CART", rank="834 %"))
    recipe = yaml.safe_load(next(c.value for c in strange.code if "method:" in c.value))
    assert recipe["parameters"]["rank"] == 0.08


def test_a_click_on_the_map_moves_the_sliders(monkeypatch: pytest.MonkeyPatch) -> None:
    state: dict[str, Any] = {}
    monkeypatch.setattr(rank_settings.st, "session_state", state)
    rank_settings.pick([0.26, 3.2])
    assert state == {"at_rank": 0.26, "at_scale": 3.2}


def test_every_rules_pick_is_a_button_away(offer: Offer) -> None:
    path = offer()
    at = find(open_page("rank_and_scale", suite="mine", show="Proxies"))
    few = figure_titled(at, "rank does each pick")
    at = find(at, "Find every rule's pick")
    wanted = library(path, "labels", every_proxy=True)
    drawn = {
        y: x
        for t in figure_titled(at, "rank does each pick")["data"]
        for x, y in zip(array(t["x"]), t["y"], strict=True)
    }
    expected = wanted.picks.dropna(subset=["rank"]).set_index("title")["rank"].to_dict()
    assert drawn == pytest.approx(expected)
    assert len(drawn) > sum(len(t["y"]) for t in few["data"])


def test_each_tab_draws_what_it_is_called(offer: Offer) -> None:
    path = offer()
    at = find(open_page("rank_and_scale", suite="mine", search="Full grid", show="Tasks"))
    wanted = library(path, "labels", full_grid=True)
    session = MergeSession(load_suite(path), None, FactorStore(path.parent / "own"))
    curves = task_curves(wanted, session, Evaluator(load_suite(path)))
    for task, mine in curves.groupby("task"):
        line = trace(figure_titled(at, "task wants which rank"), name=task)
        np.testing.assert_allclose(array(line["y"]), 100 * mine.sort_values("rank")["accuracy"])
    assert figure_titled(at, "more tasks do")
    at = assert_healthy(
        open_page("rank_and_scale", suite="mine", search="Full grid", show="Evidence")
    )
    assert figure_titled(at, "each rule lose")
    at = assert_healthy(
        open_page("rank_and_scale", suite="mine", search="Full grid", show="Layers")
    )
    marks = figure_titled(at, "directions does each layer keep")["data"][0]
    assert set(marks["y"]) == set(load_suite(path).matrices)
    at = find(at, "Compare with the uniform rank")
    names = [t["name"] for t in figure_titled(at, "help at equal storage")["data"]]
    assert names[0] == "Uniform rank"
    assert len(names) == 4


def test_a_method_without_a_rank(offer: Offer) -> None:
    path = offer()
    at = find(open_page("rank_and_scale", suite="mine", method="Task Arithmetic"))
    wanted = library(path, "labels", method="task_arithmetic")
    shown = metrics(at)
    assert "Recommended rank" not in shown
    assert shown["Recommended λ"] == f"{wanted.scale:g}"
    line = figure_titled(at, "move with the scale")["data"][1]
    assert len(array(line["x"])) == len(wanted.curve)
    assert not [f for f in figures(at) if "settings merge best" in f["layout"]["title"]["text"]]


def test_a_suite_without_data_is_asked_for_its_weights(offer: Offer) -> None:
    path = offer()
    document = yaml.safe_load(path.read_text())
    del document["architecture"]
    path.write_text(yaml.safe_dump(document))
    at = assert_healthy(open_page("rank_and_scale", suite="mine"))
    assert any("analysed and merged but not evaluated" in info.value for info in at.info)
    # No image has to be run: the answer is there at once.
    assert set(metrics(at)) == {"Recommended rank", "Recommended λ"}
    assert not [button for button in at.button if button.label == BUTTON]


def test_a_method_that_weights_say_nothing_about(offer: Offer) -> None:
    offer()
    at = assert_healthy(open_page("rank_and_scale", suite="mine", method="TIES"))
    modes = next(b for b in at.main.get("button_group") if b.key == "mode")
    assert [option.content for option in modes.proto.options] == ["With labels", "Inputs only"]


def test_two_tasks_are_told_that_cart_is_the_average(offer: Offer) -> None:
    offer()
    at = open_page("rank_and_scale", suite="mine", tasks=["digits", "lines"])
    assert any("equals the weight average" in warning.value for warning in at.warning)


def test_images_without_labels_are_enough_for_inputs_only(offer: Offer) -> None:
    folder = offer().parent
    for file in (folder / "inputs").glob("*.npz"):
        edit_arrays(file, val_labels=None, test_labels=None)
    at = find(assert_healthy(open_page("rank_and_scale", suite="mine", mode="Inputs only")))
    shown = metrics(at)
    assert "Recommended rank" in shown
    assert not {"Validation accuracy", "Test accuracy"} & set(shown)
    for page in ("overview", "compare"):
        at = assert_healthy(open_page(page, suite="mine"))
        assert any("have no labels" in info.value for info in at.info)


def test_allocations_stay_among_the_scales_that_a_method_takes(offer: Offer) -> None:
    suite = load_suite(offer())
    session = MergeSession(suite, None, FactorStore())
    space = search_space("cart", "mine", suite.tasks)
    chosen = select_rank(space, session, None, SelectionOptions("weights"))
    edge = replace(chosen, scale=max(space.scales))
    frames = OutputFrames(
        "mine", suite, suite.tasks, FrameStore(), lambda: session, lambda: Evaluator(suite)
    )
    frame = frames.storage(edge)
    assert frame["scale"].max() <= max(space.scales)

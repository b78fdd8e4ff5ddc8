"""Every page through AppTest: what it draws is true, and its controls do what they say."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import streamlit as st
import yaml
from streamlit.components.v2.component_manager import BidiComponentManager
from streamlit.testing.v1 import AppTest

from analysis.figures.spectra import short_name
from merge_core.factors.low_rank import as_matrix
from merge_core.methods import methods
from merge_core.suites.suite import load_suite
from ui.server import resources

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("overview", "spectra", "interference", "rank_and_scale", "merge_lab")
HEADINGS = {
    "overview": "Why does averaging",
    "spectra": "How many directions",
    "interference": "Where do the tasks",
    "rank_and_scale": "Which rank",
    "merge_lab": "What does this merge do",
}


@cache
def installed_components() -> BidiComponentManager:
    """What AppTest else looks for among all installed packages, once for each app."""
    manager = BidiComponentManager()
    manager.discover_and_register_components(start_file_watching=False)
    return manager


def app_at(name: str) -> AppTest:
    """The app at one of its pages, not run yet.

    AppTest, like a fresh server, starts the page's file without the entry: the page itself has
    to bring the shell.
    """
    at = AppTest.from_file(str(ROOT / "app.py"), default_timeout=120)
    at._bidi_component_manager = installed_components()
    return at.switch_page(str(ROOT / "pages" / f"{name}.py"))


def open_page(name: str, **query: str | list[str]) -> AppTest:
    """Run a page as Streamlit does when a link to it is opened."""
    at = app_at(name)
    for key, value in query.items():
        at.query_params[key] = value
    return at.run()


def finish(at: AppTest, seconds: float = 120) -> AppTest:
    """Run the page again, as its own polling does, when no job is under way any more."""
    end = time.monotonic() + seconds
    while any(button.label == "Cancel" for button in at.button):
        assert time.monotonic() < end, "the job did not end"
        # Jobs run one after another: when an empty one has had its turn, the others have ended.
        resources.job_runner()._pool.submit(lambda: None).result(seconds)
        at.run()
    return at


def assert_healthy(at: AppTest) -> AppTest:
    """The page has neither an exception nor an error message."""
    assert not at.exception, at.exception
    assert [error.value for error in at.error] == []
    return at


def figures(at: AppTest) -> list[dict[str, Any]]:
    """The drawn figures as Plotly's own dictionaries."""
    return [json.loads(chart.proto.spec) for chart in at.get("plotly_chart")]


def array(value: Any) -> np.ndarray:
    """A drawn array, from a list or from Plotly's typed encoding."""
    if isinstance(value, dict):
        flat = np.frombuffer(base64.b64decode(value["bdata"]), dtype=value["dtype"])
        shape = value.get("shape")
        return flat.reshape([int(n) for n in str(shape).split(",")]) if shape else flat
    return np.asarray(value)


def trace(figure: dict[str, Any], **wanted: Any) -> dict[str, Any]:
    """The first trace with these properties."""
    return next(t for t in figure["data"] if all(t.get(k) == v for k, v in wanted.items()))


def metrics(at: AppTest) -> dict[str, str]:
    return {metric.label: metric.value for metric in at.metric}


def weights(parameter: str) -> np.ndarray:
    """The parameter of the experts that are shown at first, float64."""
    suite = load_suite("vision")
    tasks = suite.select(["8"])
    return np.stack([suite.expert(t).tensor(parameter).double().numpy() for t in tasks])


@pytest.fixture(scope="module", autouse=True)
def empty_caches() -> Iterator[None]:
    """After the module only: as on a server, all look at one suite, which never changes."""
    yield
    st.cache_data.clear()
    st.cache_resource.clear()


@pytest.mark.parametrize("name", PAGES)
def test_each_page_opens_with_the_shell_around_it(name: str) -> None:
    at = assert_healthy(open_page(name))
    assert at.header[0].value.startswith(HEADINGS[name])
    assert at.sidebar.selectbox(key="suite").value == "vision"
    assert tuple(at.sidebar.get("button_group")[1].value) == load_suite("vision").select(["8"])
    assert figures(at)
    assert any(expander.label == "How to read this" for expander in at.expander)
    assert any(expander.label == "The numbers" for expander in at.expander)


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("tasks", [["digits"], ["digits", "greek"]])
def test_one_task_and_two_tasks_are_defined_everywhere(name: str, tasks: list[str]) -> None:
    assert_healthy(open_page(name, tasks=tasks))


@pytest.mark.parametrize("name", PAGES)
def test_values_that_a_link_cannot_have_fall_back(name: str) -> None:
    at = open_page(name, share="9999", method="nope", layer="nope", tasks="nope", rank="x")
    assert figures(assert_healthy(at))


def test_the_scree_is_the_spectrum_of_the_task_vectors() -> None:
    layer = "blocks.1.mlp.fc1.weight"
    at = assert_healthy(open_page("spectra", layer=layer))
    stacked = weights(layer)
    centred = stacked - stacked.mean(axis=0)
    expected = np.linalg.svd(centred[0], compute_uv=False)
    drawn = figures(at)[0]
    assert drawn["layout"]["yaxis"]["type"] == "log"
    digits = next(t for t in drawn["data"] if t.get("name") == "digits" and t.get("y"))
    shown, places = array(digits["y"]), array(digits["x"]).astype(int)
    strong = expected[places - 1] > 1e-5
    np.testing.assert_allclose(shown[strong], expected[places - 1][strong], rtol=1e-4)


def test_the_map_shows_fused_queries_keys_and_values_apart_when_asked_to() -> None:
    at = assert_healthy(open_page("spectra", fused="Apart", quantity="Norm"))
    drawn = trace(figures(at)[2], type="heatmap")
    rows = list(drawn["y"])
    assert {"0 attention q", "0 attention k", "0 attention v"} <= set(rows)
    assert not any("qkv" in row for row in rows)
    fused = weights("blocks.1.attn.qkv.weight")
    centred = fused - fused.mean(axis=0)
    for place, part in enumerate("qkv"):
        exact = [np.linalg.norm(np.split(matrix, 3)[place]) for matrix in centred]
        shown = array(drawn["z"])[rows.index(f"1 attention {part}")]
        np.testing.assert_allclose(shown, exact, rtol=1e-4)


def test_energy_kept_follows_the_rank() -> None:
    layer = load_suite("vision").matrices[0]
    at = assert_healthy(open_page("spectra", layer=layer, share="16 %"))
    stacked = weights(layer)
    centred = stacked - stacked.mean(axis=0)
    kept = []
    for matrix in centred:
        energy = np.linalg.svd(matrix, compute_uv=False) ** 2
        kept.append(energy[: int(0.16 * len(energy))].sum() / energy.sum())
    assert metrics(at)["Energy kept, centred"] == f"{np.mean(kept):.1%}"


def test_the_interference_map_is_the_definition() -> None:
    layer = "blocks.0.mlp.fc2.weight"
    at = assert_healthy(open_page("interference", layer=layer, share="4 %"))
    stacked = weights(layer)
    centred = stacked - stacked.mean(axis=0)
    k = int(0.04 * min(centred.shape[1:]))
    factors = [np.linalg.svd(matrix, full_matrices=False) for matrix in centred]
    (_, s_a, v_a), (_, s_b, v_b) = factors[0], factors[3]
    s_a, s_b = s_a[:k] / np.linalg.norm(s_a[:k]), s_b[:k] / np.linalg.norm(s_b[:k])
    expected = np.linalg.norm(np.diag(s_a) @ v_a[:k] @ v_b[:k].T @ np.diag(s_b))
    most = np.sqrt(np.linalg.norm(s_a**2) * np.linalg.norm(s_b**2))  # of I_ij: √(I_ii I_jj)
    drawn = array(trace(figures(at)[0], type="heatmap")["z"])
    assert drawn[0, 3] == pytest.approx(expected / most, rel=1e-3)
    assert np.diag(drawn) == pytest.approx(np.ones(len(drawn)))


def test_the_whole_model_is_in_all_figures_that_say_so() -> None:
    query = {"layer": "blocks.0.mlp.fc2.weight", "share": "16 %"}
    one = assert_healthy(open_page("interference", **query))
    whole = assert_healthy(open_page("interference", **query, scope="Whole model"))
    for at, where in ((one, short_name(query["layer"])), (whole, "whole model")):
        titles = [f["layout"]["title"]["text"].replace("<br>", " ") for f in figures(at)]
        others = [title for title in titles if where not in title]
        # What centring does is looked at in every layer, whichever is chosen.
        assert [title.partition(" ")[0] for title in others] == ["Interference", "What"], titles
        alts = [chart.proto.alt for chart in at.get("plotly_chart")]
        assert len(set(alts)) == len(alts)
    maps = [array(trace(figures(at)[0], type="heatmap")["z"]) for at in (one, whole)]
    expected = []
    for name in load_suite("vision").matrices:
        stacked = weights(name)
        k = int(0.16 * min(stacked.shape[1:]))
        factors = [np.linalg.svd(m, full_matrices=False) for m in stacked - stacked.mean(axis=0)]
        P = [(v[:k].T * (s[:k] ** 2 / (s[:k] ** 2).sum())) @ v[:k] for _, s, v in factors[:2]]
        square = (P[0] * P[1]).sum() / np.linalg.norm(P[0]) / np.linalg.norm(P[1])
        expected.append(np.sqrt(square))
    assert maps[1][0, 1] == pytest.approx(np.mean(expected), rel=1e-3)
    assert maps[0][0, 1] != pytest.approx(maps[1][0, 1], rel=1e-3)


def test_centred_cosines_have_the_mean_that_their_sum_forces() -> None:
    at = assert_healthy(open_page("interference", scope="Whole model"))
    maps = [f for f in figures(at) if f["data"][0].get("type") == "heatmap"]
    cosines = array(maps[2]["data"][0]["z"])
    tasks = len(cosines)
    off_diagonal = cosines[~np.eye(tasks, dtype=bool)]
    assert np.diag(cosines) == pytest.approx(np.ones(tasks))
    assert off_diagonal.mean() == pytest.approx(-1 / (tasks - 1), abs=0.02)


def test_two_tasks_are_told_that_cart_is_the_average() -> None:
    at = open_page("merge_lab", tasks=["digits", "dots"])
    assert any("equals the weight average" in warning.value for warning in at.warning)


@pytest.mark.parametrize(
    "name",
    [n for n, m in methods().items() if m.tasks is None and not m.indexed and m.learns is None],
)
def test_the_lab_offers_just_what_a_method_declares(name: str) -> None:
    method = methods()[name]
    at = assert_healthy(open_page("merge_lab", method=method.title))
    recipe = yaml.safe_load(next(c.value for c in at.code if "method:" in c.value))
    assert recipe["method"] == name
    assert list(recipe["parameters"]) == list(method.parameters.model_fields)
    assert recipe["parameters"] == method.parameters().model_dump()
    keys = {w.key for w in (*at.slider, *at.select_slider, *at.get("button_group"))}
    assert {spec.name for spec in method.specs} <= keys
    assert 0 < float(metrics(at)["Mean accuracy"].rstrip("%")) <= 100


def test_the_lab_compares_with_a_pinned_recipe() -> None:
    at = assert_healthy(open_page("merge_lab", pin="method=average"))
    names = [t.get("name") for t in figures(at)[0]["data"]]
    assert "Pinned: Weight average" in names
    drawn = trace(figures(at)[0], name="Pinned: Weight average")
    again = assert_healthy(open_page("merge_lab", method="Weight average"))
    assert f"{array(drawn['x'])[-1] / 100:.1%}" == metrics(again)["Mean accuracy"]


def test_pinning_takes_the_current_recipe() -> None:
    at = assert_healthy(open_page("merge_lab", rank="32 %", scale="2.0"))
    next(b for b in at.button if b.label.startswith("Pin this")).click()
    assert_healthy(at.run())
    assert "rank=0.32" in at.text_input(key="pin").value
    assert "scale=2.0" in at.text_input(key="pin").value


def test_a_pin_that_is_no_recipe_is_explained() -> None:
    at = open_page("merge_lab", pin="method=cart&rank=7.5")
    assert not at.exception
    assert any("rank" in warning.value for warning in at.warning)


def test_the_overview_names_the_settings_and_how_they_came_about() -> None:
    at = assert_healthy(open_page("overview"))
    text = " ".join(m.value for m in at.markdown)
    assert "CART: rank" in text
    assert "best on the validation split" in text
    assert "made to show an effect at a small size" in " ".join(i.value for i in at.info)


def test_the_overview_opens_with_pictures() -> None:
    at = assert_healthy(open_page("overview"))
    headings = [each.value for each in at.subheader]
    assert headings[0] == "How does a merge come about?"
    text = " ".join(m.value for m in at.markdown)
    assert "directions hold" in text
    assert "right that the average gets wrong" in text
    # One test image of each task in which CART rights any.
    pictured = [m.value for m in at.markdown if "Average:" in m.value]
    titles = [load_suite("vision").title(task) for task in load_suite("vision").select(["8"])]
    assert 1 <= len(pictured) <= len(titles)
    assert all(any(title in text for title in titles) for text in pictured)


def test_one_expert_has_no_picture_of_a_merge() -> None:
    at = assert_healthy(open_page("overview", tasks="digits"))
    assert "How does a merge come about?" not in [each.value for each in at.subheader]


def test_no_task_chosen_asks_for_one() -> None:
    at = open_page("spectra")
    at.sidebar.get("button_group")[1].set_value([])
    at.run()
    assert not at.exception
    assert any("at least one task" in info.value for info in at.info)


def test_pages_leave_the_weights_as_they_are() -> None:
    suite = load_suite("vision")
    before = {t: as_matrix(suite.expert(t).tensor(suite.matrices[0])).clone() for t in suite.tasks}
    for name in PAGES:
        open_page(name)
    again = load_suite("vision")
    for task, value in before.items():
        assert again.expert(task).tensor(suite.matrices[0]).equal(value)


def test_the_explanation_of_the_rank_says_what_the_curve_shows() -> None:
    at = app_at("interference")
    at.session_state["how_curves"] = True
    assert_healthy(at.run())
    over_rank = next(f for f in figures(at) if "Overlap of two" in f["layout"]["title"]["text"])
    curve = trace(over_rank, name="about the average (centred)")
    first, last = array(curve["y"])[[0, -1]]
    text = next(m.value for m in at.markdown if "lowest to the full rank" in m.value)
    assert f"({first:.3f} to {last:.3f})" in text
    assert ("lowers" in text) == (last < 0.95 * first)


def test_angles_and_signs_are_drawn_when_asked_for() -> None:
    layer = "blocks.1.attn.proj.weight"
    assert len(figures(open_page("interference", layer=layer))) == 10
    at = assert_healthy(open_page("interference", layer=layer, share="4 %", more="true"))
    assert len(figures(at)) == 12
    stacked = weights(layer)
    centred = stacked - stacked.mean(axis=0)
    k = int(0.04 * min(centred.shape[1:]))
    tops = [np.linalg.svd(matrix)[2][:k] for matrix in centred[:2]]
    cosines = np.linalg.svd(tops[0] @ tops[1].T, compute_uv=False).clip(0, 1)
    drawn = array(trace(figures(at)[10], type="heatmap")["z"])
    assert drawn[0, 1] == pytest.approx(np.degrees(np.arccos(cosines)).mean(), abs=0.05)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("overview", "first_result"),
        ("spectra", "summary_map"),
        ("interference", "curves"),
        ("merge_lab", "per_task"),
    ],
)
def test_explanation_and_numbers_are_there_when_opened(name: str, key: str) -> None:
    at = app_at(name)
    closed = len(assert_healthy(at.run()).dataframe)
    for which in (f"numbers_{key}", f"how_{key}"):
        at.session_state[which] = True
    assert_healthy(at.run())
    assert len(at.dataframe) == closed + 1
    assert not at.dataframe[-1].value.empty
    assert at.get("download_button")
    assert at.latex

"""The comparison page, on a tiny suite that can be evaluated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import pytest
import streamlit as st
import yaml
from streamlit.testing.v1 import AppTest

from analysis.evaluation.evaluator import Evaluator
from analysis.rank_selection.adaptive import adaptive_search
from analysis.rank_selection.space import search_space
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import make_recipe
from merge_core.methods import get_method
from merge_core.suites.suite import load_suite
from tests.evaluable import write_evaluable
from tests.pages.test_pages import array, assert_healthy, figures, finish, open_page
from ui.sections.own_recipes import link_form, parse_recipes

Offer = Callable[..., Path]


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Offer:
    """Write a suite named ``mine`` and offer it to the dashboard."""

    def make() -> Path:
        monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))  # nothing is stored
        path = write_evaluable(tmp_path / "mine")
        monkeypatch.setenv("MERGESCOPE_SUITES", str(path))
        return path

    return make


def run_comparison(at: AppTest) -> AppTest:
    """Press the button, and wait until the job has ended."""
    return assert_healthy(finish(button(at, "Compare these methods").click().run()))


def test_a_comparison_shows_the_evaluators_accuracies(offer: Offer) -> None:
    path = offer()
    chosen = ["Weight average", "CART", get_method("dare_ties").title, "TSV-C"]
    at = run_comparison(assert_healthy(open_page("compare", suite="mine", methods=chosen)))
    single, told = ranking(at, "keeps most"), ranking(at, "task is known")
    assert set(single) == {"Weight average", "CART", chosen[2]}
    assert set(told) == {"TSV-C"}  # which knows the task
    dots = single | told
    suite = load_suite(path)
    session, evaluator = MergeSession(suite, None, FactorStore()), Evaluator(suite)
    for name, title in (("average", "Weight average"), ("cart", "CART"), ("tsv_c", "TSV-C")):
        recipe = make_recipe({"suite": str(path), "method": name})
        wanted = evaluator.recipe(recipe, session, "test")["accuracy"].mean()
        assert dots[title] == pytest.approx(100 * wanted)
    seeds = [
        evaluator.recipe(
            make_recipe({"suite": str(path), "method": "dare_ties", "seed": seed}), session, "test"
        )["accuracy"].mean()
        for seed in range(3)
    ]
    assert dots[chosen[2]] == pytest.approx(100 * np.mean(seeds))
    drawn = next(f for f in figures(at) if "keeps most" in f["layout"]["title"]["text"])
    span = next(t for t in drawn["data"] if t.get("name") == "from seed to seed")
    assert [x for x in span["x"] if x is not None] == pytest.approx(
        [100 * min(seeds), 100 * max(seeds)]
    )


def test_tuned_settings_are_chosen_on_validation(offer: Offer) -> None:
    offer()
    at = open_page("compare", suite="mine", methods=["Task Arithmetic"], budget="Best of 4")
    at = run_comparison(assert_healthy(at))
    assert any("scale" in str(frame.value.to_dict()) for frame in at.dataframe)


def test_settings_that_a_search_has_found_stand_beside_the_defaults(offer: Offer) -> None:
    path = offer()
    suite = load_suite(path)
    session, evaluator = MergeSession(suite, None, FactorStore()), Evaluator(suite)
    chosen = ["Weight average", "CART"]
    at = assert_healthy(open_page("compare", suite="mine", methods=chosen))
    assert any(text.value.startswith("2 methods on 3 tasks") for text in at.markdown)
    found = adaptive_search(search_space("cart", str(path), suite.tasks), session, evaluator)
    st.cache_data.clear()
    at = assert_healthy(open_page("compare", suite="mine", methods=chosen))
    words = "2 methods and 1 stored setting tuned on validation on 3 tasks"
    assert any(text.value.startswith(words) for text in at.markdown)
    at = run_comparison(at)
    frame = next(f.value for f in at.dataframe if "chosen" in f.value).set_index("label")
    assert sorted(frame["chosen"]) == ["default", "default", "searched on validation"]
    (label,) = frame.index[frame["chosen"] == "searched on validation"]
    recipe = make_recipe({"method": "cart"}).with_parameters(rank=found.rank, scale=found.scale)
    wanted = evaluator.recipe(recipe, session, "test")
    assert label.startswith("CART (")
    assert frame.loc[label, "accuracy"] == pytest.approx(wanted["accuracy"].mean())


def ranking(at: AppTest, words: str) -> dict[str, float]:
    """Method to accuracy in the ranking with these words in its title."""
    drawn = next(f for f in figures(at) if words in f["layout"]["title"]["text"])
    return dict(zip(drawn["data"][0]["y"], array(drawn["data"][0]["x"]), strict=True))


def labels(at: AppTest) -> list[str]:
    """What is drawn in the ranking."""
    return list(ranking(at, "keeps most"))


def button(at: AppTest, label: str) -> Any:
    return next(button for button in at.button if button.label == label)


def test_own_recipes_come_with_the_link(offer: Offer) -> None:
    path = offer()
    own = (
        "method=cart&rank=0.5&scale=2\nmethod=bogus\n"
        "http://127.0.0.1:8501/compare?suite=elsewhere&tasks=cats&method=cart&scale=2&rank=0.5\n"
        'method=task_arithmetic&weights={"cats":2}\nmethod=slerp'
    )
    at = assert_healthy(open_page("compare", suite="mine", methods=["CART"], own=own))
    warnings = [warning.value for warning in at.warning]
    assert len(warnings) == 3
    assert "no method 'bogus'" in warnings[0]
    assert "does not merge 'cats'" in warnings[1]
    assert "merges 2 experts, not 3" in warnings[2]
    at = run_comparison(at)
    assert set(labels(at)) == {"CART", "CART (rank 0.5, scale 2)"}
    suite = load_suite(path)
    recipe = make_recipe({"method": "cart", "parameters": {"rank": 0.5, "scale": 2}})
    wanted = Evaluator(suite).recipe(recipe, MergeSession(suite, None, FactorStore()), "test")
    frame = next(f.value for f in at.dataframe if "chosen" in f.value)
    row = frame.set_index("label").loc["CART (rank 0.5, scale 2)"]
    assert row["accuracy"] == pytest.approx(wanted["accuracy"].mean())
    assert row["chosen"] == "your recipe"


def test_own_recipes_are_added_and_removed(offer: Offer) -> None:
    offer()
    at = assert_healthy(open_page("compare", suite="mine", methods=["CART"]))
    at.selectbox(key="own_method").set_value("task_arithmetic").run()
    at.slider(key="own_scale").set_value(0.45).run()
    at = assert_healthy(button(at, "Add to the comparison").click().run())
    at.slider(key="own_scale").set_value(0.75).run()
    at = assert_healthy(button(at, "Add to the comparison").click().run())
    at = assert_healthy(button(at, "Add to the comparison").click().run())  # once is enough
    shown = [text.value for text in at.markdown if text.value.startswith("Task Arithmetic")]
    assert shown == [f"Task Arithmetic (scale {scale})" for scale in (0.45, 0.75)]
    # They stand in the link: another session opens with them.
    other = assert_healthy(open_page("compare", suite="mine", own=at.query_params["own"]))
    assert all(text in [each.value for each in other.markdown] for text in shown)
    at = assert_healthy(at.button(key="own_remove_0").click().run())
    assert not any(text.value == shown[0] for text in at.markdown)
    assert any(text.value == shown[1] for text in at.markdown)
    assert any("1 method and 1 recipe of your own" in text.value for text in at.markdown)
    at.multiselect(key="methods").set_value([]).run()
    assert labels(run_comparison(assert_healthy(at))) == [shown[1]]


def test_recipe_files_are_added_and_bad_ones_named(offer: Offer) -> None:
    offer()
    at = assert_healthy(open_page("compare", suite="mine", methods=["CART"]))
    good = make_recipe({"suite": "x.yaml", "method": "ties", "parameters": {"density": 0.5}})
    files = [
        ("good.yaml", good.to_yaml().encode(), "text/yaml"),
        ("bad.yaml", b"method: [", "text/yaml"),
        ("large.yaml", b"method: ties" + b" " * (2 << 20), "text/yaml"),
    ]
    at = assert_healthy(at.file_uploader[0].set_value(files).run())
    assert any(text.value == "TIES (density 0.5)" for text in at.markdown)
    warnings = " ".join(warning.value for warning in at.warning)
    assert "bad.yaml is not valid YAML" in warnings
    assert "large.yaml is larger than 1 MB" in warnings
    assert not at.file_uploader[0].value
    assert not assert_healthy(at.run()).warning


def test_the_merge_lab_sends_its_recipe(offer: Offer) -> None:
    offer()
    lab = assert_healthy(open_page("merge_lab", suite="mine", method="TIES", density="0.35"))
    link = next(each for each in lab.get("page_link") if "Compare" in each.proto.label)
    query = parse_qs(link.proto.query_string)
    at = assert_healthy(open_page("compare", **query))
    assert any(text.value == "TIES (density 0.35)" for text in at.markdown)


def test_recipes_are_read_as_links_and_as_yaml() -> None:
    first = make_recipe(
        {"method": "cart", "parameters": {"rank": 0.5}, "then": [{"method": "svc"}]}
    )
    second = make_recipe({"method": "ties"})
    assert [recipe for _, recipe in parse_recipes(f"\n {link_form(first)} \n\nmethod=ties")] == [
        first,
        second,
    ]
    assert [r for _, r in parse_recipes(f"{first.to_yaml()}---\n{second.to_yaml()}")] == [
        first,
        second,
    ]
    assert parse_recipes("  \n") == []
    ((text, problem),) = parse_recipes("method: cart\nrank: 3")
    assert text == "method: cart\nrank: 3"
    assert "rank" in str(problem)


def test_published_figures_need_no_evaluation(offer: Offer) -> None:
    path = offer()
    document = yaml.safe_load(path.read_text())
    del document["architecture"]
    path.write_text(yaml.safe_dump(document))
    at = assert_healthy(open_page("compare", suite="mine"))
    assert any("analysed and merged but not evaluated" in info.value for info in at.info)
    assert any("Not comparable" in text.value for text in at.markdown)
    assert not [button for button in at.button if button.label == "Compare these methods"]


def test_two_tasks_offer_methods_for_two(offer: Offer) -> None:
    offer()
    two = assert_healthy(open_page("compare", suite="mine", tasks=["digits", "lines"]))
    three = assert_healthy(open_page("compare", suite="mine"))
    boxes = [next(m for m in at.multiselect if m.key == "methods") for at in (two, three)]
    assert ["SLERP" in box.options for box in boxes] == [True, False]


def test_the_dashboard_opens_on_the_suite_that_was_named(offer: Offer) -> None:
    offer()
    at = assert_healthy(open_page("compare"))
    assert at.selectbox(key="suite").value == "mine"
    assert (
        assert_healthy(open_page("compare", suite="vision")).selectbox(key="suite").value
        == "vision"
    )

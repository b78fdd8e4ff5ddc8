"""The Merge lab's further choices: origin, per-task weights, overrides and post-processors."""

from __future__ import annotations

import pytest
from streamlit.testing.v1 import AppTest

from analysis.evaluation.evaluator import Evaluator
from merge_core.errors import RecipeError
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import Recipe, make_recipe, recipe_from_yaml
from merge_core.suites.suite import load_suite
from tests.pages.test_pages import assert_healthy, metrics, open_page
from ui.sections.recipe_options import parse_overrides, parse_weights


def read_shown_recipe(at: AppTest) -> Recipe:
    return recipe_from_yaml(next(c.value for c in at.code if "method:" in c.value))


def test_all_options_reach_the_recipe_and_its_accuracy() -> None:
    at = assert_healthy(
        open_page(
            "merge_lab",
            method="TIES",
            origin="The average",
            weights="digits=2, dots = 0.5",
            overrides="blocks.0.*: {scale: 2}; norm*: {scale: 0}",
            then=["SVC"],
        )
    )
    recipe = read_shown_recipe(at)
    wanted = make_recipe(
        {
            "tasks": recipe.tasks,
            "method": "ties",
            "origin": "average",
            "weights": {"digits": 2, "dots": 0.5},
            "overrides": [
                {"match": "blocks.0.*", "parameters": {"scale": 2}},
                {"match": "norm*", "parameters": {"scale": 0}},
            ],
            "then": [{"method": "svc"}],
        }
    )
    assert recipe == wanted


def test_the_lab_evaluates_what_it_writes() -> None:
    at = assert_healthy(open_page("merge_lab", method="Task Arithmetic", weights="digits=3"))
    suite = load_suite("vision")
    frame = Evaluator(suite).recipe(
        read_shown_recipe(at), MergeSession(suite, suite.select(["8"]), FactorStore()), "val"
    )
    assert metrics(at)["Mean accuracy"] == f"{frame['accuracy'].mean():.1%}"


def test_methods_offer_only_what_they_can_take() -> None:
    at = assert_healthy(open_page("merge_lab", method="CART"))
    assert "weights" not in {box.key for box in at.text_input}
    assert "origin" not in {group.key for group in at.segmented_control}
    at = assert_healthy(open_page("merge_lab", method="Weight average"))
    assert "weights" in {box.key for box in at.text_input}
    assert at.text_input(key="overrides").disabled


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"method": "TIES", "weights": "digits"}, "task=number"),
        ({"method": "TIES", "weights": "nothing=2"}, "does not merge 'nothing'"),
        ({"method": "CART", "overrides": "blocks: 3"}, "pattern: {parameter: value}"),
        ({"method": "CART", "overrides": "*: {depth: 3}"}, "no parameter 'depth'"),
    ],
)
def test_what_cannot_be_read_is_said_in_words(query: dict[str, str], message: str) -> None:
    at = open_page("merge_lab", **query)
    assert not at.exception
    assert any(message in error.value for error in at.error)


def test_texts() -> None:
    assert parse_weights("") == {}
    assert parse_weights(" a=1,b = -0.5 ,") == {"a": 1.0, "b": -0.5}
    assert parse_overrides("") == []
    assert parse_overrides("a.*: {k: 1};") == [{"match": "a.*", "parameters": {"k": 1}}]
    for text in ("a=x", "=", "a:1"):
        with pytest.raises(RecipeError, match="Per-task weights"):
            parse_weights(text)
    for text in ("a", "a: [1]", "a: {", ": "):
        with pytest.raises(RecipeError, match="Other values"):
            parse_overrides(text)


def test_the_recommended_setting_is_one_click_away_and_chips_say_what_numbers_are_of() -> None:
    at = assert_healthy(open_page("merge_lab"))
    recipe = recipe_from_yaml(next(c.value for c in at.code if "method:" in c.value))
    assert recipe.parameters == {"rank": 0.08, "scale": 1.0}
    badges = [text.value for text in at.markdown if "-badge[" in text.value]
    assert any("[validation] :gray-badge[default setting]" in badge for badge in badges)
    button = next(each for each in at.button if "recommended setting" in each.label)
    at = assert_healthy(button.click().run())
    recipe = recipe_from_yaml(next(c.value for c in at.code if "method:" in c.value))
    overview = assert_healthy(open_page("overview"))
    wanted = next(t.value for t in overview.markdown if "CART: rank" in t.value)
    rank, scale = recipe.parameters["rank"], recipe.parameters["scale"]
    assert f"CART: rank {100 * rank:.3g} %, λ = {scale:g} (best on the validation split)" in wanted
    badges = [text.value for text in at.markdown if "-badge[" in text.value]
    assert any("[validation] :gray-badge[tuned on validation]" in badge for badge in badges)
    assert not [each for each in at.button if "recommended setting" in each.label]

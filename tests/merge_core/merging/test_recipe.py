"""Recipes: what is refused and how it is said, and two written forms that mean the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from merge_core.errors import MergeScopeError, RecipeError, SuiteError
from merge_core.merging.recipe import (
    Recipe,
    load_recipe,
    make_recipe,
    recipe_from_query,
    recipe_from_yaml,
)
from merge_core.methods import methods
from merge_core.suites.suite import Suite

Make = Callable[..., Suite]


def cart(**fields: Any) -> Recipe:
    return make_recipe({"method": "cart", **fields})


def refusal(document: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        make_recipe(document)
    return str(caught.value)


@pytest.mark.parametrize("method", ["cart", "low_rank_task_arithmetic"])
@pytest.mark.parametrize(
    "rank", [0, 0.0, 1.5, -1, -0.5, True, False, "abc", "1.5", "", math.nan, math.inf, None, [1],
             "²", "1,5"],
)  # fmt: skip
def test_a_rank_out_of_range_is_refused_with_what_was_given(method: str, rank: Any) -> None:
    message = refusal({"method": method, "parameters": {"rank": rank}})
    assert method in message
    assert "rank" in message
    assert "share in (0, 1]" in message
    assert repr(rank) in message


@pytest.mark.parametrize(
    ("given", "meant"),
    [(1, 1), (1.0, 1.0), (7, 7), (0.08, 0.08), ("1", 1), ("1.0", 1.0), (" 12 ", 12),
     ("0.08", 0.08), ("1e-1", 0.1), (10**20, 10**20)],
)  # fmt: skip
def test_a_share_and_a_whole_number_stay_what_they_are(given: Any, meant: float) -> None:
    rank = cart(parameters={"rank": given}).parameters["rank"]
    assert rank == meant
    assert type(rank) is type(meant)
    checked: Any = cart(parameters={"rank": given}).checked_parameters
    assert type(checked.rank) is type(meant)


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ({"method": "carts"}, ["'carts'", "cart", "ties"]),
        ({"method": "cart", "parameters": {"scal": 1}}, ["'scal'", "'cart'", "rank, scale"]),
        ({"method": "average", "parameters": {"scale": 1}}, ["'scale'", "'average'", "none"]),
        ({"method": "cart", "parameters": {"scale": math.nan}}, ["scale", "finite"]),
        ({"method": "cart", "parameters": {"scale": math.inf}}, ["scale"]),
        ({"method": "cart", "parameters": {"scale": 11}}, ["scale", "10", "11"]),
        ({"method": "cart", "parameters": {"scale": "much"}}, ["scale", "much"]),
        ({"method": "ties", "parameters": {"density": -0.1}}, ["density", "-0.1"]),
        ({"method": "ties", "parameters": {"density": 1.1}}, ["density", "1.1"]),
        ({"method": "ties", "parameters": {"trim": "Global"}}, ["trim", "global", "tensor"]),
        ({"method": "cart", "parameters": [1]}, ["parameters", "mapping"]),
        ({"method": "cart", "sead": 1}, ["sead"]),
        ({"method": "cart", "seed": -1}, ["seed", "-1"]),
        ({"method": "cart", "seed": 0.5}, ["seed"]),
        ({"method": "cart", "dtype": "int8"}, ["dtype", "float32", "int8"]),
        ({"method": "cart", "tasks": "a,b"}, ["tasks"]),
        ({"method": "cart", "suite": 3}, ["suite"]),
        ({"method": 3}, ["method"]),
        ({"suite": "vision"}, ["method", "required"]),
        ([], ["fields"]),
        (None, ["fields"]),
    ],
)
def test_what_is_wrong_with_a_recipe_is_named(document: Any, named: list[str]) -> None:
    message = refusal(document)
    for word in named:
        assert word in message
    assert "pydantic" not in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "text", ["method: [", "method: 2024-13-45", "[" * 5000, "", "- cart", "\0",
             "method: cart\nparameters: {rank: 1" + "0" * 5000 + "}", "!!python/name:os.system"],
)  # fmt: skip
def test_broken_yaml_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"r\.yaml"):
        recipe_from_yaml(text, "r.yaml")


@pytest.mark.parametrize(
    "query", ["", "?", "rank=1", "method=cart&rank=0", "method=cart&seed=x", "method=cart&rank=%F0",
              "method=cart&rank=" + "9" * 5000, "method=cart&colour=red", "method=nope&a"],
)  # fmt: skip
def test_broken_links_are_refused(query: str) -> None:
    with pytest.raises(RecipeError):
        recipe_from_query(query)


def test_a_link_gives_the_recipe_with_its_types() -> None:
    link = "?suite=vision&tasks=b,a&method=cart&rank=1.0&scale=2&seed=3&dtype=float16"
    recipe = recipe_from_query(link)
    assert recipe == cart(
        tasks=("b", "a"), parameters={"rank": 1.0, "scale": 2.0}, seed=3, dtype="float16"
    )
    assert type(recipe.parameters["rank"]) is float
    assert recipe_from_query("method=cart").parameters == {"rank": 0.08, "scale": 1.0}


def value_of(spec: Any) -> st.SearchStrategy[Any]:
    if spec.kind == "rank":
        return st.one_of(
            st.integers(1, 10**12), st.floats(0, 1, exclude_min=True), st.just(1), st.just(1.0)
        )
    if spec.kind == "choice":
        return st.sampled_from(spec.choices)
    if spec.kind == "integer":
        return st.integers(int(spec.low), int(spec.high))
    return st.floats(spec.low, spec.high)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    method = draw(st.sampled_from(list(methods().values())))
    names = st.text("abcXYZ019_.+-", min_size=1, max_size=8)
    return make_recipe(
        {
            "suite": draw(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)),
            "tasks": draw(st.none() | st.lists(names, min_size=1, max_size=4)),
            "method": method.name,
            "parameters": {spec.name: draw(value_of(spec)) for spec in method.specs},
            "seed": draw(st.integers(0, 2**63)),
            "dtype": draw(st.sampled_from(["input", "float32", "float16", "bfloat16"])),
        }
    )


def assert_identical(a: Recipe, b: Recipe) -> None:
    assert a == b
    for name, value in a.parameters.items():
        assert type(b.parameters[name]) is type(value)


@given(recipes())
def test_yaml_and_link_give_an_identical_recipe_back(recipe: Recipe) -> None:
    assert_identical(recipe, recipe_from_yaml(recipe.to_yaml()))
    assert_identical(recipe, recipe_from_query(recipe.to_query()))
    assert_identical(recipe, recipe_from_query("?" + recipe.to_query()))
    assert_identical(recipe, recipe_from_query(recipe_from_yaml(recipe.to_yaml()).to_query()))


@pytest.mark.parametrize("name", ["1", "01", "1e3", "true", "null", "no", "~", "1.0", "a.b+c-d_"])
def test_task_names_that_look_like_something_else_survive(name: str) -> None:
    if name == "~":
        name = "-"
    recipe = cart(tasks=(name, "b"))
    assert_identical(recipe, recipe_from_yaml(recipe.to_yaml()))
    assert_identical(recipe, recipe_from_query(recipe.to_query()))


@pytest.mark.parametrize(
    "suite", ["a&method=ties", "x%20y", "a+b", "a b", "#", "?", "a=b;c", "日本", "C:\\x", "/a,b/c"]
)
def test_suite_paths_with_special_characters_survive(suite: str) -> None:
    recipe = cart(suite=suite)
    assert_identical(recipe, recipe_from_yaml(recipe.to_yaml()))
    assert_identical(recipe, recipe_from_query(recipe.to_query()))


def test_defaults_are_written_out() -> None:
    document = yaml.safe_load(cart().to_yaml())
    assert document["parameters"] == {"rank": 0.08, "scale": 1.0}


def test_the_digest_follows_what_determines_the_result_and_nothing_else(
    synthetic_suite: Make,
) -> None:
    suite = synthetic_suite(["a", "b", "c"], seed=1)
    recipe = cart(tasks=("a", "b"))
    first = recipe.digest(suite)
    same = [
        cart(tasks=("b", "a")).digest(suite),
        cart(tasks=("a", "b"), suite="elsewhere").digest(suite),
        cart(tasks=("a", "b"), parameters={"rank": 0.08}).digest(suite),
        recipe.digest(synthetic_suite(["a", "b", "c"], seed=1, name="another name")),
    ]
    assert set(same) == {first}
    assert cart().digest(suite) == cart(tasks=("c", "a", "b")).digest(suite)
    different = [
        cart().digest(suite),
        cart(tasks=("a", "c")).digest(suite),
        cart(tasks=("a", "b"), parameters={"rank": 0.09}).digest(suite),
        cart(tasks=("a", "b"), parameters={"rank": 1}).digest(suite),
        cart(tasks=("a", "b"), parameters={"rank": 1.0}).digest(suite),
        cart(tasks=("a", "b"), parameters={"scale": 2}).digest(suite),
        cart(tasks=("a", "b"), seed=1).digest(suite),
        cart(tasks=("a", "b"), dtype="float16").digest(suite),
        make_recipe({"method": "average", "tasks": ["a", "b"]}).digest(suite),
        recipe.digest(synthetic_suite(["a", "b", "c"], seed=2)),
        recipe.digest(synthetic_suite(["a", "b", "c"], seed=1, average=["*fc2*"])),
        recipe.digest(synthetic_suite(["a", "b", "c"], seed=1, decompose=["pos_embed"])),
    ]
    assert len({first, *different}) == len(different) + 1


@pytest.mark.parametrize(
    ("method", "origin", "corrected"),
    [
        ("ties", None, False),
        ("ties", "average", True),
        ("dare_ties", "average", True),
        ("tsv_m", "average", True),
        ("tsv_m", "base", False),
        ("pcb", None, True),
        ("cart", None, False),
    ],
)
def test_results_that_were_corrected_have_another_digest(
    synthetic_suite: Make,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    origin: str | None,
    corrected: bool,
) -> None:
    suite = synthetic_suite(["a", "b", "c"], seed=1)
    recipe = make_recipe({"method": method, "origin": origin})
    now = recipe.digest(suite)
    monkeypatch.setitem(methods(), method, replace(methods()[method], revisions={}))
    assert (recipe.digest(suite) != now) == corrected


def test_the_digest_sees_the_base_that_integer_buffers_come_from(suite_of: Make) -> None:
    def suite(steps: int) -> Suite:
        state = {"w": torch.ones(3), "steps": torch.tensor(1)}
        return suite_of({"a": state, "b": state}, {**state, "steps": torch.tensor(steps)})

    assert cart().digest(suite(5)) != cart().digest(suite(6))


def test_unknown_tasks_have_no_digest(synthetic_suite: Make) -> None:
    with pytest.raises(SuiteError, match="'z'"):
        cart(tasks=("z",)).digest(synthetic_suite())


def test_parameters_can_be_changed_and_are_checked_again() -> None:
    recipe = cart(tasks=("a",), seed=4).with_parameters(rank=3)
    assert recipe.parameters == {"rank": 3, "scale": 1.0}
    assert recipe.tasks == ("a",)
    assert recipe.seed == 4
    with pytest.raises(RecipeError, match="rank"):
        recipe.with_parameters(rank=0)
    with pytest.raises(RecipeError, match="'depth'"):
        recipe.with_parameters(depth=1)


def test_a_recipe_file_names_its_suite_relative_to_itself(
    synthetic_suite: Make, tmp_path: Path
) -> None:
    suite = synthetic_suite()
    folder = suite.root / "recipes"
    folder.mkdir()
    (folder / "r.yaml").write_text("suite: ../suite.yaml\nmethod: cart\ntasks: [task1]\n")
    recipe, loaded = load_recipe(folder / "r.yaml")
    assert loaded.path == suite.path
    assert recipe.tasks == ("task1",)
    (folder / "r.yaml").write_text("suite: ../suite.yaml\nmethod: cart\ntasks: [moon]\n")
    with pytest.raises(SuiteError, match="'moon'"):
        load_recipe(folder / "r.yaml")
    (folder / "r.yaml").write_bytes(b"\xff\xfe")
    for bad in (folder / "r.yaml", folder / "none.yaml", folder):
        with pytest.raises(RecipeError, match="cannot be read"):
            load_recipe(bad)
    (folder / "r.yaml").write_text("suite: nowhere.yaml\nmethod: cart\n")
    with pytest.raises(MergeScopeError, match=r"nowhere\.yaml"):
        load_recipe(folder / "r.yaml")


@pytest.mark.parametrize("name", list(methods()))
def test_every_declaration_can_be_shown_and_its_defaults_are_valid(name: str) -> None:
    method = methods()[name]
    assert method.title
    assert method.summary.endswith(".")
    assert method.formula
    assert "arXiv" in method.source
    recipe = make_recipe({"method": name})
    for spec in method.specs:
        assert spec.help
        assert recipe.parameters[spec.name] == spec.default
        assert spec.kind in ("rank", "number", "integer", "choice")
        if spec.kind == "choice":
            assert spec.default in spec.choices
            values: list[Any] = list(spec.choices)
        elif spec.kind == "number":
            assert spec.low <= spec.default <= spec.high
            values = [spec.low, spec.high]
        elif spec.kind == "integer":
            assert spec.low <= spec.default <= spec.high
            values = [int(spec.low), int(spec.high)]
        else:
            values = [1, 1.0, 0.5]
        for value in values:  # whatever a widget offers, the check accepts
            recipe.with_parameters(**{spec.name: value})

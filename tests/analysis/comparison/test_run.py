"""A whole comparison: seeds, tuning within the budget, own recipes, differences to one."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.accuracy import differences_to, spread_over_seeds
from analysis.comparison import tuning
from analysis.comparison.run import label_of, run_comparison, usable_methods
from analysis.evaluation.evaluator import Evaluator
from merge_core.errors import Cancelled, RecipeError, SuiteError
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import Recipe, make_recipe
from merge_core.progress import Progress
from merge_core.suites.suite import load_suite
from tests.evaluable import TASKS, copy_evaluable, edit_document, write_evaluable


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[MergeSession, Evaluator]:
    suite = load_suite(write_evaluable(tmp_path_factory.mktemp("suite") / "s"))
    return MergeSession(suite, None, FactorStore()), Evaluator(suite)


def test_it_is_made_of_its_parts(parts: tuple[MergeSession, Evaluator]) -> None:
    session, evaluator = parts
    seen: list[tuple[int, int]] = []
    progress = Progress(lambda done, total, label: seen.append((done, total)))
    names = ["dare_ties", "cart", "average"]
    result = run_comparison("here.yaml", names, session, evaluator, 3, 2, "test", 12, progress)
    assert set(result.recipes) == {
        *("DARE with TIES, seed 0", "DARE with TIES, seed 1", "CART", "Weight average")
    }
    start = make_recipe({"suite": "here.yaml", "tasks": TASKS, "method": "cart"})
    tuned, _ = tuning.tune(start, session, evaluator, 3, limit=12)
    assert result.recipes["CART"] == tuned
    random = [result.recipes[f"DARE with TIES, seed {seed}"] for seed in (0, 1)]
    assert [recipe.seed for recipe in random] == [0, 1]
    assert random[0].parameters == random[1].parameters
    for label, recipe in result.recipes.items():
        wanted = evaluator.recipe_hits(recipe, session, "test", 12)
        assert all(np.array_equal(result.hits[label][task], wanted[task]) for task in TASKS)
    own = evaluator.experts(TASKS, "test", 12)
    pd.testing.assert_frame_equal(result.experts, own)
    base = session.suite.base
    assert base is not None
    assert result.base == evaluator.checkpoint(base, TASKS, "test", 12)["accuracy"].mean()
    summary = result.summary.set_index("label")
    assert summary["accuracy"].is_monotonic_decreasing
    assert summary.loc["CART", "needs"] == "nothing else"
    assert summary.loc["DARE with TIES, seed 1", "needs"] == "the base"
    assert summary.loc["Weight average", "setting"] == ""
    assert summary.loc["CART", "setting"].startswith("rank 0.")
    shares = [done / total for done, total in seen]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, 1)


def test_defaults_stay_without_a_budget(parts: tuple[MergeSession, Evaluator]) -> None:
    session, evaluator = parts
    result = run_comparison("s", ["cart"], session, evaluator, limit=2)
    assert result.recipes["CART"].parameters == make_recipe({"method": "cart"}).parameters
    assert result.seeds.empty


def test_each_may_try_the_same_on_the_same_images_but_for_those_that_learn(
    parts: tuple[MergeSession, Evaluator], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, evaluator = parts
    tried: list[tuple[str, int, int | None]] = []

    def tune(recipe: Recipe, *arguments: object, limit: int | None, progress: Progress) -> object:
        tried.append((recipe.method, arguments[-1], limit))  # type: ignore[arg-type]
        return recipe.with_parameters(scale=0.125), [None, None]

    monkeypatch.setattr(tuning, "tune", tune)
    result = run_comparison("s", ["cart", "regmean", "ties"], session, evaluator, 7, 1, limit=5)
    assert tried == [("cart", 7, 5), ("ties", 7, 5)]
    scales = {label: recipe.parameters.get("scale") for label, recipe in result.recipes.items()}
    assert scales == {"CART": 0.125, "RegMean": None, "TIES": 0.125}


def test_own_recipes_stand_beside_the_methods_as_they_are(
    parts: tuple[MergeSession, Evaluator],
) -> None:
    session, evaluator = parts
    own = [
        make_recipe({"method": "dare_ties", "parameters": {"drop": 0.5}, "seed": 3}),
        make_recipe({"method": "cart", "tasks": ["digits"], "parameters": {"rank": 0.5}}),
        make_recipe({"suite": "other.yaml", "method": "cart", "parameters": {"rank": 0.5}}),
    ]
    result = run_comparison("s", ["cart", "dare_ties"], session, evaluator, 3, 2, limit=5, own=own)
    summary = result.summary.set_index("label")
    chosen = {
        "CART": "best of 3 on validation",
        "DARE with TIES, seed 0": "best of 3 on validation",
        "DARE with TIES, seed 1": "best of 3 on validation",
        "DARE with TIES (drop 0.5, seed 3)": "your recipe",
        "CART (rank 0.5)": "your recipe",
    }
    assert summary["chosen"].to_dict() == chosen
    assert summary.loc["CART (rank 0.5)", "setting"] == "rank 0.5, scale 1"
    # Its seed is not one of the method's.
    assert result.seeds[["title", "seeds"]].to_numpy().tolist() == [["DARE with TIES", 2]]
    wanted = make_recipe({"suite": "s", "tasks": TASKS, "method": "cart"})
    wanted = wanted.with_parameters(rank=0.5)
    assert result.recipes["CART (rank 0.5)"] == wanted
    hits = evaluator.recipe_hits(wanted, session, "test", 5)
    assert all(np.array_equal(result.hits["CART (rank 0.5)"][task], hits[task]) for task in TASKS)
    alone = run_comparison("s", [], session, evaluator, limit=5, own=own[1:])
    assert alone.summary["label"].tolist() == ["CART (rank 0.5)"]


def test_stored_settings_are_rows_and_what_merges_alike_counts_once(
    parts: tuple[MergeSession, Evaluator],
) -> None:
    session, evaluator = parts
    default, searched = (
        make_recipe({"method": "cart", "parameters": parameters})
        for parameters in ({}, {"rank": 0.5, "scale": 2})
    )
    result = run_comparison(
        "s", ["cart"], session, evaluator, limit=5, own=[searched, default], tuned=[searched]
    )
    assert dict(zip(result.summary["label"], result.summary["chosen"], strict=True)) == {
        "CART": "default",
        "CART (rank 0.5, scale 2)": "searched on validation",
    }


def test_own_recipes_that_do_not_fit_are_refused_at_once(
    parts: tuple[MergeSession, Evaluator],
) -> None:
    session, evaluator = parts
    before = evaluator.outputs.forward_images
    weighted = {"method": "task_arithmetic", "weights": {"cats": 2}}
    with pytest.raises(RecipeError, match="does not merge 'cats'"):
        run_comparison("s", ["wudi"], session, evaluator, own=[make_recipe(weighted)])
    with pytest.raises(SuiteError, match="merges 2 experts"):
        run_comparison("s", ["wudi"], session, evaluator, own=[make_recipe({"method": "slerp"})])
    assert evaluator.outputs.forward_images == before


def test_how_settings_came_about(parts: tuple[MergeSession, Evaluator]) -> None:
    session, evaluator = parts
    names = ["average", "regmean", "task_arithmetic"]
    result = run_comparison("s", names, session, evaluator, 2, limit=2)
    assert result.summary.set_index("label")["chosen"].to_dict() == {
        "Weight average": "default (nothing to tune)",
        "RegMean": "default (not tuned)",
        "Task Arithmetic": "best of 2 on validation",
    }
    plain = run_comparison("s", names, session, evaluator, limit=2)
    assert set(plain.summary["chosen"]) == {"default"}


def test_labels_tell_recipes_apart() -> None:
    """All combinations of a few values of each field."""
    override = {"match": "blocks.0.*", "parameters": {"drop": 0.3}}
    elsewhere = {"match": "head", "parameters": {"drop": 0.3}}
    floor = {"method": "svc", "parameters": {"floor": 0.5}}
    fields: list[tuple[str, list[object]]] = [
        ("parameters", [{}, {"drop": 0.5}, {"scale": 1 / 3}, {"scale": 0.333333}]),
        ("origin", ["base", "average"]),
        ("weights", [{}, {"a": 2}, {"a": 0.5}, {"b": 2}]),
        ("overrides", [[], [override], [elsewhere], [override, elsewhere]]),
        ("then", [[], [{"method": "svc"}], [floor], [floor, {"method": "subspace_boosting"}]]),
        ("seed", [0, 1]),
    ]
    names, values = zip(*fields, strict=True)
    documents = [dict(zip(names, each, strict=True)) for each in product(*values)]
    documents += [{"dtype": dtype} for dtype in ("float16", "bfloat16")]
    recipes = [make_recipe({"method": "dare_ties", **document}) for document in documents]
    recipes += [
        make_recipe({"method": "cart", "parameters": {"rank": rank, "scale": scale}})
        for rank in (0.08, 0.5, 1, 1.0, 100, 0.08 + 1e-15)
        for scale in (0, 1, 3, 1 + 1e-15)
    ]
    assert len({label_of(recipe) for recipe in recipes}) == len(recipes) > 1000


def test_labels_in_words() -> None:
    document = {
        "method": "dare_ties",
        "parameters": {"drop": 0.5},
        "origin": "average",
        "weights": {"digits": 2},
        "overrides": [{"match": "blocks.0.*", "parameters": {"scale": 2, "drop": 0.1}}],
        "then": [{"method": "svc"}],
        "dtype": "float16",
    }
    assert label_of(make_recipe(document)) == (
        "DARE with TIES (drop 0.5, about the average, weight of digits 2, scale 2 and drop 0.1 in "
        "blocks.0.*, then SVC at floor 1, seed 0, float16)"
    )
    assert label_of(make_recipe({"method": "average"})) == "Weight average (default)"
    one, whole = ({"method": "cart", "parameters": {"rank": rank}} for rank in (1, 1.0))
    assert label_of(make_recipe(one)) == "CART (rank 1)"
    assert label_of(make_recipe(whole)) == "CART (rank 1.0)"


def test_spread_over_seeds_by_hand() -> None:
    labels = [f"DARE with TIES, seed {seed}" for seed in range(3)] + ["CART"]
    summary = pd.DataFrame({"label": labels, "accuracy": [0.5, 0.7, 0.3, 0.9]})
    repeated = {label: None if label == "CART" else "DARE with TIES" for label in labels}
    (row,) = spread_over_seeds(summary, repeated).to_dict("records")
    assert row["title"] == "DARE with TIES"
    assert row["seeds"] == 3
    assert row["accuracy"] == pytest.approx(0.5)
    assert row["spread"] == pytest.approx(0.2)
    assert (row["least"], row["most"]) == (0.3, 0.7)
    assert spread_over_seeds(summary.tail(1), repeated).empty


def test_differences_to_one_label() -> None:
    columns = ["first", "second", "difference", "low", "high", "p", "real"]
    pairs = pd.DataFrame(
        [
            ("a", "best", -0.3, -0.4, -0.2, 1e-6, True),
            ("best", "b", 0.1, 0.05, 0.15, 1e-3, True),
            ("best", "c", 0.01, -0.1, 0.12, 0.8, False),
            ("a", "b", -0.2, -0.3, -0.1, 1e-4, True),
        ],
        columns=columns,
    )
    frame = differences_to(pairs, "best")
    assert frame["label"].tolist() == ["b", "a"]
    assert frame[["difference", "low", "high"]].to_numpy().tolist() == [
        [-0.1, -0.15, -0.05],
        [-0.3, -0.4, -0.2],
    ]
    assert differences_to(pairs, "c").empty


def test_usable(tmp_path: Path) -> None:
    suite = copy_evaluable(tmp_path / "s")
    assert "slerp" not in usable_methods(suite, TASKS)
    assert "slerp" in usable_methods(suite, TASKS[:2])
    assert "adamerging" in usable_methods(suite, TASKS)
    bare = edit_document(tmp_path / "s", base=None)
    found = usable_methods(bare, TASKS)
    assert {"average", "cart", "karcher"} <= set(found)
    assert not {"ties", "emr", "task_arithmetic"} & set(found)


def test_what_cannot_run_is_refused_at_once(parts: tuple[MergeSession, Evaluator]) -> None:
    session, evaluator = parts
    before = evaluator.outputs.forward_images
    with pytest.raises(SuiteError, match="merges 2 experts"):
        run_comparison("s", ["wudi", "slerp"], session, evaluator)
    with pytest.raises(RecipeError, match="no method"):
        run_comparison("s", ["wudi", "bogus"], session, evaluator)
    assert evaluator.outputs.forward_images == before


def test_it_can_be_cancelled_while_tuning(parts: tuple[MergeSession, Evaluator]) -> None:
    session, evaluator = parts
    progress = Progress()

    def stop(done: int, total: int, label: str) -> None:
        if label == "settings of TIES":
            progress.cancel.set()

    progress.listener = stop
    with pytest.raises(Cancelled):
        run_comparison("s", ["average", "ties", "cart"], session, evaluator, 2, progress=progress)

"""The first result: chosen on the validation split, reported on the test split."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.accuracy import mean_accuracy
from analysis.comparison.first_result import (
    first_recipes,
    first_result,
    knows_first_result,
    suggest_recipe,
)
from analysis.evaluation.evaluator import Evaluator
from analysis.rank_selection import space as space_module
from analysis.rank_selection.adaptive import adaptive_search
from analysis.rank_selection.space import search_space
from merge_core.errors import Cancelled
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.progress import Progress
from merge_core.suites.suite import Suite, load_suite
from tests.evaluable import CLASSES, IMAGES, TASKS, copy_evaluable, edit_arrays, edit_document


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
    # A small usual grid: the rule is the same and the tests are quick.
    monkeypatch.setattr(space_module, "RANKS", (0.1, 0.3, 0.6))
    monkeypatch.setattr(space_module, "POINTS", 4)
    return copy_evaluable(tmp_path / "suite")


def sessions(suite: Suite) -> tuple[MergeSession, Evaluator]:
    return MergeSession(suite, None, FactorStore()), Evaluator(suite)


def search(suite: Suite) -> tuple[MergeSession, Evaluator]:
    session, evaluator = sessions(suite)
    for method in ("cart", "task_arithmetic"):
        adaptive_search(search_space(method, ".", suite.tasks), session, evaluator)
    return session, evaluator


def test_defaults_when_no_search_is_known(suite: Suite) -> None:
    session, evaluator = sessions(suite)
    recipes = first_recipes(".", session, evaluator)
    assert list(recipes) == ["Weight average", "Task Arithmetic", "CART"]
    assert [chosen for _, chosen in recipes.values()] == [True, False, False]
    assert recipes["CART"][0].parameters == {"rank": 0.08, "scale": 1.0}
    assert recipes["Task Arithmetic"][0].parameters == {"scale": 0.3}
    evaluator.recipe(search_space("cart", ".", suite.tasks).recipes()[0], session)  # one point
    assert suggest_recipe("cart", ".", session, evaluator)[1] is False
    assert evaluator.outputs.forward_images == 3 * IMAGES


def test_the_best_of_a_known_search(suite: Suite) -> None:
    session, evaluator = search(suite)
    recipes = first_recipes(".", session, evaluator)
    assert all(chosen for _, chosen in recipes.values())
    spent = evaluator.outputs.forward_images
    assert spent > 0
    for title, method in (("CART", "cart"), ("Task Arithmetic", "task_arithmetic")):
        space = search_space(method, ".", suite.tasks)
        accuracy = {
            str(recipe.parameters): mean_accuracy(evaluator.recipe(recipe, session))
            .iloc[0]
            .accuracy
            for recipe in space.recipes()
        }
        assert len(set(accuracy.values())) > 1
        # So few images tell little, but the search may not end far from the best of all points.
        assert accuracy[str(recipes[title][0].parameters)] > max(accuracy.values()) - 0.05


def test_test_labels_have_no_say_and_validation_labels_have(suite: Suite) -> None:
    session, evaluator = search(suite)
    chosen = first_recipes(".", session, evaluator)
    accuracy = first_result(chosen, session, evaluator).query("model == 'CART'")["accuracy"]

    # Adversarial: every label becomes one that the chosen merge does not predict.
    for task in TASKS:
        path = suite.root / f"inputs/{task}.npz"
        predicted = evaluator.outputs.predict(session.merge(chosen["CART"][0]), task, "test")
        edit_arrays(path, test_labels=(predicted + 1) % CLASSES)
    after = search(load_suite(suite.path))
    assert first_recipes(".", *after) == chosen
    worse = first_result(chosen, *after).query("model == 'CART'")["accuracy"]
    assert worse.max() == 0.0 < accuracy.min()  # so the test split would have chosen otherwise

    # The same done to the validation labels does change the choice.
    for task in TASKS:
        path = suite.root / f"inputs/{task}.npz"
        predicted = evaluator.outputs.predict(session.merge(chosen["CART"][0]), task, "val")
        edit_arrays(path, val_labels=(predicted + 1) % CLASSES)
    assert first_recipes(".", *search(load_suite(suite.path)))["CART"] != chosen["CART"]


def test_rows_are_the_test_accuracies_of_each_model(suite: Suite) -> None:
    session, evaluator = sessions(suite)
    recipes = first_recipes(".", session, evaluator)
    assert not knows_first_result(recipes, session, evaluator)
    events: list[tuple[int, int, str]] = []
    progress = Progress(lambda *event: events.append(event))
    frame = first_result(recipes, session, evaluator, progress=progress)
    titles = ["Base", "Weight average", "Task Arithmetic", "CART", "Experts"]
    assert list(dict.fromkeys(frame["model"])) == titles
    assert [event[0] for event in events] == [0, 1, 2, 3, 4, 5]
    assert {event[1] for event in events} == {5}
    fresh = Evaluator(suite)
    for title, (recipe, _) in recipes.items():
        mine = frame[frame["model"] == title]
        assert mine["correct"].tolist() == fresh.recipe(recipe, session, "test")["correct"].tolist()
    experts = frame[frame["model"] == "Experts"]
    assert experts["correct"].tolist() == fresh.experts(TASKS, "test")["correct"].tolist()
    assert suite.base is not None
    base = fresh.checkpoint(suite.base, TASKS, "test")["correct"].tolist()
    assert frame[frame["model"] == "Base"]["correct"].tolist() == base
    assert fresh.outputs.forward_images == 0
    assert knows_first_result(recipes, session, fresh)


@pytest.mark.parametrize("missing", ["recipe", "expert", "base"])
def test_it_is_known_only_when_every_part_is(suite: Suite, missing: str) -> None:
    session, evaluator = sessions(suite)
    recipes = first_recipes(".", session, evaluator)
    assert suite.base is not None
    for title, (recipe, _) in recipes.items():
        if missing != "recipe" or title != "CART":
            evaluator.recipe(recipe, session, "test")
    evaluator.experts(TASKS[:2] if missing == "expert" else TASKS, "test")
    evaluator.checkpoint(suite.base, TASKS, "val" if missing == "base" else "test")
    assert not knows_first_result(recipes, session, evaluator)
    first_result(recipes, session, evaluator)
    assert knows_first_result(recipes, session, evaluator)


def test_without_a_base(suite: Suite) -> None:
    bare = edit_document(suite.root, base=None)
    session, evaluator = sessions(bare)
    recipes = first_recipes(".", session, evaluator)
    assert list(recipes) == ["Weight average", "CART"]
    frame = first_result(recipes, session, evaluator)
    assert list(dict.fromkeys(frame["model"])) == ["Weight average", "CART", "Experts"]
    assert knows_first_result(recipes, session, evaluator)


def test_cancel(suite: Suite) -> None:
    session, evaluator = sessions(suite)
    progress = Progress()
    progress.listener = lambda done, total, label: progress.cancel.set() if done == 1 else None
    with pytest.raises(Cancelled):
        first_result(first_recipes(".", session, evaluator), session, evaluator, progress=progress)
    assert evaluator.outputs.forward_images == 3 * IMAGES  # the base, and nothing after it

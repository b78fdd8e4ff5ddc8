"""Published recipes: what they name, and how the suite that they were written for is found."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from merge_core import files
from merge_core.errors import RecipeError, SuiteError
from merge_core.files import cache_dir
from merge_core.merging.inputs import Inputs, find_suite, name_suite
from merge_core.merging.recipe import Recipe, load_recipe, make_recipe, recipe_from_yaml
from merge_core.places import is_place, name_without_place
from merge_core.suites.suite import Suite, load_suite

Make = Callable[..., Suite]


@pytest.fixture(autouse=True)
def another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is remembered from other tests."""
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "own cache"))


def renamed(suite: Suite, **fields: Any) -> Suite:
    suite.path.write_text(yaml.safe_dump(yaml.safe_load(suite.path.read_text()) | fields))
    return load_suite(suite.path)


def recipe_for(suite: Suite, **fields: Any) -> Recipe:
    return make_recipe({"suite": str(suite.path), "method": "average", **fields})


def test_it_is_read_back_and_determines_the_same_merge(
    synthetic_suite: Make, tmp_path: Path
) -> None:
    suite = renamed(synthetic_suite(), average=["conv*"])
    recipe = recipe_for(suite, tasks=["task2", "task0"])
    published = recipe.publish(suite)
    assert published.inputs is not None
    assert set(published.inputs.experts) == {"task0", "task2"}
    assert published.inputs.rules.average == ["conv*"]
    assert recipe_from_yaml(published.to_yaml()) == published
    assert published.digest(suite) == recipe.digest(suite)
    assert "inputs" not in published.to_query()
    (tmp_path / "recipe.yaml").write_text(published.to_yaml())
    found, loaded = load_recipe(tmp_path / "recipe.yaml")
    assert loaded.path == suite.path
    assert found == recipe.model_copy(update={"suite": suite.name})


@pytest.mark.parametrize("name", ["/home/me/models/mine", "~/mine", "..\\x\\mine", "C:\\x\\mine"])
def test_a_suite_that_is_called_by_a_path_is_named_without_it(
    synthetic_suite: Make, name: str
) -> None:
    suite = renamed(synthetic_suite(), name=name)
    assert name_suite(suite) == "mine"
    text = recipe_for(suite).publish(suite).to_yaml()
    assert name not in text
    assert is_place(name)
    assert not is_place("org/name")
    assert name_without_place("///") == "unnamed"


def test_the_bundled_suite_is_known_everywhere_and_no_other_passes_for_it(
    synthetic_suite: Make, tmp_path: Path
) -> None:
    bundled = load_suite("vision")
    recipe = make_recipe({"method": "average"})
    assert recipe.publish(bundled) == recipe
    own = renamed(synthetic_suite(), name="vision")
    published = recipe.publish(own)
    assert published.suite == "vision"
    (tmp_path / "recipe.yaml").write_text(published.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml")[1].path == own.path
    shutil.rmtree(cache_dir())
    with pytest.raises(RecipeError, match="expert 'task0': not in the suite now"):
        load_recipe(tmp_path / "recipe.yaml")


def test_where_it_is_looked_for(synthetic_suite: Make, tmp_path: Path) -> None:
    suite = synthetic_suite()
    inputs = Inputs.of(suite, suite.tasks)
    with pytest.raises(SuiteError, match="where that lies on this machine is not known"):
        find_suite(suite.name, inputs)
    inputs.remember(suite)
    assert find_suite(suite.name, inputs).path == suite.path
    # A path that stands in the recipe comes before what is remembered, and a given one before all.
    for place in ("beside", "given"):
        shutil.copytree(suite.root, tmp_path / place)
    beside = find_suite("beside", inputs, folder=tmp_path)
    assert beside.root == tmp_path / "beside"
    given = find_suite("beside", inputs, str(tmp_path / "given"), tmp_path)
    assert given.root == tmp_path / "given"
    suite.path.unlink()
    with pytest.raises(SuiteError, match="If the suite has moved, say where it is with --suite"):
        find_suite(suite.name, inputs)


def test_tasks_that_joined_since_are_not_merged(synthetic_suite: Make, tmp_path: Path) -> None:
    suite = synthetic_suite()
    (tmp_path / "recipe.yaml").write_text(recipe_for(suite).publish(suite).to_yaml())
    experts = yaml.safe_load(suite.path.read_text())["experts"]
    renamed(suite, experts=experts | {"late": dict(experts["task0"])})
    found, loaded = load_recipe(tmp_path / "recipe.yaml")
    assert found.tasks == suite.tasks
    assert "late" in loaded.tasks


@pytest.mark.parametrize(
    ("experts", "sources"),
    [
        ({"a": "0"}, {"a": "/etc/passwd"}),
        ({"a": "0"}, {"a": "hf://a/b@../c"}),
        ({"a b": "0"}, {"a b": "hf://org/name"}),
        ({"a": "0", "b": "1"}, {"a": "hf://org/name"}),
    ],
)
def test_a_strangers_recipe_that_names_no_members_on_the_hub(
    experts: dict[str, str], sources: dict[str, str]
) -> None:
    inputs = Inputs(experts=experts, sources=sources)
    assert inputs.hub_suite is None
    with pytest.raises(SuiteError, match="is not known"):
        find_suite("s", inputs)


def test_digests_of_all_members_are_taken_side_by_side(
    synthetic_suite: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = synthetic_suite(3, seed=5)
    meeting = threading.Barrier(4, timeout=20)  # three experts and the base are under way at once
    hashed = files.hash_of

    def hash_of(path: Path) -> Any:
        meeting.wait()
        return hashed(path)

    monkeypatch.setattr(files, "hash_of", hash_of)
    found = Inputs.of(suite, suite.tasks)
    assert suite.base is not None
    assert found.base == suite.base.digest
    assert found.experts == {task: suite.expert(task).digest for task in suite.tasks}

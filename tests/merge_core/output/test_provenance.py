"""What a merged file says of itself: written, read back, and held against the suite."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merge_core.errors import CheckpointError, RecipeError
from merge_core.factors.store import FactorStore
from merge_core.merging.recipe import Recipe, make_recipe
from merge_core.output.model_folder import merge_to_folder, merged_bytes
from merge_core.output.provenance import (
    Provenance,
    differences,
    provenance,
    read_provenance,
    rebuild_recipe,
)
from merge_core.suites.suite import Suite, load_suite
from merge_core.task_vectors import TensorGroups
from merge_core.yaml_text import dump_yaml

Make = Callable[..., Suite]
RICH: dict[str, Any] = {
    "method": "ties",
    "parameters": {"density": 0.5},
    "origin": "average",
    "weights": {"task0": 0.5},
    "overrides": [{"match": "blocks.*", "parameters": {"scale": 2.0}}],
    "then": [{"method": "svc"}],
    "seed": 3,
    "dtype": "bfloat16",
}


def recipe_for(suite: Suite, **fields: Any) -> Recipe:
    return make_recipe({"suite": str(suite.path), "method": "cart", **fields})


def move(suite: Suite, folder: Path, **fields: Any) -> Suite:
    """A copy of a suite elsewhere, with some fields of its file changed (None removes)."""
    shutil.copytree(suite.root, folder)
    path = folder / suite.path.name
    document = yaml.safe_load(path.read_text()) | fields
    path.write_text(dump_yaml({k: v for k, v in document.items() if v is not None}))
    return load_suite(path)


def test_it_comes_back_as_it_was_written(synthetic_suite: Make, tmp_path: Path) -> None:
    suite = synthetic_suite()
    recipe = recipe_for(suite, **RICH)
    about = provenance(recipe, suite, "svd")
    merge_to_folder(recipe, suite, tmp_path / "out", FactorStore(route="svd"))
    assert read_provenance(tmp_path / "out") == about
    assert read_provenance(tmp_path / "out" / "model.safetensors") == about
    assert rebuild_recipe(about, suite, str(suite.path)) == recipe
    content = merged_bytes(recipe, TensorGroups(suite, None, FactorStore()), suite)
    (tmp_path / "download.safetensors").write_bytes(content)
    download = read_provenance(tmp_path / "download.safetensors")
    assert download == about.model_copy(update={"decomposition": "gram"})


def test_shards_and_folders_of_tasks(synthetic_suite: Make, tmp_path: Path) -> None:
    suite = synthetic_suite()
    recipe = recipe_for(suite)
    merge_to_folder(recipe, suite, tmp_path / "shards", shard_bytes=400)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    index = tmp_path / "shards" / "model.safetensors.index.json"
    whole = provenance(recipe, suite)
    assert read_provenance(tmp_path / "shards") == read_provenance(index) == whole
    for path in (tmp_path / "shards").glob("*.safetensors"):
        assert read_provenance(path) == whole
    recipe = recipe_for(suite, method="tsv_c")
    merge_to_folder(recipe, suite, tmp_path / "tasks", shard_bytes=400)
    whole = provenance(recipe, suite)
    for task in suite.tasks:
        own = read_provenance(tmp_path / "tasks" / task)
        assert own == whole.model_copy(update={"task": task})
    assert rebuild_recipe(read_provenance(tmp_path / "tasks"), suite, "s.yaml").method == "tsv_c"


def test_an_expert_called_base_is_not_the_base(synthetic_suite: Make, tmp_path: Path) -> None:
    suite = synthetic_suite()
    experts = {"base" if t == "task0" else t: {"weights": f"{t}.safetensors"} for t in suite.tasks}
    odd = move(suite, tmp_path / "odd", experts=experts)
    about = provenance(recipe_for(odd), odd)
    assert suite.base is not None
    assert about.inputs["base"] == suite.expert("task0").digest != about.base
    assert about.base == suite.base.digest
    merge_to_folder(recipe_for(odd), odd, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| base | `{about.inputs['base']}` |" in card
    assert f"| (base) | `{about.base}` |" in card
    assert differences(read_provenance(tmp_path / "out"), odd) == []


def test_without_a_base(synthetic_suite: Make, tmp_path: Path) -> None:
    suite = synthetic_suite()
    bare = move(suite, tmp_path / "bare", base=None)
    about = provenance(recipe_for(bare), bare)
    assert about.base is None
    assert "base" not in json.loads(about.to_header())
    assert differences(about, bare) == []
    (line,) = differences(about, suite)
    assert suite.base is not None
    assert line == f"base: digest was none, is {suite.base.digest[:12]}"


def test_each_difference_is_named(synthetic_suite: Make, tmp_path: Path) -> None:
    suite = synthetic_suite()
    assert suite.base is not None
    about = provenance(recipe_for(suite, tasks=["task2", "task0"]), suite)
    assert list(about.inputs) == ["task0", "task2"]
    assert differences(about, move(suite, tmp_path / "same")) == []

    def other(name: str) -> Suite:
        folder = tmp_path / name
        shutil.copytree(suite.root, folder)
        state = load_file(folder / f"{name}.safetensors")
        state["norm.weight"] = state["norm.weight"] + 1
        save_file(state, folder / f"{name}.safetensors")
        return load_suite(folder / suite.path.name)

    changed = other("task2")
    was, now = suite.expert("task2").digest[:12], changed.expert("task2").digest[:12]
    assert differences(about, changed) == [f"expert 'task2': digest was {was}, is {now}"]
    changed = other("base")
    assert changed.base is not None
    was, now = suite.base.digest[:12], changed.base.digest[:12]
    assert differences(about, changed) == [f"base: digest was {was}, is {now}"]
    assert differences(about, other("task1")) == []  # not merged

    experts = suite.spec.model_dump(exclude_none=True)["experts"]
    fewer = {task: spec for task, spec in experts.items() if task != "task0"}
    changed = move(suite, tmp_path / "fewer", experts=fewer)
    assert differences(about, changed) == ["expert 'task0': not in the suite now"]
    turned = dict(reversed(experts.items()))
    changed = move(suite, tmp_path / "turned", experts=turned)
    (line,) = differences(about, changed)
    assert line == "order of experts: was task0, task2, is task2, task0"
    changed = move(suite, tmp_path / "patterns", average=["conv*"])
    (line,) = differences(about, changed)
    assert "'decompose', 'average' or 'vocabulary'" in line

    with pytest.raises(RecipeError, match="Put them back, or name the suite") as caught:
        rebuild_recipe(about, changed, "x")
    assert line in str(caught.value)
    assert str(changed.path) in str(caught.value)


def test_experts_that_joined_since_stay_out(synthetic_suite: Make, tmp_path: Path) -> None:
    suite = synthetic_suite()
    about = provenance(recipe_for(suite), suite)
    assert about.recipe.tasks is None
    experts = suite.spec.model_dump(exclude_none=True)["experts"]
    more = move(suite, tmp_path / "more", experts=experts | {"late": experts["task0"]})
    again = rebuild_recipe(about, more, "elsewhere.yaml")
    assert again.tasks == suite.tasks
    assert again.suite == "elsewhere.yaml"
    assert again.digest(more) == about.digest == recipe_for(suite).digest(suite)
    assert rebuild_recipe(about, suite, "elsewhere.yaml").tasks is None


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The merged file with its note changed."""
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        note = json.loads(file.metadata()["mergescope"])
    note = change(note) or note
    text = note if isinstance(note, str) else json.dumps(note)
    save_file(load_file(path), folder / "other.safetensors", {"mergescope": text})
    return folder / "other.safetensors"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda note: "{", CheckpointError, "is not JSON"),
        (lambda note: "[" * 100_000, CheckpointError, "is not JSON"),
        (lambda note: "3", CheckpointError, "cannot be read"),
        (lambda note: note.pop("inputs") and None, CheckpointError, "inputs: this field is req"),
        (lambda note: note.update(inputs={}), CheckpointError, "inputs"),
        (lambda note: note.update(later=1), CheckpointError, "later: this field is not known"),
        (lambda note: note.update(decomposition="qr"), CheckpointError, "decomposition"),
        (lambda note: note["recipe"].update(method="new"), RecipeError, "no method 'new'"),
        (lambda note: note["recipe"].update(extra=1), CheckpointError, "recipe.extra"),
    ],
)
def test_notes_that_cannot_be_read(
    synthetic_suite: Make, tmp_path: Path, change: Any, error: type[Exception], words: str
) -> None:
    suite = synthetic_suite()
    merge_to_folder(recipe_for(suite), suite, tmp_path / "out")
    with pytest.raises(error, match=words):
        read_provenance(rewrite(tmp_path / "out", change))


def test_foreign_weights(synthetic_suite: Make, tmp_path: Path) -> None:
    suite = synthetic_suite()
    with pytest.raises(CheckpointError, match="no recipe is in its header"):
        read_provenance(suite.root / "task0.safetensors")
    torch.save(load_file(suite.root / "task0.safetensors"), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="no recipe is in its header"):
        read_provenance(tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="does not exist"):
        read_provenance(tmp_path / "missing.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no weight file"):
        read_provenance(tmp_path / "empty")


def test_the_note_is_plain_json(synthetic_suite: Make) -> None:
    suite = synthetic_suite()
    about = provenance(recipe_for(suite, **RICH), suite)
    note = json.loads(about.to_header())
    assert set(note) == {"recipe", "digest", "inputs", "base", "decomposition", "versions"}
    assert Provenance.model_validate(note) == about

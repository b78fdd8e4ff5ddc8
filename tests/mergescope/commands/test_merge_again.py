"""A merged model is made again from its own header: the same bits, or a line that says why not."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from analysis.evaluation.evaluator import Evaluator
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import load_recipe
from merge_core.output import provenance
from merge_core.output.model_folder import merge_to_folder
from mergescope import cli
from tests.evaluable import TASKS, copy_evaluable, edit_arrays

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
    copy_evaluable(tmp_path / "suite")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "suite"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Run:
    """Run a command in this process; gives its exit code and what it says on standard error."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["mergescope", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert isinstance(caught.value.code, int)
        return caught.value.code, capsys.readouterr().err

    return call


def write_recipe(folder: Path, **fields: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"suite": ".", "method": "cart", **fields}))
    return path


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, byte by byte."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


RECIPES: list[dict[str, Any]] = [
    {"parameters": {"rank": 0.3, "scale": 1.5}, "then": [{"method": "svc"}]},
    {
        "method": "dare_ties",
        "seed": 5,
        "dtype": "bfloat16",
        "tasks": ["lines", "digits"],
        "weights": {"lines": 0.7},
        "overrides": [{"match": "blocks.*", "parameters": {"scale": 0.4}}],
    },
    {"method": "tsv_m", "origin": "average"},
    {"method": "cart_indexing", "parameters": {"rank": 2}},
    {"method": "regmean", "parameters": {"examples": 16}},
    {"method": "adamerging", "parameters": {"steps": 2, "learning_rate": 0.05}, "seed": 1},
]


@pytest.mark.parametrize("fields", RECIPES, ids=lambda fields: fields.get("method", "cart"))
def test_the_same_bits(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    recipe = write_recipe(folder, **fields)
    assert run("merge", recipe, "-o", "out")[0] == 0
    recipe.unlink()
    (model,) = sorted(Path("out").rglob("*.safetensors"))[:1]
    assert run("merge", model, "-o", "here") == (0, "")
    assert content(Path("here")) == content(Path("out"))
    # On another machine nothing is remembered of where the suite lies.
    monkeypatch.setenv("MERGESCOPE_CACHE", str(folder.parent / "another cache"))
    sources = {"by file": model, "by folder": "out", "by recipe": "out/recipe.yaml"}
    code, error = run("merge", "out", "-o", "x")
    assert (code, error.count("\n")) == (2, 1)
    assert "Say where its suite.yaml is with --suite" in error
    for name, source in sources.items():
        assert run("merge", source, "-o", name, "--suite", "suite") == (0, "")
        assert content(Path(name)) == content(Path("out"))
    other = write_recipe(folder, method="task_arithmetic", parameters={"scale": 0.123})
    assert run("merge", other, "-o", "other")[0] == 0  # the comparison can tell
    assert content(Path("other")) != content(Path("out"))


def test_what_is_learnt_is_what_the_library_learns(folder: Path, run: Run) -> None:
    path = write_recipe(folder, method="regmean", parameters={"examples": 16})
    assert run("merge", path, "-o", "out")[0] == 0
    recipe, suite = load_recipe(path)
    session = MergeSession(suite, None, FactorStore())
    learned = Evaluator(suite).learn(recipe, session)
    expected = session.merge(recipe, learned=learned)
    merged = load_file("out/model.safetensors")
    assert all(torch.equal(merged[name], value) for name, value in expected.items())
    average = sum(load_file(folder / f"experts/{t}.safetensors")["norm.weight"] for t in TASKS) / 3
    torch.testing.assert_close(merged["norm.weight"], average)


def test_shards(folder: Path, run: Run) -> None:
    recipe, suite = load_recipe(write_recipe(folder))
    merge_to_folder(recipe, suite, Path("out"), shard_bytes=3000)
    shards = sorted(Path("out").glob("*.safetensors"))
    assert len(shards) > 2
    merged: dict[str, Any] = {}
    for shard in shards:
        merged |= load_file(shard)
    for place, source in enumerate(("out", "out/model.safetensors.index.json", shards[1])):
        assert run("merge", source, "-o", f"again {place}")[0] == 0
        again = load_file(f"again {place}/model.safetensors")
        assert sorted(again) == sorted(merged)
        assert all(torch.equal(again[name], value) for name, value in merged.items())


def test_the_decomposition_is_remembered(folder: Path, run: Run) -> None:
    recipe = write_recipe(folder, parameters={"rank": 3})
    for name, options in (("gram", []), ("svd", ["--full-svd"])):
        assert run("merge", recipe, "-o", name, *options)[0] == 0
        assert run("merge", name, "-o", f"{name} again")[0] == 0
        assert content(Path(f"{name} again")) == content(Path(name))
    models = [Path(name, "model.safetensors") for name in ("gram", "svd")]
    assert models[0].read_bytes() != models[1].read_bytes()
    assert run("merge", "gram", "-o", "over", "--full-svd")[0] == 0
    assert content(Path("over")) == content(Path("svd"))


def test_a_suite_that_moved(folder: Path, run: Run) -> None:
    assert run("merge", write_recipe(folder), "-o", "out")[0] == 0
    shutil.move(folder, "elsewhere")
    code, error = run("merge", "out", "-o", "again")
    assert code == 2
    assert str(folder) in error
    assert "say where it is with --suite" in error
    assert not Path("again").exists()
    assert run("merge", "out", "-o", "again", "--suite", "elsewhere") == (0, "")
    before, after = (load_file(f"{name}/model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(after[name], value) for name, value in before.items())
    # What was made there knows where that is.
    assert run("merge", "again", "-o", "third") == (0, "")
    assert content(Path("third")) == content(Path("again"))
    code, error = run("merge", "out", "-o", "x", "--suite", "nowhere")
    assert code == 2
    assert "nowhere" in error
    assert "with --suite" not in error


def add_one(path: Path) -> None:
    state = load_file(path)
    save_file({**state, "norm.weight": state["norm.weight"] + 1}, path)


def test_inputs_that_changed(folder: Path, run: Run) -> None:
    assert run("merge", write_recipe(folder), "-o", "out")[0] == 0
    about = provenance.read_provenance(Path("out"))
    add_one(folder / "experts/shapes.safetensors")
    code, error = run("merge", "out/model.safetensors", "-o", "again")
    assert code == 2
    assert error.count("\n") == 1
    assert f"expert 'shapes': digest was {about.inputs['shapes'][:12]}, is " in error
    assert "'digits'" not in error
    assert "base" not in error
    assert "--suite" in error
    add_one(folder / "base.safetensors")
    code, error = run("merge", "out", "-o", "again")
    assert about.base is not None
    assert f"; base: digest was {about.base[:12]}, is " in error
    assert not Path("again").exists()


def test_data_count_for_what_learns_from_them(folder: Path, run: Run) -> None:
    learns = {"method": "regmean", "parameters": {"examples": 16}}
    assert run("merge", write_recipe(folder, **learns), "-o", "learnt")[0] == 0
    assert run("merge", write_recipe(folder), "-o", "plain")[0] == 0
    with np.load(folder / "inputs/lines.npz") as archive:
        images = archive["val_images"][::-1].copy()
    edit_arrays(folder / "inputs/lines.npz", val_images=images)
    code, error = run("merge", "learnt", "-o", "again")
    assert code == 2
    assert "data of task 'lines': digest was " in error
    assert "digits" not in error
    assert run("merge", "plain", "-o", "again") == (0, "")


def test_other_versions_are_noted(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("merge", write_recipe(folder), "-o", "out")[0] == 0
    now = provenance.versions()
    monkeypatch.setattr(provenance, "versions", lambda: {**now, "torch": "99.0"})
    code, error = run("merge", "out", "-o", "again")
    assert code == 0
    assert error == (
        f"note: made with torch {now['torch']} (now 99.0); the last bits of the weights may "
        "differ.\n"
    )


def test_what_is_not_a_merged_model(folder: Path, run: Run) -> None:
    for source in ("suite", "suite/experts/digits.safetensors"):
        code, error = run("merge", source, "-o", "x")
        assert code == 2
        assert f"{source} does not say how it was made" in error
    code, error = run("merge", write_recipe(folder), "-o", "x", "--suite", folder)
    assert code == 2
    assert "--suite goes with a merged model" in error
    assert "edit 'suite:'" in error
    assert not Path("x").exists()


def test_no_file_names_a_place_on_this_machine(folder: Path, run: Run) -> None:
    for name, options in (("out", []), ("thin", ["--as-adapter", "2"])):
        assert run("merge", write_recipe(folder), "-o", name, *options)[0] == 0
    assert run("merge", write_recipe(folder, method="cart_indexing"), "-o", "each")[0] == 0
    assert run("card", "out", "--limit", 8) == (0, "")
    for output in ("out", "thin", "each"):
        for name, data in content(Path(output)).items():
            for place in (folder.parent, Path.home(), Path.cwd()):
                assert str(place).encode() not in data, (output, name)
            assert b"../" not in data, (output, name)


def test_a_published_recipe_with_another_suite(folder: Path, run: Run) -> None:
    """It is run where its suite lies, by whatever way that is told, and on nothing else."""
    assert run("merge", write_recipe(folder), "-o", "out")[0] == 0
    published = yaml.safe_load(Path("out/recipe.yaml").read_text())
    assert published["suite"] == yaml.safe_load((folder / "suite.yaml").read_text())["name"]
    about = provenance.read_provenance(Path("out"))
    assert published["inputs"]["experts"] == about.inputs
    assert published["inputs"]["base"] == about.base
    shutil.copytree("out", "sent")
    shutil.copytree(folder, "sent/suite")
    Path("sent/recipe.yaml").write_text(yaml.safe_dump({**published, "suite": "suite"}))
    shutil.move(folder, "elsewhere")
    assert run("merge", "sent/recipe.yaml", "-o", "again") == (0, "")
    assert content(Path("again")) == content(Path("out"))
    add_one(Path("elsewhere/experts/lines.safetensors"))
    code, error = run("merge", "out/recipe.yaml", "-o", "x", "--suite", "elsewhere")
    assert code == 2
    assert "expert 'lines': digest was " in error
    assert "remove 'inputs:' from the recipe" in error
    document = yaml.safe_load(Path("elsewhere/suite.yaml").read_text())
    Path("sent/suite/suite.yaml").write_text(yaml.safe_dump({**document, "average": ["norm*"]}))
    code, error = run("merge", "sent/recipe.yaml", "-o", "x")
    assert code == 2
    assert "'decompose', 'average' or 'vocabulary' of suite.yaml: not as at that time" in error
    del published["inputs"]
    Path("own.yaml").write_text(yaml.safe_dump({**published, "suite": "elsewhere"}))
    assert run("merge", "own.yaml", "-o", "other")[0] == 0
    assert not Path("x").exists()

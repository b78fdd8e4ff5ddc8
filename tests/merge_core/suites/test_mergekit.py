"""A file of mergekit, given as a suite or as a recipe, is told from a wrong one of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from merge_core.errors import MergeScopeError, RecipeError, SuiteError
from merge_core.merging.recipe import load_recipe, recipe_from_yaml
from merge_core.methods import methods
from merge_core.suites.mergekit import NAMES, explain_mergekit
from merge_core.suites.suite import load_suite
from mergescope.commands.merge import merge

# As in mergekit's own examples.
TIES = """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters: {density: [1, 0.7, 0.1], weight: 1.0}
  - model: garage-bAInd/Platypus2-13B
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters: {normalize: true, int8_mask: true}
dtype: float16
"""
OTHERS = {
    "linear": "models: [{model: a, parameters: {weight: 1.0}}]\nmerge_method: linear\n",
    "slices": "slices: [{sources: [{model: a, layer_range: [0, 32]}]}]\nmerge_method: slerp\n",
    "passthrough": "slices: [{sources: [{model: a, layer_range: [0, 8]}]}]\ndtype: bfloat16\n",
    "moe": "base_model: a\ngate_mode: hidden\nexperts: [{source_model: b}]\n",
    "models": "models: [{model: a}, {model: b}]\n",
    "unknown": "merge_method: some_new_one\nmodels: [{model: a}]\n",
    "no text": "merge_method: [1]\nmodels: 3\n",
}


@pytest.mark.parametrize("text", [TIES, *OTHERS.values()], ids=["ties", *OTHERS])
def test_it_is_said_what_it_is_and_what_to_do(tmp_path: Path, text: str) -> None:
    path = tmp_path / "merge.yml"
    path.write_text(text)
    reads: list[tuple[type[MergeScopeError], Any]] = [
        (SuiteError, lambda: load_suite(path)),
        (RecipeError, lambda: load_recipe(path)),
        (RecipeError, lambda: recipe_from_yaml(text)),
        (RecipeError, lambda: merge(path, tmp_path / "out")),
    ]
    for error, read in reads:
        with pytest.raises(error, match=r"is a file of mergekit.*suite\.yaml.*recipe\.yaml") as e:
            read()
        assert "field" not in str(e.value)
        assert "\n" not in str(e.value)


def test_the_method_is_named_as_it_is_here() -> None:
    assert "'method: ties'" in (explain_mergekit({"merge_method": "ties"}) or "")
    assert set(NAMES.values()) <= set(methods())
    for theirs, ours in NAMES.items():
        assert f"'method: {ours}'" in (explain_mergekit({"merge_method": theirs}) or "")
    assert "a 'method:' of" in (explain_mergekit({"merge_method": "passthrough"}) or "")


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {"name": "s", "experts": {"a": {"weights": "a"}}},
        {"suite": "vision", "method": "ties"},
        {"models": {"model": "a"}},
        {"experts": ["a"]},
        {"slices": []},
    ],
)
def test_nothing_else_is_taken_for_one(document: Any) -> None:
    assert explain_mergekit(document) is None

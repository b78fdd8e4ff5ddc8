"""LoRA adapters as experts of a suite: what they merge to, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_core.checkpoints.lora import is_adapter
from merge_core.errors import CheckpointError
from merge_core.factors.low_rank import as_matrix
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import make_recipe
from merge_core.suites.preflight import preflight
from merge_core.suites.suite import Suite, load_suite
from merge_core.task_vectors import Origin, TensorGroups
from tests.merge_core.adapted_models import (
    Mixed,
    State,
    adapter,
    rewrite,
    state_of,
    two_adapters,
    write_adapted_suite,
)

A = "base_model.model.wide.lora_A.weight"


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return two_adapters(tmp_path)


def merge_suite(suite: Suite, method: str, tasks: list[str], **parameters: Any) -> State:
    recipe = make_recipe(
        {"suite": str(suite.path), "tasks": tasks, "method": method, "parameters": parameters}
    )
    return MergeSession(suite, tuple(tasks), FactorStore()).merge(recipe)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("task_arithmetic", {"scale": 1}),
        ("average", {}),
        ("low_rank_task_arithmetic", {"scale": 1, "rank": 2}),
        ("cart", {}),
        ("tsv_m", {"scale": 1}),
    ],
)
def test_an_adapter_alone_gives_itself_back(
    suite: Suite, tmp_path: Path, method: str, parameters: dict[str, Any]
) -> None:
    expert = suite.expert("digits")
    for name, value in merge_suite(suite, method, ["digits"], **parameters).items():
        torch.testing.assert_close(value, expert.tensor(name), rtol=1e-5, atol=2e-6, msg=name)


def test_two_adapters_in_task_arithmetic(suite: Suite) -> None:
    result = merge_suite(suite, "task_arithmetic", ["digits", "letters"], scale=0.4)
    base = suite.base
    assert base is not None
    for name, value in result.items():
        experts = [suite.expert(task).tensor(name).double() for task in suite.tasks]
        start = base.tensor(name).double()
        exact = start + 0.4 * sum(expert - start for expert in experts)
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("origin", "rank", "whole"),
    # Of rank 2 the three updates of "wide" fill all six directions: there is nothing to save.
    [("base", 1, 0), ("base", 2, 0), ("average", 1, 0), ("average", 2, 3)],
)
def test_thin_matrices_are_not_decomposed_whole(
    tmp_path: Path, origin: Origin, rank: int, whole: int
) -> None:
    torch.manual_seed(9)
    model = Mixed()
    for seed, task in enumerate("abc"):
        layers = ["wide", "conv"] if task == "a" else ["wide"]
        adapter(model, tmp_path / task, seed, r=rank, target_modules=layers)
    suite = load_suite(write_adapted_suite(tmp_path, state_of(model), {t: t for t in "abc"}))
    store = FactorStore()
    groups = {group.name: group for group in TensorGroups(suite, None, store)}
    for name in ("wide.weight", "conv.weight", "square.weight"):
        states = [suite.expert(task).tensor(name).double() for task in suite.tasks]
        about = state_of(model)[name].double() if origin == "base" else sum(states) / 3
        terms, spectra = groups[name].truncations(origin, 2), groups[name].singular_values(origin)
        for term, found, state in zip(terms, spectra, states, strict=True):
            update = as_matrix(state - about)
            torch.testing.assert_close(term.truncate(9).double(), update, rtol=0, atol=2e-6)
            values = torch.linalg.svdvals(update).float()
            torch.testing.assert_close(found, values, rtol=1e-5, atol=2e-6)
    assert store.decompositions == whole


def test_an_adapter_beside_a_whole_model(tmp_path: Path) -> None:
    torch.manual_seed(11)
    model = Mixed()
    adapter(model, tmp_path / "a", r=1, target_modules=["wide"])
    save_file(state_of(Mixed()), tmp_path / "b.safetensors")
    names = {"a": "a", "b": "b.safetensors"}
    suite = load_suite(write_adapted_suite(tmp_path, state_of(model), names))
    first, second = (suite.expert(task).tensor("wide.weight").double() for task in "ab")
    for group in TensorGroups(suite, None, FactorStore()):
        if group.name == "wide.weight":
            values = torch.linalg.svdvals((first - second) / 2).float()
            for found in group.singular_values("average"):
                torch.testing.assert_close(found, values, rtol=1e-5, atol=1e-6)


def test_preflight_says_what_adapters_are(suite: Suite) -> None:
    report = preflight(suite)
    assert report.differences == ()
    assert report.notes == tuple(
        f"{task} is the base with a LoRA adapter of rank 2, alpha 8, on 3 matrices"
        for task in suite.tasks
    )
    path = suite.root / "base.safetensors"
    half = {n: v.bfloat16() for n, v in load_file(path).items()}
    save_file(half, path)
    report = preflight(load_suite(suite.path))
    assert report.differences == ()
    assert {row.dtype for row in report.plan} == {"float32"}
    assert "written in float32" in report.notes[-1]


def test_content_decides_the_digest(suite: Suite, tmp_path: Path) -> None:
    digests = {suite.expert(task).digest for task in suite.tasks}
    assert len(digests) == 2
    again = load_suite(suite.path)
    assert {again.expert(task).digest for task in again.tasks} == digests
    config = tmp_path / "digits" / "adapter_config.json"
    document = json.loads(config.read_text())
    config.write_text(json.dumps({**document, "base_model_name_or_path": "elsewhere"}))
    assert load_suite(suite.path).expert("digits").digest in digests
    config.write_text(json.dumps({**document, "lora_alpha": 9}))
    assert load_suite(suite.path).expert("digits").digest not in digests


def test_suites_without_a_base_and_bases_that_are_adapters(suite: Suite) -> None:
    text = suite.path.read_text()
    suite.path.write_text(text.replace("base: base.safetensors\n", ""))
    with pytest.raises(CheckpointError, match=r"expert 'digits'.*Add 'base:'"):
        load_suite(suite.path).expert("digits")
    suite.path.write_text(text.replace("base: base.safetensors", "base: letters"))
    with pytest.raises(CheckpointError, match="is an adapter, which is no model"):
        _ = load_suite(suite.path).base
    assert is_adapter(suite.root / "digits")
    assert not is_adapter(suite.root)
    assert not is_adapter(Path("x" * 5000))


def test_files_that_change_are_noticed(suite: Suite) -> None:
    expert = suite.expert("digits")
    expert.check_unchanged()
    rewrite(suite.root / "digits", lambda s: s.update({A: torch.ones(2, 6)}))
    with pytest.raises(CheckpointError, match="has changed since"):
        expert.check_unchanged()
    with pytest.raises(CheckpointError, match="has changed since"):
        expert.tensor("wide.weight")
    (suite.root / "base.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"base\.safetensors has changed since"):
        suite.expert("letters").check_unchanged()

"""Merges written as adapters: PEFT loads them, and they are the merge or its best truncation."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from merge_core.checkpoints.lora import AdaptedCheckpoint
from merge_core.errors import OutputError, RecipeError, SuiteError
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import Recipe, make_recipe
from merge_core.output.adapter_draft import AdapterRank, AdapterReport
from merge_core.output.lora import merge_to_adapter
from merge_core.suites.suite import Suite, load_suite
from tests.merge_core.adapted_models import (
    Mixed,
    State,
    adapter,
    gpt2,
    shake,
    state_of,
    write_adapted_suite,
)

ALL = AdapterRank.parse("1.0")
Shake = Callable[[nn.Module, int], None]


def recipe_of(suite: Suite, method: str, **fields: Any) -> Recipe:
    return make_recipe({"suite": str(suite.path), "method": method, **fields})


def merged_state(recipe: Recipe, suite: Suite) -> State:
    return MergeSession(suite, suite.tasks, FactorStore()).merge(recipe)


def load_by_peft(model: nn.Module, folder: Path) -> State:
    """The model with the adapter as PEFT loads and merges it; nothing may be left over."""
    with warnings.catch_warnings(record=True) as told:
        adapted = PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
    assert not [w for w in told if "keys" in str(w.message)]
    return state_of(adapted.merge_and_unload())


def assert_states(found: State, expected: State, atol: float = 3e-6) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=atol, msg=name)


def of_adapters(folder: Path, model: nn.Module, tasks: str = "ab", **options: Any) -> Suite:
    """A suite of adapters of one model, a letter each."""
    for seed, task in enumerate(tasks):
        adapter(model, folder / task, seed, **options)
    return load_suite(write_adapted_suite(folder, state_of(model), {task: task for task in tasks}))


def of_models(folder: Path, model: nn.Module) -> Suite:
    """A suite of two fully fine-tuned models."""
    for seed, task in enumerate(["a", "b"]):
        tuned = copy.deepcopy(model).requires_grad_()
        shake(tuned, seed)
        folder.mkdir(exist_ok=True)
        save_file(state_of(tuned), folder / f"{task}.safetensors")
    names = {task: f"{task}.safetensors" for task in "ab"}
    return load_suite(write_adapted_suite(folder, state_of(model), names))


EVERY_LAYER = ["embed", "conv", "point", "square", "wide"]


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "task_arithmetic", "parameters": {"scale": 0.7}},
        {"method": "average"},
        {"method": "cart", "parameters": {"rank": 2}},
        {"method": "low_rank_task_arithmetic", "parameters": {"rank": 2, "scale": 1}},
    ],
    ids=lambda fields: fields["method"],
)
def test_a_merge_of_adapters_is_an_adapter_again(tmp_path: Path, fields: dict[str, Any]) -> None:
    torch.manual_seed(5)
    model = Mixed()
    suite = of_adapters(tmp_path / "in", model, r=1, target_modules=EVERY_LAYER, bias="lora_only")
    recipe = recipe_of(suite, **fields)
    report = merge_to_adapter(recipe, suite, tmp_path / "out", ALL)
    # Two updates of rank 1 make one of rank 2 at most, whatever rank was allowed.
    assert set(report.ranks.values()) <= {1, 2}
    assert report.energy == pytest.approx(1)
    expected = merged_state(recipe, suite)
    assert_states(load_by_peft(model, tmp_path / "out"), expected)
    assert suite.base is not None
    again = AdaptedCheckpoint(tmp_path / "out", suite.base)
    assert_states({name: again.tensor(name) for name in again}, expected)


def test_layers_of_gpt2_and_names_of_the_adapters(tmp_path: Path) -> None:
    model = gpt2()
    options: dict[str, Any] = {"r": 1, "target_modules": ["c_attn", "c_proj", "wte"]}
    suite = of_adapters(tmp_path / "in", model, fan_in_fan_out=True, **options)
    bare = {n.removeprefix("transformer."): v for n, v in state_of(model).items()}
    save_file(bare, tmp_path / "in" / "base.safetensors")
    suite = load_suite(suite.path)
    recipe = recipe_of(suite, "average")
    merge_to_adapter(recipe, suite, tmp_path / "out", ALL)
    expected = {
        name if name == "lm_head.weight" else f"transformer.{name}": value
        for name, value in merged_state(recipe, suite).items()
    }
    assert_states(load_by_peft(model, tmp_path / "out"), expected)


def roberta() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        vocab_size=13,
        max_position_embeddings=8,
        num_labels=3,
    )
    torch.manual_seed(4)
    model: nn.Module = transformers.RobertaForSequenceClassification(config)
    return model


@pytest.mark.parametrize("make", [gpt2, roberta])
def test_whole_models_of_transformers(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    model = make()
    suite = of_models(tmp_path / "in", model)
    recipe = recipe_of(suite, "average")
    report = merge_to_adapter(recipe, suite, tmp_path / "out", ALL)
    assert_states(load_by_peft(model, tmp_path / "out"), merged_state(recipe, suite))
    assert all(name.endswith("bias") for name in report.in_base)
    assert sum(".h." in name or ".layer." in name for name in report.ranks) in (6, 8)


class Deep(nn.Module):
    """Layers whose names end alike, an attention of torch's own, counters and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.pre_norm = nn.LayerNorm(6)
        self.bn = nn.BatchNorm1d(6)
        self.attn = nn.MultiheadAttention(6, 2)
        self.token = nn.Parameter(torch.ones(6))
        self.blocks = nn.ModuleList([Mixed(), Mixed()])

    def forward(self, x: Tensor) -> Tensor:
        return x


class Network(nn.Module):
    """A network that runs: torch's attention reads its output layer's weight by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.norm = nn.LayerNorm(6)
        self.attn = nn.MultiheadAttention(6, 2)
        self.wide = nn.Linear(6, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.scale * self.norm(x)
        out: Tensor = self.wide(self.attn(x, x, x)[0])
        return out


@torch.no_grad()
def test_the_adapter_works_before_peft_merges_it(tmp_path: Path) -> None:
    torch.manual_seed(10)
    model = Network().eval()
    suite = of_models(tmp_path / "in", model)
    recipe = recipe_of(suite, "average")
    report = merge_to_adapter(recipe, suite, tmp_path / "out", ALL)
    adapted = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "out")).eval()
    x = torch.randn(5, 2, 6)
    found = adapted(x)
    model.load_state_dict(merged_state(recipe, suite))
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)
    assert set(report.in_base) == {
        "scale",
        "attn.in_proj_weight",
        "attn.in_proj_bias",
        "wide.bias",
    }


def test_a_merge_of_whole_models(tmp_path: Path) -> None:
    torch.manual_seed(6)
    model = Deep()
    suite = of_models(tmp_path / "in", model)
    recipe = recipe_of(suite, "task_arithmetic", parameters={"scale": 0.4})
    report = merge_to_adapter(recipe, suite, tmp_path / "out", ALL)
    expected = merged_state(recipe, suite)
    assert_states(load_by_peft(model, tmp_path / "out"), expected)
    assert {
        f"blocks.{i}.{layer}.weight" for i in (0, 1) for layer in ("square", "wide", "head")
    } == set(report.ranks)
    assert set(report.ranks) | set(report.whole) == {
        name for name in expected if not torch.equal(expected[name], state_of(model)[name])
    }
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert "bn" in config["modules_to_save"]
    # "norm" is also the end of "pre_norm", which PEFT would copy with it.
    assert "pre_norm" in config["modules_to_save"]
    assert "norm" not in config["modules_to_save"]
    assert {"token", "norm.weight", "attn.in_proj_weight"} <= set(report.in_base)
    change = expected["token"].double() - 1
    assert report.whole["token"] == pytest.approx(float(change.norm()) / 6**0.5)
    text = report.sentences()
    assert "PEFT writes them into the base" in text
    assert text in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("text", "kept"), [("2", 2), ("0.5", 3), ("1", 1), ("energy:0.9", None)])
def test_truncation_is_the_best_of_its_rank(tmp_path: Path, text: str, kept: int | None) -> None:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(6, 9, bias=False), nn.Linear(9, 9, bias=False))
    suite = of_models(tmp_path / "in", model)
    recipe = recipe_of(suite, "task_arithmetic", parameters={"scale": 0.5})
    report = merge_to_adapter(recipe, suite, tmp_path / "out", AdapterRank.parse(text))
    found, total, left = load_by_peft(model, tmp_path / "out"), 0.0, 0.0
    for name, merged in merged_state(recipe, suite).items():
        start = state_of(model)[name].double()
        U, S, Vh = torch.linalg.svd(merged.double() - start, full_matrices=False)
        if kept is None:
            share = S.square().cumsum(0) / S.square().sum()
            k = int((share < 0.9).sum()) + 1
        else:
            k = 4 if (text, name) == ("0.5", "1.weight") else kept  # floor of 0.5 · 9
        assert report.ranks[name] == k
        best = start + (U[:, :k] * S[:k]) @ Vh[:k]
        torch.testing.assert_close(found[name].double(), best, rtol=1e-5, atol=1e-6)
        total, left = total + float(S.square().sum()), left + float(S[k:].square().sum())
    assert report.energy == pytest.approx(1 - left / total, abs=1e-6)


def test_tensors_equal_but_for_rounding_are_left_out(tmp_path: Path) -> None:
    model = Mixed()
    suite = of_adapters(tmp_path / "in", model, "abcdefg", r=1, target_modules=["wide"])
    # A mean of seven equal numbers may be off in the last bit.
    average = recipe_of(suite, "average")
    report = merge_to_adapter(average, suite, tmp_path / "out", ALL)
    square = state_of(model)["square.weight"]
    assert not torch.equal(merged_state(average, suite)["square.weight"], square)
    assert (set(report.ranks), report.whole) == ({"wide.weight"}, {})
    assert len(load_file(tmp_path / "out" / "adapter_model.safetensors")) == 2
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["bias"], config["modules_to_save"]) == ("none", None)
    nothing = recipe_of(suite, "task_arithmetic", parameters={"scale": 0})
    with pytest.raises(OutputError, match="no update for an adapter to hold"):
        merge_to_adapter(nothing, suite, tmp_path / "none", ALL)
    assert not (tmp_path / "none").exists()


def test_the_dtype_is_the_recipes(tmp_path: Path) -> None:
    model = Mixed()
    suite = of_adapters(tmp_path / "in", model, r=1, target_modules=["wide"])
    recipe = recipe_of(suite, "average", dtype="bfloat16")
    merge_to_adapter(recipe, suite, tmp_path / "out", ALL)
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    huge = recipe_of(suite, "task_arithmetic", parameters={"scale": 10}, dtype="float16")
    weights = tmp_path / "in" / "a" / "adapter_model.safetensors"
    save_file({n: v * 1e6 for n, v in load_file(weights).items()}, weights)
    with pytest.raises(OutputError, match="does not fit into torch"):
        merge_to_adapter(huge, load_suite(suite.path), tmp_path / "half", ALL)


def test_what_cannot_be_an_adapter(tmp_path: Path) -> None:
    model = Mixed()
    suite = of_models(tmp_path / "in", model)
    per_task = recipe_of(suite, "cart_indexing")
    with pytest.raises(RecipeError, match="one model per task"):
        merge_to_adapter(per_task, suite, tmp_path / "out", ALL)
    suite.path.write_text(suite.path.read_text().replace("base: base.safetensors\n", ""))
    alone = load_suite(suite.path)
    with pytest.raises(SuiteError, match="names no base"):
        merge_to_adapter(recipe_of(alone, "average"), alone, tmp_path / "out", ALL)


@pytest.mark.parametrize("text", ["", "0", "1.5", "-3", "energy:", "energy:2", "energy:nan", "x"])
def test_ranks_that_are_none(text: str) -> None:
    with pytest.raises(RecipeError, match="An adapter's rank is"):
        AdapterRank.parse(text)


def test_a_report_in_words() -> None:
    report = AdapterReport({"a": 2, "b": 3}, kept=9, total=10, whole={"n": 0.5, "m": 0.25})
    assert report.sentences() == (
        "2 matrices with rank 2 to 3, which keep 90.0000% of their update's energy. 2 tensors "
        "that no low-rank update can hold are stored whole; the most changed, n, differs from the "
        "base by 50.00%."
    )

"""GPT-2's weights, stored in x out, are merged as the same layer stored out x in would be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from analysis.spectral.interference import (
    interference_over_rank,
    interference_pairs,
    principal_angles,
)
from analysis.spectral.spectra import parts_of, spectrum
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import make_recipe
from merge_core.suites.suite import Suite
from merge_core.task_vectors import TensorGroup

Make = Callable[..., Suite]
TASKS = ("a", "b", "c")
# A layer's name as GPT-2 has it, and as a linear layer's, which is stored transposed.
NAMES = {
    "h.0.attn.c_attn": "blocks.0.attn.qkv",
    "h.0.attn.c_proj": "blocks.0.attn.proj",
    "h.0.mlp.c_fc": "blocks.0.mlp.fc1",
    "h.0.mlp.c_proj": "blocks.0.mlp.fc2",
}
SHAPES = {  # out x in
    "h.0.attn.c_attn": (18, 6),
    "h.0.attn.c_proj": (6, 6),
    "h.0.mlp.c_fc": (10, 6),
    "h.0.mlp.c_proj": (6, 10),
}


def member(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in SHAPES.items():
        state[f"{name}.weight"] = torch.randn(shape, generator=g)
        state[f"{name}.bias"] = torch.randn(shape[0], generator=g)
    return state


def as_gpt2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value.T.contiguous() if value.ndim == 2 else value for name, value in state.items()
    }


def as_linear(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    def renamed(name: str) -> str:
        layer, _, own = name.rpartition(".")
        return f"{NAMES[layer]}.{own}"

    return {renamed(name): value for name, value in state.items()}


@pytest.fixture(scope="module")
def suites(suite_of: Make) -> tuple[Suite, Suite]:
    """The same layers as GPT-2 stores them, and as linear layers."""
    experts = {task: member(i + 1) for i, task in enumerate(TASKS)}
    return (
        suite_of({t: as_gpt2(s) for t, s in experts.items()}, as_gpt2(member(0))),
        suite_of({t: as_linear(s) for t, s in experts.items()}, as_linear(member(0))),
    )


def group(suite: Suite, layer: str) -> TensorGroup:
    return TensorGroup(suite, TASKS, f"{layer}.weight", FactorStore())


RECIPES: list[dict[str, Any]] = [
    {"method": "wudi"},
    {"method": "knots"},
    {"method": "iso_cts"},
    {"method": "cart", "parameters": {"rank": 0.5}},
    {"method": "tsv_m"},
    {"method": "task_arithmetic", "then": [{"method": "svc"}]},
    {"method": "task_arithmetic", "then": [{"method": "subspace_boosting"}]},
]


@pytest.mark.parametrize("fields", RECIPES, ids=lambda f: f.get("then", [f])[0]["method"])
def test_a_merge_does_not_depend_on_how_a_layer_is_stored(
    suites: tuple[Suite, Suite], fields: dict[str, Any]
) -> None:
    recipe = make_recipe(fields)
    one, other = (MergeSession(suite, None, FactorStore()).merge(recipe) for suite in suites)
    expected = as_linear(as_gpt2(one))
    assert sorted(expected) == sorted(other)
    for name, value in other.items():
        torch.testing.assert_close(expected[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "fields", [f for f in RECIPES if f["method"] in ("wudi", "knots") or "svc" in str(f)],
    ids=lambda f: f.get("then", [f])[0]["method"],
)  # fmt: skip
def test_outputs_and_inputs_are_not_alike_to_these_methods(
    suite_of: Make, suites: tuple[Suite, Suite], fields: dict[str, Any]
) -> None:
    """What the test above would miss if it could not fail: a transposed linear layer differs."""
    experts = {task: member(i + 1) for i, task in enumerate(TASKS)}
    turned = suite_of(
        {t: as_linear(as_gpt2(s)) for t, s in experts.items()}, as_linear(as_gpt2(member(0)))
    )
    recipe = make_recipe(fields)
    one, other = (
        MergeSession(suite, None, FactorStore()).merge(recipe) for suite in (turned, suites[1])
    )
    name = "blocks.0.mlp.fc1.weight"
    assert not torch.allclose(one[name].T, other[name], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("layer", list(NAMES))
def test_a_square_weight_is_stored_like_those_beside_it(
    suites: tuple[Suite, Suite], layer: str
) -> None:
    assert group(suites[0], layer).stored_transposed
    assert not group(suites[1], NAMES[layer]).stored_transposed


def test_biases_tell_gpt2s_names_from_gpt2s_layers(suite_of: Make) -> None:
    """nanoGPT and StarCoder have linear layers under GPT-2's names."""
    suite = suite_of({task: member(i) for i, task in enumerate(TASKS)})
    assert not any(group(suite, layer).stored_transposed for layer in NAMES)


@pytest.mark.parametrize("origin", ["base", "average"])
def test_queries_keys_and_values_are_the_thirds_of_the_outputs(
    suites: tuple[Suite, Suite], origin: Any
) -> None:
    one, other = group(suites[0], "h.0.attn.c_attn"), group(suites[1], "blocks.0.attn.qkv")
    assert parts_of(one) == parts_of(other) == ("whole", "q", "k", "v")
    start = other.base if origin == "base" else other.average
    for part in parts_of(one):
        mine, theirs = spectrum(one, origin, part), spectrum(other, origin, part)
        assert mine["sigma"].to_numpy() == pytest.approx(theirs["sigma"].to_numpy(), rel=1e-4)
        rows = (
            slice(None)
            if part == "whole"
            else slice(*(6 * ("qkv".index(part) + i) for i in (0, 1)))
        )
        exact = torch.linalg.svdvals((other.experts[0] - start)[rows].double())
        first = mine[mine["task"] == "a"]["sigma"].to_numpy()
        assert first == pytest.approx(exact.numpy(), rel=1e-4)


@pytest.mark.parametrize("side", ["row", "column"])
def test_rows_are_inputs_however_they_are_stored(suites: tuple[Suite, Suite], side: Any) -> None:
    one, other = group(suites[0], "h.0.mlp.c_fc"), group(suites[1], "blocks.0.mlp.fc1")
    for measure in (interference_pairs, principal_angles):
        mine, theirs = measure(one, "base", 2, side), measure(other, "base", 2, side)
        value = mine.columns[-1]
        assert mine[value].to_numpy() == pytest.approx(theirs[value].to_numpy(), abs=1e-3)
    mine, theirs = (interference_over_rank(g, "base", (0.2, 0.5), side) for g in (one, other))
    assert mine["interference"].to_numpy() == pytest.approx(theirs["interference"], abs=1e-4)
    flipped = interference_over_rank(other, "base", (0.2,), "row" if side == "column" else "column")
    assert flipped["interference"].iloc[0] != pytest.approx(mine["interference"].iloc[0], abs=1e-3)

"""Fine-tunes, strangers and copies told apart on tiny networks whose kinship is known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor

from merge_core.compatibility.kinship import (
    MOST_ENTRIES,
    MOST_MATRICES,
    Kinships,
    measure_kinship,
)
from merge_core.errors import CheckpointError
from merge_core.suites.suite import Suite, load_suite
from merge_core.yaml_text import dump_yaml

State = dict[str, Tensor]
LAYERS = 3
WIDTH = 48


def network(seed: int) -> State:
    """A network of random start; its norms are near 1, as everybody's are."""
    source = torch.Generator().manual_seed(seed)
    state: State = {"embed_tokens.weight": torch.randn(20, WIDTH, generator=source)}
    for i in range(LAYERS):
        for name in ("attn.qkv", "mlp.fc1"):
            weight = torch.randn(3 * WIDTH, WIDTH, generator=source) / math.sqrt(WIDTH)
            state[f"blocks.{i}.{name}.weight"] = weight
        state[f"blocks.{i}.norm1.weight"] = 1 + 0.01 * torch.randn(WIDTH, generator=source)
    return state


def tuned(base: State, seed: int, size: float = 0.1) -> State:
    """A network at a relative distance from its base, in a random direction."""
    other = network(seed)
    return {name: value + size * other[name] for name, value in base.items()}


def suite_of(root: Path, states: Mapping[str, State]) -> Suite:
    """A suite of these states; one called base is the base."""
    root.mkdir(parents=True, exist_ok=True)
    for name, state in states.items():
        save_file(state, root / f"{name}.safetensors")
    experts = {name: {"weights": f"{name}.safetensors"} for name in states if name != "base"}
    document: dict[str, object] = {"name": "suite", "experts": experts}
    if "base" in states:
        document["base"] = "base.safetensors"
    (root / "suite.yaml").write_text(dump_yaml(document), encoding="utf-8")
    return load_suite(root)


def measured(root: Path, states: Mapping[str, State]) -> Kinships:
    found = measure_kinship(suite_of(root, states))
    assert found is not None
    return found


def verdicts(found: Kinships) -> dict[str, str]:
    return {row.member: row.verdict for row in found.rows}


def matrices(state: State) -> np.ndarray:
    """All weight matrices as one vector in float64."""
    names = sorted(name for name in state if name.endswith(("qkv.weight", "fc1.weight")))
    return np.concatenate([state[name].double().numpy().ravel() for name in names])


def test_figures_are_those_of_numpy(tmp_path: Path) -> None:
    base = network(0)
    states = {"base": base, **{f"e{i}": tuned(base, i, 0.1 * i) for i in (1, 2, 3)}}
    found = measured(tmp_path, states)
    origin = matrices(base)
    assert found.entries == len(origin)
    updates = {name: matrices(states[name]) - origin for name in states if name != "base"}

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    for row in found.rows:
        own, update = matrices(states[row.member]), updates[row.member]
        assert row.distance == pytest.approx(np.linalg.norm(update) / np.linalg.norm(origin))
        assert row.cosine == pytest.approx(cosine(own, origin))
        others = {n: cosine(update, updates[n]) for n in updates if n != row.member}
        nearest = max(others, key=lambda name: others[name])
        assert row.nearest == nearest
        assert row.update_cosine == pytest.approx(others[nearest], abs=1e-12)
    assert set(verdicts(found).values()) == {"fine-tune"}
    assert found.warnings == ()


def test_a_stranger_is_named_and_has_what_independent_networks_have(tmp_path: Path) -> None:
    base = network(0)
    states = {"base": base, "a": tuned(base, 1), "b": tuned(base, 2), "odd": network(9)}
    found = measured(tmp_path, states)
    assert verdicts(found) == {"a": "fine-tune", "b": "fine-tune", "odd": "stranger"}
    (warning,) = found.warnings
    assert warning.startswith("odd is no fine-tune of the base")
    row = found.rows[-1]
    assert abs(row.cosine) < 5 * found.deviation
    assert row.distance == pytest.approx(math.sqrt(2), abs=0.05)


def test_norms_alone_would_call_a_stranger_akin() -> None:
    """Why only matrices are looked at."""
    one, other = network(0), network(9)
    norms = [
        torch.cat([state[f"blocks.{i}.norm1.weight"] for i in range(LAYERS)])
        for state in (one, other)
    ]
    assert torch.cosine_similarity(*norms, dim=0) > 0.99


def test_another_order_of_neurons_is_a_stranger_weight_by_weight(tmp_path: Path) -> None:
    base = network(0)
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1))
    turned = {n: v[:, order].contiguous() if v.ndim == 2 else v for n, v in base.items()}
    found = measured(tmp_path, {"base": base, "a": tuned(base, 1), "turned": turned})
    assert verdicts(found) == {"a": "fine-tune", "turned": "stranger"}


def test_a_base_that_nobody_was_tuned_from(tmp_path: Path) -> None:
    start = network(0)
    states = {"base": network(9), **{f"e{i}": tuned(start, i) for i in (1, 2, 3)}}
    found = measured(tmp_path, states)
    assert set(verdicts(found).values()) == {"stranger"}
    assert "fine-tuned from another base" in found.warnings[0]


def test_a_base_that_is_an_earlier_start(tmp_path: Path) -> None:
    base = network(0)
    start = tuned(base, 7, 0.4)
    states = {"base": base, **{f"e{i}": tuned(start, i, 0.1) for i in (1, 2, 3)}}
    assert ["later start" in w for w in measured(tmp_path, states).warnings] == [True]


def test_the_base_among_the_experts_is_found(tmp_path: Path) -> None:
    base = network(0)
    tuned_ones = {f"e{i}": tuned(base, i) for i in (1, 2, 3)}
    copied = measured(tmp_path / "copied", {"base": base, **tuned_ones, "zero": dict(base)})
    assert copied.warnings == ("base and zero are the same weights",)
    assert verdicts(copied)["zero"] == "no difference"
    swapped = {"base": tuned_ones["e1"], "e2": tuned_ones["e2"], "e3": tuned_ones["e3"]}
    found = measured(tmp_path / "swapped", {**swapped, "start": base})
    assert ["start is nearer" in warning for warning in found.warnings] == [True]


def test_two_experts_that_are_one_model(tmp_path: Path) -> None:
    base = network(0)
    one = tuned(base, 1)
    found = measured(tmp_path / "a", {"base": base, "a": one, "b": tuned(base, 2), "c": dict(one)})
    assert found.warnings == ("a and c are the same weights",)
    # Heads, norms or embeddings that were trained alone are a difference.
    other = {**one, "embed_tokens.weight": one["embed_tokens.weight"] + 1}
    found = measured(tmp_path / "b", {"base": base, "a": one, "b": tuned(base, 2), "c": other})
    assert found.warnings == ()


def test_far_is_said_in_the_table_alone(tmp_path: Path) -> None:
    base = network(0)
    found = measured(tmp_path, {"base": base, "a": tuned(base, 1), "b": tuned(base, 2, 0.8)})
    assert verdicts(found) == {"a": "fine-tune", "b": "far"}
    assert found.warnings == ()


def test_without_a_base_experts_are_held_against_each_other(tmp_path: Path) -> None:
    start = network(0)
    states = {"a": tuned(start, 1), "b": tuned(start, 2), "odd": network(9)}
    found = measured(tmp_path, states)
    assert not found.has_base
    assert verdicts(found) == {"a": "related", "b": "related", "odd": "stranger"}
    assert found.warnings[0].startswith("odd is not akin to any other expert")
    alone = suite_of(tmp_path / "alone", {"a": states["a"]})
    assert measure_kinship(alone) is None


def test_the_order_of_experts_does_not_count(tmp_path: Path) -> None:
    base = network(0)
    states = {"a": tuned(base, 1), "b": tuned(base, 2), "c": network(5), "d": tuned(base, 1)}
    seen = set()
    for i, order in enumerate(itertools.permutations(states)):
        found = measured(
            tmp_path / str(i), {"base": base, **{name: states[name] for name in order}}
        )
        figures = [(r.member, r.verdict, round(r.distance, 9), r.nearest) for r in found.rows]
        seen.add((tuple(sorted(figures)), found.warnings))
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_and_one_large_matrix(dtype: torch.dtype, tmp_path: Path) -> None:
    source = torch.Generator().manual_seed(0)
    base = {"blocks.0.mlp.fc1.weight": torch.randn(900, 700, generator=source)}
    states = {
        "base": base,
        "a": {
            n: (v + 0.1 * torch.randn(v.shape, generator=source)).to(dtype) for n, v in base.items()
        },
        "odd": {n: torch.randn(v.shape, generator=source).to(dtype) for n, v in base.items()},
    }
    found = measured(tmp_path, states)
    assert found.entries <= MOST_ENTRIES * MOST_MATRICES
    assert verdicts(found) == {"a": "fine-tune", "odd": "stranger"}
    # Of 65,100 sampled entries the relative norm of a tenth is known to half a percent.
    assert found.rows[0].distance == pytest.approx(0.1, rel=0.03)


def test_small_samples_call_nobody_a_stranger_who_may_be_none(tmp_path: Path) -> None:
    source = torch.Generator().manual_seed(0)
    base = {"blocks.0.mlp.fc1.weight": torch.randn(4, 4, generator=source)}
    tuned_one = {n: v + 0.6 * torch.randn(4, 4, generator=source) for n, v in base.items()}
    assert verdicts(measured(tmp_path, {"base": base, "a": tuned_one}))["a"] != "stranger"


def test_adapters_are_looked_at_where_they_adapt(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=9, n_positions=8)
    torch.manual_seed(0)
    model = transformers.GPT2Model(config)
    model.save_pretrained(tmp_path / "base")
    before = {n: v.clone() for n, v in model.state_dict().items()}
    lora = LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True, init_lora_weights=False)
    adapted = get_peft_model(model, lora)
    adapted.save_pretrained(tmp_path / "lora")
    merged = adapted.merge_and_unload().state_dict()
    document = {"name": "s", "base": "base", "experts": {"lora": {"weights": "lora"}}}
    (tmp_path / "suite.yaml").write_text(dump_yaml(document), encoding="utf-8")
    found = measure_kinship(load_suite(tmp_path))
    assert found is not None
    names = [name for name in before if name.endswith("c_fc.weight")]
    assert found.matrices == len(names)
    change = math.sqrt(sum(float((merged[n] - before[n]).double().square().sum()) for n in names))
    norm = math.sqrt(sum(float(before[n].double().square().sum()) for n in names))
    assert found.rows[0].distance == pytest.approx(change / norm, rel=1e-5)
    # However large an update is, it belongs to the base that it is added to.
    assert (found.rows[0].verdict, found.warnings) == ("far", ())


def test_nan_is_refused_in_words(tmp_path: Path) -> None:
    base = network(0)
    broken = tuned(base, 1)
    broken["blocks.0.attn.qkv.weight"][0, 0] = math.nan
    with pytest.raises(CheckpointError, match="NaN"):
        measured(tmp_path, {"base": base, "a": broken})

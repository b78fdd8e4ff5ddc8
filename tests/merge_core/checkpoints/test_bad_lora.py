"""LoRA adapters that cannot be read: each gives one clear error."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.lora import AdaptedCheckpoint
from merge_core.errors import CheckpointError
from merge_core.suites.suite import Suite, load_suite
from tests.merge_core.adapted_models import adapter, rewrite, state_of, two_adapters


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return two_adapters(tmp_path)


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


REFUSED = {
    "dora": ({"use_dora": True}, "DoRA"),
    "another kind": ({"peft_type": "LOHA"}, "'LOHA'; only LORA is read"),
    "tokens": ({"trainable_token_indices": [1]}, "trained for single tokens"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "changes the base's weights"),
    "rank": ({"r": 3}, "says rank 3 for layer .* matrices have rank 2"),
    "no rank": ({"r": 0}, "greater than or equal to 1"),
    "endless alpha": ({"lora_alpha": float("inf")}, "finite"),
    "a pattern that could run for hours": ({"rank_pattern": {"(a+)+$": 2}}, "cannot be used"),
    "too many patterns": ({"rank_pattern": {f"l{i}": 2 for i in range(2001)}}, "2,000 at most"),
    "alternatives in a chain": ({"rank_pattern": {"(a|a)" * 9: 2}}, "cannot be used"),
    "a pattern that is none": ({"alpha_pattern": {"(": 2}}, "cannot be used"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_plain_adapter_is_refused(
    suite: Suite, fields: dict[str, Any], message: str
) -> None:
    edit(suite.root / "digits", **fields)
    with pytest.raises(CheckpointError, match=message):
        suite.expert("digits")


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"peft_type": 3}', "\xff"])
def test_configurations_that_are_none(suite: Suite, text: str) -> None:
    (suite.root / "digits" / "adapter_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=re.escape(str(suite.root))):
        suite.expert("digits")


A, B = (f"base_model.model.wide.lora_{part}.weight" for part in "AB")


DAMAGED = {
    "no B": (lambda s: s.pop(B), "no lora_B of layer 'wide'"),
    "another shape": (lambda s: s.update({A: torch.ones(2, 5)}), "do not make an update of"),
    "another rank": (lambda s: s.update({A: torch.ones(3, 6)}), "do not make an update of"),
    "an unknown layer": (lambda s: s.update({f"{B[:-13]}x.lora_A.weight": s[A]}), "matches no"),
    "a loose tensor": (lambda s: s.update({"base_model.model.x": s[A]}), "matches no parameter"),
    "dora": (lambda s: s.update({f"{A[:-13]}lora_magnitude_vector": s[A]}), "is a DoRA"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_weights_that_do_not_fit_are_refused(suite: Suite, change: Any, message: str) -> None:
    rewrite(suite.root / "digits", change)
    with pytest.raises(CheckpointError, match=message):
        suite.expert("digits")


def test_weights_that_are_not_finite_or_missing(suite: Suite) -> None:
    folder = suite.root / "digits"
    rewrite(folder, lambda s: s.update({A: torch.full((2, 6), torch.nan)}))
    with pytest.raises(CheckpointError, match="NaN"):
        suite.expert("digits").tensor("wide.weight")
    huge = torch.full((2, 6), 1e38)
    rewrite(folder, lambda s: s.update({A: huge, B: torch.full((9, 2), 1e38)}))
    with pytest.raises(CheckpointError, match="overflows"):
        load_suite(suite.path).expert("digits").tensor("wide.weight")
    with pytest.raises(CheckpointError, match="hold no tensor named"):
        load_suite(suite.path).expert("digits").tensor("nothing")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no adapter_model\.safetensors"):
        load_suite(suite.path).expert("digits")


def test_dora_saved_by_peft_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 9))
    save_file(state_of(model), tmp_path / "b.safetensors")
    adapted = get_peft_model(model, LoraConfig(r=2, use_dora=True, target_modules=["0"]))
    adapted.save_pretrained(str(tmp_path / "lora"))
    with pytest.raises(CheckpointError, match="DoRA"):
        AdaptedCheckpoint(tmp_path / "lora", Checkpoint(tmp_path / "b.safetensors"))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter, its base, and an empty place for a damaged copy."""
    folder = tmp_path_factory.mktemp("damaged")
    model = nn.Sequential(nn.Linear(6, 9))
    adapter(model, folder / "whole", r=2, target_modules=["0"], rank_pattern={"^0": 2})
    save_file(state_of(model), folder / "b.safetensors")
    (folder / "lora").mkdir()
    return folder


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]),
    st.integers(0, 4000),
    st.binary(max_size=6),
    st.booleans(),
)
def test_damaged_adapters_give_a_value_or_one_clear_error(
    damaged: Path, name: str, place: int, junk: bytes, cut: bool
) -> None:
    whole = (damaged / "whole" / name).read_bytes()
    start = place % len(whole)
    rest = b"" if cut else whole[start + len(junk) :]
    target = damaged / "lora"
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (target / file).write_bytes((damaged / "whole" / file).read_bytes())
    (target / name).write_bytes(whole[:start] + junk + rest)
    try:
        checkpoint = AdaptedCheckpoint(target, Checkpoint(damaged / "b.safetensors"))
        for parameter in checkpoint:
            value = checkpoint.tensor(parameter)
            assert tuple(value.shape) == checkpoint.info(parameter).shape
    except CheckpointError:
        return

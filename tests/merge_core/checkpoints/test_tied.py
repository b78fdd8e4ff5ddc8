"""Tensors under several names: found by storage or by value, merged once, written as they were."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.lora import AdaptedCheckpoint
from merge_core.checkpoints.tied import declares_tied, tied_tensors, ties
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession, merge_parameters
from merge_core.merging.recipe import make_recipe
from merge_core.output.model_folder import merge_to_folder
from merge_core.suites.preflight import preflight
from merge_core.suites.suite import Suite, load_suite
from merge_core.task_vectors import TensorGroups

WTE, HEAD = "transformer.wte.weight", "lm_head.weight"
CONFIG = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=8)


def gpt2(seed: int) -> transformers.GPT2LMHeadModel:
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel(CONFIG).eval()


def suite_at(folder: Path, **members: str) -> Suite:
    base = {"base": members.pop("base")} if "base" in members else {}
    experts = {task: {"weights": path} for task, path in members.items()}
    (folder / "suite.yaml").write_text(yaml.safe_dump({"name": "tied", "experts": experts, **base}))
    return load_suite(folder)


def pickle_file(folder: Path, name: str, state: Mapping[str, Tensor]) -> str:
    torch.save(dict(state), folder / f"{name}.bin")
    return f"{name}.bin"


def save_by_transformers(folder: Path, name: str, model: transformers.GPT2LMHeadModel) -> str:
    model.save_pretrained(folder / name)
    return name


@pytest.fixture
def three(tmp_path: Path) -> Suite:
    """Two experts and a base, pickled with both names over one storage."""
    for seed, name in enumerate(("base", "a", "b")):
        pickle_file(tmp_path, name, gpt2(seed).state_dict())
    return suite_at(tmp_path, base="base.bin", a="a.bin", b="b.bin")


def test_a_pickles_shared_storage_is_found(tmp_path: Path) -> None:
    state = gpt2(0).state_dict()
    state["module.part"] = state[WTE][:5]  # another view of the storage is another tensor
    state["module.turned"] = state[WTE].T
    state["alike"] = state[WTE].clone()
    state["none"], state["also_none"] = torch.empty(0), torch.empty(0)
    model = Checkpoint(tmp_path / pickle_file(tmp_path, "m", state))
    assert [sorted(names) for names in model.ties] == [[HEAD, WTE]]
    assert ties(model) == ((HEAD, WTE),)
    whole = tmp_path / "whole.pt"
    torch.save(gpt2(0), whole)
    assert ties(Checkpoint(whole)) == ((HEAD, WTE),)


def test_names_keep_their_tie_without_a_wrappers_prefix(tmp_path: Path) -> None:
    state = {f"module.{name}": value for name, value in gpt2(0).state_dict().items()}
    assert ties(Checkpoint(tmp_path / pickle_file(tmp_path, "m", state))) == ((HEAD, WTE),)


def test_it_is_merged_once_and_written_under_both_names(three: Suite, tmp_path: Path) -> None:
    groups = TensorGroups(three, None, FactorStore())
    names = [group.name for group in groups.members]
    assert WTE in names
    assert HEAD not in names
    assert groups.manifest.also_written == {WTE: (HEAD,)}
    assert f"{WTE} is also {HEAD}: merged once, written under each name" in preflight(three).notes
    # DARE draws its coins by name: merged apart, the two would no longer be one.
    recipe = make_recipe({"method": "dare_task_arithmetic"})
    folder = merge_to_folder(recipe, three, tmp_path / "out")
    file = load_file(folder / "model.safetensors")
    assert sorted(file) == sorted(gpt2(0).state_dict())
    assert torch.equal(file[WTE], file[HEAD])
    held = MergeSession(three, None, FactorStore()).merge(recipe)
    assert sorted(held) == sorted(file)
    assert groups.dtypes == {name: value.dtype for name, value in file.items()}
    for name, value in held.items():
        assert torch.equal(value, file[name])
    assert preflight(three).disk_bytes == sum(value.nbytes for value in file.values())


def test_the_merged_model_is_the_library_s_own_average(three: Suite, tmp_path: Path) -> None:
    folder = merge_to_folder(make_recipe({"method": "average"}), three, tmp_path / "out")
    merged, expected = gpt2(9), gpt2(8)
    merged.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.no_grad():
        parts = (expected.parameters(), gpt2(1).parameters(), gpt2(2).parameters())
        for target, one, other in zip(*parts, strict=True):
            target.copy_((one + other) / 2)
    tokens = torch.arange(6)[None]
    torch.testing.assert_close(merged(tokens).logits, expected(tokens).logits)


def test_a_resumed_run_may_want_one_of_the_names_alone(three: Suite) -> None:
    recipe = make_recipe({"method": "average"})
    for wanted in ({HEAD}, {WTE}, {HEAD, WTE}, {"transformer.ln_f.weight"}):
        groups = TensorGroups(three, None, FactorStore())
        assert {name for name, _ in merge_parameters(recipe, groups, names=wanted)} == wanted


def test_members_may_keep_it_once_or_twice(tmp_path: Path) -> None:
    """A pickle has both names, transformers' own safetensors files one."""
    one, two = gpt2(1), gpt2(2)
    once = save_by_transformers(tmp_path, "once", one)
    twice = pickle_file(tmp_path, "twice", two.state_dict())
    assert HEAD not in Checkpoint(tmp_path / once)
    mean = (one.state_dict()[WTE] + two.state_dict()[WTE]) / 2
    for first, second in ((once, twice), (twice, once)):
        suite = suite_at(tmp_path, a=first, b=second)
        report = preflight(suite)
        assert report.blocking == ()
        assert [(d.member, d.parameter, d.kind) for d in report.differences] == [
            ("a" if first is once else "b", HEAD, "tied")
        ]
        merged = MergeSession(suite, None, FactorStore()).merge(make_recipe({"method": "average"}))
        torch.testing.assert_close(merged[WTE], mean)
        assert HEAD not in merged  # as in the folder whose configuration the output has


def test_what_one_member_keeps_apart_is_merged_apart(tmp_path: Path) -> None:
    tied, apart = gpt2(1).state_dict(), gpt2(2).state_dict()
    apart[HEAD] = apart[HEAD] + 1
    suite = suite_at(
        tmp_path, a=pickle_file(tmp_path, "a", tied), b=pickle_file(tmp_path, "b", apart)
    )
    assert suite.manifest(suite.tasks).also_written == {}
    merged = MergeSession(suite, None, FactorStore()).merge(make_recipe({"method": "average"}))
    torch.testing.assert_close(merged[HEAD], (tied[HEAD] + apart[HEAD]) / 2)
    torch.testing.assert_close(merged[WTE], (tied[WTE] + apart[WTE]) / 2)


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({}, None),
        ([], None),
        (None, None),
    ],
)
def test_equal_copies_are_tied_whatever_the_configuration_says(
    tmp_path: Path, config: object, tied: bool | None
) -> None:
    state = gpt2(0).state_dict()
    save_file(
        {name: value.clone() for name, value in state.items()}, tmp_path / "model.safetensors"
    )
    text = "{ no json" if config is None else json.dumps(config)
    (tmp_path / "config.json").write_text(text)
    model = Checkpoint(tmp_path)
    assert model.ties == ()
    assert declares_tied(model) == tied
    assert ties(model) == ((HEAD, WTE),)
    (tie,) = tied_tensors(model, [model])
    assert (tie.merged, tie.also_written, tie.names) == (WTE, (HEAD,), {WTE, HEAD})


def test_a_tied_head_that_is_kept_once_is_told(tmp_path: Path) -> None:
    names = [save_by_transformers(tmp_path, name, gpt2(i)) for i, name in enumerate("ab")]
    for name in names:
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    suite = suite_at(tmp_path, a=names[0], b=names[1])
    assert any("kept once" in note for note in preflight(suite).notes)


def test_an_adapter_keeps_the_ties_of_its_base(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = Checkpoint(tmp_path / pickle_file(tmp_path, "base", gpt2(0).state_dict()))
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    get_peft_model(gpt2(0), config).save_pretrained(tmp_path / "adapter")
    assert ties(AdaptedCheckpoint(tmp_path / "adapter", base)) == ((HEAD, WTE),)

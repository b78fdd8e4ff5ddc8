"""LoRA adapters as experts, against PEFT's own merge_and_unload."""

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
from safetensors.torch import load_file, save_file
from torch import nn

from merge_core.adapters.checkpoint import AdaptedCheckpoint, is_adapter, stored_in_by_out
from merge_core.checkpoint import Checkpoint
from merge_core.engine import MergeSession
from merge_core.errors import CheckpointError
from merge_core.factors import FactorStore
from merge_core.linalg import as_matrix
from merge_core.preflight import preflight
from merge_core.recipe import make_recipe
from merge_core.suite import Suite, load_suite
from merge_core.task_vectors import Groups, Origin
from tests.merge_core.adapted_models import Mixed, State, adapter, state_of, write_adapted_suite

LAYERS = ["embed", "conv", "point", "square", "wide"]


def opened(folder: Path, model: nn.Module, **options: Any) -> tuple[AdaptedCheckpoint, State]:
    """An adapter of a model read by us, and the model as PEFT merges it."""
    merged = adapter(model, folder / "lora", **options)
    save_file(state_of(model), folder / "base.safetensors")
    base = Checkpoint(folder / "base.safetensors")
    return AdaptedCheckpoint(folder / "lora", base), merged


def assert_same(checkpoint: Checkpoint, expected: State) -> None:
    """Every tensor to float32 rounding, and headers that tell the truth."""
    assert set(checkpoint) == set(expected)
    for name in checkpoint:
        value, info = checkpoint.tensor(name), checkpoint.info(name)
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)
        assert (info.shape, info.dtype) == (tuple(value.shape), value.dtype)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 5},
    "rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True},
    "patterns": {
        "r": 3,
        "lora_alpha": 5,
        "rank_pattern": {"wide": 2, "^conv": 4, r"(square|point)": 1},
        "alpha_pattern": {"square": 7, "wi.*": 0.5},
    },
    "rslora with patterns": {
        "r": 3,
        "lora_alpha": 5,
        "use_rslora": True,
        "rank_pattern": {"wide": 2},
        "alpha_pattern": {"square": 7},
    },
    "biases of adapted layers": {"r": 2, "bias": "lora_only"},
    "all biases": {"r": 2, "bias": "all"},
    "bias in B": {"r": 2, "lora_bias": True, "target_modules": ["conv", "square", "wide"]},
    "whole layers": {"r": 2, "target_modules": ["wide"], "modules_to_save": ["norm", "head"]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_kind_of_layer_as_peft_merges_it(tmp_path: Path, options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    checkpoint, merged = opened(tmp_path, Mixed(), **{"target_modules": LAYERS, **options})
    assert_same(checkpoint, merged)
    base = checkpoint.base
    changed = {n for n in base if not torch.equal(base.tensor(n), merged[n])}
    assert changed == {n for n in checkpoint if checkpoint.touches(n)}


def test_the_update_as_a_product_of_thin_matrices(tmp_path: Path) -> None:
    checkpoint, merged = opened(tmp_path, Mixed(), r=2, target_modules=["conv", "square", "wide"])
    base = state_of(Mixed())
    for name in ("conv.weight", "square.weight", "wide.weight", "head.weight"):
        product = checkpoint.low_rank(name)
        assert product is not None
        left, right = product
        assert left.shape[1] == right.shape[0] == (0 if name == "head.weight" else 2)
        base = checkpoint.base.tensor(name)
        update = as_matrix(merged[name].double() - base.double())
        torch.testing.assert_close(left @ right, update, rtol=1e-5, atol=1e-6)
    assert checkpoint.low_rank("norm.weight") is None
    assert Checkpoint(tmp_path / "base.safetensors").low_rank("conv.weight") is None


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=8, n_layer=2, n_head=2, vocab_size=13, n_positions=6, tie_word_embeddings=False
    )
    torch.manual_seed(3)
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def test_layers_of_gpt2_are_stored_transposed(tmp_path: Path) -> None:
    # attn.c_proj is square: its shape does not tell.
    checkpoint, merged = opened(
        tmp_path,
        gpt2(),
        r=2,
        target_modules=["c_attn", "c_proj", "c_fc", "wte"],
        fan_in_fan_out=True,
    )
    assert_same(checkpoint, merged)
    # PEFT leaves the flag at whatever layer it met last, so the layers beside it count more.
    path = tmp_path / "lora" / "adapter_config.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "fan_in_fan_out": False}))
    assert_same(AdaptedCheckpoint(tmp_path / "lora", checkpoint.base), merged)
    assert stored_in_by_out(checkpoint.base, "transformer.h.0.attn.c_proj.weight")
    assert stored_in_by_out(checkpoint.base, "transformer.wte.weight") is None


def test_a_layer_stored_whole_with_an_update_besides(tmp_path: Path) -> None:
    # PEFT does so for adapted heads and embeddings, whose vocabulary may have grown.
    checkpoint, merged = opened(tmp_path, gpt2(), r=2, target_modules=["lm_head"])
    assert_same(checkpoint, merged)
    key, head = "base_model.model.lm_head.base_layer.weight", torch.randn(13, 8)
    rewritten(tmp_path / "lora", lambda s: s.update({key: head}))
    update = merged["lm_head.weight"] - checkpoint.base.tensor("lm_head.weight")
    again = AdaptedCheckpoint(tmp_path / "lora", checkpoint.base)
    torch.testing.assert_close(again.tensor("lm_head.weight"), head + update)
    assert again.low_rank("lm_head.weight") is None


@pytest.mark.parametrize("prefix", ["dropped", "added"])
def test_prefixes_that_only_one_side_has(tmp_path: Path, prefix: str) -> None:
    merged = adapter(gpt2(), tmp_path / "lora", r=2, target_modules=["c_attn"], fan_in_fan_out=True)

    def renamed(name: str) -> str:
        if prefix == "added":
            return f"model.{name}"
        return name.removeprefix("transformer.")

    save_file({renamed(n): v for n, v in state_of(gpt2()).items()}, tmp_path / "b.safetensors")
    checkpoint = AdaptedCheckpoint(tmp_path / "lora", Checkpoint(tmp_path / "b.safetensors"))
    assert_same(checkpoint, {renamed(name): value for name, value in merged.items()})
    assert len(checkpoint.updates) == 2


def test_a_new_head_is_one_more_tensor(tmp_path: Path) -> None:
    model = Mixed()
    model.head = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))  # type: ignore[assignment]
    merged = adapter(model, tmp_path / "lora", target_modules=["wide"], modules_to_save=["head"])
    base = {n: v for n, v in state_of(model).items() if not n.startswith("head")}
    save_file(base, tmp_path / "b.safetensors")
    checkpoint = AdaptedCheckpoint(tmp_path / "lora", Checkpoint(tmp_path / "b.safetensors"))
    assert_same(checkpoint, merged)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x, x, x)[0]


def test_attention_of_torch_is_refused(tmp_path: Path) -> None:
    model = Attention()
    save_file(state_of(model), tmp_path / "b.safetensors")
    merged = adapter(model, tmp_path / "lora", r=2, target_modules=["attn"])
    # Why: PEFT's own output layer is not its base plus s·B·A.
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    A, B = (stored[f"base_model.model.attn.base_layer.out_proj.lora_{x}.weight"] for x in "AB")
    update = merged["attn.out_proj.weight"] - state_of(model)["attn.out_proj.weight"]
    torch.testing.assert_close(update, 2 * (8 / 2 * B @ A))
    with pytest.raises(CheckpointError, match="MultiheadAttention"):
        AdaptedCheckpoint(tmp_path / "lora", Checkpoint(tmp_path / "b.safetensors"))


def test_timm_model_and_pickled_weights(tmp_path: Path) -> None:
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=12, depth=1, num_heads=2, num_classes=3
    )
    checkpoint, merged = opened(tmp_path, model, r=2, target_modules=["qkv", "proj", "fc1"])
    assert_same(checkpoint, merged)
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    assert_same(AdaptedCheckpoint(tmp_path / "lora", checkpoint.base), merged)


def test_half_precision_bases_keep_the_whole_update(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 9))
    adapter(model, tmp_path / "lora", r=2, target_modules=["0"])
    half = {n: v.bfloat16() for n, v in state_of(model).items()}
    save_file(half, tmp_path / "b.safetensors")
    checkpoint = AdaptedCheckpoint(tmp_path / "lora", Checkpoint(tmp_path / "b.safetensors"))
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    A, B = (stored[f"base_model.model.0.lora_{part}.weight"].double() for part in "AB")
    exact = half["0.weight"].double() + 8 / 2 * B @ A
    torch.testing.assert_close(checkpoint.tensor("0.weight").double(), exact, rtol=1e-6, atol=1e-7)
    assert checkpoint.info("0.bias").dtype == torch.float32
    assert torch.equal(checkpoint.tensor("0.bias"), half["0.bias"].float())


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    torch.manual_seed(4)
    model = Mixed()
    for seed, task in enumerate(["digits", "letters"]):
        adapter(model, tmp_path / task, seed, r=2, target_modules=["square", "wide", "conv"])
    names = {"digits": "digits", "letters": "letters/adapter_model.safetensors"}
    return load_suite(write_adapted_suite(tmp_path, state_of(model), names))


def merged(suite: Suite, method: str, tasks: list[str], **parameters: Any) -> State:
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
    for name, value in merged(suite, method, ["digits"], **parameters).items():
        torch.testing.assert_close(value, expert.tensor(name), rtol=1e-5, atol=2e-6, msg=name)


def test_two_adapters_in_task_arithmetic(suite: Suite) -> None:
    result = merged(suite, "task_arithmetic", ["digits", "letters"], scale=0.4)
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
    groups = {group.name: group for group in Groups(suite, None, store)}
    for name in ("wide.weight", "conv.weight", "square.weight"):
        states = [suite.expert(task).tensor(name).double() for task in suite.tasks]
        about = state_of(model)[name].double() if origin == "base" else sum(states) / 3
        for factors, state in zip(groups[name].factors(origin, 2), states, strict=True):
            update = as_matrix(state - about)
            torch.testing.assert_close(factors.truncated(9).double(), update, rtol=0, atol=2e-6)
            values = torch.linalg.svdvals(update).float()
            torch.testing.assert_close(factors.S, values, rtol=1e-5, atol=2e-6)
    assert store.decompositions == whole


def test_an_adapter_beside_a_whole_model(tmp_path: Path) -> None:
    torch.manual_seed(11)
    model = Mixed()
    adapter(model, tmp_path / "a", r=1, target_modules=["wide"])
    save_file(state_of(Mixed()), tmp_path / "b.safetensors")
    names = {"a": "a", "b": "b.safetensors"}
    suite = load_suite(write_adapted_suite(tmp_path, state_of(model), names))
    first, second = (suite.expert(task).tensor("wide.weight").double() for task in "ab")
    for group in Groups(suite, None, FactorStore()):
        if group.name == "wide.weight":
            values = torch.linalg.svdvals((first - second) / 2).float()
            for factors in group.factors("average"):
                torch.testing.assert_close(factors.S, values, rtol=1e-5, atol=1e-6)


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


def edited(folder: Path, **fields: Any) -> None:
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
    edited(suite.root / "digits", **fields)
    with pytest.raises(CheckpointError, match=message):
        suite.expert("digits")


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"peft_type": 3}', "\xff"])
def test_configurations_that_are_none(suite: Suite, text: str) -> None:
    (suite.root / "digits" / "adapter_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=re.escape(str(suite.root))):
        suite.expert("digits")


def rewritten(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    change(state)
    save_file({name: value.clone() for name, value in state.items()}, path)


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
    rewritten(suite.root / "digits", change)
    with pytest.raises(CheckpointError, match=message):
        suite.expert("digits")


def test_weights_that_are_not_finite_or_missing(suite: Suite) -> None:
    folder = suite.root / "digits"
    rewritten(folder, lambda s: s.update({A: torch.full((2, 6), torch.nan)}))
    with pytest.raises(CheckpointError, match="NaN"):
        suite.expert("digits").tensor("wide.weight")
    huge = torch.full((2, 6), 1e38)
    rewritten(folder, lambda s: s.update({A: huge, B: torch.full((9, 2), 1e38)}))
    with pytest.raises(CheckpointError, match="overflows"):
        load_suite(suite.path).expert("digits").tensor("wide.weight")
    with pytest.raises(CheckpointError, match="hold no tensor named"):
        load_suite(suite.path).expert("digits").tensor("nothing")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no adapter_model\.safetensors"):
        load_suite(suite.path).expert("digits")


def test_names_that_fit_several_parts_of_the_base(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 9))
    adapter(model, tmp_path / "lora", r=2, target_modules=["0"])
    state = {f"{tower}.{n}": v for tower in ("text", "image") for n, v in state_of(model).items()}
    save_file(state, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="may be several parameters"):
        AdaptedCheckpoint(tmp_path / "lora", Checkpoint(tmp_path / "b.safetensors"))


def test_one_of_two_tied_tensors_is_not_changed_alone(tmp_path: Path) -> None:
    model = gpt2()
    state = state_of(model)
    state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    (tmp_path / "base").mkdir()
    save_file(state, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"tie_word_embeddings": true}')
    base = Checkpoint(tmp_path / "base")
    adapter(model, tmp_path / "inner", r=2, target_modules=["c_attn"])
    assert AdaptedCheckpoint(tmp_path / "inner", base).ties == (
        ("lm_head.weight", "transformer.wte.weight"),
    )
    adapter(model, tmp_path / "head", r=2, target_modules=["lm_head"])
    with pytest.raises(CheckpointError, match=r"keeps as one tensor with 'transformer\.wte"):
        AdaptedCheckpoint(tmp_path / "head", base)
    adapter(model, tmp_path / "both", target_modules=["c_attn"], modules_to_save=["wte", "lm_head"])
    assert AdaptedCheckpoint(tmp_path / "both", base).ties == ()


def test_files_that_change_are_noticed(suite: Suite) -> None:
    expert = suite.expert("digits")
    expert.check_unchanged()
    rewritten(suite.root / "digits", lambda s: s.update({A: torch.ones(2, 6)}))
    with pytest.raises(CheckpointError, match="has changed since"):
        expert.check_unchanged()
    with pytest.raises(CheckpointError, match="has changed since"):
        expert.tensor("wide.weight")
    (suite.root / "base.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"base\.safetensors has changed since"):
        suite.expert("letters").check_unchanged()


def test_what_it_is_in_words(tmp_path: Path) -> None:
    checkpoint, _ = opened(
        tmp_path,
        Mixed(),
        r=3,
        lora_alpha=5,
        use_rslora=True,
        rank_pattern={"wide": 2},
        target_modules=LAYERS,
        modules_to_save=["norm"],
    )
    assert checkpoint.summary.startswith(
        "rank-stabilised LoRA adapter of rank 2 to 3, alpha 5, on 5 matrices"
    )


def test_dora_saved_by_peft_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 9))
    save_file(state_of(model), tmp_path / "b.safetensors")
    adapted = get_peft_model(model, LoraConfig(r=2, use_dora=True, target_modules=["0"]))
    adapted.save_pretrained(str(tmp_path / "lora"))
    with pytest.raises(CheckpointError, match="DoRA"):
        AdaptedCheckpoint(tmp_path / "lora", Checkpoint(tmp_path / "b.safetensors"))


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


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter, its base, and an empty place for a damaged copy."""
    folder = tmp_path_factory.mktemp("damaged")
    model = nn.Sequential(nn.Linear(6, 9))
    adapter(model, folder / "whole", r=2, target_modules=["0"], rank_pattern={"^0": 2})
    save_file(state_of(model), folder / "b.safetensors")
    (folder / "lora").mkdir()
    return folder

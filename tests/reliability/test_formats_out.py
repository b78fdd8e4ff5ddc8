"""The output has the input's layout: it opens in timm, open_clip and transformers, as it is.

Each library writes the inputs and reads the outputs by its own means; what it reads is compared
with state dicts averaged by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.errors import OutputError
from merge_core.factors.store import FactorStore
from merge_core.merging.recipe import make_recipe
from merge_core.output.model_folder import merge_to_folder, merged_bytes
from merge_core.suites.suite import load_suite
from merge_core.task_vectors import TensorGroups

State = Mapping[str, Tensor]


def shake(model: nn.Module, seed: int) -> nn.Module:
    """Random weights, tied ones still tied."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=source))
    return model.eval()


def average(states: list[State]) -> dict[str, Tensor]:
    return {
        name: sum(state[name] for state in states) / len(states)
        if states[0][name].is_floating_point()
        else states[0][name]
        for name in states[0]
    }


def merge_folder(
    folder: Path, experts: list[str], base: str | None = None, shard_bytes: int = 10**9
) -> Path:
    """Average experts that lie in a folder; the output's folder."""
    document: dict[str, Any] = {
        "name": "s",
        "experts": {f"t{i}": {"weights": name} for i, name in enumerate(experts)},
    }
    if base is not None:
        document["base"] = base
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(document))
    recipe = make_recipe({"suite": str(path), "method": "average"})
    return merge_to_folder(recipe, load_suite(path), folder / "out", shard_bytes=shard_bytes)


def assert_same(got: State, expected: State) -> None:
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-6, msg=name)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


TIMM = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
CODE = ("modeling_own.py", "pytorch_model.bin", "training_args.bin", "optimizer.pt", "x.pkl")


def litter(folder: Path) -> None:
    """What lies beside weights and must stay there."""
    for name in CODE:
        (folder / name).write_bytes(b"import os; os.system('touch owned')")


@pytest.mark.parametrize("shard_bytes", [10**9, 5000])
def test_timm(tmp_path: Path, shard_bytes: int) -> None:
    def model() -> nn.Module:
        return timm.create_model("vit_tiny_patch16_224", num_classes=3, **TIMM)

    models = [shake(model(), seed) for seed in range(2)]
    for i, each in enumerate(models):
        timm.models.save_for_hf(each, tmp_path / f"m{i}", model_args=TIMM, safe_serialization=True)
        litter(tmp_path / f"m{i}")
    out = merge_folder(tmp_path, ["m0", "m1"], shard_bytes=shard_bytes)
    expected = average([each.state_dict() for each in models])
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    by_hand = model().eval()
    by_hand.load_state_dict(expected)
    if shard_bytes == 10**9:
        loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(images), by_hand(images), rtol=0, atol=1e-5)
    checkpoint = Checkpoint(out)
    again = model()
    again.load_state_dict({n: checkpoint.tensor(n) for n in checkpoint}, strict=True)
    assert_same(again.state_dict(), expected)
    assert "config.json" in names(out)
    assert not names(out) & set(CODE)
    assert (out / "config.json").read_bytes() == (tmp_path / "m0" / "config.json").read_bytes()


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24, max_position_embeddings=20, num_labels=3,
        )
    )  # fmt: skip


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    )


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
            tie_word_embeddings=False,
        )
    )  # fmt: skip


def clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    tower |= {"num_attention_heads": 2}
    return CLIPModel(
        CLIPConfig(
            text_config={**tower, "vocab_size": 40, "max_position_embeddings": 8},
            vision_config={**tower, "image_size": 16, "patch_size": 8},
            projection_dim=8,
        )
    )


TOKENIZER = ("vocab.txt", "tokenizer_config.json", "special_tokens_map.json", "merges.txt")


@pytest.mark.parametrize("make", [bert, gpt2, llama, clip])
@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("with_base", [False, True])
def test_transformers(
    tmp_path: Path, make: Callable[[], Any], shards: bool, with_base: bool
) -> None:
    models = [shake(make(), seed) for seed in range(3)]
    for i, model in enumerate(models):
        folder = tmp_path / f"m{i}"
        model.save_pretrained(folder, max_shard_size="8KB" if shards else "1GB")
        litter(folder)
        for name in TOKENIZER:
            (folder / name).write_text(f'{{"of": {i}}}')
        (folder / "vocab.txt").write_text("one vocabulary for all")
    assert (tmp_path / "m0" / "model.safetensors.index.json").exists() == shards
    base = "m0" if with_base else None
    out = merge_folder(tmp_path, ["m1", "m2"], base, shard_bytes=8000 if shards else 10**9)
    expected = average([model.state_dict() for model in models[1:]])
    kind = type(models[0])
    loaded, report = kind.from_pretrained(out, output_loading_info=True)
    found = {key: list(value) for key, value in report.items() if value}
    assert not found, found
    assert_same(loaded.state_dict(), expected)
    source = tmp_path / ("m0" if with_base else "m1")
    assert names(out) >= {"config.json", *TOKENIZER}
    assert not names(out) & set(CODE)
    for name in ("config.json", *TOKENIZER):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    written = [load_file(path) for path in sorted(out.glob("*.safetensors"))]
    given = [load_file(path) for path in sorted(source.glob("*.safetensors"))]
    assert set().union(*written) == set().union(*given)
    assert (len(written) > 1) == shards


def test_open_clip(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 8,
        "vision_cfg": {
            "image_size": 16,
            "layers": 1,
            "width": 64,
            "head_width": 32,
            "patch_size": 8,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 40, "width": 16, "heads": 2, "layers": 1},
    }
    models = [shake(open_clip.model.CLIP(**config), seed) for seed in range(2)]
    for i, model in enumerate(models):
        folder = tmp_path / f"m{i}"
        folder.mkdir()
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
        document = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
        (folder / "open_clip_config.json").write_text(json.dumps(document))
    out = merge_folder(tmp_path, ["m0", "m1"], shard_bytes=5000)
    # What open_clip looks for on the hub (hf-hub:org/name), in one file whatever its size.
    from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME

    assert names(out) == {HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME, "README.md", "recipe.yaml"}
    loaded = open_clip.create_model(f"local-dir:{out}")
    assert_same(loaded.state_dict(), average([model.state_dict() for model in models]))


def test_wrappers_prefixes_are_written_as_the_base_has_them(tmp_path: Path) -> None:
    """Data-parallel experts of a plain base give a plain model; without a base, their own."""
    plain = {"a.weight": torch.ones(2, 2), "b": torch.zeros(3)}
    wrapped = {f"module.{name}": value + 1 for name, value in plain.items()}
    save_file(plain, tmp_path / "base.safetensors")
    torch.save(wrapped, tmp_path / "x.pt")
    out = merge_folder(tmp_path, ["x.pt"], "base.safetensors")
    assert_same(
        load_file(out / "model.safetensors"), {name: value + 1 for name, value in plain.items()}
    )
    (tmp_path / "alone").mkdir()
    torch.save(wrapped, tmp_path / "alone" / "x.pt")
    out = merge_folder(tmp_path / "alone", ["x.pt"])
    assert_same(load_file(out / "model.safetensors"), wrapped)
    suite = load_suite(tmp_path / "alone" / "suite.yaml")
    recipe = make_recipe({"suite": str(suite.path), "method": "average"})
    data = merged_bytes(recipe, TensorGroups(suite, None, FactorStore()), suite)
    (tmp_path / "download.safetensors").write_bytes(data)
    assert_same(load_file(tmp_path / "download.safetensors"), wrapped)


def test_what_only_the_base_has_is_kept(tmp_path: Path) -> None:
    """Vision towers fine-tuned out of a whole model give a whole model again."""
    tower = {"visual.w": torch.ones(2, 2), "visual.n": torch.tensor(3)}
    text = {"text.w": torch.full((3,), 7.0), "head.weight": torch.ones(4, 2)}
    save_file(tower | text, tmp_path / "base.safetensors")
    for i in (1, 2):
        state = {**tower, "visual.w": tower["visual.w"] * i, "head.weight": torch.ones(i, 2)}
        save_file(state, tmp_path / f"x{i}.safetensors")
    out = merge_folder(tmp_path, ["x1.safetensors", "x2.safetensors"], "base.safetensors", 20)
    parts: dict[str, Tensor] = {}
    for path in out.glob("*.safetensors"):
        parts |= load_file(path)
    assert_same(parts, {**tower, **text, "visual.w": torch.full((2, 2), 1.5)})


def test_a_config_of_something_else_stays_where_it_is(tmp_path: Path) -> None:
    for i, text in enumerate(['{"colour": "blue"}', "not JSON", "[]", '{"model_type":' * 3]):
        folder = tmp_path / str(i)
        folder.mkdir()
        save_file({"w": torch.ones(2)}, folder / "x.safetensors")
        (folder / "config.json").write_text(text)
        (folder / "tokenizer.json").write_text("{}")
        out = merge_folder(folder, ["x.safetensors"])
        assert names(out) == {"README.md", "model.safetensors", "recipe.yaml"}


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "m").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "blobs" / "1")
    (tmp_path / "blobs" / "2").write_text('{"model_type": "bert"}')
    (tmp_path / "m" / "model.safetensors").symlink_to(tmp_path / "blobs" / "1")
    (tmp_path / "m" / "config.json").symlink_to(tmp_path / "blobs" / "2")
    out = merge_folder(tmp_path, ["m"])
    assert not (out / "config.json").is_symlink()
    # The dtype of the weights is said where the input left it to the reader.
    found = json.loads((out / "config.json").read_text())
    assert found == {"model_type": "bert", "dtype": "float32"}


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json", "chat_template.jinja"])
def test_no_link_brings_a_foreign_file_into_the_output(tmp_path: Path, name: str) -> None:
    """A downloaded folder could otherwise have a private key published as its vocabulary."""
    secret = tmp_path / "id_rsa"
    secret.write_text("PRIVATE KEY")
    for number in (0, 1):
        folder = tmp_path / "models" / f"e{number}"
        folder.mkdir(parents=True)
        save_file({"weight": torch.full((2, 2), float(number))}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (tmp_path / "models" / "e0" / name).symlink_to(secret)
    with pytest.raises(OutputError, match=f"{name} is a link to a place outside"):
        merge_folder(tmp_path / "models", ["e0", "e1"])
    assert not [path for path in tmp_path.rglob("*") if path.is_dir() and "out" in path.name]
    (tmp_path / "models" / "e0" / name).unlink()
    (tmp_path / "models" / "e0" / name).write_text("own")
    assert (merge_folder(tmp_path / "models", ["e0", "e1"]) / name).read_text() == "own"

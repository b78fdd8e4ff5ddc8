"""Files beside merged weights: what comes along, from whom, and that they say what is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_core.checkpoints.side_files import MOST_FILES, find_side_files, is_side_file
from merge_core.errors import OutputError
from merge_core.merging.recipe import make_recipe
from merge_core.output.model_folder import merge_to_folder
from merge_core.suites.suite import Suite, load_suite

TINY = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 16,
}  # fmt: skip


def llama(seed: int, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    torch.manual_seed(seed)
    settings = transformers.LlamaConfig(**{**TINY, **config})
    return transformers.LlamaForCausalLM(settings).to(dtype).eval()


def suite_at(folder: Path, experts: dict[str, str], **fields: Any) -> Suite:
    document = {"name": "s", "experts": {t: {"weights": w} for t, w in experts.items()}, **fields}
    (folder / "suite.yaml").write_text(yaml.safe_dump(document))
    return load_suite(folder)


def merge(suite: Suite, out: str = "out", **fields: Any) -> Path:
    recipe = make_recipe({"suite": str(suite.path), "method": "average", **fields})
    return merge_to_folder(recipe, suite, suite.root / out)


def read_config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def edit_config(folder: Path, remove: tuple[str, ...] = (), **fields: Any) -> None:
    document = {k: v for k, v in read_config(folder).items() if k not in remove}
    (folder / "config.json").write_text(json.dumps(document | fields))


def files_of(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


WRITTEN = {"README.md", "recipe.yaml", "model.safetensors"}


@pytest.mark.parametrize("asked", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("keys", [("dtype",), ("torch_dtype",), ("dtype", "torch_dtype"), ()])
def test_the_configuration_names_the_dtype_of_the_weights(
    tmp_path: Path, asked: str, keys: tuple[str, ...]
) -> None:
    for name in "ab":
        llama(ord(name), torch.bfloat16).save_pretrained(tmp_path / name)
        edit_config(tmp_path / name, ("dtype", "torch_dtype"), **dict.fromkeys(keys, "bfloat16"))
    out = merge(suite_at(tmp_path, {"a": "a", "b": "b"}), dtype=asked)
    found = {k: v for k, v in read_config(out).items() if "dtype" in k}
    assert found == dict.fromkeys(keys or ("dtype",), asked)
    opened = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert opened.dtype == getattr(torch, asked)
    assert {value.dtype for value in load_file(out / "model.safetensors").values()} == {
        opened.dtype
    }


def test_configurations_within_it_name_it_too(tmp_path: Path) -> None:
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    tower |= {"num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**tower, "vocab_size": 40, "max_position_embeddings": 8},
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        transformers.CLIPModel(config).half().save_pretrained(tmp_path / name)
        for part in ("text_config", "vision_config"):
            inner = read_config(tmp_path / name)[part] | {"torch_dtype": "float16"}
            edit_config(tmp_path / name, **{part: inner})
        edit_config(tmp_path / name, torch_dtype={"text_config": "float16", "": "float16"})
    out = merge(suite_at(tmp_path, {"a": "a", "b": "b"}), dtype="float32")
    found = read_config(out)
    assert found["dtype"] == found["torch_dtype"] == "float32"
    assert {found[part]["torch_dtype"] for part in ("text_config", "vision_config")} == {"float32"}
    assert transformers.CLIPModel.from_pretrained(out).dtype == torch.float32


def test_of_mixed_dtypes_the_one_of_most_numbers_is_named(tmp_path: Path) -> None:
    for name in "ab":
        model = llama(ord(name), torch.bfloat16)
        model.save_pretrained(tmp_path / name)
        path = tmp_path / name / "model.safetensors"
        state = {n: v.float() if "norm" in n else v for n, v in load_file(path).items()}
        save_file(state, path, {"format": "pt"})
        edit_config(tmp_path / name, dtype="float32")
    out = merge(suite_at(tmp_path, {"a": "a", "b": "b"}))
    assert read_config(out)["dtype"] == "bfloat16"


def test_a_packed_base_s_packing_is_not_claimed(tmp_path: Path) -> None:
    for name in "ab":
        llama(ord(name)).save_pretrained(tmp_path / name)
        edit_config(tmp_path / name, quantization_config={"quant_method": "fp8"})
        (tmp_path / name / "quantize_config.json").write_text("{}")
    out = merge(suite_at(tmp_path, {"a": "a", "b": "b"}))
    assert "quantization_config" not in read_config(out)
    assert "quantize_config.json" not in files_of(out)
    assert transformers.AutoModelForCausalLM.from_pretrained(out).dtype == torch.float32


@pytest.mark.parametrize("declared", [True, None])
def test_a_head_that_is_kept_apart_is_not_tied_by_the_configuration(
    tmp_path: Path, declared: bool | None
) -> None:
    models = [llama(seed, tie_word_embeddings=False) for seed in range(2)]
    for name, model in zip("ab", models, strict=True):
        model.save_pretrained(tmp_path / name)
    edit_config(tmp_path / "a", ("tie_word_embeddings",))
    if declared is not None:
        edit_config(tmp_path / "a", tie_word_embeddings=declared)
    out = merge(suite_at(tmp_path, {"a": "a", "b": "b"}))
    assert read_config(out)["tie_word_embeddings"] is False
    opened = transformers.AutoModelForCausalLM.from_pretrained(out)
    expected = sum(model.lm_head.weight for model in models) / 2
    torch.testing.assert_close(opened.lm_head.weight, expected)


def test_no_configuration_names_a_place_on_somebody_s_machine(tmp_path: Path) -> None:
    places = {"_name_or_path": "/home/me/models/x", "vocab_file": "C:\\models\\x"}
    for name in "ab":
        llama(ord(name)).save_pretrained(tmp_path / name)
        edit_config(tmp_path / name, **places, nested={"name_or_path": "../x", "keep_path": "a/b"})
        settings = {"name_or_path": "~/x", "tokenizer_file": "/root/t.json", "unk_token": "/"}
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(settings))
    out = merge(suite_at(tmp_path, {"a": "a", "b": "b"}))
    found = read_config(out)
    assert not set(places) & set(found)
    assert found["nested"] == {"keep_path": "a/b"}
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"unk_token": "/"}


CARRIED = {
    "config.json", "tokenizer.json", "tekken.json", "modules.json", "1_Pooling/config.json",
    "sentence_bert_config.json", "config_sentence_transformers.json", "spiece.model", "vocab.txt",
    "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "LICENSE", "LICENSE.txt",
    "NOTICE", "some_new_config.json",
}  # fmt: skip
LEFT = {
    "modeling_own.py", "1_Pooling/own.py", "additional_chat_templates/run.py", "training_args.bin",
    "trainer_state.json", "optimizer.pt", "scheduler.pt", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_config.json", "eval_results.json",
    "events.out.tfevents.1", ".secret.json", "x.pkl", "checkpoint-5/config.json", "README.md",
    "2_Dense/model.safetensors", "deep/er/config.json", "1_Pooling/notes.txt",
}  # fmt: skip


def write_files(folder: Path, names: set[str], text: str = "{}") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_what_stands_beside_weights_comes_along_by_pattern(tmp_path: Path) -> None:
    assert all(map(is_side_file, CARRIED))
    assert not any(map(is_side_file, LEFT))
    state = {"w": torch.ones(2)}
    write_files(tmp_path / "a", (CARRIED | LEFT) - {"adapter_config.json"} - {
        name for name in LEFT if name.endswith("index.json")
    })  # fmt: skip
    save_file(state, tmp_path / "a" / "model.safetensors")
    (tmp_path / "a" / "config.json").write_text('{"model_type": "bert", "dtype": "float32"}')
    # Another model that lies below is no part of this one.
    write_files(tmp_path / "a" / "other", {"config.json"}, '{"model_type": "bert"}')
    out = merge(suite_at(tmp_path, {"a": "a"}))
    assert files_of(out) == CARRIED | WRITTEN
    assert read_config(out) == {"model_type": "bert", "dtype": "float32"}


def test_links_that_lead_out_are_refused_and_floods_cut(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    llama(0).save_pretrained(folder)
    write_files(folder, {"inside.json"})
    (folder / "in.json").symlink_to("inside.json")
    (folder / "circle.json").symlink_to("circle.json")
    suite = suite_at(tmp_path, {"a": "a"})
    assert {"in.json", "inside.json"} <= files_of(merge(suite))
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    write_files(tmp_path / "elsewhere", {"config.json"})
    for name, target in {"out.json": "secret", "1_Pooling": "elsewhere"}.items():
        (folder / name).symlink_to(tmp_path / target)
        with pytest.raises(OutputError, match=f"{name}.* is a link to a place outside"):
            merge(suite, name)
        (folder / name).unlink()
    write_files(folder, {f"{i}.json" for i in range(MOST_FILES + 5)})
    assert len(find_side_files(folder)) == MOST_FILES


def tokens_of(text: str) -> dict[str, str]:
    return dict.fromkeys(("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"), text)


def test_a_base_without_tokenizer_takes_the_first_experts(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        llama(seed).save_pretrained(tmp_path / name)
        edit_config(tmp_path / name, of=name)
        (tmp_path / name / "generation_config.json").write_text(f'{{"of": "{name}"}}')
    for name in "ab":
        for file, text in tokens_of(f'{{"of": "{name}"}}').items():
            (tmp_path / name / file).write_text(text)
    suite = suite_at(tmp_path, {"a": "a", "b": "b"}, base="base")
    out = merge(suite)
    assert read_config(out)["of"] == "base"
    assert json.loads((out / "generation_config.json").read_text()) == {"of": "base"}
    for file, text in tokens_of('{"of": "a"}').items():
        assert (out / file).read_text() == text
    for file, text in tokens_of('{"of": "base"}').items():
        (tmp_path / "base" / file).write_text(text)
    out = merge(suite, "own")
    assert (out / "tokenizer.json").read_text() == '{"of": "base"}'


def test_a_base_that_is_a_bare_file_takes_the_first_experts_description(tmp_path: Path) -> None:
    models = [llama(seed) for seed in range(3)]
    for name, model in zip("ab", models[1:], strict=True):
        model.save_pretrained(tmp_path / name)
    save_file(models[0].state_dict(), tmp_path / "base.safetensors")
    out = merge(suite_at(tmp_path, {"a": "a", "b": "b"}, base="base.safetensors"))
    opened = transformers.AutoModelForCausalLM.from_pretrained(out)
    expected = sum(model.state_dict()["lm_head.weight"] for model in models[1:]) / 2
    torch.testing.assert_close(opened.lm_head.weight, expected)


def test_the_tokenizer_is_of_the_member_whose_vocabulary_is_written(tmp_path: Path) -> None:
    sizes = {"base": 40, "a": 40, "b": 43}
    for seed, (name, size) in enumerate(sizes.items()):
        llama(seed, vocab_size=size).save_pretrained(tmp_path / name)
        for file, text in tokens_of(f'{{"of": "{name}"}}').items():
            (tmp_path / name / file).write_text(text)
    out = merge(suite_at(tmp_path, {"a": "a", "b": "b"}, base="base", vocabulary="common"))
    assert read_config(out)["vocab_size"] == 43
    for file, text in tokens_of('{"of": "b"}').items():
        assert (out / file).read_text() == text
    opened = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert opened.lm_head.weight.shape == (43, 16)


def sentence_model(folder: Path, seed: int) -> dict[str, Tensor]:
    """A tiny BERT laid out as sentence-transformers does."""
    torch.manual_seed(seed)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog"]
    model = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=24, max_position_embeddings=12,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    parts = ["Transformer", "Pooling", "Normalize"]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{part}"}
        for i, (part, path) in enumerate(zip(parts, paths, strict=True))
    ]
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}
    for name, document in {
        "modules.json": modules,
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": {"max_seq_length": 12, "do_lower_case": False},
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
    }.items():
        write_files(folder, {name}, json.dumps(document))
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_sentence_transformers(tmp_path: Path) -> None:
    states = [sentence_model(tmp_path / name, seed) for seed, name in enumerate("ab")]
    out = merge(suite_at(tmp_path, {"a": "a", "b": "b"}))
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json",
                 "config_sentence_transformers.json"):  # fmt: skip
        assert (out / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    tokens = transformers.AutoTokenizer.from_pretrained(out)(["a cat"], return_tensors="pt")
    opened = transformers.AutoModel.from_pretrained(out).eval()
    expected = transformers.BertModel(opened.config).eval()
    expected.load_state_dict({name: (states[0][name] + states[1][name]) / 2 for name in states[0]})
    with torch.no_grad():
        torch.testing.assert_close(
            opened(**tokens).last_hidden_state, expected(**tokens).last_hidden_state
        )
    library = pytest.importorskip("sentence_transformers")
    encoded = library.SentenceTransformer(str(out)).encode(["a cat"], convert_to_tensor=True)
    with torch.no_grad():
        mean = expected(**tokens).last_hidden_state.mean(1)
    torch.testing.assert_close(encoded.cpu(), torch.nn.functional.normalize(mean))

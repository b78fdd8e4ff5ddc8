"""What the files beside the weights say: which differences are another network, and which are not.

The levels are written down here by what transformers computes: a field whose change leaves the
logits of a tiny model as they are may not be refused, one that changes them must be.
"""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from merge_core.compatibility.compare import compare_companions, refuse_incompatible
from merge_core.errors import SuiteError
from merge_core.merging.engine import check_fits
from merge_core.suites.suite import Suite, load_suite
from merge_core.yaml_text import dump_yaml

Files = Mapping[str, Any]

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]", "the", "cat", "sat", "mat"]


def write(folder: Path, files: Files) -> None:
    """A model of one matrix with files beside it: JSON for objects, text as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    weight = torch.eye(8) + 0.01 * torch.randn(8, 8)
    save_file({"blocks.0.mlp.fc1.weight": weight}, folder / "model.safetensors")
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")


def suite_of(root: Path, members: Mapping[str, Files], **fields: Any) -> Suite:
    """A suite of members with these files; one called base is the base."""
    for name, files in members.items():
        write(root / name, files)
    experts = {name: {"weights": name} for name in members if name != "base"}
    document = {"name": "suite", "experts": experts, **fields}
    if "base" in members:
        document["base"] = "base"
    (root / "suite.yaml").write_text(dump_yaml(document), encoding="utf-8")
    return load_suite(root / "suite.yaml")


def levels(root: Path, members: Mapping[str, Files], **fields: Any) -> dict[str, str]:
    """Level by field of what differs, notes left out."""
    found = compare_companions(suite_of(root, members, **fields))
    return {f.field: f.level for f in found if f.level != "noted"}


def configs(*changes: dict[str, Any], of: dict[str, Any] = LLAMA) -> dict[str, Files]:
    """A base with a configuration, and experts whose configurations differ; None removes."""

    def changed(change: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in (of | change).items() if value is not ...}

    members = {f"expert{i}": {"config.json": changed(change)} for i, change in enumerate(changes)}
    return {"base": {"config.json": of}, **members}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"rope_theta": 1e6}, "rope_theta"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type"),
        ({"rope_theta": ..., "rope_parameters": {"rope_theta": 5e5}}, "rope_theta"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_attention_heads": 4}, "num_attention_heads"),
        ({"num_key_value_heads": 1}, "num_key_value_heads"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps"),
        ({"rms_norm_eps": 1e-12}, "rms_norm_eps"),
        ({"model_type": "phi3"}, "model_type"),
        ({"sliding_window": 16}, "sliding_window"),
        ({"layer_types": ["sliding_attention"]}, None),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_another_network_under_the_same_shapes_is_refused(
    change: dict[str, Any], field: str | None, tmp_path: Path
) -> None:
    suite = suite_of(tmp_path, configs({}, change))
    if field is None:  # what only one file says, and no default is known for
        refuse_incompatible(suite)
        return
    with pytest.raises(SuiteError, match="not one network") as raised:
        check_fits(suite, suite.tasks)
    assert field in str(raised.value)
    assert "expert1" in str(raised.value)


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["LlamaForSequenceClassification"], "num_labels": 7},
        {"id2label": {"0": "cat"}, "label2id": {"cat": 0}, "problem_type": "regression"},
        {"_name_or_path": "x/y", "transformers_version": "4.1", "torch_dtype": "float16"},
        {"use_cache": False, "attention_dropout": 0.1, "finetuning_task": "mnli"},
        {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 10000}},
        {"rope_theta": ...},
        {"rope_scaling": None, "sliding_window": None, "head_dim": 4},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"hidden_act": "swish"},
        {"num_key_value_heads": ...},
        {"rms_norm_eps": 9.999999974752427e-07},
        {"model_type": "mistral", "sliding_window": None},
        {"sliding_window": 64},
        {"layer_types": ["full_attention"] * 2},
        {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "is_decoder": False},
        {"max_position_embeddings": 128, "vocab_size": 11, "eos_token_id": [2]},
        {"some_new_field": {"deep": [1, 2]}, "quantization_config": None},
    ],
)
def test_what_is_the_same_network_is_neither_refused_nor_warned_of(
    change: dict[str, Any], tmp_path: Path
) -> None:
    assert levels(tmp_path, configs({}, change)) == {}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"eos_token_id": 3}, "eos_token_id"),
        ({"eos_token_id": [2, 3]}, "eos_token_id"),
        ({"pad_token_id": 0}, "pad_token_id"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
    ],
)
def test_what_only_the_files_decide_is_warned_of(
    change: dict[str, Any], field: str, tmp_path: Path
) -> None:
    members = configs(change)
    assert levels(tmp_path, members) == {field: "warned"}
    suite = load_suite(tmp_path)
    check_fits(suite, suite.tasks)


def test_the_small_eps_that_is_warned_of_moves_little_and_the_other_much() -> None:
    """The bound of the table, from RMS norms of rows of variance 1e-3 in float64."""
    rows = torch.randn(4, 4096, dtype=torch.float64) * 1e-3**0.5

    def norm(eps: float) -> torch.Tensor:
        return rows / (rows.square().mean(-1, keepdim=True) + eps).sqrt()

    small = ((norm(1e-5) - norm(1e-6)).norm() / norm(1e-6).norm()).item()
    large = ((norm(1e-3) - norm(1e-6)).norm() / norm(1e-6).norm()).item()
    assert small < 0.005
    assert large > 0.25


def logits(change: dict[str, Any]) -> torch.Tensor:
    """What transformers computes with one set of weights under a changed configuration."""
    transformers = pytest.importorskip("transformers")
    plain = {name: value for name, value in (LLAMA | change).items() if value is not ...}
    config = transformers.LlamaConfig(
        **plain, vocab_size=11, intermediate_size=12, num_hidden_layers=2
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    for value in model.parameters():  # larger than at initialisation: nonlinearities show
        value.data.normal_(generator=torch.Generator().manual_seed(value.numel()))
    with torch.no_grad():
        return model(torch.arange(11)[None]).logits


@pytest.mark.parametrize(
    ("change", "level"),
    [
        ({"rope_theta": 1e6}, "refused"),
        ({"hidden_act": "relu"}, "refused"),
        ({"rms_norm_eps": 1e-1}, "refused"),
        ({"num_attention_heads": 4, "num_key_value_heads": 4}, "refused"),
        ({"rope_theta": ..., "rope_parameters": {"rope_theta": 10000.0}}, None),
        ({"hidden_act": "swish"}, None),
        ({"use_cache": False}, None),
        ({"rope_theta": ...}, None),
    ],
)
def test_levels_are_what_transformers_computes(
    change: dict[str, Any], level: str | None, tmp_path: Path
) -> None:
    differs = not torch.allclose(logits(change), logits({}), atol=1e-5)
    assert differs == (level == "refused")
    found = levels(tmp_path, configs(change))
    assert ("refused" in found.values()) == differs


def test_the_order_of_experts_does_not_count(tmp_path: Path) -> None:
    members = configs({"rope_theta": 1e6}, {"hidden_act": "gelu"}, {"eos_token_id": 5}, {})
    names = [name for name in members if name != "base"]
    found = set()
    for order in itertools.permutations(names):
        suite = suite_of(tmp_path, {"base": members["base"], **{n: members[n] for n in order}})
        found.add(compare_companions(suite))
    assert len(found) == 1
    assert {f.level for f in found.pop()} == {"refused", "warned"}


def test_a_base_and_one_expert_are_compared_as_experts_are(tmp_path: Path) -> None:
    members = configs({}, {"rope_theta": 1e6})
    with_base = levels(tmp_path / "a", members)
    alone = levels(tmp_path / "b", {n: f for n, f in members.items() if n != "base"})
    assert with_base == alone == {"rope_theta": "refused"}


def test_a_vision_tower_beside_the_whole_clip_is_compared_with_its_part(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    part = {"hidden_size": 768, "num_attention_heads": 12, "hidden_act": "quick_gelu"}
    whole = {"model_type": "clip", "vision_config": part, "text_config": {"hidden_size": 512}}
    tower = {"model_type": "clip_vision_model", **part}
    members = {"base": {"config.json": whole}, "a": {"config.json": tower}}
    assert levels(tmp_path / "same", members) == {}
    other = {"a": {"config.json": tower | {"hidden_act": "gelu"}}}
    assert levels(tmp_path / "other", members | other) == {"hidden_act": "refused"}
    silent = {"a": {"config.json": {"model_type": "clip_vision_model"}}}  # the class's defaults
    assert levels(tmp_path / "silent", members | silent) == {}


@pytest.mark.parametrize(
    ("one", "other", "level"),
    [
        ("vit_base_patch16_224.augreg_in21k", "vit_base_patch16_224", None),
        ("vit_base_patch16_224", "vit_base_patch16_384", None),  # shapes tell positions apart
        ("vit_base_patch16_clip_224", "vit_base_patch16_clip_quickgelu_224", "refused"),
        ("efficientnet_b0", "tf_efficientnet_b0", "refused"),
    ],
)
def test_names_of_timm(one: str, other: str, level: str | None, tmp_path: Path) -> None:
    members = {
        name: {"config.json": {"architecture": architecture, "pretrained_cfg": {"tag": name}}}
        for name, architecture in (("base", one), ("a", other))
    }
    assert levels(tmp_path, members).get("architecture") == level


def test_inputs_normalised_otherwise_are_warned_of(tmp_path: Path) -> None:
    timm = {"architecture": "resnet18", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    other = {**timm, "pretrained_cfg": {"mean": [0.4] * 3, "std": [0.5] * 3}}
    assert levels(tmp_path / "t", {"a": {"config.json": timm}, "b": {"config.json": other}}) == {
        "pretrained_cfg.mean": "warned"
    }
    processor = {"image_mean": [0.5] * 3, "size": {"height": 224, "width": 224}}
    later = {"image_mean": [0.48] * 3, "size": 224}
    name = "preprocessor_config.json"
    assert levels(tmp_path / "p", {"a": {name: processor}, "b": {name: later}}) == {
        "image_mean": "warned"
    }
    clip = {"model_cfg": {"vision_cfg": {"patch_size": 16}}, "preprocess_cfg": {"mean": [0.5]}}
    quick = {**clip, "model_cfg": {**clip["model_cfg"], "quick_gelu": True}}
    name = "open_clip_config.json"
    found = levels(tmp_path / "o", {"a": {name: clip}, "b": {name: quick}})
    assert found == {"model_cfg.quick_gelu": "refused"}


def test_images_of_another_size_are_another_network_only_where_positions_are_kept(
    tmp_path: Path,
) -> None:
    vit = {"model_type": "vit", "image_size": 224, "patch_size": 16}
    assert levels(tmp_path / "v", configs({"image_size": 384}, of=vit)) == {"image_size": "refused"}
    swin = {"model_type": "swin", "image_size": 224, "patch_size": 4, "window_size": 7}
    assert levels(tmp_path / "s", configs({"image_size": 256}, of=swin)) == {"image_size": "warned"}


def test_generation_and_special_tokens_are_warned_of_and_sampling_noted(tmp_path: Path) -> None:
    generation = {"eos_token_id": 2, "temperature": 0.7, "transformers_version": "5"}
    other = {"eos_token_id": [2, 9], "temperature": 0.1}
    name = "generation_config.json"
    suite = suite_of(tmp_path / "g", {"base": {name: generation}, "a": {name: other}})
    assert [(f.level, f.field) for f in compare_companions(suite)] == [
        ("warned", "eos_token_id"),
        ("noted", "temperature"),
    ]
    token = {"content": "</s>", "lstrip": False, "special": True}
    members = {
        "base": {"tokenizer_config.json": {"eos_token": token, "model_max_length": 512}},
        "a": {
            "tokenizer_config.json": {"eos_token": "</s>", "pad_token": "</s>"},
            "special_tokens_map.json": {"eos_token": "</s>"},
        },
    }
    assert levels(tmp_path / "t", members) == {"pad_token": "warned"}


def test_chat_templates_are_one_wherever_they_stand(tmp_path: Path) -> None:
    text = "{% for m in messages %}{{ m.content }}{% endfor %}"
    members = {
        "base": {"tokenizer_config.json": {"chat_template": text}},
        "a": {"tokenizer_config.json": {}, "chat_template.jinja": text + "\n"},
        "b": {"tokenizer_config.json": {}, "chat_template.json": {"chat_template": text}},
        "c": {"tokenizer_config.json": {"chat_template": [{"name": "default", "template": text}]}},
    }
    assert levels(tmp_path / "same", members) == {}
    members["d"] = {"tokenizer_config.json": {"chat_template": "other " * 99}}
    found = compare_companions(suite_of(tmp_path / "other", members))
    assert [f.level for f in found] == ["warned"]
    assert "in d" in found[0].values
    assert "other other" not in found[0].values


def fast(words: list[str], **parts: Any) -> dict[str, Any]:
    """A tokenizer.json of these words."""
    added = [{"id": i, "content": w, "special": True} for i, w in enumerate(words) if w[0] == "["]
    vocabulary = {word: i for i, word in enumerate(words)}
    return {"model": {"type": "WordPiece", "vocab": vocabulary}, "added_tokens": added, **parts}


def test_a_permuted_vocabulary_is_refused_in_every_file_that_lists_it(tmp_path: Path) -> None:
    other = [*WORDS[:6], "cat", "the", *WORDS[8:]]
    forms: dict[str, Any] = {
        "tokenizer.json": fast,
        "vocab.txt": lambda words: "\n".join(words) + "\n",
        "vocab.json": lambda words: {word: i for i, word in enumerate(words)},
    }
    for (one, of), (two, to) in itertools.product(forms.items(), repeat=2):
        same = {"base": {one: of(WORDS)}, "a": {two: to(WORDS)}}
        assert levels(tmp_path / "same" / one / two, same) == {}
        differs = {"base": {one: of(WORDS)}, "a": {two: to(other)}}
        suite = suite_of(tmp_path / "differs" / one / two, differs)
        with pytest.raises(SuiteError, match=r"2 of 10 rows; row 6 is 'the' in base, 'cat' in a"):
            refuse_incompatible(suite)


@pytest.mark.parametrize("seed", range(3))
def test_any_order_but_the_same_is_refused(seed: int, tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(30)]
    other = random.Random(seed).sample(words, len(words))
    pieces = {"model": {"type": "Unigram", "vocab": [[word, -1.0] for word in words]}}
    mixed = {"model": {"type": "Unigram", "vocab": [[word, -1.0] for word in other]}}
    members = {"a": {"tokenizer.json": pieces}, "b": {"tokenizer.json": mixed}}
    found = levels(tmp_path, members)
    assert found["vocabulary"] == "refused"
    assert levels(tmp_path, members, vocabulary="common")["vocabulary"] == "refused"


def test_added_tokens_are_noted_and_spare_rows_warned_of(tmp_path: Path) -> None:
    longer = {
        "base": {"tokenizer.json": fast(WORDS)},
        "a": {"tokenizer.json": fast([*WORDS, "dog"])},
    }
    found = compare_companions(suite_of(tmp_path / "longer", longer, vocabulary="common"))
    assert [(f.level, f.values) for f in found] == [("noted", "10 in base; 11 in a")]
    taken = [*WORDS[:5], "dog", *WORDS[6:]]
    spare = {"base": {"vocab.txt": "\n".join(WORDS)}, "a": {"vocab.txt": "\n".join(taken)}}
    assert levels(tmp_path / "spare", spare) == {"vocabulary": "warned"}


def test_merges_and_normalizers_are_warned_of(tmp_path: Path) -> None:
    pairs = fast(WORDS)
    pairs["model"] |= {"merges": [["c", "at"], ["s", "at"]]}
    texts = fast(WORDS)
    texts["model"] |= {"merges": ["c at", "s at"]}
    turned = fast(WORDS)
    turned["model"] |= {"merges": ["s at", "c at"]}
    same = {"a": {"tokenizer.json": pairs}, "b": {"tokenizer.json": texts}}
    assert levels(tmp_path / "same", same) == {}
    differs = {"a": {"tokenizer.json": pairs}, "b": {"tokenizer.json": turned}}
    assert levels(tmp_path / "differs", differs) == {"merges": "warned"}
    lower = {
        "a": {"tokenizer.json": fast(WORDS)},
        "b": {"tokenizer.json": fast(WORDS, normalizer={"type": "Lowercase"})},
    }
    assert levels(tmp_path / "lower", lower) == {"normalizer": "warned"}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"rope_theta": 1' + "0" * 5000 + "}",
        "[1, 2]",
        '"text"',
        '{"hidden_act":' + "[" * 900 + "]" * 900 + "}",
        '{"model": {"vocab": {"a": 0}}, "normalizer":' + '{"a":' * 400 + "1" + "}" * 400 + "}",
        '{"model_type": ["llama"], "rope_theta": {"a": 1}, "hidden_act": null}',
        '{"model": 3, "added_tokens": 7, "chat_template": 5, "eos_token": [[]]}',
        '{"model": {"vocab": [1, [], ["a"]], "merges": [1, [2]]}, "added_tokens": [1, {"id": []}]}',
        '{"rope_scaling": {"type": [], "factor": NaN}, "rope_parameters": {"x": {"y": {}}}}',
        '{"layer_norm_eps": true, "image_size": [1, [2]], "architecture": {}, "size": {"a": {}}}',
        '{"layer_norm_eps": "1e-5", "model_type": "x\\u001b[31m", "vision_config": 4}',
        "\udcff".encode("utf-8", "surrogateescape").decode("latin-1"),
    ],
)
def test_files_of_strangers_raise_nothing(content: str, tmp_path: Path) -> None:
    names = (
        *("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt"),
        *("generation_config.json", "preprocessor_config.json", "special_tokens_map.json"),
        *("chat_template.json", "added_tokens.json", "merges.txt", "open_clip_config.json"),
    )
    good = {"config.json": LLAMA, "tokenizer.json": fast(WORDS), "vocab.txt": "a\nb"}
    members = {"base": dict.fromkeys(names, content), "a": good, "b": good}
    found = compare_companions(suite_of(tmp_path, members))
    for finding in found:
        assert finding.sentence.isprintable()
        assert len(finding.sentence) < 600


def test_what_is_no_file_counts_as_absent(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, configs({}))
    (tmp_path / "expert0" / "config.json").unlink()
    (tmp_path / "expert0" / "config.json").mkdir()
    (tmp_path / "expert0" / "tokenizer.json").symlink_to(tmp_path / "expert0" / "tokenizer.json")
    assert compare_companions(suite) == ()


def test_links_are_followed_within_the_folder_and_where_the_weights_lead(tmp_path: Path) -> None:
    suite_of(tmp_path, configs({}, {"rope_theta": 1e6}))
    config = tmp_path / "expert1" / "config.json"
    (tmp_path / "elsewhere").mkdir()
    away = config.rename(tmp_path / "elsewhere" / "config.json")
    config.symlink_to(away)
    assert compare_companions(load_suite(tmp_path)) == ()
    # A cache or a store of models, to which the weights are linked as well.
    weights = tmp_path / "expert1" / "model.safetensors"
    weights.symlink_to(weights.rename(tmp_path / "elsewhere" / "weights.safetensors"))
    assert [f.field for f in compare_companions(load_suite(tmp_path))] == ["rope_theta"]


def test_members_that_cannot_be_read_are_left_to_the_pre_flight(tmp_path: Path) -> None:
    members = configs({}, {"rope_theta": 1e6})
    suite_of(tmp_path, members, vocabulary="base")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"")
    (tmp_path / "expert0" / "model.safetensors").unlink()
    assert compare_companions(load_suite(tmp_path)) == ()
    (tmp_path / "expert0" / "model.safetensors").write_bytes(b"")
    assert compare_companions(load_suite(tmp_path)) == ()


def test_adapters_of_several_bases_are_warned_of(tmp_path: Path) -> None:
    """By the names in their configurations, without owners and folders."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    names = {"a": "org/llama-7b", "b": "/models/Llama-7B/", "c": "other/llama-7b-chat"}
    for task, name in names.items():
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["0"]))
        adapted.save_pretrained(tmp_path / task)
        path = tmp_path / task / "adapter_config.json"
        config = json.loads(path.read_text()) | {"base_model_name_or_path": name}
        path.write_text(json.dumps(config))

    def levels_of(*tasks: str) -> list[str]:
        experts = {task: {"weights": task} for task in tasks}
        document = {"name": "s", "base": "base.safetensors", "experts": experts}
        (tmp_path / "suite.yaml").write_text(dump_yaml(document), encoding="utf-8")
        return [f.level for f in compare_companions(load_suite(tmp_path))]

    assert levels_of("a", "b") == []
    assert levels_of("c", "a", "b") == ["warned"]


def test_another_order_mixes_no_rows_where_the_base_keeps_its_embeddings(tmp_path: Path) -> None:
    other = ["dog", *WORDS[1:6], "cat", "the", *WORDS[8:]]
    members = {"base": {"tokenizer.json": fast(WORDS)}, "a": {"tokenizer.json": fast(other)}}
    for rule, level in (("base", "warned"), ("common", "refused")):
        suite_of(tmp_path, members, vocabulary=rule)
        for name, rows in (("base", 10), ("a", 11)):  # a table of its own length each
            state = {"blocks.0.mlp.fc1.weight": torch.eye(8), "wte.weight": torch.zeros(rows, 8)}
            save_file(state, tmp_path / name / "model.safetensors")
        found = compare_companions(load_suite(tmp_path))
        assert [(f.field, f.level) for f in found] == [("vocabulary", level)]


def test_many_fields_do_not_hide_the_one_that_counts(tmp_path: Path) -> None:
    many = {f"a{i}": i for i in range(5000)}
    assert levels(tmp_path, configs({"rope_theta": 1e6, **many})) == {"rope_theta": "refused"}


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    good = {"config.json": LLAMA, "tokenizer.json": fast(WORDS)}
    members = {"base": good, "a": good, "b": {"config.json": "{", "tokenizer.json": "[]"}}
    found = compare_companions(suite_of(tmp_path, members))
    assert [(f.level, f.file) for f in found] == [
        ("warned", "config.json"),
        ("warned", "tokenizer"),
    ]
    assert all("cannot be read in b" in f.values for f in found)

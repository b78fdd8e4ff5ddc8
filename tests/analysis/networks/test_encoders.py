"""Every family gives what transformers' own classes give, from nothing but its config.json."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from analysis.networks.classifiers import find_classifier
from analysis.networks.limits import Size
from analysis.networks.towers import suite_network
from analysis.outputs.heads import load_head
from merge_core.errors import SuiteError
from merge_core.suites.suite import Suite, load_suite
from merge_core.suites.suite_spec import ArchitectureSpec
from tests.evaluable import write_document

transformers = pytest.importorskip("transformers")

CLASSES, VOCABULARY, LENGTHS = 4, 50, (7, 3, 5)
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 24,
}
IMAGE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "image_size": 32,
    "patch_size": 16,
}
TEXTS: dict[str, dict[str, Any]] = {
    "bert": TEXT,
    "roberta": TEXT,
    "xlm-roberta": TEXT,
    "camembert": TEXT,
    "distilbert": {
        **{"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 20},
        **{"vocab_size": VOCABULARY, "max_position_embeddings": 24},
    },
    "electra": {**TEXT, "embedding_size": 12},
    "mpnet": TEXT,
    "deberta": {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "deberta-v2": {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "albert": {**TEXT, "embedding_size": 12},
    "modernbert": TEXT | {"pad_token_id": 0},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24},
}
IMAGES: dict[str, dict[str, Any]] = {
    "vit": IMAGE,
    "deit": IMAGE,
    "beit": IMAGE,
    "dinov2": {key: IMAGE[key] for key in IMAGE if key != "intermediate_size"},
    "dinov2_with_registers": {key: IMAGE[key] for key in IMAGE if key != "intermediate_size"},
    "swin": {
        **{"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 2]},
        **{"num_heads": [2, 2], "window_size": 4},
    },
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32},
    "resnet": {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8},
    "clip": {"vision_config": IMAGE, "text_config": {"hidden_size": 8, "num_attention_heads": 1}},
    "siglip": {"vision_config": IMAGE, "text_config": {"hidden_size": 8, "num_attention_heads": 1}},
}
KINDS = {**TEXTS, **IMAGES}


def classifier(kind: str, seed: int = 0) -> Any:
    """transformers' classifier of a type, small, with weights that are nowhere zero or one."""
    config = transformers.CONFIG_MAPPING[kind](**KINDS[kind])
    config.num_labels = CLASSES
    if kind in TEXTS:
        config.pad_token_id = config.pad_token_id or 0
        make = transformers.AutoModelForSequenceClassification
    else:
        make = transformers.AutoModelForImageClassification
    if kind == "deit":  # of two classes the library wants to be told which
        config.architectures = ["DeiTForImageClassification"]
    torch.manual_seed(seed)
    model = make.from_config(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return model


def inputs(kind: str) -> Tensor:
    """Texts of several lengths, negative after their ends, or images."""
    source = torch.Generator().manual_seed(5)
    if kind in IMAGES:
        return torch.randn(3, 3, 32, 32, generator=source)
    tokens = torch.full((len(LENGTHS), 10), -1)
    for row, length in enumerate(LENGTHS):
        tokens[row, :length] = torch.randint(5, VOCABULARY, (length,), generator=source)
    return tokens


@torch.no_grad()
def own_logits(model: Any, given: Tensor) -> Tensor:
    """Of each input alone, so that there is no padding."""
    if given.ndim == 4:
        result: Tensor = model(pixel_values=given).logits
        return result
    return torch.cat([model(input_ids=row[row >= 0][None]).logits for row in given])


def suite_of(folder: Path, kind: str, bare_base: bool = True, **fields: Any) -> Suite:
    """A suite of two classifiers as their library saves them; nothing says what they are but
    config.json."""
    for seed, name in enumerate(("one", "two")):
        classifier(kind, seed).save_pretrained(folder / name)
    document: dict[str, Any] = {
        "name": "s",
        "experts": {name: {"weights": name} for name in ("one", "two")},
        **fields,
    }
    if bare_base:
        model = classifier(kind, 2)
        bare = getattr(model, model.base_model_prefix, None) or model.vision_model
        bare.save_pretrained(folder / "base")
        document["base"] = "base"
    return load_suite(write_document(folder, document))


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_experts_give_the_logits_of_their_library(
    kind: str, with_base: bool, tmp_path: Path
) -> None:
    suite = suite_of(tmp_path, kind, with_base)
    network, given = suite_network(suite), inputs(kind)
    for seed, task in enumerate(suite.tasks):
        expert = suite.expert(task)
        state = {name: expert.tensor(name) for name in expert}
        assert set(network.module.state_dict()) <= set(state)
        got = load_head(suite, task).logits(network.features(state, given))
        expected = own_logits(classifier(kind, seed), given)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "pooling", "layers"),
    [
        ("bert", "pooler", {"classifier": "nothing"}),
        ("roberta", "first", {"classifier.dense": "nothing", "classifier.out_proj": "tanh"}),
        ("electra", "first", {"classifier.dense": "nothing", "classifier.out_proj": "gelu"}),
        ("distilbert", "first", {"pre_classifier": "nothing", "classifier": "relu"}),
        ("mpnet", "first", {"classifier.dense": "nothing", "classifier.out_proj": "tanh"}),
        ("deberta-v2", "first", {"pooler.dense": "nothing", "classifier": "gelu"}),
        ("albert", "pooler", {"classifier": "nothing"}),
        ("gpt2", "last", {"score": "nothing"}),
        ("vit", "first", {"classifier": "nothing"}),
        ("dinov2", "first_and_patches", {"classifier": "nothing"}),
        ("swin", "mean", {"classifier": "nothing"}),
        ("convnext", "pooler", {"classifier": "nothing"}),
        ("clip_vision_model", "patches", {"classifier": "nothing"}),
        ("siglip_vision_model", "mean", {"classifier": "nothing"}),
    ],
)
def test_what_a_classifier_takes_is_read_off_its_run(
    kind: str, pooling: str, layers: dict[str, str]
) -> None:
    """Against what stands in the forward methods of transformers 5."""
    args = IMAGE if kind.endswith("vision_model") else KINDS[kind]
    architecture = ArchitectureSpec(name=kind, args=args, library="transformers")
    found = find_classifier(architecture, Path("suite.yaml"), Size())
    assert found is not None
    assert found.pooling == pooling
    assert {layer.name: layer.before for layer in found.layers} == layers


def bert_args(**args: Any) -> dict[str, Any]:
    return {"name": "bert", "library": "transformers", "args": {**TEXT, **args}}


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({**bert_args(), "name": "roberta"}, None),  # the same names and shapes
        (bert_args(num_hidden_layers=3), r"lack 'encoder.layer.2.*\(16 of \d+ are missing\)"),
        (bert_args(num_hidden_layers=1), r"hold 'encoder.layer.1.*fewer layers \(16 param"),
        (bert_args(intermediate_size=21), r"has shape .* needs .*Correct the architecture's args"),
        (
            {"name": "distilbert", "library": "transformers", "args": TEXTS["distilbert"]},
            "of another",
        ),
        ({"name": "vit", "library": "transformers", "args": IMAGE}, "26 of the 40 .* 'vit'"),
        (bert_args(auto_map={"AutoModel": "x.Y"}), "'auto_map' would have transformers fetch"),
    ],
)
def test_what_is_at_fault_is_named(
    architecture: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    classifier("bert").bert.save_pretrained(tmp_path / "one")
    document = {"name": "s", "architecture": architecture, "experts": {"one": {"weights": "one"}}}
    suite = load_suite(write_document(tmp_path, document))
    expert = suite.expert("one")
    state = {name: expert.tensor(name) for name in expert}
    if message is None:
        assert suite_network(suite).features(state, inputs("bert")).shape == (3, 16)
        return
    with pytest.raises(SuiteError, match=message):
        suite_network(suite).features(state, inputs("bert"))


@pytest.mark.parametrize("prefix", ["", "bert.", "model.encoder."])
def test_any_prefix_is_found(prefix: str, tmp_path: Path) -> None:
    bert = classifier("bert").bert
    (tmp_path / "one").mkdir()
    named = {f"{prefix}{name}": value for name, value in bert.state_dict().items()}
    save_file(named, tmp_path / "one/model.safetensors")
    bert.config.save_pretrained(tmp_path / "one")
    suite = load_suite(
        write_document(tmp_path, {"name": "s", "experts": {"one": {"weights": "one"}}})
    )
    network, expert = suite_network(suite), suite.expert("one")
    state = {name: expert.tensor(name) for name in expert}
    tokens = inputs("bert")
    with torch.no_grad():  # what BERT's classifier takes
        expected = [bert(input_ids=row[row >= 0][None]).pooler_output for row in tokens]
    got = network.features(state, tokens)
    torch.testing.assert_close(got, torch.cat(expected), rtol=1e-5, atol=1e-6)
    assert set(network.module.state_dict()) == set(named)


def test_learners_find_layers_and_blocks_by_the_names_in_files(tmp_path: Path) -> None:
    """A ViT's modules are called otherwise than its parameters are saved."""
    suite = suite_of(tmp_path, "vit")
    module, given = suite_network(suite).module, inputs("vit")
    block = module.get_submodule("vit.encoder.layer.1")
    query = module.get_submodule("vit.encoder.layer.1.attention.attention.query")
    seen: list[Any] = []
    for each in (block, query):
        each.register_forward_pre_hook(lambda layer, _: seen.append(layer))
    with torch.no_grad():
        module(given)
    assert seen == [block, query]
    copied = copy.deepcopy(module)
    own = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        before = module(given)
        changed = {name: 1.5 * value for name, value in own.items()}
        assert not torch.allclose(torch.func.functional_call(copied, changed, (given,)), before)
        torch.testing.assert_close(module(given), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_towers_of_whole_models_give_their_embeddings(kind: str, tmp_path: Path) -> None:
    """A whole model as the base, and experts that are its vision tower or the whole again."""
    text = {
        **{"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "vocab_size": VOCABULARY, "projection_size": 16},
    }
    make = transformers.CONFIG_MAPPING[kind]
    whole = transformers.AutoModel.from_config(make(vision_config=IMAGE, text_config=text)).eval()
    whole.save_pretrained(tmp_path / "base")
    whole.save_pretrained(tmp_path / "one")
    document = {"name": "s", "base": "base", "experts": {"one": {"weights": "one"}}}
    suite = load_suite(write_document(tmp_path, document))
    expert = suite.expert("one")
    state = {name: expert.tensor(name) for name in expert}
    images = inputs("vit")
    with torch.no_grad():
        expected = whole.get_image_features(pixel_values=images)
    expected = getattr(expected, "pooler_output", expected)
    got = suite_network(suite).features(state, images)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_text_tower_gives_its_pooled_vector(tmp_path: Path) -> None:
    args = {
        **{"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 24},
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    }
    tower = transformers.AutoModel.from_config(transformers.CLIPTextConfig(**args)).eval()
    tower.save_pretrained(tmp_path / "one")
    suite = load_suite(
        write_document(tmp_path, {"name": "s", "experts": {"one": {"weights": "one"}}})
    )
    tokens = torch.tensor([[1, 7, 9, 11, 2], [1, 30, 31, 32, 2]])
    expert = suite.expert("one")
    state = {name: expert.tensor(name) for name in expert}
    with torch.no_grad():
        expected = tower(input_ids=tokens).pooler_output
    torch.testing.assert_close(suite_network(suite).features(state, tokens), expected)

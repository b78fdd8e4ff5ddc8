"""Architectures told from config.json: what is written builds the network that was saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.networks.towers import suite_network
from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.opening.draft import write_suite
from merge_core.opening.roles import draft_suite, with_base
from merge_core.opening.search import find_models
from merge_core.suites.architectures import (
    WHOLE,
    of_config,
    read_architecture,
    read_class_names,
    runnable_types,
)
from merge_core.suites.suite import load_suite
from merge_core.suites.suite_spec import ArchitectureSpec

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS: dict[str, Any] = {
    "gpt2": lambda: transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40),
    "roberta": lambda: transformers.RobertaConfig(
        **SMALL, intermediate_size=20, vocab_size=40, max_position_embeddings=20
    ),
    "clip_vision_model": lambda: transformers.CLIPVisionConfig(
        **SMALL, intermediate_size=20, image_size=32, patch_size=16, projection_dim=12
    ),
}
CLASSES = {
    "gpt2": "GPT2ForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
    "clip_vision_model": "CLIPVisionModelWithProjection",
}


@pytest.mark.parametrize("kind", ["bert", "mpnet", "deberta-v2", "dinov2", "swin", "siglip"])
def test_encoders_of_transformers_are_known(kind: str) -> None:
    assert kind in runnable_types() | WHOLE.keys()
    assert of_config({"model_type": kind}) is not None


@pytest.mark.parametrize("kind", ["t5", "bart", "timm_wrapper", "detr", "whisper", "nothing"])
def test_what_is_no_encoder_is_not_named(kind: str) -> None:
    assert of_config({"model_type": kind}) is None


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_a_saved_model_is_named_and_built_again(kind: str, tmp_path: Path) -> None:
    for seed, name in enumerate(("start", "a", "b")):
        torch.manual_seed(seed)
        config = CONFIGS[kind]()
        config.dtype = None if seed else "float32"
        getattr(transformers, CLASSES[kind])(config).save_pretrained(tmp_path / name)
    found = with_base(find_models([str(tmp_path)]), str(tmp_path / "start"))
    path = tmp_path / "suite.yaml"
    write_suite(draft_suite(found, "s"), path)
    suite = load_suite(path)
    assert suite.spec.architecture is not None
    assert (suite.spec.architecture.name, suite.spec.architecture.library) == (kind, "transformers")
    network = suite_network(suite).module
    expert = suite.expert("a")
    own = network.state_dict()
    held = {name: tuple(value.shape) for name, value in own.items() if name in expert}
    assert held == {name: expert.info(name).shape for name in held}
    assert len(held) >= len(own) - 2  # position ids are buffers of the network alone


def test_members_that_say_different_things_name_nothing(tmp_path: Path) -> None:
    for name, heads in (("a", 2), ("b", 4)):
        config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=heads, vocab_size=40)
        transformers.GPT2Model(config).save_pretrained(tmp_path / name)
    assert draft_suite(find_models([str(tmp_path)]), "s").architecture is None


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "bert", "auto_map": {"AutoModel": "x.py"}, "num_labels": 3},
        {"model_type": ["gpt2"]},
        {"architecture": "hf-hub:org/model"},
        {"architecture": "../x"},
        {"architecture": 5, "model_args": 7},
        {"model_type": "clip", "vision_config": 3, "projection_dim": []},
    ],
)
def test_strangers_files_name_nothing_that_cannot_be_run(config: dict[str, Any]) -> None:
    told = of_config(json.loads(json.dumps(config)))
    assert told is None or told.args == {}


def test_a_backbone_saved_alone_is_the_base_of_classifiers(tmp_path: Path) -> None:
    """Its names lack the prefix that they have under a head."""
    config = CONFIGS["roberta"]()
    transformers.RobertaModel(config).save_pretrained(tmp_path / "base")
    for name in ("mood", "news"):
        transformers.RobertaForSequenceClassification(config).save_pretrained(tmp_path / name)
    transformers.GPT2Model(CONFIGS["gpt2"]()).save_pretrained(tmp_path / "other")
    found = {each.label: each.role for each in find_models([str(tmp_path)])}
    assert found == {"base": "base", "mood": "expert", "news": "expert", "other": "left out"}


MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
UNIT = {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.x.Normalize"}
DENSE = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}


@pytest.mark.parametrize(
    ("modules", "pooling", "told"),
    [
        (MODULES, {"pooling_mode_mean_tokens": True}, ("mean", None)),
        ([*MODULES, UNIT], {"pooling_mode_cls_token": True}, ("first", True)),
        (MODULES, {"pooling_mode": "lasttoken"}, ("last", None)),  # as version 6 writes it
        (MODULES, {"pooling_mode": ["mean"], "pooling_mode_cls_token": False}, ("mean", None)),
        (MODULES, {"pooling_mode": "max"}, (None, None)),
        (MODULES, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, (None, None)),
        ([*MODULES, DENSE], {"pooling_mode": "mean"}, (None, None)),  # another vector follows
        (MODULES[:1], {"pooling_mode": "mean"}, (None, None)),
        ({"0": MODULES}, {"pooling_mode": "mean"}, (None, None)),
        ([{**MODULES[0]}, {**MODULES[1], "path": "../1_Pooling"}], {}, (None, None)),
    ],
)
def test_pooling_is_what_the_files_of_sentence_transformers_say(
    modules: Any, pooling: dict[str, Any], told: tuple[Any, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    transformers.RobertaModel(CONFIGS["roberta"]()).save_pretrained(folder)
    for place in (folder / "1_Pooling", tmp_path / "1_Pooling"):  # one of them outside
        place.mkdir()
        given = pooling if place.parent == folder else {"pooling_mode": "mean"}
        (place / "config.json").write_text(json.dumps(given), encoding="utf-8")
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    found = read_architecture(Checkpoint(folder))
    assert found is not None
    assert (found.pooling, found.normalize) == told


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"id2label": {"1": "no", "0": "yes"}}, ("yes", "no")),
        ({"label_names": ["a", "b"]}, ("a", "b")),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, None),
        ({"id2label": {"0": "yes", "2": "no"}}, None),
        ({"id2label": {"0": "yes", "1": "yes"}}, None),
        ({"id2label": ["yes"]}, None),
        ({"label_names": [1, 2]}, None),
        ({}, None),
    ],
)
def test_names_of_classes_are_those_of_the_configuration(
    config: dict[str, Any], names: tuple[str, ...] | None, tmp_path: Path
) -> None:
    transformers.RobertaModel(CONFIGS["roberta"]()).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert read_class_names(Checkpoint(tmp_path)) == names


def test_the_identity_of_architectures_is_as_it_was() -> None:
    """By it predictions are kept; what is not said leaves it alone."""
    spec = ArchitectureSpec(name="gpt2", args={"n_layer": 2}, library="transformers")
    assert spec.identity == '{"name":"gpt2","args":{"n_layer":2},"library":"transformers"}'
    named = spec.model_copy(update={"pooling": "mean", "normalize": True})
    assert named.identity != spec.identity
    with pytest.raises(ValueError, match="'pooling' is of architectures of transformers"):
        ArchitectureSpec(name="vit", pooling="mean")

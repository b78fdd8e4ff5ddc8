"""Classifiers within checkpoints: found, run as their library runs them, their classes named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

from analysis.evaluation.evaluator import Evaluator
from analysis.networks.towers import suite_network
from analysis.outputs.heads import load_head
from analysis.outputs.inputs import load_inputs
from merge_core.errors import SuiteError
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import make_recipe
from merge_core.suites.suite import Suite, load_suite
from tests.analysis.networks.test_encoders import classifier, inputs, own_logits, suite_of
from tests.evaluable import write_document

CLASSES = 4
NETWORKS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2},
    "resnet18": {"channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1]},
    "convnext_atto": {"dims": [8, 8, 8, 8], "depths": [1, 1, 1, 1]},
    "mobilenetv3_small_050": {},
    "swin_tiny_patch4_window7_224": {
        **{"img_size": 32, "window_size": 2, "embed_dim": 8},
        **{"depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]},
    },
}


def timm_suite(folder: Path, name: str, args: dict[str, Any], **fields: Any) -> tuple[Suite, Any]:
    """One expert as timm's save_for_hf writes it, and the network itself."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES, **args).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.05 * torch.randn_like(value))
    (folder / "one").mkdir(parents=True)
    save_file(model.state_dict(), folder / "one/model.safetensors")
    config = {"architecture": name, "num_classes": CLASSES, "model_args": args, **fields}
    (folder / "one/config.json").write_text(json.dumps(config), encoding="utf-8")
    document = {"name": "s", "experts": {"one": {"weights": "one"}}}
    return load_suite(write_document(folder, document)), model


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_those_of_timm(name: str, tmp_path: Path) -> None:
    suite, model = timm_suite(tmp_path, name, NETWORKS[name])
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    state = load_file(tmp_path / "one/model.safetensors")
    got = load_head(suite, "one").logits(suite_network(suite).features(state, images))
    with torch.no_grad():
        torch.testing.assert_close(got, model(images), rtol=1e-5, atol=1e-5)


def test_two_classifiers_of_timm_are_no_head(tmp_path: Path) -> None:
    args = {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2}
    suite, _ = timm_suite(tmp_path, "deit_tiny_distilled_patch16_224", args)
    with pytest.raises(SuiteError, match=r"more than one linear layer.*Add 'head:'"):
        load_head(suite, "one")


def with_data(folder: Path, kind: str, classes: list[str] | None, **labels: Any) -> Suite:
    """A suite of classifiers with images as an archive."""
    suite = suite_of(folder, kind)
    if classes is not None:
        for task in suite.tasks:
            path = folder / task / "config.json"
            config = json.loads(path.read_text(encoding="utf-8"))
            config["id2label"] = dict(enumerate(classes))
            config["label2id"] = {name: number for number, name in enumerate(classes)}
            path.write_text(json.dumps(config), encoding="utf-8")
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split in ("val", "test"):
        arrays[f"{split}_images"] = rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.array([0, 1, 2, 3, 0, 1])
    np.savez(folder / "data.npz", **arrays, **labels)
    experts = {task: {"weights": task, "data": {"file": "data.npz"}} for task in suite.tasks}
    document = {"name": "s", "base": "base", "experts": experts}
    return load_suite(write_document(folder, document))


def test_labels_go_by_the_names_of_the_checkpoints_classes(tmp_path: Path) -> None:
    names = ["cat", "dog", "emu", "fox"]
    suite = with_data(tmp_path, "vit", ["Fox", "dog", "cat", "emu"], class_names=np.array(names))
    found = load_inputs(suite, "one", "test")
    assert found.class_names == ("Fox", "dog", "cat", "emu")
    assert [found.class_names[label].lower() for label in found.labels] == [
        names[label] for label in [0, 1, 2, 3, 0, 1]
    ]


@pytest.mark.parametrize("classes", [None, ["a", "b", "c", "d"]])
def test_other_names_stay(classes: list[str] | None, tmp_path: Path) -> None:
    names = np.array(["cat", "dog", "emu", "fox"])
    found = load_inputs(with_data(tmp_path, "vit", classes, class_names=names), "one", "test")
    assert found.class_names == tuple(names)
    assert found.labels.tolist() == [0, 1, 2, 3, 0, 1]


def test_a_merge_of_classifiers_is_evaluated_with_each_tasks_own(tmp_path: Path) -> None:
    """The average by hand: transformers' classifier with averaged encoder and the task's head."""
    suite = with_data(tmp_path, "vit", None)
    assert suite.can_evaluate
    session = MergeSession(suite, suite.tasks, FactorStore())
    evaluator = Evaluator(suite)
    recipe = make_recipe({"suite": str(suite.path), "method": "average"})
    images = evaluator.outputs.images(suite.tasks, "test")
    got = evaluator.measure_recipe(recipe, session, images, "test")
    states = [classifier("vit", seed).state_dict() for seed in (0, 1)]
    pixels = torch.from_numpy(load_inputs(suite, "one", "test").images).permute(0, 3, 1, 2)
    for task, own in zip(suite.tasks, states, strict=True):
        merged = {
            name: own[name] if name.startswith("classifier") else (states[0][name] + value) / 2
            for name, value in states[1].items()
        }
        model = classifier("vit")
        model.load_state_dict(merged)
        with torch.no_grad():
            expected = model(pixel_values=pixels.float() / 127.5 - 1).logits.argmax(dim=1)
        np.testing.assert_array_equal(got[task]["classes"], expected.numpy())


def test_another_pooling_than_the_classifiers_is_refused(tmp_path: Path) -> None:
    suite_of(tmp_path, "distilbert")
    args = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 20, "vocab_size": 50}
    architecture = {
        **{"name": "distilbert", "library": "transformers", "pooling": "mean"},
        "args": {**args, "max_position_embeddings": 24},
    }
    experts = {"one": {"weights": "one"}}
    document = {"name": "s", "architecture": architecture, "experts": experts}
    suite = load_suite(write_document(tmp_path, document))
    with pytest.raises(SuiteError, match=r"take the pooling 'first'.*'mean'. Leave 'pooling'"):
        load_head(suite, "one")


@pytest.mark.parametrize("kind", ["roberta", "electra"])
def test_layers_named_in_a_file_have_their_familys_activation(kind: str, tmp_path: Path) -> None:
    """RoBERTa's head has tanh between its two layers, ELECTRA's has gelu."""
    suite = suite_of(tmp_path, kind)
    head = {"file": "one/model.safetensors", "layers": "classifier"}
    document = {"name": "s", "experts": {"one": {"weights": "one", "head": head}}}
    named = load_suite(write_document(tmp_path, document))
    features = torch.randn(3, 16, generator=torch.Generator().manual_seed(3))
    expected = load_head(suite, "one").logits(features)
    torch.testing.assert_close(load_head(named, "one").logits(features), expected)


def test_a_model_without_classifier_has_no_own_head(tmp_path: Path) -> None:
    classifier("bert").bert.save_pretrained(tmp_path / "one")
    config = transformers.BertConfig(**{**classifier("bert").config.to_dict()})
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "two")
    experts = {name: {"weights": name} for name in ("one", "two")}
    suite = load_suite(write_document(tmp_path, {"name": "s", "experts": experts}))
    assert suite.why_not_evaluated == "no head is given for one, two"
    with pytest.raises(SuiteError, match="has no head; add 'head:'"):
        load_head(suite, "one")


def test_texts_in_any_order_and_company_have_the_same_features(tmp_path: Path) -> None:
    """They are run sorted by their lengths, and given back in their own order."""
    suite = suite_of(tmp_path, "bert")
    network, expert = suite_network(suite), suite.expert("one")
    state = {name: expert.tensor(name) for name in expert}
    rng = np.random.default_rng(0)
    tokens = torch.full((120, 20), -1)
    for row in tokens:
        length = int(rng.integers(1, 21))
        row[:length] = torch.from_numpy(rng.integers(5, 50, length))
    together = network.features(state, tokens)
    alone = torch.cat([network.features(state, row[None]) for row in tokens])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    order = torch.from_numpy(rng.permutation(120))
    torch.testing.assert_close(network.features(state, tokens[order]), together[order])


def test_the_second_text_of_a_pair_is_another_segment(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, "bert")
    network, expert = suite_network(suite), suite.expert("one")
    state = {name: expert.tensor(name) for name in expert}
    given = inputs("bert")
    segments = torch.zeros_like(given)
    segments[:, 2:] = 1
    tokens = torch.where(given >= 0, given + (segments << 24), -1)
    got = load_head(suite, "one").logits(network.features(state, tokens))
    model = classifier("bert")
    with torch.no_grad():
        alone = [
            model(input_ids=row[row >= 0][None], token_type_ids=part[row >= 0][None]).logits
            for row, part in zip(given, segments, strict=True)
        ]
    torch.testing.assert_close(got, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, own_logits(model, given), atol=1e-4)

"""Heads: pickled classifiers of the benchmark, and zero-shot ones against the libraries' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import analysis.outputs.zero_shot as zero_shot_module
from analysis.evaluation.evaluator import Evaluator
from analysis.outputs.heads import Head, load_head
from analysis.outputs.zero_shot import class_weights
from merge_core.errors import MergeScopeError, SuiteError
from merge_core.suites.suite import Suite, load_suite
from merge_core.yaml_text import dump_yaml
from tests.evaluable import copy_evaluable

TASK = "shapes"
NAMES = ["ant", "bee", "cow", "dog"]
TEMPLATES = ["a photo of a {}.", "art of the {}", "{}"]
TINY = "tiny-clip-of-the-tests"
WIDTH = 16


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return copy_evaluable(tmp_path / "suite")


def with_head(suite: Suite, head: Any) -> Suite:
    document = yaml.safe_load(suite.path.read_text())
    document["experts"][TASK]["head"] = head
    suite.path.write_text(dump_yaml(document))
    return load_suite(suite.path)


class ClassificationHead(torch.nn.Linear):
    """As the benchmark's files hold it: a whole pickled module."""

    def __init__(self, normalize: bool, weights: Tensor) -> None:
        super().__init__(weights.shape[1], weights.shape[0])
        self.normalize = normalize
        self.weight = torch.nn.Parameter(weights.clone())
        self.bias = torch.nn.Parameter(torch.zeros_like(self.bias))

    def forward(self, features: Tensor) -> Tensor:
        if self.normalize:
            features = features / features.norm(dim=-1, keepdim=True)
        return super().forward(features)


@pytest.mark.parametrize("normalize", [False, True])
def test_pickled_heads_of_the_benchmark(suite: Suite, normalize: bool) -> None:
    weight = load_file(suite.root / f"heads/{TASK}.safetensors")["weight"]
    theirs = ClassificationHead(normalize, weight)
    torch.save(theirs, suite.root / "head.pt")
    head = load_head(with_head(suite, {"file": "head.pt", "normalize": normalize}), TASK)
    features = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head.logits(features), theirs(features).detach())
    assert head.normalizes == normalize


def test_normalised_features_change_what_is_known_of_a_task(suite: Suite) -> None:
    path = f"heads/{TASK}.safetensors"
    plain = suite.data_digest(TASK)
    assert with_head(suite, {"file": path}).data_digest(TASK) == plain
    normalised = with_head(suite, {"file": path, "normalize": True})
    assert normalised.data_digest(TASK) != plain
    assert Evaluator(normalised).experts([TASK])["images"].tolist() == [20]


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ({}, "either a 'file' or 'zero_shot'"),
        ({"file": "a", "zero_shot": {"text_tower": "b"}}, "either a 'file' or 'zero_shot'"),
        ({"zero_shot": {"templates": ["{}"]}}, r"text_tower: this field is required"),
        ({"file": "a", "normalise": True}, r"normalise: this field is not known"),
        (7, r"experts\.shapes\.head"),
    ],
)
def test_heads_that_make_no_sense(suite: Suite, head: Any, words: str) -> None:
    with pytest.raises(SuiteError, match=words):
        with_head(suite, head)


def test_the_formula_by_hand() -> None:
    """Against float64, from features that stand for the texts."""
    source = np.random.default_rng(0)
    texts = {t.replace("{}", n): source.normal(size=6) for n in NAMES for t in TEMPLATES}
    found = class_weights(
        lambda asked: torch.tensor(np.stack([texts[t] for t in asked])).float(),
        7.5,
        NAMES,
        TEMPLATES,
    )
    for row, name in zip(found, NAMES, strict=True):
        each = np.stack([texts[t.replace("{}", name)] for t in TEMPLATES])
        mean = (each / np.linalg.norm(each, axis=1, keepdims=True)).mean(axis=0)
        np.testing.assert_allclose(row.numpy(), 7.5 * mean / np.linalg.norm(mean), rtol=1e-5)


@pytest.fixture(scope="module")
def open_clip_tower(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A random CLIP of open_clip, its tokenizer and a file of its weights."""
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("open_clip")
    config = {
        "embed_dim": WIDTH,
        "vision_cfg": {
            "image_size": 16,
            "layers": 1,
            "width": 16,
            "head_width": 8,
            "patch_size": 8,
        },
        "text_cfg": {
            "context_length": 20,
            "vocab_size": 49408,
            "width": 8,
            "heads": 2,
            "layers": 1,
        },
    }
    (folder / f"{TINY}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{TINY}.json")
    torch.manual_seed(0)
    model = open_clip.create_model(TINY).eval()
    save_file(model.state_dict(), folder / "clip.safetensors")
    torch.save({"state_dict": model.state_dict()}, folder / "clip.pt")
    return model, open_clip.get_tokenizer(TINY), folder


@pytest.mark.parametrize("file", ["clip.safetensors", "clip.pt"])
def test_open_clip(suite: Suite, open_clip_tower: tuple[Any, Any, Path], file: str) -> None:
    import open_clip

    model, tokenizer, folder = open_clip_tower
    made = {
        "text_tower": str(folder / file),
        "model": TINY,
        "classes": NAMES,
        "templates": TEMPLATES,
    }
    head = load_head(with_head(suite, {"zero_shot": made}), TASK)
    theirs = open_clip.build_zero_shot_classifier(
        model, tokenizer, NAMES, [lambda name, t=t: t.replace("{}", name) for t in TEMPLATES]
    )
    torch.testing.assert_close(head.weight, theirs.T * model.logit_scale.exp().item())
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    features = model.encode_image(images)
    logits = model.logit_scale.exp() * model.encode_image(images, normalize=True) @ theirs
    torch.testing.assert_close(head.logits(features), logits, rtol=1e-4, atol=1e-4)
    assert head.normalizes


@pytest.fixture(scope="module")
def transformers_tower(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A random CLIP of transformers, its tokenizer and their folder."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("transformers")
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 40}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    common = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    text = {**common, **ends, "vocab_size": len(words), "max_position_embeddings": 40}
    config = transformers.CLIPConfig(
        text_config={**text, "pad_token_id": len(words) - 1},
        vision_config={**common, "image_size": 16, "patch_size": 8},
        projection_dim=WIDTH,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(folder)
    return model, transformers.AutoTokenizer.from_pretrained(folder), folder


def test_transformers(suite: Suite, transformers_tower: tuple[Any, Any, Path]) -> None:
    model, tokenizer, folder = transformers_tower
    made = {"text_tower": str(folder), "classes": NAMES}
    head = load_head(with_head(suite, {"zero_shot": made}), TASK)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    texts = tokenizer([f"a photo of a {n}." for n in NAMES], padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = model(pixel_values=images, **texts)
        features = model.visual_projection(model.vision_model(images).pooler_output)
    torch.testing.assert_close(head.logits(features), theirs.logits_per_image, rtol=1e-4, atol=1e-4)
    assert theirs.logits_per_image.std() > 1e-3


def test_a_head_is_made_once_and_follows_what_it_is_made_of(
    suite: Suite,
    transformers_tower: tuple[Any, Any, Path],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: dict[str, Any] = {"text_tower": str(transformers_tower[2])}
    from_data = with_head(suite, {"zero_shot": made})
    first = load_head(from_data, TASK)  # the class names of its archive
    digest = from_data.data_digest(TASK)
    named = with_head(suite, {"zero_shot": made | {"classes": [f"{TASK}-{i}" for i in range(4)]}})
    torch.testing.assert_close(load_head(named, TASK).weight, first.weight, rtol=0, atol=0)
    others = [made | {"classes": NAMES}, made | {"templates": ["{}!"]}]
    digests = {digest}
    for other in others:
        changed = with_head(suite, {"zero_shot": other})
        digests.add(changed.data_digest(TASK))
        assert not torch.equal(load_head(changed, TASK).weight, first.weight)
    assert len(digests) == 3
    again = with_head(suite, {"zero_shot": made})
    monkeypatch.setattr(zero_shot_module, "_tower", None)
    torch.testing.assert_close(load_head(again, TASK).weight, first.weight, rtol=0, atol=0)
    assert again.data_digest(TASK) == digest
    for path in (cache / "heads").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(TypeError):  # a damaged one would be made again
        load_head(again, TASK)


def test_towers_that_do_not_fit(
    suite: Suite,
    transformers_tower: tuple[Any, Any, Path],
    open_clip_tower: tuple[Any, Any, Path],
    tmp_path: Path,
) -> None:
    folder, clip = transformers_tower[2], open_clip_tower[2] / "clip.safetensors"
    state = load_file(clip)
    save_file({k: v for k, v in state.items() if k != "logit_scale"}, tmp_path / "scaleless")
    (tmp_path / "scaleless").rename(tmp_path / "scaleless.safetensors")
    save_file({k: v[:1] if v.ndim else v for k, v in state.items()}, tmp_path / "cut.safetensors")
    faults = [
        ({"text_tower": "nowhere"}, "nowhere .text tower of head.*does not exist"),
        ({"text_tower": str(folder), "templates": ["no place"]}, "must hold {} once"),
        ({"text_tower": str(folder), "templates": ["{} {}"]}, "must hold {} once"),
        ({"text_tower": str(tmp_path / "scaleless.safetensors"), "model": TINY}, "no whole CLIP"),
        ({"text_tower": str(tmp_path / "cut.safetensors"), "model": TINY}, "has shape"),
        ({"text_tower": str(clip), "model": "no-such"}, "knows no model 'no-such'"),
        ({"text_tower": str(clip), "model": "roberta-ViT-B-32"}, "one of the hub's"),
        ({"text_tower": str(clip)}, "cannot be used as a text tower"),
    ]
    for made, words in faults:
        changed = with_head(suite, {"zero_shot": {"classes": NAMES} | made})
        with pytest.raises(MergeScopeError, match=words):
            load_head(changed, TASK)


def test_a_head_needs_class_names(suite: Suite, transformers_tower: tuple[Any, Any, Path]) -> None:
    with np.load(suite.root / f"inputs/{TASK}.npz") as archive:
        arrays = {name: archive[name] for name in archive if name != "class_names"}
    np.savez(suite.root / f"inputs/{TASK}.npz", **arrays)
    made = with_head(suite, {"zero_shot": {"text_tower": str(transformers_tower[2])}})
    with pytest.raises(SuiteError, match=r"its data have none\. Add 'classes'"):
        load_head(made, TASK)


def test_a_plain_head_does_not_normalise() -> None:
    head = Head(torch.eye(2), torch.zeros(2))
    assert head.logits(torch.tensor([[3.0, 4.0]])).tolist() == [[3.0, 4.0]]

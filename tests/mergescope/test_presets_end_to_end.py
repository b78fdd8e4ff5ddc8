"""Presets run on stand-ins of their layout, without network: init, inspect, merge, evaluate.

What comes out is held against the libraries' own loading of the same files.
"""

from __future__ import annotations

import gzip
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from analysis.evaluation.evaluator import Evaluator
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import make_recipe
from merge_core.opening.benchmark_tasks import VISION_TASKS
from merge_core.opening.draft import write_suite
from merge_core.opening.presets import preset_spec, presets
from merge_core.suites.suite import load_suite
from mergescope import cli
from tests.merge_core.checkpoints.pickled.pickled_files import make_importable
from tests.stand_in_data import SIZE, snapshot
from tests.stand_ins import (
    OPEN_CLIP,
    PROJECTED,
    TOKENS,
    ClassificationHead,
    at,
    go_offline,
    shrink,
    write_stand_ins,
)

SCALE, SHARE = 1.5, 0.25
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Run:
    """Run a command in this process; gives its exit code and all that it says."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["mergescope", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert isinstance(caught.value.code, int)
        said = capsys.readouterr()
        return caught.value.code, said.out + said.err

    return call


@pytest.fixture
def stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> Callable[[str], tuple[Path, Path]]:
    """Run ``suite init`` for a preset on its stand-in; gives the suite's file and the cache."""

    def make(name: str) -> tuple[Path, Path]:
        hub = go_offline(monkeypatch, tmp_path)
        write_stand_ins(presets()[name], hub, tmp_path)
        path = tmp_path / "suite.yaml"
        code, said = run("suite", "init", "--preset", name, "--output", path)
        assert code == 0, said
        assert said.count("yes") == len(preset_spec(name).experts) + 1
        assert load_suite(path).spec == preset_spec(name)
        write_suite(shrink(preset_spec(name)), path, overwrite=True)
        return path, hub

    return make


def merge_cart(run: Run, path: Path) -> dict[str, Tensor]:
    """What ``mergescope merge`` writes for CART."""
    recipe = path.with_name("recipe.yaml")
    recipe.write_text(
        f"suite: suite.yaml\nmethod: cart\nparameters: {{rank: {SHARE}, scale: {SCALE}}}\n"
    )
    code, said = run("inspect", path)
    assert code == 0, said
    code, said = run("merge", recipe, "-o", path.with_name("merged"))
    assert code == 0, said
    return load_file(path.with_name("merged") / "model.safetensors")


def cart(members: list[np.ndarray]) -> np.ndarray:
    """θ_avg + λ Σ SVD_k(θ_t − θ_avg), float64."""
    average = np.mean(members, axis=0)
    total = average.copy()
    for member in members:
        U, sigma, Vh = np.linalg.svd(member - average, full_matrices=False)
        k = max(1, int(SHARE * len(sigma)))
        total += SCALE * (U[:, :k] * sigma[:k]) @ Vh[:k]
    return np.asarray(total)


def assert_merged(
    state: dict[str, Tensor], members: list[dict[str, Tensor]], matrix: str, averaged: str
) -> None:
    for name, expected in (
        (matrix, cart([m[matrix].double().numpy() for m in members])),
        (averaged, np.mean([m[averaged].double().numpy() for m in members], axis=0)),
    ):
        np.testing.assert_allclose(state[name].numpy(), expected, rtol=1e-4, atol=1e-5)


def accuracies(run: Run, path: Path) -> dict[str, float]:
    """Task to what ``mergescope evaluate`` finds of the merge on the test split."""
    table = path.with_name("table.csv")
    code, said = run("evaluate", path.with_name("recipe.yaml"), "--split", "test", "--csv", table)
    assert code == 0, said
    frame = pd.read_csv(table)
    return dict(zip(frame["task"], frame["accuracy"], strict=True))


def pixels(images: list[Image.Image]) -> Tensor:
    """As CLIP sees images of its own size."""
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images]) / 255
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    normal = (arrays - np.array(mean)) / np.array(std)
    return torch.from_numpy(normal.transpose(0, 3, 1, 2)).float()


def parquet(hub: Path, dataset: str, image: str, label: str) -> tuple[Tensor, np.ndarray]:
    """The test split of a stand-in, read without the library that wrote it."""
    (file,) = snapshot(hub, dataset, "datasets").rglob("test-*.parquet")
    frame = pd.read_parquet(file)
    images = [Image.open(io.BytesIO(row["bytes"])) for row in frame[image]]
    return pixels(images), frame[label].to_numpy().astype(int)


def share_right(logits: Tensor, labels: np.ndarray) -> float:
    return float((logits.argmax(dim=1).numpy() == labels).mean())


def assert_logits(path: Path, state: dict[str, Tensor], task: str, expected: Tensor) -> None:
    """What MergeScope computes for the test images, whose order it draws, is what is expected."""
    evaluator = Evaluator(load_suite(path))
    images, _ = evaluator.outputs.inputs(task, "test", None)
    got = evaluator.outputs.head(task).logits(evaluator.outputs.network.features(state, images))
    torch.testing.assert_close(got.sort(dim=0)[0], expected.sort(dim=0)[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_fusion_bench_runs_from_init_to_accuracies(
    stand_in: Callable[[str], tuple[Path, Path]], run: Run
) -> None:
    from transformers import AutoTokenizer, CLIPModel

    path, hub = stand_in("clip-vit-b-32-8")
    spec = preset_spec("clip-vit-b-32-8")
    state = merge_cart(run, path)
    members = [load_file(at(hub, expert.weights)) for expert in spec.experts.values()]
    layer = "vision_model.encoder.layers.1"
    assert_merged(state, members, f"{layer}.mlp.fc1.weight", f"{layer}.layer_norm1.weight")
    measured = accuracies(run, path)
    folder = at(hub, spec.base or "").parent
    clip = CLIPModel.from_pretrained(folder).eval()
    vision = {name: state[name] for name in members[0]}
    missing, unexpected = clip.load_state_dict(vision, strict=False)
    assert not unexpected
    assert not any(name.startswith("vision_model.") for name in missing)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for task in VISION_TASKS[:8]:
        inputs, labels = parquet(hub, task.hub.name, task.hub.image_column, task.hub.label_column)
        weights = []
        for name in ("a cat", "a dog", "a horse"):
            texts = [template.format(name) for template in task.templates]
            tokens = tokenizer(texts, padding=True, return_tensors="pt")
            features = clip.get_text_features(**tokens).pooler_output
            weights.append((features / features.norm(dim=-1, keepdim=True)).mean(dim=0))
        head = torch.stack(weights)
        head = clip.logit_scale.exp() * head / head.norm(dim=-1, keepdim=True)
        features = clip.get_image_features(pixel_values=inputs).pooler_output
        logits = features / features.norm(dim=-1, keepdim=True) @ head.T
        assert_logits(path, state, task.name, logits)
        assert measured[task.name] == pytest.approx(share_right(logits, labels)), task.name


@torch.no_grad()
def test_tall_masks_runs_from_init_to_accuracies(
    stand_in: Callable[[str], tuple[Path, Path]], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    # The library knows the published file by its checksum.
    monkeypatch.setattr("torchvision.datasets.SVHN._check_integrity", lambda self: True)
    path, hub = stand_in("tall-masks-vit-b-32-8")
    spec = preset_spec("tall-masks-vit-b-32-8")
    state = merge_cart(run, path)
    members = [torch.load(at(hub, expert.weights)) for expert in spec.experts.values()]
    layer = "model.visual.transformer.resblocks.1"
    assert_merged(state, members, f"{layer}.attn.in_proj_weight", f"{layer}.ln_1.weight")
    measured = accuracies(run, path)
    clip = open_clip.CLIP(
        PROJECTED,
        open_clip.CLIPVisionCfg(**OPEN_CLIP["vision_cfg"]),  # type: ignore[arg-type]
        open_clip.CLIPTextCfg(context_length=8, vocab_size=16, width=32, heads=2, layers=1),
        quick_gelu=True,
    ).eval()
    clip.load_state_dict({n.removeprefix("model."): v for n, v in state.items()}, strict=False)
    folder = path.parent / "data/sun397/val"
    files = sorted(folder.rglob("*.png"))
    packed = path.parent / "data/MNIST/raw/t10k-images-idx3-ubyte.gz"
    digits = np.frombuffer(gzip.decompress(packed.read_bytes())[16:], np.uint8)
    found = {
        "SUN397": (
            pixels([Image.open(file) for file in files]),
            np.array([int(file.parent.name[-1]) for file in files]),
        ),
        "MNIST": (
            pixels([Image.fromarray(image) for image in digits.reshape(-1, SIZE, SIZE)]),
            np.arange(len(digits) // SIZE**2) % 3,
        ),
        "RESISC45": parquet(hub, "tanganke/resisc45", "image", "label"),
    }
    for task, (inputs, labels) in found.items():
        with make_importable("src.models.modeling", ClassificationHead=ClassificationHead):
            place = at(hub, spec.experts[task].head.file)  # type: ignore[union-attr, arg-type]
            head = torch.load(place, weights_only=False)
        features = clip.encode_image(inputs)
        logits = head(features / features.norm(dim=-1, keepdim=True))
        assert_logits(path, state, task, logits)
        assert measured[task] == pytest.approx(share_right(logits, labels)), task
    assert set(measured) >= set(spec.experts)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt-2-glue-7", "roberta-base-glue-7"])
def test_text_presets_run_from_init_to_accuracies(
    name: str, stand_in: Callable[[str], tuple[Path, Path]], run: Run
) -> None:
    path, hub = stand_in(name)
    gpt, spec = name.startswith("gpt"), preset_spec(name)
    state = merge_cart(run, path)
    read: Callable[[Path], dict[str, Tensor]] = load_file if gpt else torch.load
    members = {task: read(at(hub, expert.weights)) for task, expert in spec.experts.items()}
    # Written as the base is, whose names lack a prefix in GPT-2; heads are left out.
    base = load_file(at(hub, spec.base or ""))
    assert set(state) == set(base)
    assert not any("score" in n or n.startswith("classifier") for n in state)
    prefix = "transformer." if gpt else ""
    state = {f"{prefix}{n}": v for n, v in state.items()}
    layer = "transformer.h.1" if gpt else "roberta.encoder.layer.1"
    matrix = "mlp.c_fc.weight" if gpt else "attention.self.query.weight"
    averaged = "ln_1.bias" if gpt else "output.dense.bias"
    assert_merged(state, list(members.values()), f"{layer}.{matrix}", f"{layer}.{averaged}")
    measured = accuracies(run, path)
    for task, member in members.items():
        logits, labels = classify(path, hub, task, {**member, **state})
        assert_logits(path, state, task, logits)
        assert measured[task] == pytest.approx(share_right(logits, labels)), task
    # Task Arithmetic is about the base.
    recipe = path.with_name("arithmetic.yaml")
    recipe.write_text("suite: suite.yaml\nmethod: task_arithmetic\nparameters: {scale: 0.5}\n")
    code, said = run("merge", recipe, "-o", path.with_name("sum"))
    assert code == 0, said
    summed = load_file(path.with_name("sum") / "model.safetensors")
    bias = f"{layer}.{averaged}"
    about = base[bias.removeprefix(prefix)].double()
    expected = about + 0.5 * sum(m[bias].double() - about for m in members.values())
    torch.testing.assert_close(
        summed[bias.removeprefix(prefix)].double(), expected, rtol=1e-5, atol=1e-6
    )


def classify(
    path: Path, hub: Path, task: str, state: dict[str, Tensor]
) -> tuple[Tensor, np.ndarray]:
    """Logits of transformers' own classifier for the reported texts, one text at a time."""
    import transformers as tf

    suite = load_suite(path)
    architecture, data = suite.spec.architecture, suite.spec.experts[task].data
    assert architecture is not None
    assert data is not None
    config, model = {
        "gpt2": (tf.GPT2Config, tf.GPT2ForSequenceClassification),
        "roberta": (tf.RobertaConfig, tf.RobertaForSequenceClassification),
    }[architecture.name]
    classes = 3 if task == "mnli" else 2
    classifier = model(config(**architecture.args, num_labels=classes)).eval()
    missing, _ = classifier.load_state_dict(state, strict=False)
    assert not missing
    tokenizer = tf.AutoTokenizer.from_pretrained(at(hub, suite.spec.base or "").parent)
    (file,) = (snapshot(hub, "nyu-mll/glue", "datasets") / task).glob("validation*.parquet")
    frame = pd.read_parquet(file)
    assert data.text_columns is not None
    rows = []
    for texts in frame[data.text_columns].itertuples(index=False):
        tokens = tokenizer(*texts, truncation=True, max_length=TOKENS, return_tensors="pt")
        rows.append(classifier(input_ids=tokens["input_ids"]).logits)
    return torch.cat(rows), frame["label"].to_numpy()


@pytest.mark.parametrize("name", ["clip-vit-b-32-8", "tall-masks-vit-b-32-8", "gpt-2-glue-7"])
def test_methods_that_learn_from_inputs_run_on_these_networks(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torchvision.datasets.SVHN._check_integrity", lambda self: True)
    write_stand_ins(presets()[name], go_offline(monkeypatch, tmp_path), tmp_path)
    write_suite(shrink(preset_spec(name)), tmp_path / "suite.yaml")
    suite = load_suite(tmp_path)
    tasks, evaluator = suite.tasks[-2:], Evaluator(suite)
    session = MergeSession(suite, tasks, FactorStore(tmp_path / "factors"))
    plain = session.merge(make_recipe({"method": "average", "tasks": list(tasks)}))
    for method, parameters in (("regmean", {"examples": 3}), ("adamerging", {"steps": 2})):
        fields = {"method": method, "tasks": list(tasks), "parameters": parameters}
        recipe = make_recipe(fields)
        learned = session.merge(recipe, None, None, evaluator.learn(recipe, session, None))
        assert learned.keys() == plain.keys()
        assert all(bool(torch.isfinite(value).all()) for value in learned.values())
        moved = sum(not torch.equal(learned[name], plain[name]) for name in plain)
        # GPT-2 has no nn.Linear, so that RegMean averages all of it.
        assert (moved > 0) == (name != "gpt-2-glue-7" or method != "regmean")


def test_a_regression_is_merged_but_not_evaluated(
    stand_in: Callable[[str], tuple[Path, Path]], run: Run
) -> None:
    path, _ = stand_in("roberta-base-glue-8")
    merge_cart(run, path)
    code, said = run("evaluate", path)
    assert code != 0
    assert "no head is given for stsb" in said

"""Small stand-ins for what presets name: checkpoints of the same names and layout, tiny images.

They lie where the hub's cache would keep them, so that a preset runs without network. Weights
are random and seeded; models are made and saved by the libraries that the public ones come from.
"""

from __future__ import annotations

import csv
import gzip
import io
import struct
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from merge_core.opening.presets import Preset
from merge_core.suite import ExpertSpec, SuiteSpec
from tests.merge_core.pickled_files import importable

SIZE, PATCH, WIDTH, PROJECTED, CLASSES = 32, 16, 32, 16, 3
COMMIT = "5" * 40
TRAIN, TEST = 24, 9  # images
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": PATCH,
    "projection_dim": PROJECTED,
}
OPEN_CLIP = {
    "embed_dim": PROJECTED,
    "vision_cfg": {
        "layers": 2,
        "width": WIDTH,
        "head_width": 8,
        "patch_size": PATCH,
        "image_size": SIZE,
    },
}
GPT2 = {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40}
GPT2 |= {"bos_token_id": 5, "eos_token_id": 5, "pad_token_id": 5}
ROBERTA = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 42,
    "type_vocab_size": 1,
}
TOKENS = 24
# What CLIP's tokenizer must know; each word is spelt out by its letters.
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!:\"-'"


def shrunk(spec: SuiteSpec) -> SuiteSpec:
    """A preset's suite with the sizes of the stand-ins in place of the published ones."""
    document = spec.model_dump(mode="json", exclude_unset=True)
    architecture = document["architecture"]
    known = {"clip_vision_model": VISION, "gpt2": GPT2, "roberta": ROBERTA}
    architecture["args"] = known.get(architecture["name"], OPEN_CLIP)
    for data in (expert["data"] for expert in document["experts"].values() if "data" in expert):
        if data["kind"] == "text":
            data["length"] = TOKENS
    return SuiteSpec.model_validate(document)


def write_stand_ins(preset: Preset, hub: Path, folder: Path, seed: int = 0) -> None:
    """Write what a preset names.

    Args:
        preset: the preset.
        hub: the hub's cache (``HF_HUB_CACHE``).
        folder: where the suite is going to lie; local images go there.
        seed: of weights and images.
    """
    torch.manual_seed(seed)
    {"FusionBench": _fusion_bench, "TALL-masks": _tall_masks, "GLUE": _glue}[preset.protocol](
        preset.spec, hub
    )
    rng = np.random.default_rng(seed)
    for expert in preset.spec.experts.values():
        if expert.data is not None:
            WRITERS[expert.data.kind](expert, hub, folder, rng)


def offline(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Make a folder the cache of the hub, which cannot be reached; returns the models' place."""
    hub = folder / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "datasets")
    monkeypatch.setenv("MERGESCOPE_CACHE", str(folder / "cache"))
    return hub


def snapshot(hub: Path, name: str, kind: str = "models") -> Path:
    """The folder of a repository in the hub's cache, made if need be."""
    repository = hub / f"{kind}--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(COMMIT)
    place = repository / "snapshots" / COMMIT
    place.mkdir(parents=True, exist_ok=True)
    return place


def at(hub: Path, reference: str) -> Path:
    """Where a hub id of a file, or the usual weight file of a repository, lies."""
    name, _, file = reference.removeprefix("hf://").partition(":")
    path = snapshot(hub, name) / (file or "model.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def moved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights a little away from others, as fine-tuning leaves them."""
    return {
        name: value + 0.02 * torch.randn_like(value) if value.is_floating_point() else value
        for name, value in state.items()
    }


def _fusion_bench(spec: SuiteSpec, hub: Path) -> None:
    """A whole CLIP of transformers, and vision models named as in the public files of 2024."""
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

    assert spec.base is not None
    folder = at(hub, spec.base).parent
    _write_tokenizer(folder)
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 2 * len(LETTERS) + 2,
        "bos_token_id": 2 * len(LETTERS),
        "eos_token_id": 2 * len(LETTERS) + 1,
        "pad_token_id": 2 * len(LETTERS) + 1,
    }
    config = CLIPConfig(text_config=text, vision_config=VISION, projection_dim=PROJECTED)
    base = CLIPModel(config).state_dict()
    save_file(base, folder / "model.safetensors")
    config.save_pretrained(folder)
    vision = {name: value for name, value in base.items() if name.startswith("vision_model.")}
    for expert in spec.experts.values():
        path = at(hub, expert.weights)
        save_file(moved(vision), path)
        CLIPVisionConfig(**VISION).save_pretrained(path.parent)


def _write_tokenizer(folder: Path) -> None:
    from transformers import CLIPTokenizer

    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)


def _tall_masks(spec: SuiteSpec, hub: Path) -> None:
    """State dicts of ImageEncoder (a CLIP of open_clip without its text transformer), pickled
    heads that are whole modules."""
    import open_clip

    clip = open_clip.CLIP(
        embed_dim=PROJECTED,
        vision_cfg=open_clip.CLIPVisionCfg(**OPEN_CLIP["vision_cfg"]),  # type: ignore[arg-type]
        text_cfg=open_clip.CLIPTextCfg(
            context_length=8, vocab_size=16, width=WIDTH, heads=2, layers=1
        ),
        quick_gelu=True,
    )
    base = {
        f"model.{name}": value
        for name, value in clip.state_dict().items()
        if not name.startswith("transformer.")
    }
    assert spec.base is not None
    torch.save(OrderedDict(base), at(hub, spec.base))
    for expert in spec.experts.values():
        torch.save(OrderedDict(moved(base)), at(hub, expert.weights))
        assert expert.head is not None
        assert not isinstance(expert.head, str)
        with importable("src.models.modeling", ClassificationHead=ClassificationHead):
            torch.save(ClassificationHead(), at(hub, expert.head.file or ""))


class ClassificationHead(nn.Linear):
    """Like the published heads: no bias to speak of, and a note that features are normalised."""

    def __init__(self) -> None:
        super().__init__(PROJECTED, CLASSES)
        nn.init.zeros_(self.bias)
        self.normalize = True


def _glue(spec: SuiteSpec, hub: Path) -> None:
    """GPT-2 or RoBERTa, small: the base as published, classifiers of two, three and one class."""
    import transformers as tf

    assert spec.base is not None
    folder = at(hub, spec.base).parent
    symbols = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>", "Ġ", *LETTERS]
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    if "gpt2" in spec.base:
        configuration, prefix = tf.GPT2Config(**GPT2), "transformer."
        base, labelled = tf.GPT2Model(configuration), tf.GPT2ForSequenceClassification
        tf.GPT2Tokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    else:
        configuration, prefix = tf.RobertaConfig(**ROBERTA), ""
        base, labelled = tf.RobertaForMaskedLM(configuration), tf.RobertaForSequenceClassification
        tf.RobertaTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    base.save_pretrained(folder)
    common = {f"{prefix}{name}": value for name, value in base.state_dict().items()}
    for task, expert in spec.experts.items():
        configuration.num_labels = {"mnli": 3, "stsb": 1}.get(task, 2)
        state = labelled(configuration).state_dict()
        trained = moved({name: common.get(name, value) for name, value in state.items()})
        path = at(hub, expert.weights)
        if path.suffix == ".bin":
            torch.save(OrderedDict(trained), path)
        else:
            save_file(trained, path)


def pictures(rng: np.random.Generator, count: int, channels: int = 3) -> np.ndarray:
    """uint8, N x 32 x 32 x channels (N x 32 x 32 for one)."""
    shape = (count, SIZE, SIZE, channels) if channels > 1 else (count, SIZE, SIZE)
    return rng.integers(0, 256, shape, dtype=np.uint8)


def labels_of(count: int) -> np.ndarray:
    """int64, N: the classes in turn."""
    return np.arange(count) % CLASSES


def png(image: np.ndarray) -> bytes:
    """A picture's file."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def _write_hub_dataset(
    expert: ExpertSpec, hub: Path, _folder: Path, rng: np.random.Generator
) -> None:
    import datasets

    data = expert.data
    assert data is not None
    assert data.dataset is not None
    place = snapshot(hub, data.dataset, "datasets")
    image, label = data.image_column or "image", data.label_column or "label"
    kind = (
        datasets.Value("bool")
        if "PatchCamelyon" in data.dataset
        else datasets.Value("int64")
        if label == "cls"
        else datasets.ClassLabel(names=["a_cat", "a_dog", "a_horse"])
    )
    features = datasets.Features({image: datasets.Image(), label: kind})
    where = data.config or "data"
    for split, count in (("train", TRAIN), (data.test or "test", TEST)):
        labels = labels_of(count) % (2 if kind.dtype == "bool" else CLASSES)
        rows = {
            image: [{"bytes": png(p), "path": None} for p in pictures(rng, count)],
            label: labels.astype(bool if kind.dtype == "bool" else int).tolist(),
        }
        (place / where).mkdir(exist_ok=True)
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(str(place / where / f"{split}-00000-of-00001.parquet"))
    if data.config is not None:
        (place / "README.md").write_text(
            f"---\nconfigs:\n- config_name: {data.config}\n  data_files:\n"
            f"  - split: train\n    path: {where}/train-*\n  - split: test\n"
            f"    path: {where}/test-*\n---\n"
        )


def _write_folder(expert: ExpertSpec, _hub: Path, folder: Path, rng: np.random.Generator) -> None:
    assert expert.data is not None
    root = folder / (expert.data.path or "")
    for split, count in (
        ("train", TRAIN),
        (expert.data.val or "", 6),
        (expert.data.test or "", TEST),
    ):
        for number, image in enumerate(pictures(rng, count)):
            place = root / split / f"class_{labels_of(count)[number]}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}.png").write_bytes(png(image))


def _write_torchvision(
    expert: ExpertSpec, _hub: Path, folder: Path, rng: np.random.Generator
) -> None:
    assert expert.data is not None
    root = folder / (expert.data.path or "")
    root.mkdir(exist_ok=True)
    {"MNIST": _mnist, "SVHN": _svhn, "GTSRB": _gtsrb, "StanfordCars": _cars}[
        expert.data.dataset or ""
    ](root, rng)


def _mnist(root: Path, rng: np.random.Generator) -> None:
    place = root / "MNIST/raw"
    place.mkdir(parents=True)
    for split, count in (("train", TRAIN), ("t10k", TEST)):
        images, labels = pictures(rng, count, channels=1), labels_of(count).astype(np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            packed = gzip.compress(header + array.tobytes())
            (place / f"{split}-{name}-ubyte.gz").write_bytes(packed)


def _svhn(root: Path, rng: np.random.Generator) -> None:
    from scipy.io import savemat

    for split, count in (("train", TRAIN), ("test", TEST)):
        images = pictures(rng, count).transpose(1, 2, 3, 0)
        savemat(
            root / f"{split}_32x32.mat",
            {"X": images, "y": (labels_of(count)[:, None] - 1) % 10 + 1},
        )


def _gtsrb(root: Path, rng: np.random.Generator) -> None:
    for number, image in enumerate(pictures(rng, TRAIN)):
        place = root / f"gtsrb/GTSRB/Training/{labels_of(TRAIN)[number]:05d}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number:05d}.ppm")
    place = root / "gtsrb/GTSRB/Final_Test/Images"
    place.mkdir(parents=True)
    with (root / "gtsrb/GT-final_test.csv").open("w", newline="") as stream:
        rows = csv.writer(stream, delimiter=";")
        rows.writerow(["Filename", "ClassId"])
        for number, image in enumerate(pictures(rng, TEST)):
            Image.fromarray(image).save(place / f"{number:05d}.ppm")
            rows.writerow([f"{number:05d}.ppm", int(labels_of(TEST)[number])])


def _cars(root: Path, rng: np.random.Generator) -> None:
    from scipy.io import savemat

    kit = root / "stanford_cars/devkit"
    kit.mkdir(parents=True)
    names = np.array([f"car {i}" for i in range(CLASSES)], dtype=object)
    savemat(kit / "cars_meta.mat", {"class_names": names})
    for split, count, listed in (
        ("train", TRAIN, kit / "cars_train_annos.mat"),
        ("test", TEST, root / "stanford_cars/cars_test_annos_withlabels.mat"),
    ):
        place = root / f"stanford_cars/cars_{split}"
        place.mkdir()
        rows = np.zeros(count, dtype=[("class", "O"), ("fname", "O")])
        for number, image in enumerate(pictures(rng, count)):
            (place / f"{number:05d}.png").write_bytes(png(image))
            rows[number] = (int(labels_of(count)[number]) + 1, f"{number:05d}.png")
        savemat(listed, {"annotations": rows})


def _write_texts(expert: ExpertSpec, hub: Path, _folder: Path, rng: np.random.Generator) -> None:
    import datasets

    data = expert.data
    assert data is not None
    assert data.text_columns is not None
    place = snapshot(hub, data.dataset or "", "datasets")
    own = place / (data.config or "")
    own.mkdir()
    classes = 3 if data.config == "mnli" else 2
    columns = {name: datasets.Value("string") for name in data.text_columns}
    kind = datasets.ClassLabel(names=[f"class {i}" for i in range(classes)])
    features = datasets.Features({**columns, "label": kind})
    for split, count in (("train", TRAIN), (data.test or "", TEST)):
        rows: dict[str, Any] = {name: sentences(rng, count) for name in columns}
        rows["label"] = (np.arange(count) % classes).tolist()
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(str(own / f"{split}-00000-of-00001.parquet"))
    configs = "".join(
        f"- config_name: {folder.name}\n  data_files:\n"
        + "".join(
            f"  - split: {file.name.partition('-')[0]}\n    path: {folder.name}/{file.name}\n"
            for file in sorted(folder.glob("*.parquet"))
        )
        for folder in sorted(place.iterdir())
        if folder.is_dir()
    )
    (place / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")


def sentences(rng: np.random.Generator, count: int) -> list[str]:
    """Words of random letters, of several lengths."""
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz "))
    return ["".join(rng.choice(letters, rng.integers(3, 30))) for _ in range(count)]


WRITERS = {
    "text": _write_texts,
    "huggingface": _write_hub_dataset,
    "folder": _write_folder,
    "torchvision": _write_torchvision,
}

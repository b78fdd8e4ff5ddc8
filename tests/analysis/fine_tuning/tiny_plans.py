"""Plans of tiny suites: a RoBERTa that reads letters, and a ViT that sees coloured squares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from merge_core.yaml_text import dump_yaml

SYMBOLS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġ", *"abcdefgh"]
# What the classes of a task differ in: which letters their words are made of.
TEXT_TASKS = {"ends": ("abc", "fgh"), "thirds": ("ab", "de", "gh")}
IMAGE_TASKS = {"colour": (0, 1), "place": (2, 3)}
COUNTS = {"train": 48, "validation": 12, "test": 12}
VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
STEPS = {"steps": 4, "batch": 20, "rate": 1e-3, "warmup": 1}


def write_text_plan(folder: Path, **fields: Any) -> Path:
    """A plan on a tiny RoBERTa of transformers with two tasks of Parquet files."""
    write_roberta(folder / "roberta")
    rng = np.random.default_rng(3)
    for task, letters in TEXT_TASKS.items():
        (folder / task).mkdir()
        for split, count in COUNTS.items():
            labels = np.arange(count) % len(letters)
            texts = [
                " ".join(
                    "".join(rng.choice(list(letters[k]), 3)) for _ in range(rng.integers(1, 4))
                )
                for k in labels
            ]
            frame = pd.DataFrame({"text": texts, "label": labels})
            frame.to_parquet(folder / task / f"{split}-00000-of-00001.parquet")
    data = {"kind": "text", "path": "{task}", "text_columns": ["text"], "length": 20}
    return write_plan(folder, {"base": "roberta", "tasks": list(TEXT_TASKS), "data": data} | fields)


def write_roberta(folder: Path) -> None:
    """A base of transformers' own making, with its tokenizer."""
    import transformers as tf

    torch.manual_seed(0)
    config = tf.RobertaConfig(
        vocab_size=len(SYMBOLS), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=24, type_vocab_size=1,
        initializer_range=0.2,
    )  # fmt: skip
    tf.RobertaForMaskedLM(config).save_pretrained(folder)
    vocabulary = {symbol: number for number, symbol in enumerate(SYMBOLS)}
    tf.RobertaTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)


def write_image_plan(folder: Path, **fields: Any) -> Path:
    """A plan on a bare file of a tiny ViT with two tasks of image folders."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT).state_dict()
    save_file(state, folder / "vit.safetensors")
    rng = np.random.default_rng(4)
    for task, kinds in IMAGE_TASKS.items():
        for split, count in COUNTS.items():
            for number in range(count):
                kind = kinds[number % 2]
                place = folder / "images" / task / split / f"class{kind}"
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(_picture(kind, rng)).save(place / f"{number}.png")
    document = {
        "base": "vit.safetensors",
        "architecture": {"name": "vit_tiny_patch16_224", "args": VIT},
        "tasks": list(IMAGE_TASKS),
        "data": {"kind": "folder", "path": "images/{task}", "mean": [0.5] * 3, "std": [0.5] * 3},
    }
    return write_plan(folder, document | fields)


def _picture(kind: int, rng: np.random.Generator) -> np.ndarray:
    """Red or blue all over, or a bright half on the left or right."""
    picture = rng.integers(0, 80, (16, 16, 3), dtype=np.uint8)
    if kind < 2:
        picture[..., 2 * kind] += 120
    else:
        picture[:, 8 * (kind - 2) : 8 * (kind - 1)] += 120
    return picture


def write_plan(folder: Path, document: dict[str, Any]) -> Path:
    path = folder / "plan.yaml"
    whole = {"name": "tiny", "fine_tuning": STEPS, "device": "cpu"} | document
    path.write_text(dump_yaml({key: value for key, value in whole.items() if value is not None}))
    return path

"""Small stand-ins for what presets name: checkpoints of the same names and layout, tiny images.

They lie where the hub's cache would keep them, so that a preset runs without network. Weights
are random and seeded; models are made and saved by the libraries that the public ones come from.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from merge_core.opening.presets import Preset
from merge_core.suites.suite_spec import SuiteSpec
from tests.merge_core.checkpoints.pickled.pickled_files import make_importable
from tests.stand_in_data import CLASSES, SIZE, WRITERS, snapshot

PATCH, WIDTH, PROJECTED = 16, 32, 16
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


def shrink(spec: SuiteSpec) -> SuiteSpec:
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


def go_offline(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Make a folder the cache of the hub, which cannot be reached; returns the models' place."""
    hub = folder / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "datasets")
    monkeypatch.setenv("MERGESCOPE_CACHE", str(folder / "cache"))
    return hub


def at(hub: Path, reference: str) -> Path:
    """Where a hub id of a file, or the usual weight file of a repository, lies."""
    name, _, file = reference.removeprefix("hf://").partition(":")
    path = snapshot(hub, name) / (file or "model.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def perturb(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
        save_file(perturb(vision), path)
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
        torch.save(OrderedDict(perturb(base)), at(hub, expert.weights))
        assert expert.head is not None
        assert not isinstance(expert.head, str)
        with make_importable("src.models.modeling", ClassificationHead=ClassificationHead):
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
        trained = perturb({name: common.get(name, value) for name, value in state.items()})
        path = at(hub, expert.weights)
        if path.suffix == ".bin":
            torch.save(OrderedDict(trained), path)
        else:
            save_file(trained, path)

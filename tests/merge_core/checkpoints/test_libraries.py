"""What is decomposed in models as the libraries build them, against the modules themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import open_clip
import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from merge_core.checkpoints.parameter_roles import describe, treatment
from merge_core.checkpoints.shards import TensorInfo

CLASSES = 7
TEXT: dict[str, Any] = {"vocab_size": 60, "num_labels": CLASSES}
SMALL: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
}
TOWER: dict[str, Any] = {"width": 24, "layers": 2}


def of_timm(name: str) -> nn.Module:
    return timm.create_model(name, num_classes=CLASSES)


def of_torchvision(name: str) -> nn.Module:
    model = torchvision.models.get_model(name, num_classes=CLASSES)
    assert isinstance(model, nn.Module)
    return model


def of_open_clip(_: str) -> nn.Module:
    vision = {**TOWER, "patch_size": 16, "image_size": 32, "head_width": 12}
    text = {**TOWER, "vocab_size": 60, "context_length": 8, "heads": 2}
    return open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)


def of_transformers(name: str) -> nn.Module:
    configs: dict[str, Any] = {
        "CLIPModel": lambda: transformers.CLIPConfig(
            text_config={**SMALL, "vocab_size": 60},
            vision_config={**SMALL, "patch_size": 16, "image_size": 32},
        ),
        "CLIPVisionModelWithProjection": lambda: transformers.CLIPVisionConfig(**SMALL),
        "ViTForImageClassification": lambda: transformers.ViTConfig(**SMALL, num_labels=CLASSES),
        "BertForSequenceClassification": lambda: transformers.BertConfig(**SMALL, **TEXT),
        "BertForPreTraining": lambda: transformers.BertConfig(**SMALL, **TEXT),
        "RobertaForSequenceClassification": lambda: transformers.RobertaConfig(**SMALL, **TEXT),
        "RobertaForMaskedLM": lambda: transformers.RobertaConfig(**SMALL, **TEXT),
        "GPT2LMHeadModel": lambda: transformers.GPT2Config(
            n_embd=24, n_layer=2, n_head=2, add_cross_attention=True, **TEXT
        ),
        "GPT2ForSequenceClassification": lambda: transformers.GPT2Config(
            n_embd=24, n_layer=2, n_head=2, **TEXT
        ),
        "LlamaForCausalLM": lambda: transformers.LlamaConfig(
            **SMALL, num_key_value_heads=1, **TEXT
        ),
        "T5ForConditionalGeneration": lambda: transformers.T5Config(
            d_model=24, d_kv=12, d_ff=40, num_layers=2, num_heads=2, **TEXT
        ),
    }
    model = getattr(transformers, name)(configs[name]())
    assert isinstance(model, nn.Module)
    return model


MODELS: list[tuple[Callable[[str], nn.Module], str]] = [
    *((of_timm, name) for name in (
        "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224",
        "convnext_atto", "resnet18",
    )),
    *((of_torchvision, name) for name in ("vit_b_32", "swin_t", "convnext_tiny", "resnet18")),
    (of_open_clip, "CLIP"),
    *((of_transformers, name) for name in (
        "CLIPModel", "CLIPVisionModelWithProjection", "ViTForImageClassification",
        "BertForSequenceClassification", "BertForPreTraining", "RobertaForSequenceClassification",
        "RobertaForMaskedLM", "GPT2LMHeadModel", "GPT2ForSequenceClassification",
        "LlamaForCausalLM", "T5ForConditionalGeneration",
    )),
]  # fmt: skip


def owners(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, nn.Module, bool]]:
    """Every tensor of a state dict, the module that owns it, and whether that lies in a block."""
    modules = dict(model.named_modules())
    for name, tensor in model.state_dict().items():
        path = name.split(".")[:-1]
        above = [modules[".".join(path[:i])] for i in range(len(path))]
        inside = any(isinstance(m, nn.ModuleList | nn.Sequential) for m in above)
        yield name, tensor, modules[".".join(path)], inside


def by_module(name: str, tensor: torch.Tensor, owner: nn.Module, inside: bool) -> bool:
    """Whether a tensor is to be decomposed, told from its module alone."""
    if not isinstance(owner, nn.Linear | nn.Conv2d | Conv1D | nn.MultiheadAttention):
        return False
    if tensor.ndim < 2 or not inside:
        # A residual network's first convolution is one like the others.
        return isinstance(owner, nn.Conv2d) and name == "conv1.weight"
    if isinstance(owner, nn.Conv2d) and owner.in_channels == 3:
        return owner.kernel_size != owner.stride  # or else it cuts the image into patches
    return not (isinstance(owner, nn.Linear) and owner.out_features == CLASSES)


@pytest.mark.parametrize(
    ("build", "name"), MODELS, ids=lambda value: getattr(value, "__name__", value)
)
def test_the_tables_agree_with_the_modules(build: Callable[[str], nn.Module], name: str) -> None:
    on_meta = build in (of_timm, of_torchvision)
    with torch.device("meta" if on_meta else "cpu"):
        model = build(name)
    kinds: dict[str, int] = {}
    for parameter, tensor, owner, inside in owners(model):
        info = TensorInfo.of(tensor)
        role, rule = describe(parameter, info), treatment(parameter, info)
        assert rule.decomposed == by_module(parameter, tensor, owner, inside), (parameter, role)
        kinds[role.kind] = kinds.get(role.kind, 0) + 1
        is_norm = isinstance(owner, nn.LayerNorm) and ".".join(parameter.split(".")[:-1])
        if is_norm and not parameter.split(".")[-2].isdigit():  # what has no name but a number
            assert role.kind == "norm", parameter
        if isinstance(owner, nn.Embedding):
            assert "embedding" in role.kind, parameter
        if tensor.ndim == 2:
            assert role.stored_transposed == isinstance(owner, Conv1D), parameter
        if isinstance(owner, nn.Linear) and owner.out_features == CLASSES:
            assert role.kind == "head", parameter
        vocabulary = isinstance(owner, nn.Embedding) and owner.num_embeddings == 60
        head = isinstance(owner, nn.Linear) and owner.out_features == 60
        if vocabulary or head:
            assert role.is_vocabulary, parameter
        elif role.is_vocabulary:
            assert tensor.shape[0] == 60, parameter
    transformer = not any(word in name for word in ("resnet", "convnext"))
    if transformer:
        apart = {kinds.get(f"attention {part}", 0) for part in "qkv"}
        assert len(apart) == 1  # as many queries as keys as values
        assert kinds.get("attention qkv", 0) + kinds.get("attention q", 0) == kinds["attention out"]
        assert kinds["mlp in"] == kinds["mlp out"] > 0

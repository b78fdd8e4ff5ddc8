"""Checkpoints of real sizes and shapes with spectra that are known: what the benchmarks merge.

Run ``python -m benchmarks.synthetic FOLDER --model vit-b-32 --spectrum decaying``. The weights are
random, so that nothing can be learnt from the merged models but time, memory and exactness.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Literal, get_args

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from merge_core.yaml_text import dump_yaml

Spectrum = Literal["decaying", "flat"]
Shapes = dict[str, tuple[int, ...]]

INITIAL = 0.02
"""Standard deviation of the base's weights."""
RELATIVE = 0.02
"""Frobenius norm of a task vector as a share of the weights', as fine-tuning leaves it."""
DECAY = 0.7
FLOOR = 0.5
FORMAT = 1


@dataclass(frozen=True)
class Model:
    """What a checkpoint holds.

    Attributes:
        name: of the layout, with its sizes.
        shapes: of each parameter.
        dtype: as stored.
        shard_bytes: largest size of one file; a larger checkpoint has shards and an index.
    """

    name: str
    shapes: Shapes
    dtype: torch.dtype = torch.float32
    shard_bytes: int = 2 << 30

    @property
    def nbytes(self) -> int:
        """Bytes of one checkpoint's tensors."""
        return sum(torch.Size(s).numel() for s in self.shapes.values()) * self.dtype.itemsize


def vit(width: int, depth: int, patch: int, embedding: int, image: int = 224) -> Model:
    """The visual tower of a CLIP ViT under timm's names (``vit_base_patch32_clip_224``)."""
    tokens = (image // patch) ** 2 + 1
    shapes: Shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, tokens, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "norm_pre.weight": (width,),
        "norm_pre.bias": (width,),
    }
    layers = {
        "norm1": (width,),
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "norm2": (width,),
        "mlp.fc1": (4 * width, width),
        "mlp.fc2": (width, 4 * width),
    }
    for i in range(depth):
        for layer, shape in layers.items():
            shapes[f"blocks.{i}.{layer}.weight"] = shape
            shapes[f"blocks.{i}.{layer}.bias"] = shape[:1]
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    shapes |= {"head.weight": (embedding, width), "head.bias": (embedding,)}
    return Model(f"vit-{width}-{depth}-{patch}", shapes)


def decoder(
    hidden: int, inner: int, depth: int, vocabulary: int, key_value: int, shard_bytes: int
) -> Model:
    """A decoder under Llama's names, in bfloat16; `key_value` is the width of keys and values."""
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    layers: Shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    for i in range(depth):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layers.items()}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    return Model(f"decoder-{hidden}-{inner}-{depth}", shapes, torch.bfloat16, shard_bytes)


def plain(side: int, layers: int) -> Model:
    """A model of square matrices and biases, for measuring how cost grows."""
    shapes: Shapes = {}
    for i in range(layers):
        shapes[f"blocks.{i}.fc.weight"] = (side, side)
        shapes[f"blocks.{i}.fc.bias"] = (side,)
    return Model(f"plain-{side}-{layers}", shapes)


def vit_b_32() -> Model:
    """CLIP ViT-B/32's visual tower, 335 MiB."""
    return vit(768, 12, 32, 512)


def vit_l_14() -> Model:
    """CLIP ViT-L/14's visual tower, 1.13 GiB."""
    return vit(1024, 24, 14, 768)


def decoder_1b() -> Model:
    """TinyLlama's shapes, 1.1 billion parameters, 2.05 GiB."""
    return decoder(2048, 5632, 22, 32000, 256, 512 << 20)


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is one of the layers' matrices, whose spectrum is set."""
    return len(shape) == 2 and ("blocks." in name or "layers." in name)


def singular_values(r: int, spectrum: Spectrum) -> Tensor:
    """The shape of a spectrum, r values: σ_i ~ i^−0.7, or falling linearly from 1 to 0.5."""
    if spectrum == "flat":
        return torch.linspace(1, FLOOR, r)
    return torch.arange(1, r + 1).float() ** -DECAY


def _source(*parts: object) -> torch.Generator:
    """Random numbers that follow from names alone, whatever was drawn before."""
    seed = int(sha256(repr(parts).encode()).hexdigest()[:15], 16)
    return torch.Generator().manual_seed(seed)


@lru_cache(maxsize=16)
def _pattern(m: int, n: int, spectrum: Spectrum, task: str, seed: int) -> Tensor:
    """A dense m x n matrix of that spectrum, of Frobenius norm 1."""
    r = min(m, n)
    source = _source("pattern", m, n, task, seed)
    U, _ = torch.linalg.qr(torch.randn(m, r, generator=source))
    V, _ = torch.linalg.qr(torch.randn(n, r, generator=source))
    S = singular_values(r, spectrum)
    return (U * (S / S.norm())) @ V.T


def base_parameter(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """A parameter of the base, float32."""
    if "norm" in name and name.endswith("weight"):
        return torch.ones(shape)
    return INITIAL * torch.randn(shape, generator=_source("base", name, seed))


def task_vector(
    name: str, shape: tuple[int, ...], spectrum: Spectrum, task: str, seed: int
) -> Tensor:
    """What fine-tuning on a task adds to a parameter, float32.

    A matrix is one dense matrix per shape and task with its rows permuted and the signs of rows and
    columns flipped: orthogonal maps, so that the spectrum is exact and making it is cheap, while
    the singular vectors of two layers are as unrelated as random ones.
    """
    source = _source("task", name, task, seed)
    size = torch.Size(shape).numel()
    if not is_matrix(name, shape):
        return RELATIVE * INITIAL * torch.randn(shape, generator=source)
    m, n = shape
    rows = torch.randperm(m, generator=source)
    left = torch.randint(0, 2, (m, 1), generator=source) * 2 - 1
    right = torch.randint(0, 2, (n,), generator=source) * 2 - 1
    norm = RELATIVE * INITIAL * size**0.5
    return _pattern(m, n, spectrum, task, seed)[rows] * (norm * left) * right


def _tensors(
    model: Model, spectrum: Spectrum, task: str | None, seed: int
) -> Iterator[dict[str, Tensor]]:
    """The shards of the base (`task` None) or of an expert."""
    shard: dict[str, Tensor] = {}
    held = 0
    for name, shape in model.shapes.items():
        value = base_parameter(name, shape, seed)
        if task is not None:
            value += task_vector(name, shape, spectrum, task, seed)
        value = value.to(model.dtype)
        if shard and held + value.nbytes > model.shard_bytes:
            yield shard
            shard, held = {}, 0
        shard[name] = value
        held += value.nbytes
    yield shard


def write_checkpoint(
    target: Path, model: Model, spectrum: Spectrum, task: str | None, seed: int
) -> Path:
    """Write the base (`task` None) or an expert.

    Args:
        target: path without a suffix: a file's, or where there are several shards a folder's.
        model, spectrum, task, seed: what to write.

    Returns:
        The file, or the folder of shards.
    """
    if model.nbytes <= model.shard_bytes:
        path = target.with_suffix(".safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(next(_tensors(model, spectrum, task, seed)), path, {"format": "pt"})
        return path
    target.mkdir(parents=True, exist_ok=True)
    where: dict[str, str] = {}
    for i, shard in enumerate(_tensors(model, spectrum, task, seed)):
        file = f"model-{i:05d}.safetensors"
        save_file(shard, target / file, {"format": "pt"})
        where |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": model.nbytes}, "weight_map": where}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def write_suite(folder: Path, model: Model, spectrum: Spectrum, tasks: int, seed: int = 0) -> Path:
    """Write base, experts and suite.yaml, or keep them where they are complete.

    The base lies beside the folder, as it is the same for every spectrum.

    Args:
        folder: the suite's.
        model: layout of all members.
        spectrum: of the experts' task vectors.
        tasks: number of experts, task1 …
        seed: of all random numbers.

    Returns:
        Path of suite.yaml.
    """
    suite, base = folder / "suite.yaml", folder.parent / f"{model.name}-base-{seed}"
    made = f"format {FORMAT}, {model.name}, {spectrum}, {tasks} tasks, seed {seed}"
    if suite.is_file() and yaml.safe_load(suite.read_text())["description"] == made:
        return suite
    folder.mkdir(parents=True, exist_ok=True)
    suite.unlink(missing_ok=True)
    done = base.with_name(f"{base.name}.done")
    if not done.is_file():
        write_checkpoint(base, model, spectrum, None, seed)
        done.touch()
    experts = {}
    for task in (f"task{i}" for i in range(1, tasks + 1)):
        path = write_checkpoint(folder / "experts" / task, model, spectrum, task, seed)
        experts[task] = {"weights": str(path.relative_to(folder))}
    sharded = model.nbytes > model.shard_bytes
    document = {
        "name": folder.name,
        "description": made,
        "base": f"../{base.name}{'' if sharded else '.safetensors'}",
        "experts": experts,
    }
    # Last, and so the sign that everything is there.
    suite.write_text(dump_yaml(document))
    return suite


PRESETS = {"vit-b-32": (vit_b_32, 8), "vit-l-14": (vit_l_14, 8), "decoder-1b": (decoder_1b, 3)}


def main() -> None:
    """Write a suite, or say that it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=[*PRESETS, "plain"], default="vit-b-32")
    parser.add_argument("--spectrum", choices=get_args(Spectrum), default="decaying")
    parser.add_argument("--tasks", type=int, help="default: 8, or 3 decoders")
    parser.add_argument("--side", type=int, default=512, help="of a plain model's matrices")
    parser.add_argument("--layers", type=int, default=4, help="of a plain model")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if asked.model == "plain":
        model, usual = plain(asked.side, asked.layers), 8
    else:
        make, usual = PRESETS[asked.model]
        model = make()
    print(write_suite(asked.folder, model, asked.spectrum, asked.tasks or usual, asked.seed))


if __name__ == "__main__":
    main()

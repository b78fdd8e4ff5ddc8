"""Pictures in deeper networks: first filters, norms of kernels, positions, attention heads.

All of it reads a plain dict of tensors, so that experts, bases, averages and differences are
looked at alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from analysis.networks.stateless import State
from merge_core.checkpoints.parameter_roles import describe, matrix_kind, query_key_value
from merge_core.checkpoints.shards import TensorInfo
from merge_core.errors import CheckpointError

VIEWS = {
    "kernels": "first convolution kernels",
    "patch_embedding": "patch-embedding filters",
    "norms": "norms of the later kernels",
    "positions": "similarity of positional embeddings",
    "heads": "attention heads",
}
# The layer that sees the image, as timm, torchvision, CLIP and transformers call it.
_FIRST = re.compile(
    r"(^|\.)(patch_embed\w*|embeddings|stem\w*|conv_stem|conv0|conv1|features\.0|stages\.0\.0)\."
)
_QUERIES_AND_KEYS = ("attention qkv", "attention q", "attention k")
_POSITIONS = re.compile(r"(pos_embed|positional_embedding|position_embeddings?(\.weight)?)$")


def available_views(weights: State) -> tuple[str, ...]:
    """Which of :data:`VIEWS` a model has something for, in their order.

    Example:
        >>> available_views({"conv1.weight": torch.zeros(8, 3, 7, 7)})
        ('kernels',)
    """
    first = _first_name(weights)
    heads = attention_layers(weights)
    # CLIP's patch embedding is called conv1: a transformer cuts its image into patches.
    patches = first is not None and ("patch" in first or bool(heads))
    has = {
        "kernels": first is not None and not patches,
        "patch_embedding": patches,
        "norms": len(_kernel_names(weights)) > 1,
        "positions": _positions_name(weights) is not None,
        "heads": bool(heads),
    }
    return tuple(view for view in VIEWS if has[view])


def pictured_names(shapes: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """The tensors that any of :data:`VIEWS` reads, told from headers alone.

    Args:
        shapes: of all tensors of a model, by name.

    Example:
        >>> pictured_names({"conv1.weight": (8, 3, 7, 7), "fc.weight": (10, 8)})
        ('conv1.weight',)
    """
    return tuple(
        name
        for name, shape in shapes.items()
        if len(shape) == 4 or _POSITIONS.search(name) or matrix_kind(name) in _QUERIES_AND_KEYS
    )


def difference(a: State, b: State) -> dict[str, Tensor]:
    """a − b, for what both hold as floating tensors; float32.

    Raises:
        CheckpointError: nothing in common, or shapes that differ.

    Example:
        >>> difference({"w": torch.tensor([3.0])}, {"w": torch.tensor([1.0]), "v": torch.ones(1)})
        {'w': tensor([2.])}
    """
    return {name: a[name].float() - b[name].float() for name in _common_names([a, b])}


def average(models: Sequence[State]) -> dict[str, Tensor]:
    """The mean of models, for what all hold as floating tensors; float32, summed in float64.

    Raises:
        CheckpointError: nothing in common, or shapes that differ.

    Example:
        >>> average([{"w": torch.tensor([3.0])}, {"w": torch.tensor([1.0])}])
        {'w': tensor([2.])}
    """
    return {
        name: (sum(model[name].double() for model in models) / len(models)).float()  # type: ignore[union-attr]
        for name in _common_names(models)
    }


def _common_names(models: Sequence[State]) -> list[str]:
    names = [
        name
        for name in models[0]
        if all(name in model and model[name].is_floating_point() for model in models)
    ]
    if not names:
        raise CheckpointError("These models have no weights in common. Choose models of one kind.")
    for name in names:
        if len({model[name].shape for model in models}) > 1:
            raise CheckpointError(
                f"{name!r} has different shapes in these models. Choose models of one architecture."
            )
    return names


class Kernels(NamedTuple):
    """Filters that see the image.

    Attributes:
        name: of the weight.
        filters: float64, K x kh x kw x C with C = 1 or 3, in units of weights.
    """

    name: str
    filters: np.ndarray


def first_kernels(weights: State) -> Kernels:
    """The filters of the first convolution or patch embedding.

    That is the 4-D weight with 3 input channels (or 1; but those of depth-wise layers have 1
    too) whose name says that it comes first.

    Raises:
        CheckpointError: none.

    Example:
        >>> name, filters = first_kernels({"conv1.weight": torch.zeros(8, 3, 7, 5)})
        >>> name, filters.shape
        ('conv1.weight', (8, 7, 5, 3))
    """
    name = _first_name(weights)
    if name is None:
        raise CheckpointError(
            "This model has no convolution on 1 or 3 colour channels. Choose a convolutional "
            "network or a vision transformer."
        )
    return Kernels(name, weights[name].double().permute(0, 2, 3, 1).numpy())


def _first_name(weights: State) -> str | None:
    found = [name for name in _kernel_names(weights) if weights[name].shape[1] in (1, 3)]
    return min(
        found,
        key=lambda n: (
            weights[n].shape[1] != 3,
            not _FIRST.search(n),
            n.count("."),
            natural_sort_key(n),
        ),
        default=None,
    )


def _kernel_names(weights: State) -> list[str]:
    """Spatial kernels (not 1 x 1), in natural order: files do not keep the network's order."""
    names = [n for n, w in weights.items() if w.ndim == 4 and max(w.shape[2:]) > 1]
    return sorted((n for n in names if n.endswith("weight")), key=natural_sort_key)


def natural_sort_key(name: str) -> list[tuple[int, int | str]]:
    """A sort key by which ``layer1.10`` comes after ``layer1.2``.

    Example:
        >>> sorted(["layer1.10", "layer1.2"], key=natural_sort_key)
        ['layer1.2', 'layer1.10']
    """
    return [
        (0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part
    ]


def kernel_norms(weights: State) -> pd.DataFrame:
    """Norms of the output filters of every spatial kernel but the first.

    Returns:
        One row per layer and output filter, layers in natural order of their names: layer,
        filter (from 0), norm (‖W_o‖ over input channels and pixels), rms (norm / √(number of its
        weights), comparable between layers).

    Raises:
        CheckpointError: there is none.

    Example:
        >>> kernel = torch.ones(2, 3, 3, 3)
        >>> kernel_norms({"conv1.weight": kernel, "conv2.weight": kernel})["norm"].round(3).tolist()
        [5.196, 5.196]
    """
    first = _first_name(weights)
    frames = []
    for name in _kernel_names(weights):
        if name == first:
            continue
        rows = weights[name].double().flatten(1)
        norm = rows.norm(dim=1).numpy()
        frames.append(
            pd.DataFrame(
                {
                    "layer": name,
                    "filter": np.arange(len(norm)),
                    "norm": norm,
                    "rms": norm / math.sqrt(rows.shape[1]),
                }
            )
        )
    if not frames:
        raise CheckpointError("This model has no further spatial kernels; choose another model.")
    return pd.concat(frames, ignore_index=True)


class Components(NamedTuple):
    """Principal components of filters, by falling share.

    Attributes:
        filters: unit vectors as images, k x kh x kw x C; the largest entry is positive, as the
            sign is free.
        explained: each one's share of the sum of squares (about the mean, where centred), k.
    """

    filters: np.ndarray
    explained: np.ndarray


def filter_components(filters: np.ndarray, centred: bool = True) -> Components:
    """Principal components of flattened filters.

    Args:
        filters: K x kh x kw x C.
        centred: about the mean filter, as in principal component analysis; else about zero.

    Returns:
        min(K, kh·kw·C) components.

    Source: Dosovitskiy et al., arXiv:2010.11929, figure 7 (left).

    Example:
        >>> along = np.arange(4.0).reshape(4, 1, 1, 1) * np.ones((1, 2, 2, 1))  # one pattern
        >>> filter_components(along).explained.round(6).tolist()
        [1.0, 0.0, 0.0, 0.0]
    """
    rows = filters.reshape(len(filters), -1).astype(np.float64)
    if centred:
        rows = rows - rows.mean(axis=0)
    _, sigma, Vh = np.linalg.svd(rows, full_matrices=False)
    largest = np.take_along_axis(Vh, np.abs(Vh).argmax(axis=1)[:, None], axis=1)
    energy = sigma**2
    total = energy.sum()
    explained = energy / total if total > 0 else np.zeros_like(energy)
    return Components((Vh * np.sign(largest)).reshape(-1, *filters.shape[1:]), explained)


def position_embedding(weights: State) -> Tensor:
    """The learned positional embedding of the image tokens, tokens x width.

    Raises:
        CheckpointError: none (fixed or relative positions are not stored as a table of tokens).

    Example:
        >>> position_embedding({"pos_embed": torch.zeros(1, 17, 8)}).shape
        torch.Size([17, 8])
    """
    name = _positions_name(weights)
    if name is None:
        raise CheckpointError(
            "This model stores no positional embedding of tokens. Choose a vision transformer "
            "with learned absolute positions."
        )
    return weights[name].reshape(-1, weights[name].shape[-1])


def _positions_name(weights: State) -> str | None:
    found = [
        n
        for n, w in weights.items()
        if _POSITIONS.search(n) and (w.ndim == 2 or (w.ndim == 3 and len(w) == 1))
    ]
    # Models of images and texts have two tables.
    return min(
        found,
        key=lambda n: ("visi" not in n and "visual" not in n, natural_sort_key(n)),
        default=None,
    )


def position_similarity(pos_embed: Tensor, grid: tuple[int, int] | None = None) -> np.ndarray:
    """Cosine of every position's embedding with every other's.

    Args:
        pos_embed: tokens x width, or 1 x tokens x width; tokens before those of the grid (class
            token, registers) are dropped.
        grid: rows and columns of patches; None for the largest square that fits.

    Returns:
        float64, rows x columns x rows x columns: [i, j] is the map of the patch at row i and
        column j; 0 where an embedding is zero.

    Raises:
        CheckpointError: fewer tokens than the grid has patches.

    Source: Dosovitskiy et al., arXiv:2010.11929, figure 7 (centre).

    Example:
        >>> similarity = position_similarity(torch.eye(5))  # a class token and 2 x 2 patches
        >>> similarity.shape, similarity[0, 0].tolist()
        ((2, 2, 2, 2), [[1.0, 0.0], [0.0, 0.0]])
    """
    table = pos_embed.reshape(-1, pos_embed.shape[-1]).double()
    rows, columns = grid or (math.isqrt(len(table)),) * 2
    if rows * columns > len(table):
        raise CheckpointError(
            f"The positional embedding has {len(table)} tokens, fewer than a grid of {rows} x "
            f"{columns}. Give the model's own grid."
        )
    patches = table[len(table) - rows * columns :]
    unit = patches / patches.norm(dim=1, keepdim=True).clamp(min=1e-300)
    return (unit @ unit.T).clamp(-1, 1).reshape(rows, columns, rows, columns).numpy()


def attention_layers(weights: State) -> tuple[str, ...]:
    """Names of the weights of queries, fused with keys and values or apart, in natural order.

    Fused weights are (3 · width) x width, or the transpose (GPT-2); separate ones width x width.
    Layers in which several queries share a key are left out.

    Example:
        >>> attention_layers({"blocks.0.attn.qkv.weight": torch.zeros(24, 8)})
        ('blocks.0.attn.qkv.weight',)
    """
    found = []
    for name, weight in weights.items():
        if matrix_kind(name) == "attention qkv":
            role = describe(name, TensorInfo.of(weight))
            if role.parts and max(weight.shape) == 3 * min(weight.shape):
                found.append(name)
        elif (apart := query_key_value(name)) is not None and weight.ndim == 2:
            key = weights.get(apart[1])
            if key is not None and key.shape == weight.shape and len(set(key.shape)) == 1:
                found.append(name)
    return tuple(sorted(found, key=natural_sort_key))


def head_count(network: nn.Module) -> int | None:
    """Attention heads of a network's first attention layer, which weights alone do not tell.

    Example:
        >>> head_count(nn.Sequential(nn.MultiheadAttention(8, num_heads=4)))
        4
    """
    modules: list[Any] = list(network.modules())
    return next((int(m.num_heads) for m in modules if hasattr(m, "num_heads")), None)


def _queries_keys(weights: State, layer: str, heads: int) -> tuple[Tensor, Tensor]:
    """W_Q and W_K by head: float64, heads x d x width."""
    if layer not in attention_layers(weights):
        raise CheckpointError(
            f"This model has no attention weight {layer!r} of queries. Choose one of its layers."
        )
    apart = query_key_value(layer)
    if apart is not None:
        query, key = (weights[name].double() for name in apart[:2])
    else:
        fused = weights[layer].double()
        info = TensorInfo.of(fused)
        outputs = fused.T if describe(layer, info).stored_transposed else fused
        query, key, _ = outputs.chunk(3)
    width = query.shape[1]
    if heads < 1 or width % heads:
        raise CheckpointError(
            f"{layer!r} has width {width}, which {heads} heads cannot share. Correct their number."
        )
    by_head = (heads, width // heads, width)
    return query.reshape(by_head), key.reshape(by_head)


def query_key(weights: State, layer: str, heads: int) -> np.ndarray:
    """The bilinear form of each attention head, B_h = W_Q,hᵀ W_K,h / √d.

    The logit with which token x attends to token y is x B_h yᵀ, plus what the biases of queries
    and keys add; x and y are inputs of the attention layer (after its normalisation), d the
    width of a head. It does not hold for models that normalise or rotate queries and keys.

    Args:
        weights: of a model.
        layer: one of :func:`attention_layers`. Of the outputs of queries and of keys, head h has
            those from h·d to (h+1)·d − 1.
        heads: their number.

    Returns:
        float64, heads x width x width.

    Raises:
        CheckpointError: an unknown layer, or heads that do not divide the width.

    Source: Vaswani et al., arXiv:1706.03762, equation 1.

    Example:
        >>> weights = {"attn.qkv.weight": torch.eye(4).repeat(3, 1)}
        >>> query_key(weights, "attn.qkv.weight", heads=1)[0].diagonal().tolist()  # 1 / √4
        [0.5, 0.5, 0.5, 0.5]
    """
    query, key = _queries_keys(weights, layer, heads)
    return (query.mT @ key / math.sqrt(query.shape[1])).numpy()


def head_spectrum(weights: State, layer: str, heads: int) -> pd.DataFrame:
    """Singular values and symmetry of each head's form B_h (see :func:`query_key`).

    With S = (B + Bᵀ)/2 and A = (B − Bᵀ)/2, ‖B‖² = ‖S‖² + ‖A‖². Without S, every token's
    logit with itself is 0; without A, two tokens have the same logit for each other.

    Returns:
        One row per head and direction: head (from 0), index (1..d), sigma (falling),
        symmetric_share (‖S‖²/‖B‖², in [0, 1]; 0 where B is zero), trace (of B, the sum of its
        eigenvalues).

    Raises:
        CheckpointError: as :func:`query_key`.

    [derived] With Q R decompositions W_Qᵀ = P R and W_Kᵀ = P' R', the singular values of B are
    those of the d x d matrix R R'ᵀ / √d, as P and P' are orthonormal.

    Example:
        >>> weights = {"attn.qkv.weight": torch.eye(4).repeat(3, 1)}
        >>> head_spectrum(weights, "attn.qkv.weight", heads=1)["sigma"].round(6).tolist()
        [0.5, 0.5, 0.5, 0.5]
    """
    query, key = _queries_keys(weights, layer, heads)
    scale = math.sqrt(query.shape[1])
    small = torch.linalg.qr(query.mT).R @ torch.linalg.qr(key.mT).R.mT / scale
    crossed = key @ query.mT / scale  # tr(B) = tr(crossed), ⟨B, Bᵀ⟩ = tr(B B) = tr(crossed²)
    frames = []
    for head in range(heads):
        sigma = torch.linalg.svdvals(small[head]).numpy()
        energy = float((sigma**2).sum())
        mutual = float((crossed[head] @ crossed[head]).trace())
        frames.append(
            pd.DataFrame(
                {
                    "head": head,
                    "index": np.arange(1, len(sigma) + 1),
                    "sigma": sigma,
                    "symmetric_share": (1 + mutual / energy) / 2 if energy > 0 else 0.0,
                    "trace": float(crossed[head].trace()),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)

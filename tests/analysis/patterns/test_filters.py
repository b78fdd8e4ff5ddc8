"""Views of deeper networks against timm's own modules, sklearn, and loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA, TruncatedSVD
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from analysis.networks.plain import MLP, VGG
from analysis.patterns.filters import (
    attention_layers,
    available_views,
    average,
    difference,
    filter_components,
    first_kernels,
    head_count,
    head_spectrum,
    kernel_norms,
    natural_sort_key,
    pictured_names,
    position_embedding,
    position_similarity,
    query_key,
)
from merge_core.errors import CheckpointError

SEEDS = st.integers(0, 10**6)
CONV = ("kernels", "norms")
VIT = ("patch_embedding", "positions", "heads")
TINY_VIT = {"img_size": 32, "embed_dim": 12, "depth": 2, "num_heads": 3}
NETWORKS: dict[str, tuple[str, dict[str, Any], str, tuple[int, ...], tuple[str, ...]]] = {
    "resnet": ("resnet18", {}, "conv1.weight", (64, 7, 7, 3), CONV),
    "resnet_d": ("resnet18d", {}, "conv1.0.weight", (32, 3, 3, 3), CONV),
    "vit": ("vit_tiny_patch16_224", TINY_VIT, "patch_embed.proj.weight", (12, 16, 16, 3), VIT),
    "convnext": ("convnext_atto", {}, "stem.0.weight", (40, 4, 4, 3), CONV),
    "grey_convnext": ("convnext_atto", {"in_chans": 1}, "stem.0.weight", (40, 4, 4, 1), CONV),
    "densenet": ("densenet121", {}, "features.conv0.weight", (64, 7, 7, 3), CONV),
    "efficientnet": ("efficientnet_b0", {"in_chans": 1}, "conv_stem.weight", (32, 3, 3, 1), CONV),
    "vgg": ("vgg11", {"num_classes": 0}, "features.0.weight", (64, 3, 3, 3), CONV),
}


def state_of(name: str, **args: Any) -> dict[str, Tensor]:
    """A network's names and shapes; values only where the network is small."""
    if name == "vgg11":
        with torch.device("meta"):  # half a gigabyte otherwise
            shapes = timm.create_model(name, **args).state_dict()
        first = "features.0.weight"
        return {n: torch.randn(t.shape) if n == first else t for n, t in shapes.items()}
    return timm.create_model(name, pretrained=False, **args).state_dict()


@pytest.mark.parametrize("which", NETWORKS)
def test_first_kernels_of_timms_networks(which: str) -> None:
    name, args, parameter, shape, views = NETWORKS[which]
    state = state_of(name, **args)
    # Files list tensors in an order of their own.
    for order in (sorted(state), sorted(state, reverse=True)):
        weights = {n: state[n] for n in order}
        found = first_kernels(weights)
        assert found.name == parameter
        assert found.filters.shape == shape
        assert available_views(weights) == views
    kernel = state[parameter]
    assert found.filters[1, 2, 1, -1] == pytest.approx(float(kernel[1, -1, 2, 1]))
    # What is told from headers alone is enough for every view.
    chosen = pictured_names({n: tuple(t.shape) for n, t in state.items()})
    assert available_views({n: state[n] for n in chosen}) == views


def test_our_own_networks() -> None:
    state = VGG(in_chans=1, channels=(4, 6), hidden=5, num_classes=3).state_dict()
    assert first_kernels(state).name == "stages.0.0.weight"
    assert available_views(state) == CONV
    flat = MLP(1, 6, num_classes=2).state_dict()
    assert available_views(flat) == ()
    with pytest.raises(CheckpointError, match="no convolution"):
        first_kernels(flat)


def test_names_tell_the_first_layer_from_depth_wise_ones() -> None:
    # As deep in the network's tree, of one input channel both, and later by name.
    state = {name: torch.zeros(4, 1, 3, 3) for name in ("body.dw.weight", "stem.conv.weight")}
    assert first_kernels(state).name == "stem.conv.weight"


def test_clips_names() -> None:
    state = {
        "visual.conv1.weight": torch.zeros(8, 3, 4, 4),
        "visual.positional_embedding": torch.zeros(5, 8),
        "visual.transformer.resblocks.0.attn.in_proj_weight": torch.zeros(24, 8),
        "positional_embedding": torch.ones(77, 8),
    }
    assert available_views(state) == VIT
    assert first_kernels(state).name == "visual.conv1.weight"
    assert position_embedding(state).shape == (5, 8)
    assert attention_layers(state) == ("visual.transformer.resblocks.0.attn.in_proj_weight",)


def test_natural_order() -> None:
    names = ["b.10.w", "b.2.w", "a.1.w", "b.2.1.w", "3.w"]
    assert sorted(names, key=natural_sort_key) == ["3.w", "a.1.w", "b.2.1.w", "b.2.w", "b.10.w"]


def test_kernel_norms_one_by_one() -> None:
    state = timm.create_model("resnet18", channels=[4, 4, 6, 8], stem_width=4).state_dict()
    frame = kernel_norms(state)
    layers = list(dict.fromkeys(frame["layer"]))
    assert layers[0] == "layer1.0.conv1.weight"
    # 16 convolutions of 3 x 3; the first one and those of 1 x 1 are left out.
    assert len(layers) == 16
    assert all("downsample" not in layer and layer != "conv1.weight" for layer in layers)
    for row in frame.itertuples():
        kernel = state[row.layer][row.filter].numpy().astype(float)
        assert row.norm == pytest.approx(np.sqrt((kernel**2).sum()))
        assert row.rms == pytest.approx(np.sqrt((kernel**2).mean()))
    with pytest.raises(CheckpointError, match="no further"):
        kernel_norms({"conv1.weight": torch.zeros(2, 3, 3, 3)})


@pytest.mark.parametrize(("count", "centred"), [(40, True), (40, False), (7, True), (7, False)])
def test_components_are_sklearns(count: int, centred: bool) -> None:
    rng = np.random.default_rng(1)
    filters = rng.normal(0.5, 1, (count, 3, 2, 3)) * np.linspace(0.2, 3, 18).reshape(3, 2, 3)
    found = filter_components(filters, centred)
    rows = filters.reshape(count, -1)
    most = min(rows.shape)
    assert found.filters.shape == (most, 3, 2, 3)
    assert found.explained.sum() == pytest.approx(1)
    if centred:
        kept = min(most, count - 1)
        reference = PCA(kept, svd_solver="full").fit(rows)
        explained = reference.explained_variance_ratio_
    else:
        kept = most - 1
        reference = TruncatedSVD(kept, algorithm="arpack").fit(rows)
        explained = reference.singular_values_**2 / (rows**2).sum()
    assert found.explained[:kept] == pytest.approx(explained, abs=1e-9)
    flat = found.filters.reshape(most, -1)[:kept]
    assert np.abs((flat * reference.components_).sum(axis=1)) == pytest.approx(np.ones(kept))
    largest = np.take_along_axis(flat, np.abs(flat).argmax(axis=1)[:, None], axis=1)
    assert (largest > 0).all()


def test_equal_filters_have_no_components() -> None:
    same = np.ones((4, 2, 2, 1))
    assert filter_components(same).explained.tolist() == [0.0] * 4
    assert filter_components(same, centred=False).explained == pytest.approx([1, 0, 0, 0])


@given(SEEDS, st.integers(2, 4), st.integers(0, 3))
def test_position_similarity_is_the_cosine_of_patches(seed: int, g: int, prefix: int) -> None:
    table = torch.randn(1, prefix + g * g, 6, generator=torch.Generator().manual_seed(seed))
    S = position_similarity(table)
    assert S.shape == (g, g, g, g)
    patches = table[0, prefix:].double().numpy().reshape(g, g, 6)
    for i, j, k, m in np.ndindex(S.shape):
        a, b = patches[i, j], patches[k, m]
        expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        assert S[i, j, k, m] == pytest.approx(expected, abs=1e-9)
    assert np.einsum("ijij->ij", S) == pytest.approx(np.ones((g, g)))
    assert S == pytest.approx(S.transpose(2, 3, 0, 1))


def test_positions_on_other_grids() -> None:
    table = torch.randn(7, 5)
    table[1] = 0
    S = position_similarity(table, (2, 3))
    assert S.shape == (2, 3, 2, 3)
    assert (S[0, 0] == 0).all()
    unit = torch.nn.functional.normalize(table[1:].double(), dim=1)
    assert S[1, 2] == pytest.approx((unit @ unit[-1]).reshape(2, 3).numpy())
    with pytest.raises(CheckpointError, match="fewer than a grid of 3 x 3"):
        position_similarity(table, (3, 3))
    with pytest.raises(CheckpointError, match="no positional embedding"):
        position_embedding({"relative_position_bias_table": torch.zeros(9, 2)})


@pytest.fixture(scope="module")
def vit() -> torch.nn.Module:
    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **TINY_VIT).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.double()


def test_forms_are_timms_attention(vit: Any) -> None:
    assert head_count(vit) == 3
    assert head_count(VGG()) is None
    layers = attention_layers(vit.state_dict())
    assert layers == ("blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight")
    attention = vit.blocks[1].attn
    torch.nn.init.zeros_(attention.qkv.bias)
    attention.fused_attn = False
    seen: list[Tensor] = []
    hook = attention.attn_drop.register_forward_hook(lambda *args: seen.append(args[2]))
    x = torch.randn(1, 5, 12, dtype=torch.float64)
    with torch.no_grad():
        attention(x)
    hook.remove()
    B = query_key(vit.state_dict(), layers[1], 3)
    assert B.shape == (3, 12, 12)
    logits = np.einsum("ia,hab,jb->hij", x[0].numpy(), B, x[0].numpy())
    weights = np.exp(logits - logits.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    assert weights == pytest.approx(seen[0][0].numpy(), abs=1e-10)


@pytest.mark.parametrize("library", ["gpt2", "clip", "bert"])
def test_forms_are_those_of_fused_columns_and_of_separate_weights(library: str) -> None:
    """Logits of the libraries' own layers: GPT-2 fuses by columns, others keep weights apart."""
    torch.manual_seed(4)
    x = torch.randn(5, 12, dtype=torch.float64)
    if library == "gpt2":
        layer = Conv1D(36, 12).double()
        state = {"h.0.attn.c_attn.weight": layer.weight.detach()}
        query, key, _ = layer(x).split(12, dim=1)
    else:
        names = {
            "clip": ("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj"),
            "bert": ("layer.0.attention.self.query", "layer.0.attention.self.key"),
        }[library]
        layers = [torch.nn.Linear(12, 12, bias=False).double() for _ in names]
        state = {f"{n}.weight": m.weight.detach() for n, m in zip(names, layers, strict=True)}
        query, key = (m(x) for m in layers)
    (name,) = attention_layers(state)
    assert name == next(iter(state))
    assert set(state) <= set(pictured_names({n: w.shape for n, w in state.items()}))
    B = query_key(state, name, 3)
    heads = [part.reshape(5, 3, 4).transpose(0, 1) for part in (query, key)]
    logits = heads[0] @ heads[1].mT / 4**0.5
    assert np.einsum("ia,hab,jb->hij", x, B, x) == pytest.approx(logits.detach().numpy(), abs=1e-10)


def test_layers_whose_queries_share_keys_have_no_forms() -> None:
    state = {
        "layers.0.self_attn.q_proj.weight": torch.ones(12, 12),
        "layers.0.self_attn.k_proj.weight": torch.ones(4, 12),
    }
    assert attention_layers(state) == ()
    assert attention_layers({"layers.0.self_attn.q_proj.weight": torch.ones(12, 12)}) == ()


@pytest.mark.parametrize("heads", [1, 3, 6])
def test_head_spectrum_is_that_of_the_form(vit: Any, heads: int) -> None:
    state, layer = vit.state_dict(), "blocks.0.attn.qkv.weight"
    frame = head_spectrum(state, layer, heads)
    for head, B in enumerate(query_key(state, layer, heads)):
        part = frame[frame["head"] == head]
        d = 12 // heads
        assert part["index"].tolist() == list(range(1, d + 1))
        sigma = np.linalg.svd(B, compute_uv=False)
        assert part["sigma"].to_numpy() == pytest.approx(sigma[:d], abs=1e-9)
        assert sigma[d:] == pytest.approx(np.zeros(12 - d), abs=1e-9)
        share = np.linalg.norm((B + B.T) / 2) ** 2 / np.linalg.norm(B) ** 2
        other = np.linalg.norm((B - B.T) / 2) ** 2 / np.linalg.norm(B) ** 2
        assert part["symmetric_share"].to_numpy() == pytest.approx(np.full(d, share))
        assert part["symmetric_share"].to_numpy() == pytest.approx(np.full(d, 1 - other))
        assert part["trace"].to_numpy() == pytest.approx(np.full(d, np.trace(B)))


def test_symmetric_antisymmetric_and_silent_heads() -> None:
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    layer = "blocks.0.attn.qkv.weight"
    for query, key, share in (
        (torch.eye(2), torch.eye(2), 1.0),
        (torch.eye(2), turn, 0.0),
        (torch.zeros(2, 2), turn, 0.0),
    ):
        state = {layer: torch.cat([query, key, torch.full((2, 2), 9.0)])}
        assert head_spectrum(state, layer, 1)["symmetric_share"].tolist() == [share] * 2


def test_layers_and_heads_must_exist(vit: Any) -> None:
    state = vit.state_dict()
    with pytest.raises(CheckpointError, match=r"no attention weight 'blocks\.7"):
        query_key(state, "blocks.7.attn.qkv.weight", 3)
    for heads in (0, 5):
        with pytest.raises(CheckpointError, match=f"{heads} heads cannot share"):
            head_spectrum(state, "blocks.0.attn.qkv.weight", heads)


def test_averages_and_differences_are_models_too() -> None:
    torch.manual_seed(0)
    models = [
        {"w": torch.randn(4, 3), "n": torch.tensor(i), f"own{i}": torch.ones(1)} for i in (0, 1, 2)
    ]
    mean = average(models)
    assert list(mean) == ["w"]
    expected = np.mean([m["w"].double().numpy() for m in models], axis=0)
    assert mean["w"].numpy() == pytest.approx(expected, abs=1e-6)
    gap = difference(models[0], models[1])
    assert torch.equal(gap["w"], models[0]["w"] - models[1]["w"])
    # Views are linear in the weights: the average's kernels are the kernels' average.
    kernels = [{"conv1.weight": torch.randn(2, 3, 3, 3)} for _ in range(3)]
    pictures = np.mean([first_kernels(k).filters for k in kernels], axis=0)
    assert first_kernels(average(kernels)).filters == pytest.approx(pictures, abs=1e-6)
    with pytest.raises(CheckpointError, match="no weights in common"):
        difference({"a": torch.ones(1)}, {"b": torch.ones(1)})
    with pytest.raises(CheckpointError, match="'w' has different shapes"):
        average([{"w": torch.ones(2)}, {"w": torch.ones(3)}])

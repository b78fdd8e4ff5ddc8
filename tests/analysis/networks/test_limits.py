"""A description has no library build more than the weights fill, nor fetch or open anything."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from analysis.networks.build import build_network
from analysis.networks.limits import Size, TooLargeError, build_within
from analysis.networks.towers import suite_network
from analysis.outputs import zero_shot
from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.errors import MergeScopeError, SuiteError
from merge_core.suites.data_spec import ZeroShotSpec
from merge_core.suites.suite import load_suite
from merge_core.suites.suite_spec import ArchitectureSpec
from tests.evaluable import ARCHITECTURE, timm_model, write_document
from tests.reliability.limits import SECONDS, run_confined

TIMM = ARCHITECTURE
CLIP = {"name": "ViT-B-32", "library": "open_clip"}
VISION = {"name": "clip_vision_model", "library": "transformers"}
GPT2 = {"name": "gpt2", "library": "transformers"}
BERT = {"name": "bert", "library": "transformers"}
SWIN = {"name": "swin", "library": "transformers"}


def with_args(architecture: Mapping[str, Any], **args: Any) -> dict[str, Any]:
    return {**architecture, "args": {**architecture.get("args", {}), **args}}


def with_vision(**args: Any) -> dict[str, Any]:
    return with_args(CLIP, vision_cfg=args)


HUGE: dict[str, dict[str, Any]] = {
    "timm depth": with_args(TIMM, depth=100_000_000),
    "timm depth within the common numbers": with_args(TIMM, depth=4096),
    "timm width": with_args(TIMM, embed_dim=4096, num_heads=2, depth=12),
    "timm image": with_args(TIMM, img_size=1_000_000),
    "timm image within the common numbers": with_args(TIMM, img_size=4096, patch_size=1),
    "timm hidden": with_args(TIMM, mlp_ratio=1e9),
    "timm hidden within the common numbers": with_args(TIMM, mlp_ratio=4000.0, embed_dim=128),
    "timm stages": {"name": "resnet18", "args": {"layers": [4096] * 4}},
    "timm nested": {"name": "resnet18", "args": {"layers": [2, 2, 2, 10**9]}},
    "timm list": {"name": "resnet18", "args": {"layers": [1] * 2000, "channels": [8] * 2000}},
    "timm large": {"name": "vit_giant_patch14_224"},
    "plain image": {"name": "linear", "args": {"in_chans": 3, "img_size": 10**9}},
    "plain widths": {"name": "mlp", "args": {"in_chans": 3, "img_size": 8, "widths": [4096] * 900}},
    "open_clip layers": with_vision(layers=100_000_000),
    "open_clip layers within": with_vision(layers=4000),
    "open_clip width": with_vision(width=10**8),
    "open_clip large": {"name": "ViT-bigG-14", "library": "open_clip"},
    "transformers layers": with_args(VISION, num_hidden_layers=100_000_000),
    "transformers layers within": with_args(VISION, num_hidden_layers=4000),
    "transformers width": with_args(VISION, hidden_size=10**9),
    "transformers vocabulary": with_args(GPT2, vocab_size=10**12),
    "transformers positions": with_args(GPT2, n_positions=10**9),
    "encoder layers within": with_args(BERT, num_hidden_layers=4000),
    "encoder vocabulary within": with_args(BERT, vocab_size=4096, hidden_size=4096),
    "encoder stages": with_args(SWIN, depths=[4000, 4000], num_heads=[1, 1], embed_dim=8),
    "encoder stage count": with_args(SWIN, depths=[1] * 2000, num_heads=[1] * 2000),
    "encoder windows": with_args(SWIN, window_size=4096),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the weights of a small ViT."""
    folder = tmp_path_factory.mktemp("weights")
    save_file(timm_model().state_dict(), folder / "expert.safetensors")
    return folder


@pytest.fixture(scope="module", autouse=True)
def imported_models() -> None:
    """What the libraries import once, whatever is built of them."""
    timm.list_models()
    open_clip.list_models()
    with torch.device("meta"):
        transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig())
        transformers.GPT2Model(transformers.GPT2Config())
        transformers.BertModel(transformers.BertConfig())
        transformers.SwinModel(transformers.SwinConfig())


def told(folder: Path, architecture: Mapping[str, Any]) -> Callable[[], str]:
    """What is said of an architecture, and that nothing was asked of any other machine."""
    document = {
        "name": "s",
        "architecture": architecture,
        "experts": {"one": {"weights": "expert.safetensors"}},
    }
    suite = load_suite(write_document(folder, document))

    def build() -> str:
        def connect(*_: Any) -> None:
            raise AssertionError("asked the network")

        socket.socket.connect = connect  # type: ignore[method-assign]
        socket.getaddrinfo = connect  # type: ignore[assignment]
        began = time.process_time()
        try:
            suite_network(suite)
        except SuiteError as error:
            assert time.process_time() - began < SECONDS, f"{time.process_time() - began:.1f} s"
            return str(error)
        return "built"

    return build


@pytest.mark.parametrize("kind", HUGE)
def test_a_network_beyond_its_weights_is_refused_before_it_is_built(
    weights: Path, kind: str
) -> None:
    sentence = run_confined(told(weights, HUGE[kind]), seconds=60)
    assert "proportion" in sentence or "far more parameters" in sentence
    assert "Correct the args" in sentence
    assert len(sentence) < 1000


FETCHED: dict[str, dict[str, Any]] = {
    **{
        f"{library} {name}": {"name": name, "library": library}
        for library in ("timm", "open_clip", "transformers")
        for name in (
            "hf-hub:org/model", "hf_hub:org/model", "hf-hub:timm/vit_tiny_patch16_224",
            "local-dir:/tmp/model", "local-dir:model", "org/model", "./model", "~/model",
            "https://host/model", "bert-base-uncased", "google-bert/bert-base-uncased",
        )
    },
    "timm pretrained": with_args(TIMM, pretrained=True),
    "timm cfg": with_args(TIMM, pretrained_cfg={"hf_hub_id": "org/model"}),
    "timm overlay": with_args(TIMM, pretrained_cfg_overlay={"url": "http://host/w.pth"}),
    "timm checkpoint": with_args(TIMM, checkpoint_path="/etc/passwd"),
    "timm cache": with_args(TIMM, cache_dir="/tmp/x"),
    "open_clip trunk": with_vision(timm_model_name="hf-hub:org/model"),
    "open_clip folder": with_vision(timm_model_name="local-dir:/tmp/model"),
    "open_clip unknown trunk": with_vision(timm_model_name="no_such_model"),
    "open_clip pretrained": with_vision(timm_model_pretrained=True),
    "open_clip hub": with_vision(hf_model_name="org/model"),
    "transformers private": with_args(VISION, _attn_implementation="kernels-community/attn"),
    "transformers attention": with_args(VISION, attn_implementation="kernels-community/attn"),
    "transformers dunder": with_args(VISION, __class__="x"),
    "transformers name": with_args(VISION, _name_or_path="org/model"),
    "transformers code": with_args(VISION, auto_map={"AutoModel": "org/model--x.Y"}),
    "transformers remote": with_args(VISION, trust_remote_code=True),
    "transformers method": with_args(VISION, to_dict=1),
}  # fmt: skip


@pytest.mark.parametrize("kind", FETCHED)
def test_no_name_or_argument_reaches_another_host_or_file(weights: Path, kind: str) -> None:
    sentence = run_confined(told(weights, FETCHED[kind]), seconds=60)
    assert sentence != "built"
    assert "asked the network" not in sentence
    assert "suite.yaml" in sentence


@pytest.mark.parametrize("name", ["hf-hub:org/model", "local-dir:/tmp/model", "org/model", "none"])
def test_no_text_tower_of_open_clip_is_fetched(weights: Path, name: str) -> None:
    def build() -> str:
        def connect(*_: Any) -> None:
            raise AssertionError("asked the network")

        socket.getaddrinfo = connect  # type: ignore[assignment]
        made = ZeroShotSpec(model=name, text_tower="expert.safetensors", templates=("{}",))
        with pytest.raises(SuiteError) as refused:
            zero_shot._open_clip_encoder(
                name, weights, Checkpoint(weights / "expert.safetensors"), f"head {made.model}"
            )
        return str(refused.value)

    assert "knows no model" in run_confined(build, seconds=60)


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "convnext_atto"])
def test_what_its_weights_fill_is_built(name: str) -> None:
    """Also where a network has buffers that no weights hold (Swin's masks and indices)."""
    alone = timm.create_model(name, num_classes=0)
    elements = sum(value.numel() for value in alone.state_dict().values())
    size = Size(len(alone.state_dict()), elements, 1000)
    made = build_network(ArchitectureSpec(name=name), Path("suite.yaml"), SuiteError, 0, size)
    assert {n: v.shape for n, v in made.state_dict().items()} == {
        n: v.shape for n, v in alone.state_dict().items()
    }
    assert not any(value.is_meta for value in (*made.parameters(), *made.buffers()))


def test_another_threads_modules_do_not_count() -> None:
    """The server builds networks of several sessions at once."""
    import threading

    def build() -> nn.Module:
        other = threading.Thread(target=lambda: nn.Linear(3000, 3000, device="meta"))
        other.start()
        other.join()
        return nn.Linear(2, 2)

    size = Size(tensors=2, elements=6, longest=2)
    assert isinstance(build_within(size, [], build), nn.Linear)
    with pytest.raises(TooLargeError):
        build_within(size, [], lambda: nn.Linear(3000, 3000))


def test_a_library_that_catches_the_refusal_is_refused_all_the_same() -> None:
    def build() -> nn.Module:
        try:
            return nn.Linear(3000, 3000)
        except TooLargeError:
            return nn.Linear(2, 2)

    with pytest.raises(TooLargeError):
        build_within(Size(tensors=2, elements=6, longest=2), [], build)


def test_weights_beyond_all_memory_are_refused() -> None:
    size = Size(tensors=4, elements=1 << 50, longest=1 << 25)
    with pytest.raises(MergeScopeError, match="GB of memory"):
        build_network(ArchitectureSpec(name="resnet18"), Path("s"), SuiteError, 0, size)

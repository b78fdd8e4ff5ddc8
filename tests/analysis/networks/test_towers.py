"""Networks of transformers and open_clip give what those libraries give with the weights loaded."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from analysis.networks.build import build_network
from analysis.networks.towers import common_prefix, suite_network
from merge_core.errors import PoolError, SuiteError
from merge_core.suites.suite import Suite, load_suite
from merge_core.suites.suite_spec import ArchitectureSpec
from tests.evaluable import edit_document, write_document
from tests.stand_in_data import SIZE
from tests.stand_ins import OPEN_CLIP, PROJECTED, VISION, perturb

CLIP = {"name": "clip_vision_model", "library": "transformers", "args": VISION}
TOWER = {"name": "ViT-B-32-quickgelu", "library": "open_clip", "args": OPEN_CLIP}
PROJECTION = "visual_projection.weight"


@pytest.fixture(scope="module")
def clip() -> CLIPVisionModelWithProjection:
    torch.manual_seed(0)
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)).eval()


@pytest.fixture(scope="module")
def tower() -> nn.Module:
    torch.manual_seed(1)
    text = open_clip.CLIPTextCfg(context_length=4, vocab_size=9, width=8, heads=2, layers=2)
    vision = open_clip.CLIPVisionCfg(**OPEN_CLIP["vision_cfg"])  # type: ignore[arg-type]
    return open_clip.CLIP(PROJECTED, vision, text, quick_gelu=True).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


def suite_of(
    folder: Path,
    architecture: Mapping[str, Any],
    expert: Mapping[str, Tensor],
    base: Mapping[str, Tensor] | None = None,
) -> Suite:
    folder.mkdir(exist_ok=True)
    document: dict[str, Any] = {"name": "x", "architecture": dict(architecture)}
    for name, state in (("expert", expert), ("base", base)):
        if state is not None:
            whole = {key: value.clone().contiguous() for key, value in state.items()}
            save_file(whole, folder / f"{name}.safetensors")
    if base is not None:
        document["base"] = "base.safetensors"
    document["experts"] = {"one": {"weights": "expert.safetensors"}}
    return load_suite(write_document(folder, document))


def without_projection(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name != PROJECTION}


@torch.no_grad()
def embed(clip: nn.Module, state: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """transformers' own: another module, loaded strictly."""
    other = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)).eval()
    other.load_state_dict(state, strict=True)
    result: Tensor = other(pixel_values=images).image_embeds
    return result


@pytest.mark.parametrize("layout", ["2024", "bare", "whole"])
def test_features_are_the_image_embeddings_of_transformers(
    layout: str, clip: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    base = clip.state_dict()
    torch.manual_seed(3)
    trained = {**perturb(base), PROJECTION: base[PROJECTION]}
    if layout == "bare":  # what transformers 5 saves of a CLIPVisionModel
        given = {n.removeprefix("vision_model."): v for n, v in without_projection(trained).items()}
    else:
        given = trained if layout == "whole" else without_projection(trained)
    suite = suite_of(tmp_path / "suite", CLIP, given, base)
    network, expert = suite_network(suite), suite.expert("one")
    given = {name: expert.tensor(name) for name in expert}  # under the base's names
    torch.testing.assert_close(
        network.features(given, images), embed(clip, trained, images), rtol=1e-5, atol=1e-6
    )
    # The parameters are called as in the checkpoint, so that what is learnt is called so too.
    assert set(given) <= set(network.module.state_dict())


def test_an_experts_own_projection_comes_before_the_bases(
    clip: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    trained = perturb(clip.state_dict())
    network = suite_network(suite_of(tmp_path / "suite", CLIP, trained, clip.state_dict()))
    torch.testing.assert_close(
        network.features(trained, images), embed(clip, trained, images), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(SuiteError, match=f"lack '{PROJECTION}'"):
        network.features(without_projection(trained), images)


def test_without_any_projection_the_base_is_asked_for(clip: nn.Module, tmp_path: Path) -> None:
    given = without_projection(clip.state_dict())
    for place, base in (("none", None), ("same", given)):
        suite = suite_of(tmp_path / place, CLIP, given, base)
        with pytest.raises(SuiteError, match=r"without 'visual_projection.weight'.*as the suite's"):
            suite_network(suite)
    wide = {**clip.state_dict(), PROJECTION: torch.zeros(PROJECTED + 1, VISION["hidden_size"])}
    suite = suite_of(tmp_path / "wide", CLIP, given, wide)
    with pytest.raises(SuiteError, match="Correct its args"):
        suite_network(suite)


@pytest.mark.parametrize("prefix", ["", "visual.", "model.visual."])
def test_features_are_the_encoded_images_of_open_clip(
    prefix: str, tower: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    whole = tower.state_dict()
    if prefix:  # the text half lies beside it, with names that end alike
        given = {f"{prefix.removesuffix('visual.')}{name}": value for name, value in whole.items()}
    else:
        given = {
            name.removeprefix("visual."): value
            for name, value in whole.items()
            if name.startswith("visual.")
        }
    network = suite_network(suite_of(tmp_path / "suite", TOWER, given))
    with torch.no_grad():
        expected = tower.encode_image(images)
    torch.testing.assert_close(network.features(given, images), expected, rtol=1e-5, atol=1e-6)
    assert set(network.module.state_dict()) <= set(given)


def test_activations_of_openai_are_not_those_of_gelu(
    tower: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    given = tower.state_dict()
    features = []
    for name in ("ViT-B-32", "ViT-B-32-quickgelu"):
        suite = suite_of(tmp_path / name, {**TOWER, "name": name}, given)
        features.append(suite_network(suite).features(given, images))
    assert not torch.allclose(*features, atol=1e-3)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({**CLIP, "name": "t6"}, "no encoder of type 't6'"),
        ({**CLIP, "args": {"hiden_size": 32}}, "no 'hiden_size'"),
        ({**CLIP, "args": {**VISION, "num_attention_heads": 5}}, "cannot build.*Correct the args"),
        ({**TOWER, "name": "ViT-B-3"}, "knows no architecture 'ViT-B-3'. Similar: ViT-B"),
        ({**TOWER, "args": {"vision_cfg": {"layer": 3}}}, "cannot build.*Correct the args"),
        (
            {**TOWER, "args": {"vision_cfg": {"timm_model_pretrained": True}}},
            "'timm_model_pretrained' would have open_clip fetch",
        ),
    ],
)
def test_what_cannot_be_built_is_one_clear_sentence(
    architecture: Mapping[str, Any], message: str, clip: nn.Module, tmp_path: Path
) -> None:
    suite = suite_of(tmp_path / "suite", architecture, clip.state_dict())
    with pytest.raises(SuiteError, match=message):
        suite_network(suite)


@pytest.mark.parametrize(
    ("architecture", "command"), [(CLIP, "mergescope[text]"), (TOWER, "mergescope[clip]")]
)
def test_a_library_that_is_not_installed_is_named(
    architecture: Mapping[str, Any],
    command: str,
    clip: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    suite = suite_of(tmp_path / "suite", architecture, clip.state_dict())
    monkeypatch.setitem(sys.modules, str(architecture["library"]), None)
    with pytest.raises(SuiteError, match=command.replace("[", r"\[")):
        suite_network(suite)


def test_weights_of_another_size_are_refused(
    clip: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    given = dict(clip.state_dict())
    network = suite_network(suite_of(tmp_path / "suite", CLIP, given))
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    given[name] = given[name][:, :-1]
    with pytest.raises(SuiteError, match=r"mlp\.fc1\.weight' has shape"):
        network.features(given, images)


def test_a_pool_takes_networks_of_timm_only() -> None:
    with pytest.raises(PoolError, match="a pool are timm's, not those of open_clip"):
        build_network(ArchitectureSpec(**TOWER), Path("pool.yaml"), PoolError)


def test_timms_own_results_are_still_known_by_name_and_arguments() -> None:
    # Predictions that were kept before there were other libraries.
    spec = ArchitectureSpec(name="vit", args={"depth": 1})
    assert spec.identity == '{"name":"vit","args":{"depth":1}}'
    others = {ArchitectureSpec(name="vit", library=name).identity for name in ("open_clip", "timm")}
    assert len(others) == 2


def test_the_prefix_is_that_under_which_most_is_found() -> None:
    expected = {"a.w": (2, 3), "a.b": (2,), "c.w": (4, 2)}

    def under(start: str) -> dict[str, tuple[int, ...]]:
        return {f"{start}{name}": shape for name, shape in expected.items()}

    assert common_prefix(expected, expected) == ""
    assert common_prefix(expected, {**under("m."), "n.a.w": (2, 3)}) == "m."
    assert common_prefix(expected, {**under("n.m."), "n.a.w": (2, 3)}) == "n.m."
    assert common_prefix(expected, {"x": (1,), "ma.w": (2, 3)}) == ""
    # Of a second tower with the same names it is the one whose shapes are these.
    other = {f"text.{name}": (9, *shape[1:]) for name, shape in expected.items()}
    assert common_prefix(expected, {**other, "text.d.w": (1,), **under("vision.")}) == "vision."


def test_wrapped_checkpoints_of_timm_are_run_too(tmp_path: Path) -> None:
    from tests.evaluable import copy_evaluable, state_of

    suite = copy_evaluable(tmp_path / "suite")
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    plain = state_of(suite, "digits")
    expected = suite_network(suite).features(plain, images)
    wrapped = {f"encoder.{name}": value for name, value in plain.items()}
    save_file(wrapped, suite.root / "experts/digits.safetensors")
    again = edit_document(suite.root, base=None)
    torch.testing.assert_close(suite_network(again).features(wrapped, images), expected)

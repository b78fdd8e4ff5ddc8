"""The network gives what timm gives, and refuses what does not fit it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from analysis.networks.stateless import StatelessNetwork
from analysis.networks.towers import suite_network
from merge_core.errors import SuiteError
from merge_core.suites.suite import Suite
from tests.evaluable import ARCHITECTURE, SIZE, copy_evaluable, edit_document, state_of, timm_model


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return copy_evaluable(tmp_path / "suite")


def images(count: int = 7, size: int = SIZE) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def with_args(suite: Suite, **args: Any) -> StatelessNetwork:
    architecture = {**ARCHITECTURE, "args": {**ARCHITECTURE["args"], **args}}
    return suite_network(edit_document(suite.root, architecture=architecture))


def test_features_are_those_of_timm_with_the_weights_loaded(suite: Suite) -> None:
    for task in (*suite.tasks, None):
        state = state_of(suite, task)
        model = timm_model()
        model.load_state_dict(state)
        with torch.no_grad():
            expected = model(images())
        torch.testing.assert_close(
            suite_network(suite).features(state, images()), expected, rtol=0, atol=1e-6
        )


def test_each_call_uses_the_weights_given_with_it(suite: Suite) -> None:
    network = suite_network(suite)
    first = network.features(state_of(suite, "digits"), images())
    other = network.features(state_of(suite, "shapes"), images())
    assert not torch.allclose(first, other, atol=0.1)
    torch.testing.assert_close(network.features(state_of(suite, "digits"), images()), first)


def test_batch_norm_and_dropout_are_in_evaluation_mode(suite: Suite) -> None:
    args = {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 8], "stem_width": 4, "drop_rate": 0.9}
    net = timm.create_model("resnet18", num_classes=0, **args).eval()
    source = torch.Generator().manual_seed(2)
    state = {}
    for name, value in net.state_dict().items():
        state[name] = value + torch.rand(value.shape, generator=source) * value.is_floating_point()
    net.load_state_dict(state)
    with torch.no_grad():
        expected = net(images(5, 32))
    changed = edit_document(suite.root, architecture={"name": "resnet18", "args": args})
    network = suite_network(changed)
    before = {name: value.clone() for name, value in state.items()}
    got = network.features(state, images(5, 32))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(network.features(state, images(5, 32)), got)  # nothing random
    alone = network.features(state, images(5, 32)[:1])  # batch statistics would differ
    torch.testing.assert_close(alone, got[:1], rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before[name], state[name]) for name in state)  # no running update
    net.train()
    with torch.no_grad():  # the check above can fail: training mode gives something else
        assert not torch.allclose(net(images(5, 32)), expected, atol=1e-2)


@pytest.mark.parametrize("batch", [1, 3, 7, 100])
def test_batches_do_not_matter(suite: Suite, batch: int) -> None:
    network, state = suite_network(suite), state_of(suite, "lines")
    whole = network.features(state, images())
    assert whole.shape == (7, 16)
    torch.testing.assert_close(
        network.features(state, images(), batch=batch), whole, rtol=1e-5, atol=1e-5
    )


def test_half_precision_weights_run_in_single(suite: Suite) -> None:
    half = {name: value.half() for name, value in state_of(suite, "digits").items()}
    model = timm_model()
    model.load_state_dict({name: value.float() for name, value in half.items()})
    got = suite_network(suite).features(half, images())
    assert got.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(got, model(images()), rtol=0, atol=1e-6)


def test_further_tensors_are_ignored(suite: Suite) -> None:
    state = state_of(suite, "digits")
    expected = suite_network(suite).features(state, images())
    extra = {**state, "head.weight": torch.ones(3, 16), "steps": torch.tensor(3)}
    torch.testing.assert_close(suite_network(suite).features(extra, images()), expected)


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ({"pretrained": True}, "'pretrained'"),
        ({"pretrained_cfg": {"file": "x"}}, "'pretrained_cfg'"),
        ({"checkpoint_path": "/etc/passwd"}, "'checkpoint_path'"),
        ({"cache_dir": "/tmp"}, "'cache_dir'"),
    ],
)
def test_arguments_that_fetch_files_are_refused(
    suite: Suite, args: dict[str, Any], word: str
) -> None:
    with pytest.raises(SuiteError, match=rf"{word} would fetch files.*plain timm name"):
        with_args(suite, **args)


@pytest.mark.parametrize("name", ["hf-hub:someone/model", "local-dir:/tmp/x"])
def test_names_that_fetch_files_are_refused(suite: Suite, name: str) -> None:
    changed = edit_document(suite.root, architecture={"name": name})
    with pytest.raises(SuiteError, match="would fetch files"):
        suite_network(changed)


def test_an_unknown_name_suggests_similar_ones(suite: Suite) -> None:
    changed = edit_document(suite.root, architecture={"name": "resnet_18"})
    with pytest.raises(SuiteError, match=r"suite\.yaml: .*no architecture 'resnet_18'.*Similar: "):
        suite_network(changed)


@pytest.mark.parametrize(
    "args",
    [
        {"no_such_argument": 1},
        {"img_size": "abc"},
        {"img_size": [SIZE]},
        {"patch_size": 0},
        {"embed_dim": 15},
        {"num_heads": 0},
        {"norm_layer": "nope"},
        {"global_pool": "nope"},
        {"num_classes": 4},
        {"drop_rate": 3},
    ],
)
def test_arguments_that_timm_cannot_use(suite: Suite, args: dict[str, Any]) -> None:
    with pytest.raises(SuiteError, match=r"suite\.yaml: timm cannot build 'vit_tiny") as caught:
        with_args(suite, **args)
    assert next(iter(args)) in str(caught.value)


def test_unpooled_features_are_refused(suite: Suite) -> None:
    network = with_args(suite, global_pool="", class_token=True)
    state = {name: value.clone() for name, value in network.module.state_dict().items()}
    with pytest.raises(SuiteError, match=r"shape \(5, 16\) per image.*global_pool"):
        network.features(state, images())


def test_no_architecture(suite: Suite) -> None:
    with pytest.raises(SuiteError, match=r"names no architecture.*Add 'architecture:"):
        suite_network(edit_document(suite.root, architecture=None))


def test_a_missing_parameter_is_named(suite: Suite) -> None:
    state = state_of(suite, "digits")
    del state["norm.weight"], state["norm.bias"]
    with pytest.raises(SuiteError, match=r"lack 'norm.weight'.*2 of \d+ are missing.*suite\.yaml"):
        suite_network(suite).features(state, images())


def test_a_wrong_shape_is_named(suite: Suite) -> None:
    state = {**state_of(suite, "digits"), "norm.weight": torch.ones(5)}
    with pytest.raises(SuiteError, match=r"'norm.weight' has shape \(5,\).* needs \(16,\)"):
        suite_network(suite).features(state, images())


def test_a_wrong_image_size_is_named(suite: Suite) -> None:
    with pytest.raises(SuiteError, match=r"images of shape \(3, 24, 24\) do not fit"):
        suite_network(suite).features(state_of(suite, "digits"), images(2, 24))

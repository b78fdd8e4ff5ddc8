"""Outputs of members and merges: right, in evaluation mode, and computed once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from analysis.networks.pool_network import pool_network
from analysis.outputs.pool_outputs import PoolEvaluator
from merge_core.errors import PoolError
from merge_core.suites.pool import load_pool
from tests.pools import ARCHITECTURES, CLASSES, IMAGES, SIZE, write_pool


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_are_the_loaded_networks(tmp_path: Path, name: str) -> None:
    """Against load_state_dict and a forward pass of the module as it is."""
    pool = write_pool(tmp_path / name, name, channels=3)
    evaluator = PoolEvaluator(pool)
    outputs = evaluator.member(1, "test")
    module = pool_network(pool).module
    module.load_state_dict(load_file(pool.root / "1.safetensors"))
    with np.load(pool.root / "inputs.npz") as archive:
        raw = archive["test_images"].astype(np.float64) / 255
    images = torch.tensor(((raw - 0.5) / 0.25).transpose(0, 3, 1, 2))
    with torch.no_grad():
        wanted = module.double()(images)
    assert outputs.logits.shape == (IMAGES["test"], CLASSES)
    torch.testing.assert_close(outputs.logits.double(), wanted, rtol=1e-4, atol=1e-5)
    weight, bias = evaluator.network.head(evaluator.weights(1))
    torch.testing.assert_close(
        outputs.features @ weight.T + bias, outputs.logits, rtol=0, atol=1e-5
    )


def test_dropout_and_batch_statistics_have_no_part(tmp_path: Path) -> None:
    args = {**ARCHITECTURES["resnet"]["args"], "drop_rate": 0.5}
    pool = write_pool(tmp_path / "p", {"name": "resnet18", "args": args})
    evaluator = PoolEvaluator(pool)
    whole = evaluator.run(evaluator.weights(0), "test").logits
    images = evaluator.images("test")
    one_by_one = [
        evaluator.network.outputs(evaluator.weights(0), image[None]).logits for image in images
    ]
    torch.testing.assert_close(whole, torch.cat(one_by_one), rtol=1e-4, atol=1e-5)


def test_float64_where_float32_overflows(tmp_path: Path) -> None:
    evaluator = PoolEvaluator(write_pool(tmp_path / "p", "mlp"))
    huge = {name: value * 2.0**50 for name, value in evaluator.weights(0).items()}
    assert not torch.isfinite(evaluator.run(huge, "test").logits).all()
    exact = evaluator.run(huge, "test", torch.float64).logits
    assert torch.isfinite(exact).all()
    plain = evaluator.run(evaluator.weights(0), "test", torch.float64).logits
    torch.testing.assert_close(exact / 2.0**150, plain, rtol=1e-12, atol=0)


def test_members_are_computed_once_ever(tmp_path: Path, fresh_cache: Path) -> None:
    pool = write_pool(tmp_path / "p", "vgg")
    evaluator = PoolEvaluator(pool)
    first = evaluator.member(0, "test")
    assert evaluator.forward_images == IMAGES["test"]
    assert evaluator.member(0, "test") is first
    again = PoolEvaluator(load_pool(pool.root))
    assert torch.equal(again.member(0, "test").logits, first.logits)
    assert torch.equal(again.member(0, "test").features, first.features)
    assert again.forward_images == 0
    again.member(0, "val")
    assert again.forward_images == IMAGES["val"]
    # Another content under the same name is another model.
    state = load_file(pool.root / "0.safetensors")
    save_file({name: 2 * value for name, value in state.items()}, pool.root / "0.safetensors")
    changed = PoolEvaluator(load_pool(pool.root))
    assert not torch.equal(changed.member(0, "test").logits, first.logits)


def test_a_damaged_or_unwritable_store_costs_time_only(tmp_path: Path, fresh_cache: Path) -> None:
    pool = write_pool(tmp_path / "p", "mlp")
    first = PoolEvaluator(pool).member(0, "test")
    files = list((fresh_cache / "outputs").iterdir())
    assert len(files) == 1
    files[0].write_bytes(b"PK\x03\x04 not an archive")
    again = PoolEvaluator(pool)
    assert torch.equal(again.member(0, "test").logits, first.logits)
    assert again.forward_images == IMAGES["test"]
    with np.load(files[0]) as archive:  # repaired
        assert np.array_equal(archive["logits"], first.logits.numpy())
    files[0].unlink()
    (fresh_cache / "outputs").rmdir()
    (fresh_cache / "outputs").write_text("a file in the way")
    assert torch.equal(PoolEvaluator(pool).member(0, "test").logits, first.logits)


def test_merges_are_known_by_key_and_split(tmp_path: Path) -> None:
    evaluator = PoolEvaluator(write_pool(tmp_path / "p", "mlp"))
    calls = []

    def weights() -> dict[str, torch.Tensor]:
        calls.append(1)
        return evaluator.weights(0)

    merged = evaluator.merge("a", weights, "test")
    assert evaluator.merge("a", weights, "test") is merged
    assert len(calls) == 1
    assert len(evaluator.merge("a", weights, "val").logits) == IMAGES["val"]
    evaluator.merge("b", weights, "test")
    assert len(calls) == 3


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "p", "mlp")
    evaluator = PoolEvaluator(pool)
    weights = evaluator.weights(0)
    with pytest.raises(PoolError, match=r"lack 'head\.weight'.*pool\.yaml"):
        evaluator.run({k: v for k, v in weights.items() if k != "head.weight"}, "test")
    with pytest.raises(PoolError, match=r"'head\.weight' has shape \(4, 9\)"):
        evaluator.run({**weights, "head.weight": torch.zeros(4, 9)}, "test")
    with pytest.raises(PoolError, match="do not fit the architecture"):
        evaluator.network.outputs(weights, torch.zeros(2, 1, SIZE + 1, SIZE + 1))
    with np.load(pool.root / "inputs.npz") as archive:
        arrays = dict(archive)
    np.savez(pool.root / "inputs.npz", **{**arrays, "test_labels": arrays["test_labels"] + 3})  # type: ignore[arg-type]
    with pytest.raises(PoolError, match="know 4 classes, but the data hold labels up to 6"):
        PoolEvaluator(load_pool(pool.root)).member(0, "test")
    np.savez(pool.root / "inputs.npz", **{**arrays, "val_images": arrays["val_images"][..., :0]})  # type: ignore[arg-type]
    with pytest.raises(
        PoolError, match=r"val_images must be uint8 of shape N x height x width x 1"
    ):
        PoolEvaluator(load_pool(pool.root)).member(0, "val")


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("no_such_net", {}, "timm knows no architecture"),
        ("mlp", {"img_size": 12, "wheels": 4}, "MergeScope cannot build 'mlp'"),
        ("resnet18", {"pretrained": True}, "would fetch files"),
        ("mlp", {"in_chans": 1, "img_size": 12}, "does not end in one linear layer"),
    ],
)
def test_architectures_that_cannot_be_run(
    tmp_path: Path, name: str, args: dict[str, object], message: str
) -> None:
    pool = write_pool(tmp_path / "p", "mlp")
    spec = pool.spec.model_copy(
        update={
            "architecture": pool.spec.architecture.model_copy(update={"name": name, "args": args})
        }
    )
    pool.spec = spec
    with pytest.raises(PoolError, match=message):
        _ = pool_network(pool).module

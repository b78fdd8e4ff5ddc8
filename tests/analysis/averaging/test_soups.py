"""Soups against float64 means, torch's own update of BatchNorm, and a written-out greedy loop."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.swa_utils import update_bn

from analysis.averaging.soups import (
    UNDECIDED,
    RunningMean,
    accuracy_of,
    greedy_soup,
    has_batchnorm,
    mean_norms,
    predict_classes,
    rank_by_validation,
    reestimate_batchnorm,
    restore_norms,
    soup_outputs,
    soup_weights,
    uniform_soup,
)
from analysis.networks.pool_network import pool_network
from analysis.outputs.pool_outputs import PoolEvaluator
from merge_core.errors import Cancelled, PoolError
from merge_core.progress import Progress
from tests.pools import ARCHITECTURES, CLASSES, IMAGES, write_pool

MEMBERS = (0, 1, 2)
RESNET = ARCHITECTURES["resnet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("soups")


@pytest.fixture(scope="module")
def resnet(folder: Path) -> PoolEvaluator:
    def count(number, state):
        return {
            name: value if value.is_floating_point() else value + 100 + number
            for name, value in state.items()
        }

    return PoolEvaluator(write_pool(folder / "resnet", "resnet", change=count))


@pytest.fixture(scope="module")
def mlp(folder: Path) -> PoolEvaluator:
    return PoolEvaluator(write_pool(folder / "mlp", "mlp", members=5))


def test_a_uniform_soup_is_the_float64_mean(resnet: PoolEvaluator) -> None:
    soup = uniform_soup(resnet, MEMBERS)
    states = [resnet.weights(i) for i in MEMBERS]
    assert soup.keys() == states[0].keys()
    for name, value in soup.items():
        if value.is_floating_point():
            mean = np.mean([state[name].numpy().astype(np.float64) for state in states], axis=0)
            assert value.dtype == torch.float32
            assert np.allclose(value.numpy(), mean, rtol=1e-7, atol=0)
        else:
            assert torch.equal(value, states[0][name])
    counters = [name for name in soup if name.endswith("num_batches_tracked")]
    assert counters
    assert int(uniform_soup(resnet, (1, 0))[counters[0]]) == 101


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12))
def test_a_running_mean_is_the_mean(values: list[float]) -> None:
    mean = RunningMean()
    for value in values:
        mean.add({"w": torch.tensor([value], dtype=torch.float64)}, "it")
    expected = np.mean(np.array(values))
    assert float(mean.weights()["w"]) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert mean.weights()["w"].dtype == torch.float32


def test_a_running_mean_does_not_lose_small_differences() -> None:
    mean = RunningMean()
    for i in range(2000):
        mean.add({"w": torch.tensor([1.0 + 1e-4 * (i % 2)])}, "it")
    assert float(mean.weights()["w"]) == pytest.approx(1.00005, abs=1e-7)


def test_a_running_mean_leaves_its_inputs_alone() -> None:
    first = {"w": torch.ones(2, dtype=torch.float64)}
    mean = RunningMean()
    mean.add(first, "first")
    mean.add({"w": torch.zeros(2)}, "second")
    assert torch.equal(first["w"], torch.ones(2, dtype=torch.float64))


def test_members_that_do_not_match_cannot_be_averaged() -> None:
    mean = RunningMean()
    mean.add({"w": torch.ones(2)}, "member 0")
    with pytest.raises(PoolError, match="'v' is not in all members"):
        mean.add({"w": torch.ones(2), "v": torch.ones(1)}, "member 1")
    with pytest.raises(PoolError, match=r"'w' of member 1 has shape \(3,\)"):
        mean.add({"w": torch.ones(3)}, "member 1")


@pytest.mark.parametrize(
    ("family", "expected"),
    [("linear", False), ("mlp", False), ("vgg", False), ("resnet", True), ("vit", False)],
)
def test_which_architectures_have_batchnorm(tmp_path: Path, family: str, expected: bool) -> None:
    assert has_batchnorm(PoolEvaluator(write_pool(tmp_path / "p", family, 1))) == expected


def test_statistics_are_those_of_torchs_own_update(resnet: PoolEvaluator) -> None:
    soup = uniform_soup(resnet, MEMBERS)
    mine = reestimate_batchnorm(resnet, soup)
    reference = pool_network(resnet.pool).module
    reference.load_state_dict(soup)
    update_bn([resnet.images("train")], reference)
    theirs = reference.state_dict()
    changed = [name for name in soup if not torch.equal(mine[name], soup[name])]
    assert changed
    assert all(name.rpartition(".")[2].startswith(("running", "num_batches")) for name in changed)
    for name in changed:
        assert torch.allclose(mine[name], theirs[name], rtol=1e-5, atol=1e-6), name


def test_first_statistics_are_unbiased_moments_of_the_first_convolution(
    resnet: PoolEvaluator,
) -> None:
    soup = uniform_soup(resnet, MEMBERS)
    maps = torch.nn.functional.conv2d(
        resnet.images("train").double(), soup["conv1.weight"].double(), stride=2, padding=3
    )
    values = maps.transpose(0, 1).flatten(1).numpy()
    mine = reestimate_batchnorm(resnet, soup)
    assert mine["bn1.running_mean"].numpy() == pytest.approx(values.mean(axis=1), abs=1e-5)
    assert mine["bn1.running_var"].numpy() == pytest.approx(values.var(axis=1, ddof=1), rel=1e-4)


def test_batches_weigh_alike(resnet: PoolEvaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.averaging.soups.BATCH", 20)
    soup = uniform_soup(resnet, MEMBERS)
    reference = pool_network(resnet.pool).module
    reference.load_state_dict(soup)
    update_bn(list(resnet.images("train").split(20)), reference)
    mine, theirs = reestimate_batchnorm(resnet, soup), reference.state_dict()
    assert torch.allclose(mine["bn1.running_var"], theirs["bn1.running_var"], rtol=1e-5)
    assert int(mine["bn1.num_batches_tracked"]) == 2


def test_re_estimation_leaves_the_evaluator_as_it_was(resnet: PoolEvaluator) -> None:
    module = resnet.network.module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    outputs = resnet.run(resnet.weights(0), "val").logits
    reestimate_batchnorm(resnet, uniform_soup(resnet, MEMBERS))
    assert not any(layer.training for layer in module.modules())
    assert module.bn1.momentum == 0.1
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(resnet.run(resnet.weights(0), "val").logits, outputs)


def test_only_batchnorm_runs_in_training_mode(folder: Path, resnet: PoolEvaluator) -> None:
    # Stochastic depth in training mode would drop nearly every block at random.
    dropping = {**RESNET, "args": {**RESNET["args"], "drop_path_rate": 0.95}}
    evaluator = PoolEvaluator(write_pool(folder / "dropping", dropping))
    soup = uniform_soup(resnet, MEMBERS)
    torch.manual_seed(0)
    mine, expected = reestimate_batchnorm(evaluator, soup), reestimate_batchnorm(resnet, soup)
    assert all(torch.equal(mine[name], expected[name]) for name in soup)


def test_re_estimation_without_batchnorm_changes_nothing(mlp: PoolEvaluator) -> None:
    soup = uniform_soup(mlp, MEMBERS)
    again = reestimate_batchnorm(mlp, soup)
    assert again is not soup
    assert all(torch.equal(again[name], soup[name]) for name in soup)


def test_one_training_image_is_refused(folder: Path) -> None:
    pool = write_pool(folder / "one", "resnet", 2)
    with np.load(pool.root / "inputs.npz") as archive:
        arrays = dict(archive)
    arrays["train_images"], arrays["train_labels"] = (
        arrays[f"train_{kind}"][:1] for kind in ("images", "labels")
    )
    np.savez(pool.root / "inputs.npz", **arrays)
    evaluator = PoolEvaluator(pool)
    with pytest.raises(PoolError, match="at least two training images"):
        soup_outputs(evaluator, (0, 1), "val", "reestimate")


def test_soup_outputs_are_those_of_its_weights(resnet: PoolEvaluator) -> None:
    for statistics in ("average", "reestimate"):
        weights = soup_weights(resnet, MEMBERS, statistics)
        expected = resnet.run(weights, "test").logits
        assert torch.equal(soup_outputs(resnet, MEMBERS, "test", statistics).logits, expected)
    averaged = soup_outputs(resnet, MEMBERS, "test").logits
    assert not torch.allclose(averaged, expected)


def test_a_set_of_members_is_run_once(resnet: PoolEvaluator, mlp: PoolEvaluator) -> None:
    soup_outputs(resnet, (0, 2), "val")
    soup_outputs(mlp, (0, 2), "val")
    runs = resnet.forward_images, mlp.forward_images
    assert soup_outputs(resnet, (2, 0), "val") is soup_outputs(resnet, (0, 2), "val")
    soup_outputs(mlp, (2, 0), "val", "reestimate")  # the same, as there is no BatchNorm
    assert (resnet.forward_images, mlp.forward_images) == runs
    soup_outputs(resnet, (0, 1), "val")
    soup_outputs(resnet, (0, 2), "test")
    assert resnet.forward_images == runs[0] + IMAGES["val"] + IMAGES["test"]


def test_the_soup_of_one_member_is_that_member(resnet: PoolEvaluator) -> None:
    for statistics in ("average", "reestimate"):
        assert soup_outputs(resnet, (1,), "test", statistics) is resnet.member(1, "test")


def test_images_without_finite_logits_are_not_predicted(mlp: PoolEvaluator) -> None:
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[0.0, 2.0, 1.0], [inf, 0.0, 0.0], [0.0, nan, 0.0], [0.0, 0.0, -inf]])
    assert predict_classes(logits).tolist() == [1, UNDECIDED, UNDECIDED, UNDECIDED]
    labels = torch.from_numpy(mlp.labels("val"))
    perfect = torch.nn.functional.one_hot(labels, CLASSES).float()
    assert accuracy_of(mlp, perfect, "val") == 1.0
    perfect[:3, 0] = nan
    assert accuracy_of(mlp, perfect, "val") == pytest.approx(1 - 3 / IMAGES["val"])


def reference_greedy(evaluator: PoolEvaluator) -> tuple[list[int], list[float]]:
    """Recipe 1 of model soups, written out over full averages on fresh networks."""
    network = pool_network(evaluator.pool).module
    labels = evaluator.labels("val")

    def accuracy(members: list[int]) -> float:
        states = [evaluator.weights(m) for m in members]
        network.load_state_dict(
            {name: torch.stack([s[name] for s in states]).mean(dim=0) for name in states[0]}
        )
        return float(np.mean(network(evaluator.images("val")).argmax(1).numpy() == labels))

    alone = {m: accuracy([m]) for m in range(len(evaluator.pool))}
    order = sorted(alone, key=lambda m: -alone[m])  # stable: ties by number
    kept, seen = [order[0]], [alone[order[0]]]
    for member in order[1:]:
        seen.append(accuracy([*kept, member]))
        if seen[-1] >= accuracy(kept):
            kept.append(member)
    return kept, seen


@pytest.mark.parametrize("spread", [None, 0.6])
def test_greedy_soup_is_recipe_1(tmp_path: Path, spread: float | None) -> None:
    joined = []
    for seed in range(4):
        pool = write_pool(tmp_path / str(seed), "mlp", 6, seed=seed, spread=spread)
        evaluator = PoolEvaluator(pool)
        kept, trace = greedy_soup(evaluator, range(6))
        expected, accuracies = reference_greedy(evaluator)
        assert list(kept) == expected
        assert list(trace) == ["step", "member", "member_accuracy", "accuracy", "kept"]
        assert trace["accuracy"].to_numpy() == pytest.approx(accuracies)
        assert trace.loc[trace["kept"], "member"].tolist() == list(kept)
        assert trace["step"].tolist() == [1, 2, 3, 4, 5, 6]
        assert (np.diff(trace["member_accuracy"]) <= 0).all()
        joined.append(len(kept))
    assert min(joined) < 6
    assert max(joined) > 1


def test_equal_members_all_join_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "equal", "mlp", 4, spread=0.0)
    assert greedy_soup(PoolEvaluator(pool), (3, 1, 0, 2))[0] == (0, 1, 2, 3)


def test_greedy_soup_never_looks_at_test(
    mlp: PoolEvaluator, resnet: PoolEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = PoolEvaluator.inputs

    def guarded(self, split):
        assert split != "test"
        return original(self, split)

    monkeypatch.setattr(PoolEvaluator, "inputs", guarded)
    for held in (mlp, resnet):
        fresh = PoolEvaluator(held.pool)
        kept, _ = greedy_soup(fresh, MEMBERS, "reestimate")
        assert not any(split == "test" for _, split in fresh._members)
        assert rank_by_validation(fresh, MEMBERS)[0][0] == kept[0]


def test_greedy_soup_reports_progress_and_can_be_cancelled(mlp: PoolEvaluator) -> None:
    seen: list[tuple[int, int, str]] = []
    greedy_soup(mlp, MEMBERS, progress=Progress(lambda *step: seen.append(step)))
    assert [(done, total) for done, total, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        greedy_soup(mlp, MEMBERS, progress=Progress(cancel=cancel))


def test_a_restored_soup_has_the_members_norms(resnet: PoolEvaluator) -> None:
    soup = uniform_soup(resnet, MEMBERS)
    restored = restore_norms(soup, mean_norms(resnet, MEMBERS))
    states = [resnet.weights(i) for i in MEMBERS]
    parameters = {name for name, _ in resnet.network.module.named_parameters()}
    assert restored.keys() == soup.keys()
    for name, value in restored.items():
        if name not in parameters:
            assert torch.equal(value, soup[name])
            continue
        wanted = np.mean([np.linalg.norm(s[name].numpy().astype(float)) for s in states])
        assert float(value.double().norm()) == pytest.approx(wanted, rel=1e-5)
        cosine = torch.nn.functional.cosine_similarity(value.flatten(), soup[name].flatten(), 0)
        assert float(cosine) == pytest.approx(1, abs=1e-5)
        assert value.dtype == torch.float32


def test_a_tensor_of_zeros_stays(mlp: PoolEvaluator) -> None:
    assert torch.equal(restore_norms({"w": torch.zeros(3)}, {"w": 2.0})["w"], torch.zeros(3))

"""Templates against loops over images, a classifier trained to convergence, and identities."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.optimize import minimize
from torch import Tensor

from analysis.outputs.pool_outputs import PoolEvaluator
from analysis.patterns.blending import blend, blend_response, model_response
from analysis.patterns.templates import (
    centre_templates,
    class_means,
    cosine_frame,
    decay_frame,
    diagonal_dominance,
    pool_templates,
    roughness,
    stationary_templates,
    templates,
    training_frame,
)
from merge_core.errors import Cancelled, PoolError
from merge_core.progress import Progress
from merge_core.suites.pool import load_pool
from merge_core.yaml_text import dump_yaml
from tests.pools import CLASSES, SIZE, write_pool

SEEDS = st.integers(0, 10**6)
DECAYS = (0.0, 0.1, 0.1)
# Unequal shares of the classes, so that weighing them matters.
LABELS = np.array([0] * 16 + [1] * 12 + [2] * 8 + [3] * 4)


def unbalance(folder: Path) -> None:
    with np.load(folder / "inputs.npz") as archive:
        arrays = dict(archive)
    arrays["train_labels"] = LABELS
    # Images that differ by class, so that there is something to see.
    bright = 20 * LABELS[:, None, None, None].astype(np.uint8)
    arrays["train_images"] = arrays["train_images"] // 2 + bright
    np.savez(folder / "inputs.npz", **arrays)


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory: pytest.TempPathFactory) -> PoolEvaluator:
    folder = tmp_path_factory.mktemp("linear") / "pool"
    fields = [{"weight_decay": d, "epochs": 3.0} for d in DECAYS]
    pool = write_pool(folder, "linear", 3, channels=3, fields=fields)
    unbalance(folder)
    document = yaml.safe_load((folder / "pool.yaml").read_text(encoding="utf-8"))
    document["members"][1]["trajectory"] = [
        {"epoch": 0, "weights": "2.safetensors"},
        {"epoch": 3, "weights": "1.safetensors"},
    ]
    (folder / "pool.yaml").write_text(dump_yaml(document), encoding="utf-8")
    return PoolEvaluator(load_pool(pool.path))


def pixels(evaluator: PoolEvaluator, split: str) -> np.ndarray:
    """N x H x W x C, straight from the file."""
    with np.load(evaluator.pool.file("inputs.npz")) as archive:
        return (archive[f"{split}_images"] / 255.0 - 0.5) / 0.25


def naive_logits(evaluator: PoolEvaluator, weights: dict[str, Tensor], split: str) -> np.ndarray:
    x = pixels(evaluator, split).transpose(0, 3, 1, 2).reshape(len(pixels(evaluator, split)), -1)
    return x @ weights["head.weight"].double().numpy().T + weights["head.bias"].double().numpy()


def probabilities(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def test_templates_lie_on_the_pixels_they_weigh(evaluator: PoolEvaluator) -> None:
    weights = evaluator.weights(0)
    W = pool_templates(evaluator, weights)
    assert W.shape == (CLASSES, SIZE, SIZE, 3)
    # Product with an image of H x W x C gives the network's own logit.
    products = np.einsum("nhwc,khwc->nk", pixels(evaluator, "test"), W)
    logits = evaluator.run(weights, "test").logits - weights["head.bias"]
    assert products == pytest.approx(logits.numpy(), abs=1e-4)


@pytest.mark.parametrize(
    "weights", [{}, {"head.weight": torch.zeros(4, 11)}, {"head.weight": torch.zeros(12)}]
)
def test_other_weights_are_no_templates(weights: dict[str, Tensor]) -> None:
    with pytest.raises(PoolError, match="Choose a pool of linear classifiers"):
        templates(weights, 3, 2)


def test_deeper_networks_have_no_templates(tmp_path: Path) -> None:
    deep = PoolEvaluator(write_pool(tmp_path / "p", "mlp", 1))
    for measure in (class_means, decay_frame, lambda e: stationary_templates(e, {}, 0.1)):
        with pytest.raises(PoolError, match="have no templates"):
            measure(deep)
    for respond in (blend_response, model_response):
        with pytest.raises(PoolError, match="have no templates"):
            respond(deep, {}, {}, 0, [0.5])


def test_class_means_are_means_of_normalised_images(evaluator: PoolEvaluator) -> None:
    x, found = pixels(evaluator, "train"), class_means(evaluator)
    for c in range(CLASSES):
        assert found.means[c] == pytest.approx(x[c == LABELS].mean(axis=0), abs=1e-6)
        # About the mean of all images, not of the classes.
        assert found.centred[c] == pytest.approx(found.means[c] - x.mean(axis=0), abs=1e-6)
    assert found.overall == pytest.approx(x.mean(axis=0), abs=1e-6)
    assert found.shares.tolist() == [0.4, 0.3, 0.2, 0.1]
    assert np.einsum("k,khwc->hwc", found.shares, found.centred) == pytest.approx(
        np.zeros(found.overall.shape), abs=1e-12
    )


@pytest.mark.parametrize(("label", "message"), [(2, "lack the class 'class3'"), (9, "up to 9")])
def test_labels_that_do_not_fit_are_named(tmp_path: Path, label: int, message: str) -> None:
    pool = write_pool(tmp_path / "p", "linear", 1)
    path = tmp_path / "p" / "inputs.npz"
    with np.load(path) as archive:
        arrays = dict(archive)
    arrays["train_labels"] = np.where(arrays["train_labels"] == 3, label, arrays["train_labels"])
    np.savez(path, **arrays)
    with pytest.raises(PoolError, match=message):
        class_means(PoolEvaluator(pool))


def train(evaluator: PoolEvaluator, decay: float) -> dict[str, Tensor]:
    """Softmax regression at its minimum, by scipy; the bias is not decayed."""
    x = pixels(evaluator, "train").transpose(0, 3, 1, 2).reshape(len(LABELS), -1)
    hits = np.eye(CLASSES)[LABELS]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        W, b = flat[:-CLASSES].reshape(CLASSES, -1), flat[-CLASSES:]
        p = probabilities(x @ W.T + b)
        errors = (p - hits) / len(x)
        value = -np.log((p * hits).sum(axis=1)).mean() + decay / 2 * (W**2).sum()
        return value, np.concatenate([(errors.T @ x + decay * W).ravel(), errors.sum(axis=0)])

    start = np.zeros(CLASSES * (x.shape[1] + 1))
    options = {"maxiter": 5000, "maxfun": 10000, "ftol": 0, "gtol": 1e-10}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x
    return {
        "head.weight": torch.from_numpy(found[:-CLASSES].reshape(CLASSES, -1)),
        "head.bias": torch.from_numpy(found[-CLASSES:]),
    }


@pytest.mark.parametrize("decay", [0.05, 1.0])
def test_a_minimum_reproduces_its_own_templates(evaluator: PoolEvaluator, decay: float) -> None:
    weights = train(evaluator, decay)
    W = pool_templates(evaluator, weights)
    found = stationary_templates(evaluator, weights, decay)
    assert np.abs(W).max() > 1e-3
    assert np.abs(found - W).max() < 1e-4 * np.abs(W).max()
    # The gradient's columns sum to zero, so nothing but decay acts on the mean template.
    assert np.abs(W.mean(axis=0)).max() < 1e-7


def test_a_model_off_the_minimum_is_told_from_one_on_it(evaluator: PoolEvaluator) -> None:
    weights = evaluator.weights(1)
    x = pixels(evaluator, "train")
    p = probabilities(naive_logits(evaluator, weights, "train"))
    expected = np.zeros((CLASSES, SIZE, SIZE, 3))
    for i, c in itertools.product(range(len(x)), range(CLASSES)):
        expected[c] += (float(LABELS[i] == c) - p[i, c]) * x[i] / (0.1 * len(x))
    found = stationary_templates(evaluator, weights, 0.1)
    assert found == pytest.approx(expected, abs=1e-5)
    with pytest.raises(PoolError, match="Without weight decay"):
        stationary_templates(evaluator, weights, 0.0)


def test_under_strong_decay_templates_are_centred_means(evaluator: PoolEvaluator) -> None:
    decay = 1e4
    W = pool_templates(evaluator, train(evaluator, decay))
    means = class_means(evaluator)
    cosine = cosine_frame(W, means.centred, evaluator.class_names)["cosine"].to_numpy()
    assert np.diagonal(cosine.reshape(CLASSES, CLASSES)) == pytest.approx(np.ones(4), abs=1e-3)
    predicted = means.shares[:, None, None, None] * means.centred / decay
    assert np.linalg.norm(W - predicted) < 0.02 * np.linalg.norm(predicted)


def test_centred_templates_predict_the_same(evaluator: PoolEvaluator) -> None:
    weights = evaluator.weights(0)
    W = pool_templates(evaluator, weights)
    x, b = pixels(evaluator, "test"), weights["head.bias"].numpy()
    full, about = (np.einsum("nhwc,khwc->nk", x, t) + b for t in (W, centre_templates(W)))
    assert np.abs(full - about).max() > 0.1
    assert probabilities(full) == pytest.approx(probabilities(about), abs=1e-12)
    assert centre_templates(W).mean(axis=0) == pytest.approx(np.zeros(W.shape[1:]), abs=1e-12)


@given(SEEDS)
def test_cosines_entry_by_entry(seed: int) -> None:
    rng = np.random.default_rng(seed)
    A, B = rng.normal(size=(2, 3, 2, 4, 1))
    A[1] = 0
    frame = cosine_frame(A, B, ["x", "y", "z"])
    assert list(frame) == ["first", "second", "cosine"]
    for row in frame.itertuples():
        a, b = A["xyz".index(row.first)].ravel(), B["xyz".index(row.second)].ravel()
        length = np.linalg.norm(a) * np.linalg.norm(b)
        assert row.cosine == pytest.approx(a @ b / length if length else 0.0)


def test_dominance_by_hand() -> None:
    e = np.eye(3).reshape(3, 1, 3, 1)
    own = diagonal_dominance(cosine_frame(e, e, "abc"))
    assert own == (1.0, 0.0, 1.0)
    swapped = diagonal_dominance(cosine_frame(e, e[[1, 0, 2]], "abc"))
    assert swapped == pytest.approx((1 / 3, 2 / 6, 1 / 3))
    # Rows are templates: the first is nearest to b, the second to its own.
    lone = np.array([[0.6, 0.8], [0.0, 1.0]]).reshape(2, 1, 2, 1)
    assert diagonal_dominance(cosine_frame(lone, e[:2, :, :2], "ab")).largest == 0.5


def test_roughness_is_one_on_average_over_all_orders() -> None:
    # Geary's expectation under permutation, exactly.
    values = np.array([0.0, 1.0, 5.0, -2.0, 0.5, 0.0])
    orders = np.array(list(itertools.permutations(values))).reshape(-1, 2, 3, 1)
    assert np.mean([roughness(order[None]) for order in orders]) == pytest.approx(1.0, abs=1e-12)


def test_roughness_tells_smooth_from_chequered() -> None:
    y, x = np.mgrid[:8, :8]
    smooth, chequered = (x + y)[..., None], ((x + y) % 2)[..., None]
    assert roughness(smooth[None]) < 0.15
    # Every pair of neighbours differs by 1; the variance is 64/63 · ¼.
    assert roughness(chequered[None]) == pytest.approx(63 / 64 * 2)
    assert roughness(-7.0 * chequered[None]) == pytest.approx(63 / 64 * 2)
    both = np.stack([smooth, chequered])
    assert roughness(both) == pytest.approx((roughness(both[:1]) + roughness(both[1:])) / 2)
    flat = np.concatenate([chequered, np.ones_like(chequered)], axis=-1)
    assert roughness(flat[None]) == pytest.approx(63 / 64 * 2)
    assert np.isnan(roughness(np.ones((1, 3, 3, 1))))


def test_decay_frame_measures_each_member(evaluator: PoolEvaluator) -> None:
    frame = decay_frame(evaluator)
    assert frame["member"].tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert frame[frame["comparison"] == "stationary"]["member"].tolist() == [1, 2]
    means = class_means(evaluator)
    for row in frame.itertuples():
        weights = evaluator.weights(row.member)
        assert (row.weight_decay, row.epoch) == (DECAYS[row.member], 3.0)
        assert row.seed == row.member
        W = pool_templates(evaluator, weights)
        others = {"means": means.means, "centred_means": means.centred}.get(row.comparison)
        if others is None:
            others = stationary_templates(evaluator, weights, row.weight_decay)
        expected = diagonal_dominance(cosine_frame(W, others, evaluator.class_names))
        assert (row.diagonal, row.off_diagonal, row.largest) == pytest.approx(expected)
        assert row.norm == pytest.approx(weights["head.weight"].norm(dim=1).mean().item())
        assert row.roughness == pytest.approx(roughness(W))
        for split, accuracy in (("val", row.val_accuracy), ("test", row.test_accuracy)):
            predicted = naive_logits(evaluator, weights, split).argmax(axis=1)
            assert accuracy == (predicted == evaluator.labels(split)).mean()


def test_training_frame_follows_the_snapshots(evaluator: PoolEvaluator, tmp_path: Path) -> None:
    frame = training_frame(evaluator)
    assert frame["member"].unique().tolist() == [1]
    assert frame["epoch"].tolist() == [0, 0, 0, 3, 3, 3]
    final = decay_frame(evaluator)
    last = final[final["member"] == 1].reset_index(drop=True)
    assert frame[frame["epoch"] == 3].reset_index(drop=True)["diagonal"].equals(last["diagonal"])
    with pytest.raises(PoolError, match="no snapshots"):
        training_frame(PoolEvaluator(write_pool(tmp_path / "p", "linear", 1)))


def test_measuring_reports_progress_and_can_be_cancelled(evaluator: PoolEvaluator) -> None:
    seen: list[tuple[int, int]] = []
    decay_frame(evaluator, Progress(lambda done, total, _: seen.append((done, total))))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        training_frame(evaluator, Progress(cancel=cancel))


def test_a_blend_ends_at_its_parts() -> None:
    A, B = np.random.default_rng(0).normal(size=(2, 3, 3, 1))
    assert np.array_equal(blend(A, B, 1.0), A)
    assert np.array_equal(blend(A, B, 0.0), B)


def test_blended_rows_respond_as_a_classifier_that_has_them(evaluator: PoolEvaluator) -> None:
    weights, a, b = evaluator.weights(0), 1, 3
    lams = [0.0, 0.3, 0.75, 1.0]
    frame = blend_response(evaluator, weights, a, b, lams)
    labels = evaluator.labels("test")
    groups = {"a": labels == a, "b": labels == b, "others": ~np.isin(labels, [a, b])}
    for row in frame.itertuples():
        changed = {name: value.double() for name, value in weights.items()}
        for value in changed.values():
            value[a] = row.lam * value[a] + (1 - row.lam) * value[b]
        logits, chosen = naive_logits(evaluator, changed, "test"), groups[row.images]
        assert row.count == chosen.sum()
        assert row.logit == pytest.approx(logits[chosen, a].mean(), abs=1e-5)
        # At λ = 0 rows a and b tie; a tie is not counted as a.
        ahead = logits[:, a] > np.delete(logits, a, axis=1).max(axis=1) + 1e-9
        assert row.share_as_a == ahead[chosen].mean()
    assert (frame[frame["lam"] == 0]["share_as_a"] == 0).all()
    assert frame[frame["lam"] == 1]["share_as_a"].max() > 0


@given(st.floats(0, 1))
def test_responses_are_linear_in_lambda(evaluator: PoolEvaluator, lam: float) -> None:
    weights, other = evaluator.weights(0), evaluator.weights(1)
    classes = blend_response(evaluator, weights, 0, 2, [0, lam, 1])
    for _, part in classes.groupby("images"):
        low, mid, high = part["logit"]
        assert mid == pytest.approx(low + lam * (high - low), abs=1e-9)
    models = model_response(evaluator, weights, other, 2, [0, lam, 1])
    for column in ("logit", "logit_others"):
        low, mid, high = models[column]
        assert mid == pytest.approx(low + lam * (high - low), abs=1e-9)


@pytest.mark.parametrize("pair", [(1, 1), (-1, 0), (0, 4)])
def test_classes_to_blend_must_be_two(evaluator: PoolEvaluator, pair: tuple[int, int]) -> None:
    with pytest.raises(PoolError, match="two different classes from 0 to 3"):
        blend_response(evaluator, evaluator.weights(0), *pair, [0.5])


def test_blended_models_are_run_as_models(evaluator: PoolEvaluator) -> None:
    first, second, label = evaluator.weights(0), evaluator.weights(1), 2
    frame = model_response(evaluator, first, second, label, [0.0, 0.4, 1.0])
    labels = evaluator.labels("test")
    own = labels == label
    for row in frame.itertuples():
        soup = {n: row.lam * first[n] + (1 - row.lam) * second[n] for n in first}
        logits = naive_logits(evaluator, soup, "test")
        correct = logits.argmax(axis=1) == labels
        assert row.accuracy == correct.mean()
        assert row.class_accuracy == correct[own].mean()
        assert row.logit == pytest.approx(logits[own, label].mean(), abs=1e-5)
        assert row.logit_others == pytest.approx(logits[~own, label].mean(), abs=1e-5)
    with pytest.raises(PoolError, match="no class 7"):
        model_response(evaluator, first, second, 7, [0.5])


def test_a_group_without_images_has_no_response(tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "p", {"name": "linear", "args": {"img_size": SIZE}}, 1)
    with np.load(tmp_path / "p" / "inputs.npz") as archive:
        arrays = dict(archive)
    arrays["test_labels"] = np.where(arrays["test_labels"] == 3, 0, arrays["test_labels"])
    np.savez(tmp_path / "p" / "inputs.npz", **arrays)
    evaluator = PoolEvaluator(load_pool(pool.path))
    frame = blend_response(evaluator, evaluator.weights(0), 0, 3, [0.5])
    b = frame[frame["images"] == "b"].iloc[0]
    assert b["count"] == 0
    assert np.isnan(b["logit"])
    assert np.isnan(b["share_as_a"])


def test_member_files_may_be_half_precision(tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "p", "linear", 1)
    path = tmp_path / "p" / "0.safetensors"
    state = {n: t.half() for n, t in PoolEvaluator(pool).weights(0).items()}
    save_file(state, path)
    evaluator = PoolEvaluator(load_pool(pool.path))
    assert pool_templates(evaluator, evaluator.weights(0)).dtype == np.float64
    assert len(decay_frame(evaluator)) == 2

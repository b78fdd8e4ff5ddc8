"""Outputs of images: those of timm's own model, for any subset, and none computed twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.special import log_softmax
from scipy.stats import entropy

from analysis.evaluation.evaluator import Evaluator
from analysis.outputs.measures import MEASURES
from analysis.outputs.prediction_store import PredictionStore
from merge_core.errors import Cancelled
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import Recipe, make_recipe
from merge_core.progress import Progress
from merge_core.suites.suite import Suite
from tests.evaluable import IMAGES, MEANS, STDS, TASKS, copy_evaluable, state_of, timm_model

SOME = {
    "digits": np.array([3, 17, 5]),
    "shapes": np.arange(IMAGES),
    "lines": np.array([], dtype=int),
}


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
    return copy_evaluable(tmp_path / "suite")


@pytest.fixture
def session(suite: Suite) -> MergeSession:
    return MergeSession(suite, None, FactorStore())


def average() -> Recipe:
    return make_recipe({"suite": ".", "method": "average"})


def features(suite: Suite, state: dict[str, torch.Tensor], task: str) -> np.ndarray:
    """Of the validation images, by the bare timm model."""
    model = timm_model()
    model.load_state_dict(state)
    with np.load(suite.root / f"inputs/{task}.npz") as archive:
        images = archive["val_images"]
    pixels = (images.astype(np.float32) / 255 - np.float32(MEANS[task])) / np.float32(STDS[task])
    with torch.no_grad():
        result: np.ndarray = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).double().numpy()
    return result


def by_numpy(suite: Suite, state: dict[str, torch.Tensor], task: str) -> dict[str, np.ndarray]:
    """Every measure in float64, one image after another."""
    head = load_file(suite.root / f"heads/{task}.safetensors")
    W, b = head["weight"].double().numpy(), head["bias"].double().numpy()
    rows = []
    for f, e in zip(
        features(suite, state, task), features(suite, state_of(suite, task), task), strict=True
    ):
        p, q = (np.exp(log_softmax(W @ x + b)) for x in (f, e))
        rows.append(
            {
                "classes": int(np.argmax(W @ f + b)),
                "entropy": entropy(p),
                "l2": np.sqrt(((f - e) ** 2).sum()),
                "cosine": 1 - f @ e / np.linalg.norm(f) / np.linalg.norm(e),
                "overlap": np.minimum(p, q).sum(),
                "divergence": entropy(q, p),
            }
        )
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def average_state(suite: Suite) -> dict[str, torch.Tensor]:
    states = [state_of(suite, task) for task in TASKS]
    return {name: sum(state[name] for state in states) / 3 for name in states[0]}  # type: ignore[misc]


def test_every_measure_of_any_images_by_numpy(suite: Suite, session: MergeSession) -> None:
    got = Evaluator(suite).measure_recipe(average(), session, SOME, measures=tuple(MEASURES))
    for task, images in SOME.items():
        expected = by_numpy(suite, average_state(suite), task)
        assert expected.keys() == MEASURES.keys()
        for name, values in expected.items():
            assert got[task][name].dtype == MEASURES[name].dtype
            np.testing.assert_allclose(got[task][name], values[images], atol=2e-5, rtol=1e-4)


def test_an_experts_own_outputs(suite: Suite) -> None:
    got = Evaluator(suite).measure_experts(SOME, measures=("classes", "l2", "overlap"))
    for task, images in SOME.items():
        expected = by_numpy(suite, state_of(suite, task), task)
        assert got[task]["classes"].tolist() == expected["classes"][images].tolist()
        np.testing.assert_allclose(got[task]["l2"], 0, atol=1e-5)
        np.testing.assert_allclose(got[task]["overlap"], 1, atol=1e-5)


def test_only_what_is_new_is_run(suite: Suite, session: MergeSession) -> None:
    evaluator = Evaluator(suite)
    whole = Evaluator(suite, PredictionStore(suite.root / "p")).measure_recipe(
        average(), session, {t: np.arange(IMAGES) for t in TASKS}, measures=("classes", "entropy")
    )
    ran = 0
    for images, new in (
        (SOME, 23),
        (SOME, 0),
        ({"digits": np.array([17, 4])}, 1),
        ({"lines": np.array([9, 9])}, 1),  # twice is once
        ({t: np.arange(IMAGES) for t in TASKS}, 3 * IMAGES - 25),
        (SOME, 0),
    ):
        got = evaluator.measure_recipe(average(), session, images, measures=("classes", "entropy"))
        ran += new
        assert evaluator.outputs.forward_images == ran
        for task, numbers in images.items():
            for name, values in got[task].items():
                np.testing.assert_allclose(values, whole[task][name][numbers], atol=1e-6)
    assert Evaluator(suite).knows(average(), session)


def test_images_beyond_those_read_first(suite: Suite, session: MergeSession) -> None:
    evaluator = Evaluator(suite)
    evaluator.recipe(average(), session, limit=5)  # reads no more than five
    images = {"digits": np.array([2, 4, 5, 19])}
    got = evaluator.measure_recipe(average(), session, images)["digits"]["classes"]
    expected = by_numpy(suite, average_state(suite), "digits")["classes"]
    assert got.tolist() == expected[images["digits"]].tolist()
    last = evaluator.measure_recipe(average(), session, {"lines": np.array([5])})
    assert (
        last["lines"]["classes"][0] == by_numpy(suite, average_state(suite), "lines")["classes"][5]
    )


def test_a_new_measure_runs_images_again_and_an_old_one_does_not(
    suite: Suite, session: MergeSession
) -> None:
    evaluator, three = Evaluator(suite), {"digits": np.arange(3)}
    for measures, new in (
        (("classes",), 3),
        (("classes", "entropy"), 3),
        (("entropy",), 0),
        (("l2",), 3 + IMAGES),  # and the expert's pass, which is kept
        (("cosine", "l2"), 3),
    ):
        before = evaluator.outputs.forward_images
        evaluator.measure_recipe(average(), session, three, measures=measures)
        assert evaluator.outputs.forward_images - before == new


def test_distances_are_forgotten_with_the_expert(suite: Suite) -> None:
    """The same weights, another expert: classes are known, distances are not."""
    images, base = {"digits": np.arange(4)}, suite.base
    assert base is not None
    first = Evaluator(suite)
    first.measure_member(base, images, measures=("classes", "l2"))
    suite._members["digits"] = suite.expert("shapes")
    other = Evaluator(suite)
    other.measure_member(base, images)
    assert other.outputs.forward_images == 0
    other.measure_member(base, images, measures=("l2",))
    assert other.outputs.forward_images == 4 + IMAGES


def test_batches_span_tasks(
    suite: Suite, session: MergeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analysis.outputs.suite_outputs.READ", 8)
    events: list[tuple[int, int, str]] = []
    evaluator = Evaluator(suite)
    got = evaluator.measure_recipe(
        average(), session, SOME, progress=Progress(lambda *event: events.append(event))
    )
    assert events == [
        (0, 23, "digits, shapes"),
        (8, 23, "shapes"),
        (16, 23, "shapes"),
        (23, 23, "done"),
    ]
    monkeypatch.undo()
    for task, images in SOME.items():
        expected = by_numpy(suite, average_state(suite), task)["classes"]
        assert got[task]["classes"].tolist() == expected[images].tolist()


def test_a_cancelled_run_keeps_what_was_run(
    suite: Suite, session: MergeSession, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr("analysis.outputs.suite_outputs.READ", 8)
    progress = Progress()
    progress.listener = lambda done, *_: progress.cancel.set() if done == 8 else None
    first = Evaluator(suite)
    with pytest.raises(Cancelled):
        first.measure_recipe(average(), session, SOME, progress=progress)
    assert first.outputs.forward_images == 16
    second = Evaluator(suite)
    second.measure_recipe(average(), session, SOME)
    assert second.outputs.forward_images == 7


def test_labels_are_not_looked_at(suite: Suite, session: MergeSession) -> None:
    evaluator = Evaluator(suite)
    for task in TASKS:
        raw = evaluator.outputs.raw_inputs(task, "val")
        evaluator.outputs._raw[task, "val", None] = replace(
            raw, labels=np.full_like(raw.labels, 99)
        )
    got = evaluator.measure_recipe(average(), session, SOME, measures=tuple(MEASURES))
    expected = by_numpy(suite, average_state(suite), "shapes")
    assert got["shapes"]["classes"].tolist() == expected["classes"].tolist()
    with pytest.raises(Exception, match=r"head of task 'digits' \(4 classes.*labels up to 99"):
        evaluator.recipe(average(), session)


def test_a_model_per_task_gives_its_own_outputs(suite: Suite, session: MergeSession) -> None:
    """CART-Indexing at full rank is each expert itself."""
    parameters = {"rank": 1.0, "scale": 1.0}
    recipe = make_recipe({"suite": ".", "method": "cart_indexing", "parameters": parameters})
    got = Evaluator(suite).measure_recipe(recipe, session, SOME)
    for task, images in SOME.items():
        expected = by_numpy(suite, state_of(suite, task), task)["classes"]
        assert got[task]["classes"].tolist() == expected[images].tolist()

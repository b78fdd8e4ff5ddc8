"""Scores per image against the bare timm model, numpy and scipy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.special import softmax

from analysis.evaluation.evaluator import Evaluator
from analysis.rank_selection.scores import SCORES, image_scores, scores_at
from merge_core.errors import RecipeError
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import make_recipe
from merge_core.suites.suite import Suite
from tests.evaluable import (
    ARCHITECTURE,
    IMAGES,
    MEANS,
    STDS,
    TASKS,
    copy_evaluable,
    edit_arrays,
    state_of,
)

OF_CLASSES = [name for name in SCORES if name != "cross_entropy"]  # which is of texts


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
    return copy_evaluable(tmp_path / "suite")


@pytest.fixture
def session(suite: Suite) -> MergeSession:
    return MergeSession(suite, None, FactorStore())


def passes(suite: Suite, state: dict, task: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, softmax (float64) and labels of a task's validation images, without our code."""
    model = timm.create_model(ARCHITECTURE["name"], num_classes=0, **ARCHITECTURE["args"]).eval()
    model.load_state_dict({k: v.float() for k, v in state.items()})
    with np.load(suite.root / f"inputs/{task}.npz") as archive:
        images, labels = archive["val_images"], archive["val_labels"]
    pixels = (images.astype(np.float32) / 255 - np.float32(MEANS[task])) / np.float32(STDS[task])
    head = load_file(suite.root / f"heads/{task}.safetensors")
    with torch.no_grad():
        features = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).contiguous())
    logits = features.numpy() @ head["weight"].numpy().T + head["bias"].numpy()
    return features.double().numpy(), softmax(logits.astype(float), axis=1), labels


def recipe_of(suite: Suite, scale: float = 0.4, tasks: tuple[str, ...] | None = None):
    document = {"suite": str(suite.path), "method": "task_arithmetic", "tasks": tasks}
    return make_recipe({**document, "parameters": {"scale": scale}})


def merged_state(suite: Suite, scale: float) -> dict:
    """θ_0 + λ Σ_t (θ_t − θ_0), straight from the files."""
    base, experts = state_of(suite), [state_of(suite, task) for task in TASKS]
    return {
        name: value + scale * sum(expert[name] - value for expert in experts)
        for name, value in base.items()
    }


def test_every_score_against_the_bare_model(suite: Suite, session: MergeSession) -> None:
    evaluator = Evaluator(suite)
    images = evaluator.outputs.images(TASKS, "val")
    found = scores_at(OF_CLASSES, recipe_of(suite), session, evaluator, images)
    for task in TASKS:
        features, p, labels = passes(suite, merged_state(suite, 0.4), task)
        own, q, _ = passes(suite, state_of(suite, task), task)
        cosine = (features * own).sum(1) / np.linalg.norm(features, axis=1)
        expected = {
            "accuracy": p.argmax(1) == labels,
            "agreement": p.argmax(1) == q.argmax(1),
            "overlap": 1 - np.abs(p - q).sum(1) / 2,
            "divergence": -scipy.stats.entropy(q, p, axis=1),
            "entropy": -scipy.stats.entropy(p, axis=1),
            "l2": -np.linalg.norm(features - own, axis=1),
            "cosine": cosine / np.linalg.norm(own, axis=1) - 1,
        }
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert found[name][task] == pytest.approx(values.astype(float), abs=2e-4), name


def test_a_merge_that_is_the_expert_has_the_best_of_each_score(suite: Suite) -> None:
    session, evaluator = MergeSession(suite, ("shapes",), FactorStore()), Evaluator(suite)
    recipe = recipe_of(suite, 1.0, ("shapes",))
    images = evaluator.outputs.images(("shapes",), "val")
    found = scores_at(OF_CLASSES, recipe, session, evaluator, images)
    perfect = {"agreement": 1, "overlap": 1, "divergence": 0, "l2": 0, "cosine": 0}
    for name, value in perfect.items():
        assert found[name]["shapes"] == pytest.approx(np.full(IMAGES, value), abs=1e-3), name


def test_labels_count_for_the_accuracy_alone(suite: Suite, session: MergeSession) -> None:
    images = Evaluator(suite).outputs.images(TASKS, "val")
    before = scores_at(OF_CLASSES, recipe_of(suite), session, Evaluator(suite), images)
    for task in TASKS:
        path = suite.root / f"inputs/{task}.npz"
        with np.load(path) as archive:
            labels = (archive["val_labels"] + 1) % 4
        edit_arrays(path, val_labels=labels)
    after = scores_at(OF_CLASSES, recipe_of(suite), session, Evaluator(suite), images)
    for name in OF_CLASSES:
        same = all(np.array_equal(before[name][t], after[name][t]) for t in TASKS)
        assert same == (name != "accuracy"), name


def test_all_scores_take_one_pass_of_the_merge(suite: Suite, session: MergeSession) -> None:
    evaluator = Evaluator(suite)
    images = {task: np.array([3, 1, 7]) for task in TASKS}
    whole = evaluator.outputs.images(TASKS, "val")
    scores_at(OF_CLASSES, recipe_of(suite, 0.3), session, evaluator, whole)  # experts, once
    before = evaluator.outputs.forward_images
    found = scores_at(OF_CLASSES, recipe_of(suite), session, evaluator, images)
    assert evaluator.outputs.forward_images - before == 3 * len(TASKS)
    for name in OF_CLASSES:
        alone = image_scores(name, recipe_of(suite), session, evaluator, images)
        assert all(np.array_equal(alone[t], found[name][t]) for t in TASKS)
    assert evaluator.outputs.forward_images - before == 3 * len(TASKS)


def test_some_images_are_those_of_all(suite: Suite, session: MergeSession) -> None:
    evaluator = Evaluator(suite)
    some = {task: np.array([11, 2, 5]) for task in TASKS}
    for name in OF_CLASSES:
        few = image_scores(name, recipe_of(suite), session, evaluator, some)
        all_ = image_scores(
            name, recipe_of(suite), session, evaluator, evaluator.outputs.images(TASKS, "val")
        )
        assert all(few[t] == pytest.approx(all_[t][some[t]], abs=1e-4) for t in TASKS)


def test_an_unknown_score_is_refused(suite: Suite, session: MergeSession) -> None:
    evaluator = Evaluator(suite)
    with pytest.raises(RecipeError, match="no score 'luck'; choose from accuracy, cross"):
        image_scores("luck", recipe_of(suite), session, evaluator, {})


@given(st.integers(0, 2**32 - 1))
def test_agreement_loses_at_most_twice_the_experts_error(seed: int) -> None:
    source = np.random.default_rng(seed)
    settings, images, classes = 5, 12, 3
    labels = source.integers(0, classes, images)
    expert = np.where(source.random(images) < 0.7, labels, source.integers(0, classes, images))
    error = np.mean(expert != labels)
    merges = source.integers(0, classes, (settings, images))
    of = SCORES["accuracy"].of
    accuracy = np.array([of({"classes": merge}, labels).mean() for merge in merges])
    agreement = np.array([of({"classes": merge}, expert).mean() for merge in merges])
    assert (np.abs(accuracy - agreement) <= error + 1e-12).all()
    assert accuracy.max() - accuracy[agreement.argmax()] <= 2 * error + 1e-12

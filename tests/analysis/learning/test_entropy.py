"""AdaMerging and adaptive CART: slopes, steps, bounds and what the coefficients stand for."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from analysis.learning.entropy import Family, entropy_gradient, minimise_entropy
from analysis.learning.learn import learn
from analysis.outputs.suite_outputs import SuiteOutputs
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import Recipe, make_recipe
from merge_core.suites.suite import Suite
from tests.analysis.learning.learnable import context_on, inputs_of, mlp_suite
from tests.evaluable import IMAGES, TASKS, copy_evaluable, edit_document, state_of, timm_model
from tests.merge_core.float64_reference import (
    assert_same,
    cart,
    states,
    svd_k,
    task_arithmetic,
    ties_limits,
)
from tests.merge_core.float64_reference import merge as plain_merge
from tests.merge_core.sparse_reference import ties_sum

QKV = "blocks.0.attn.qkv.weight"


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return copy_evaluable(tmp_path / "suite")


def adamerging(seed: int = 0, **parameters: Any) -> Recipe:
    return make_recipe({"method": "adamerging", "seed": seed, "parameters": parameters})


def cart_adaptive(**parameters: Any) -> Recipe:
    return make_recipe({"method": "cart_adaptive", "parameters": {"rank": 2} | parameters})


def learn_state(suite: Suite, recipe: Recipe) -> Any:
    return learn(SuiteOutputs(suite), recipe, MergeSession(suite, None, FactorStore()))


def merge_learnt(suite: Suite, recipe: Recipe, state: Any = None) -> dict[str, Tensor]:
    session = MergeSession(suite, None, FactorStore())
    state = learn_state(suite, recipe) if state is None else state
    return session.merge(recipe, learned=state)


def total_entropy(suite: Suite, weights: dict[str, np.ndarray], images: dict[str, Tensor]) -> float:
    """Summed over tasks, in float64, by load_state_dict and numpy."""
    model = timm_model().double()
    model.load_state_dict({n: torch.from_numpy(np.asarray(v)) for n, v in weights.items()})
    total = 0.0
    for task, batch in images.items():
        head = load_file(suite.root / f"heads/{task}.safetensors")
        with torch.no_grad():
            features = model(batch.double()).numpy()
        logits = features @ head["weight"].double().numpy().T + head["bias"].double().numpy()
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        total += float(-(p * np.log(p)).sum(axis=1).mean())
    return total


def all_inputs(suite: Suite) -> dict[str, Tensor]:
    return {task: inputs_of(suite, task) for task in TASKS}


def arithmetic_family(suite: Suite, level: str) -> Family:
    base = state_of(suite)
    moved = {n: torch.stack([state_of(suite, t)[n] - v for t in TASKS]) for n, v in base.items()}
    rows = {name: i if level == "layer" else 0 for i, name in enumerate(base)}
    return Family(base, moved, rows)


@pytest.mark.parametrize("level", ["task", "layer"])
def test_the_slope_of_the_entropy_against_central_differences(suite: Suite, level: str) -> None:
    family, context = arithmetic_family(suite, level), context_on(suite, adamerging())
    experts, base = states(suite)
    images = all_inputs(suite)
    rows = max(family.rows.values()) + 1
    values = 0.3 + 0.1 * torch.rand(rows, 3, generator=torch.Generator().manual_seed(1))
    entropy, slope = entropy_gradient(context, family, values, list(images.values()))

    def at(lam: np.ndarray) -> float:
        weights = {
            name: origin
            + sum(lam[family.rows[name], t] * (e[name] - origin) for t, e in enumerate(experts))
            for name, origin in base.items()
        }
        return total_entropy(suite, weights, images)

    lam = values.double().numpy()
    assert entropy == pytest.approx(at(lam), rel=1e-5)
    for row in {0, rows // 2, rows - 1, family.rows[QKV]}:
        for t in range(3):
            step = np.zeros_like(lam)
            step[row, t] = 1e-4
            difference = (at(lam + step) - at(lam - step)) / 2e-4
            assert slope[row, t] == pytest.approx(difference, rel=1e-3, abs=2e-5)


@pytest.mark.parametrize("level", ["task", "layer"])
def test_the_first_step_of_adam_follows_the_sign_of_the_slope(suite: Suite, level: str) -> None:
    # Adam's first step is the learning rate times g / (|g| + 1e-8).
    recipe = adamerging(level=level, steps=1, learning_rate=0.01)
    family, context = arithmetic_family(suite, level), context_on(suite, recipe)
    batches = [next(context.batches(task, 16)) for task in TASKS]
    rows = max(family.rows.values()) + 1
    _, slope = entropy_gradient(context, family, torch.full((rows, 3), 0.3), batches)
    state = learn_state(suite, recipe)
    for name, row in family.rows.items():
        live = slope[row].abs() > 1e-5
        expected = 0.3 - 0.01 * slope[row].sign()
        torch.testing.assert_close(state.values[name][live], expected[live], rtol=0, atol=2e-5)


def test_adam_by_hand(suite: Suite) -> None:
    recipe = adamerging(level="task", steps=4, learning_rate=0.02)
    family, context = arithmetic_family(suite, "task"), context_on(suite, recipe)
    streams = [context.batches(task, 16) for task in TASKS]
    values = torch.full((1, 3), 0.3)
    first, second = torch.zeros(1, 3), torch.zeros(1, 3)
    for step in range(1, 5):
        _, g = entropy_gradient(context, family, values, [next(s) for s in streams])
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        root = (second / (1 - 0.999**step)).sqrt() + 1e-8
        values = values - 0.02 * first / (1 - 0.9**step) / root
    got = learn_state(suite, recipe).values[QKV]
    torch.testing.assert_close(got, values[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", [adamerging(steps=25, learning_rate=0.02),
                                    adamerging(steps=25, learning_rate=0.02, level="task"),
                                    adamerging(steps=25, learning_rate=0.02, trimmed="ties"),
                                    cart_adaptive(steps=25, learning_rate=0.05)])  # fmt: skip
def test_the_entropy_falls(suite: Suite, recipe: Recipe) -> None:
    values = []
    for steps in (0, 25):
        weights = merge_learnt(suite, recipe.with_parameters(steps=steps))
        double = {name: value.double().numpy() for name, value in weights.items()}
        values.append(total_entropy(suite, double, all_inputs(suite)))
    assert values[1] < 0.95 * values[0]


def test_no_steps_are_task_arithmetic_and_cart(suite: Suite) -> None:
    assert_same(merge_learnt(suite, adamerging(steps=0)), task_arithmetic(suite, 0.3))
    assert_same(merge_learnt(suite, adamerging(steps=0, start=0.7, level="task")),
                task_arithmetic(suite, 0.7))  # fmt: skip
    trimmed = merge_learnt(suite, adamerging(steps=0, trimmed="ties"))
    assert_same(trimmed, ties_sum(suite, 0.2, 0.3, "global"))
    theirs = plain_merge(suite, "cart", rank=2, scale=1.5)
    for name, value in merge_learnt(suite, cart_adaptive(steps=0, scale=1.5)).items():
        torch.testing.assert_close(value, theirs[name])
    assert_same(merge_learnt(suite, cart_adaptive(steps=0)), cart(suite, lambda r: 2, 1.0))


def test_plus_plus_descends_on_trimmed_and_elected_vectors(suite: Suite) -> None:
    recipe = adamerging(steps=1, learning_rate=0.01, trimmed="ties")
    plain = arithmetic_family(suite, "layer")
    taus = {name: vector.flatten(1).numpy() for name, vector in plain.vectors.items()}
    limit = ties_limits(np.hstack(list(taus.values())), 0.2)[:, None]
    trimmed = {}
    for name, tau in taus.items():
        kept = np.where(np.abs(tau) >= limit, tau, 0)
        kept = np.where(np.sign(kept) == np.sign(kept.sum(axis=0)), kept, 0)
        trimmed[name] = torch.from_numpy(kept).reshape(plain.vectors[name].shape).float()
    context = context_on(suite, recipe)
    batches = [next(context.batches(task, 16)) for task in TASKS]
    family, start = Family(plain.origin, trimmed, plain.rows), torch.full((len(taus), 3), 0.3)
    _, slope = entropy_gradient(context, family, start, batches)
    _, other = entropy_gradient(context, plain, start, batches)
    assert (slope.sign() != other.sign()).any()
    values = learn_state(suite, recipe).values
    for name, row in plain.rows.items():
        live = slope[row].abs() > 1e-5
        expected = 0.3 - 0.01 * slope[row].sign()
        torch.testing.assert_close(values[name][live], expected[live], rtol=0, atol=2e-5)


def test_a_level_of_tasks_has_one_coefficient_each(suite: Suite) -> None:
    one = learn_state(suite, adamerging(level="task", steps=3, learning_rate=0.05)).values
    assert {tuple(value.tolist()) for value in one.values()} == {tuple(one[QKV].tolist())}
    assert len(set(one[QKV].tolist())) == 3
    several = learn_state(suite, adamerging(level="layer", steps=3, learning_rate=0.05)).values
    assert len({tuple(value.tolist()) for value in several.values()}) > len(several) / 2


def test_coefficients_stay_in_their_bounds(suite: Suite) -> None:
    values = torch.stack(
        [*learn_state(suite, adamerging(steps=8, learning_rate=0.5)).values.values()]
    )
    assert values.min() == 0
    assert values.max() == 1
    free = torch.stack([*learn_state(suite, cart_adaptive(steps=8, learning_rate=0.5)).values()])
    assert free.min() < 0
    assert free.max() > 1


def test_a_coefficient_beyond_its_bound_has_no_slope(suite: Suite) -> None:
    recipe = adamerging(steps=3, learning_rate=0.1, level="task")
    context, family = context_on(suite, recipe), arithmetic_family(suite, "task")
    start = torch.tensor([[-0.5, 0.3, 1.5]])
    values = minimise_entropy(context, family, start, bounds=(0.0, 1.0))
    assert values[0, 0] == 0
    assert values[0, 2] == 1
    assert values[0, 1] != 0.3


def test_overrides_choose_level_start_and_rank(suite: Suite) -> None:
    def with_override(recipe: Recipe, **parameters: Any) -> Recipe:
        override = {"match": "blocks.0.attn.*", "parameters": parameters}
        return make_recipe(recipe.model_dump() | {"overrides": [override]})

    values = learn_state(
        suite, with_override(adamerging(steps=2, level="task"), level="layer")
    ).values
    inside = [n for n in values if n.startswith("blocks.0.attn.")]
    shared = {tuple(v.tolist()) for n, v in values.items() if n not in inside}
    assert len(shared) == 1
    assert len({tuple(values[n].tolist()) for n in inside}) == len(inside)
    started = learn_state(suite, with_override(adamerging(steps=0), start=0.9)).values
    assert started[QKV].tolist() == pytest.approx([0.9] * 3)
    assert started["norm.weight"].tolist() == pytest.approx([0.3] * 3)
    # The rank is the matrix's own, in learning as in merging.
    recipe = with_override(cart_adaptive(steps=1, learning_rate=0.1, rank=1), rank=4)
    state = learn_state(suite, recipe)
    got = merge_learnt(suite, recipe, state)
    experts, _ = states(suite)
    for name, k in ((QKV, 4), ("blocks.0.mlp.fc1.weight", 1)):
        mean = np.mean([e[name] for e in experts], axis=0)
        parts = [svd_k(e[name] - mean, k) for e in experts]
        expected = mean + sum(float(c) * p for c, p in zip(state[name], parts, strict=True))
        np.testing.assert_allclose(got[name], expected, rtol=1e-4, atol=1e-5)


def test_the_adaptation_of_cart_descends(suite: Suite) -> None:
    # One step from λ = 1: against central differences in the first coefficient of one matrix.
    recipe = cart_adaptive(steps=1, learning_rate=0.01)
    state = learn_state(suite, recipe)
    assert set(state) == set(suite.matrices)
    context = context_on(suite, recipe)
    images = {task: next(context.batches(task, 16)) for task in TASKS}
    experts, _ = states(suite)
    plain = cart(suite, lambda r: 2, 1.0)
    for name in suite.matrices:
        mean = np.mean([e[name] for e in experts], axis=0)
        for t in range(3):
            step = 1e-3 * svd_k(experts[t][name] - mean, 2)
            ends = [
                total_entropy(suite, {**plain, name: plain[name] + sign * step}, images)
                for sign in (1, -1)
            ]
            slope = (ends[0] - ends[1]) / 2e-3
            if abs(slope) > 1e-4:
                assert float(state[name][t]) == pytest.approx(1 - 0.01 * np.sign(slope), abs=2e-5)


def test_batches_pass_over_all_images_in_a_new_order(suite: Suite) -> None:
    context = context_on(suite, adamerging())
    images = inputs_of(suite, "digits")
    found = list(islice(context.batches("digits", 5), 8))
    for part in (found[:4], found[4:]):
        seen = torch.cat(part).flatten(1)
        gaps = torch.cdist(seen.double(), images.flatten(1).double())
        assert sorted(gaps.argmin(dim=1).tolist()) == list(range(IMAGES))
    assert not torch.equal(torch.cat(found[:4]), torch.cat(found[4:]))
    assert [len(b) for b in islice(context.batches("digits", 16), 3)] == [16] * 3
    assert [len(b) for b in islice(context.batches("digits", 50), 2)] == [IMAGES] * 2


def test_networks_without_decomposed_weights_have_nothing_to_adapt(tmp_path: Path) -> None:
    suite = edit_document(mlp_suite(tmp_path / "mlp").root, average=["*"])
    assert suite.matrices == ()
    recipe = cart_adaptive()
    assert learn_state(suite, recipe) == {}
    merge = merge_learnt(suite, recipe, {})
    for name, value in plain_merge(suite, "average").items():
        assert torch.equal(merge[name], value)

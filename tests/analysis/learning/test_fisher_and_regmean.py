"""What Fisher and RegMean learn from data, against closed forms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from analysis.learning.regmean import blocks_in_order, linear_layers
from merge_core.merging.recipe import make_recipe
from merge_core.suites.suite import Suite, load_suite
from tests.analysis.learning.learnable import (
    context_on,
    inputs_of,
    learn_state,
    merge_learnt,
    mlp_suite,
    recipe_of,
)
from tests.evaluable import (
    TASKS,
    copy_evaluable,
    state_of,
    timm_model,
)


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return copy_evaluable(tmp_path / "suite")


@pytest.fixture
def mlp(tmp_path: Path) -> Suite:
    return mlp_suite(tmp_path / "mlp")


# Fisher


def test_fisher_of_one_layer_has_its_closed_form(mlp: Suite) -> None:
    # z = W x + b, h = relu(z), logits = H h + c: the gradient of log p_y is
    # (1{z > 0} ∘ Hᵀ(e_y − p)) xᵀ, whose squares average to 1{z > 0} diag(Hᵀ(diag p − ppᵀ)H) x².
    mlp = mlp_suite(mlp.root.parent / "one", widths=(5,))
    state = learn_state(mlp, recipe_of("fisher", examples=1000))
    for place, task in enumerate(TASKS):
        own = {n: v.double().numpy() for n, v in state_of(mlp, task).items()}
        head = {
            n: v.double().numpy()
            for n, v in load_file(mlp.root / f"heads/{task}.safetensors").items()
        }
        X = inputs_of(mlp, task).double().numpy().reshape(-1, own["hidden.0.weight"].shape[1])
        F_W, F_b = np.zeros_like(own["hidden.0.weight"]), np.zeros_like(own["hidden.0.bias"])
        for x in X:
            z = own["hidden.0.weight"] @ x + own["hidden.0.bias"]
            logits = head["weight"] @ np.maximum(z, 0) + head["bias"]
            p = np.exp(logits - logits.max())
            p /= p.sum()
            spread = head["weight"].T @ (np.diag(p) - np.outer(p, p)) @ head["weight"]
            d = (z > 0) * np.diag(spread)
            F_W += np.outer(d, x**2) / len(X)
            F_b += d / len(X)
        got = {name: value[place].double().numpy() for name, value in state.items()}
        np.testing.assert_allclose(got["hidden.0.weight"], F_W, rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(got["hidden.0.bias"], F_b, rtol=1e-4, atol=1e-9)


def test_fisher_over_its_norm_is_the_authors_rule(mlp: Suite) -> None:
    plain = learn_state(mlp, recipe_of("fisher", examples=1000))
    recipe = recipe_of("fisher", examples=1000, normalise="norm")
    got = merge_learnt(mlp, recipe)
    whole = [np.concatenate([v[t].double().ravel() for v in plain.values()]) for t in range(3)]
    own = [{n: v.double().numpy() for n, v in state_of(mlp, task).items()} for task in TASKS]
    for name in plain:
        weights = [
            np.maximum(plain[name][t].double().numpy(), 1e-6) / np.linalg.norm(whole[t])
            for t in range(3)
        ]
        expected = sum(w * e[name] for w, e in zip(weights, own, strict=True)) / sum(weights)
        np.testing.assert_allclose(got[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("held", [1, 1 << 25])
def test_fisher_of_a_transformer_is_that_of_a_loop_over_classes(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    monkeypatch.setattr("analysis.learning.fisher.HELD_NUMBERS", held)
    state = learn_state(suite, recipe_of("fisher", tasks=("shapes",), examples=3))
    own, recipe = state_of(suite, "shapes"), recipe_of("fisher", tasks=("shapes",))
    images = context_on(suite, recipe).images("shapes", 3)
    model = timm_model()
    model.load_state_dict(own)
    head = load_file(suite.root / "heads/shapes.safetensors")
    expected = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for image in images:
        log_p = (model(image[None]) @ head["weight"].T + head["bias"]).log_softmax(1)[0]
        for c in range(len(log_p)):
            parameters = list(model.parameters())
            gradients = torch.autograd.grad(log_p[c], parameters, retain_graph=True)
            for (name, _), g in zip(model.named_parameters(), gradients, strict=True):
                expected[name] += log_p[c].exp().detach() * g**2 / len(images)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name][0], value, rtol=1e-3, atol=1e-6)


# RegMean


def least_squares(
    Ws: Sequence[np.ndarray], Xs: Sequence[np.ndarray], factor: float = 1.0
) -> np.ndarray:
    """RegMean's formula at a factor; at 1 by solving the stacked regression itself."""
    if factor == 1:
        targets = np.vstack([X @ W.T for X, W in zip(Xs, Ws, strict=True)])
        return np.linalg.lstsq(np.vstack(Xs), targets, rcond=None)[0].T
    mask = factor + (1 - factor) * np.eye(Ws[0].shape[1])
    grams = [X.T @ X * mask for X in Xs]
    return sum(W @ G for W, G in zip(Ws, grams, strict=True)) @ np.linalg.inv(sum(grams))


@pytest.mark.parametrize("method", ["regmean", "regmean_plus_plus"])
@pytest.mark.parametrize("factor", [1.0, 0.7])
def test_regmean_solves_the_stacked_regression(mlp: Suite, method: str, factor: float) -> None:
    got = merge_learnt(mlp, recipe_of(method, examples=1000, off_diagonal=factor))
    own = [{n: v.double().numpy() for n, v in state_of(mlp, task).items()} for task in TASKS]
    mean = {name: np.mean([e[name] for e in own], axis=0) for name in own[0]}
    width = mean["hidden.0.weight"].shape[1]
    pixels = [inputs_of(mlp, task).double().numpy().reshape(-1, width) for task in TASKS]
    W0 = least_squares([e["hidden.0.weight"] for e in own], pixels, factor)
    np.testing.assert_allclose(got["hidden.0.weight"], W0, rtol=1e-4, atol=1e-5)
    if method == "regmean":  # each expert's own first layer; else the merged one
        first = [(e["hidden.0.weight"], e["hidden.0.bias"]) for e in own]
    else:
        first = [(W0, mean["hidden.0.bias"])] * 3
    hidden = [np.maximum(X @ W.T + b, 0) for X, (W, b) in zip(pixels, first, strict=True)]
    W1 = least_squares([e["hidden.1.weight"] for e in own], hidden, factor)
    np.testing.assert_allclose(got["hidden.1.weight"], W1, rtol=1e-3, atol=1e-4)
    for name in ("hidden.0.bias", "hidden.1.bias"):
        np.testing.assert_allclose(got[name], mean[name], atol=1e-6)


@pytest.mark.parametrize("method", ["regmean", "regmean_plus_plus"])
def test_a_mean_gram_matrix_does_not_count_rows(mlp: Suite, method: str) -> None:
    # One task's images five times over: its XᵀX grows, its mean over rows does not.
    recipes = {rule: recipe_of(method, examples=1000, gram=rule) for rule in ("sum", "mean")}
    before = {rule: learn_state(mlp, recipe) for rule, recipe in recipes.items()}
    path = mlp.root / f"inputs/{TASKS[0]}.npz"
    with np.load(path) as archive:
        stored = dict(archive)
    np.savez(
        path,
        **{n: np.repeat(v, 5, axis=0) if n.startswith("val") else v for n, v in stored.items()},
    )
    again = load_suite(mlp.path)
    after = {rule: learn_state(again, recipe) for rule, recipe in recipes.items()}
    for name, value in before["mean"].items():
        torch.testing.assert_close(after["mean"][name], value, rtol=1e-5, atol=1e-7)
        assert not torch.allclose(after["sum"][name], before["sum"][name], rtol=1e-2, atol=1e-4)


def watch_inputs(state: dict[str, Tensor], images: Tensor, layers: Sequence[str]) -> dict[str, Any]:
    """The inputs of some layers of the tiny transformer, one row per token."""
    model, seen = timm_model(), {}
    model.load_state_dict(state)
    for name in layers:
        model.get_submodule(name).register_forward_hook(
            lambda _m, args, _out, name=name: seen.update({name: args[0].detach().flatten(0, 1)})
        )
    with torch.no_grad():
        model(images)
    return {name: value.double().numpy() for name, value in seen.items()}


@pytest.mark.parametrize("method", ["regmean", "regmean_plus_plus"])
def test_regmean_of_a_transformer(suite: Suite, method: str) -> None:
    layers = [f"blocks.0.{n}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    got = merge_learnt(suite, recipe_of(method, examples=1000, off_diagonal=0.9))
    own = [state_of(suite, task) for task in TASKS]
    mean = {n: torch.stack([e[n].double() for e in own]).mean(0).float() for n in own[0]}
    seen = []
    for task, expert in zip(TASKS, own, strict=True):
        # RegMean++: the merged embedding before the block, which is the expert's own.
        inside = {n: v for n, v in expert.items() if n.startswith("blocks.0.")}
        run = expert if method == "regmean" else {**mean, **inside}
        seen.append(watch_inputs(run, inputs_of(suite, task), layers))
    for layer in layers:
        Ws = [e[f"{layer}.weight"].double().numpy() for e in own]
        expected = least_squares(Ws, [s[layer] for s in seen], 0.9)
        np.testing.assert_allclose(got[f"{layer}.weight"], expected, rtol=1e-3, atol=1e-4)
    for name in set(mean) - {f"{layer}.weight" for layer in layers}:
        torch.testing.assert_close(got[name], mean[name])


def test_an_override_changes_the_factor_of_its_layers(mlp: Suite) -> None:
    recipe = recipe_of("regmean")
    document = recipe.model_dump() | {
        "overrides": [{"match": "hidden.1*", "parameters": {"off_diagonal": 0.1}}]
    }
    one, other = learn_state(mlp, recipe), learn_state(mlp, make_recipe(document))
    all_at = learn_state(mlp, recipe_of("regmean", off_diagonal=0.1))
    assert torch.equal(one["hidden.0.weight"], other["hidden.0.weight"])
    assert torch.equal(all_at["hidden.1.weight"], other["hidden.1.weight"])
    assert not torch.equal(one["hidden.1.weight"], other["hidden.1.weight"])


def test_blocks_come_in_the_order_of_the_images(suite: Suite, mlp: Suite) -> None:
    for given, blocks in ((suite, ["blocks.0"]), (mlp, ["hidden.0", "hidden.1"])):
        context = context_on(given, recipe_of("regmean"))
        layers = linear_layers(context)
        image = context.images("digits", 1)
        found = blocks_in_order(context, layers, context.expert("digits"), image)
        assert list(found) == blocks
        assert [name for inside in found.values() for name in inside] == list(layers)

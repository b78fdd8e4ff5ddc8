"""What Fisher and RegMean learn from data, against closed forms; what holds for every learner."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import analysis.evaluation
from analysis.evaluation import Evaluator
from analysis.learners.regmean import blocks_in_order, linear_layers
from analysis.learning import LEARNERS, learn
from analysis.predictions import PredictionStore
from merge_core import engine
from merge_core.engine import MergeSession
from merge_core.errors import Cancelled, SuiteError
from merge_core.factors import FactorStore
from merge_core.methods import methods
from merge_core.progress import Progress
from merge_core.recipe import Recipe, make_recipe
from merge_core.suite import Suite, load_suite
from tests.analysis.learnable import inputs_of, lesson_on, mlp_suite
from tests.evaluable import (
    IMAGES,
    TASKS,
    edit_arrays,
    edit_document,
    evaluable,
    state_of,
    timm_model,
    write_evaluable,
)

# Few and large steps: every learner in a fraction of a second.
QUICK: dict[str, dict[str, Any]] = {
    "fisher": {"examples": 5},
    "regmean": {"examples": 12},
    "regmean_plus_plus": {"examples": 12},
    "adamerging": {"steps": 3, "learning_rate": 0.05},
    "cart_adaptive": {"rank": 2, "steps": 3, "learning_rate": 0.05},
}


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return evaluable(tmp_path / "suite")


@pytest.fixture
def mlp(tmp_path: Path) -> Suite:
    return mlp_suite(tmp_path / "mlp")


def recipe_of(method: str, seed: int = 0, tasks: Any = None, **parameters: Any) -> Recipe:
    given = QUICK[method] | parameters
    document = {"method": method, "seed": seed, "tasks": tasks, "parameters": given}
    return make_recipe({**document, "suite": "."})


def learnt(suite: Suite, recipe: Recipe, progress: Progress | None = None) -> Any:
    session = MergeSession(suite, recipe.tasks, FactorStore())
    return learn(Evaluator(suite), recipe, session, progress)


def merged(suite: Suite, recipe: Recipe) -> dict[str, Tensor]:
    session = MergeSession(suite, recipe.tasks, FactorStore())
    return session.merge(recipe, learned=learn(Evaluator(suite), recipe, session))


def numbers(state: Any) -> Iterator[Tensor]:
    """Every tensor of a learnt state, in a fixed order."""
    values = state if isinstance(state, dict) else state.values
    return iter([values[name] for name in sorted(values)])


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(numbers(one), numbers(other), strict=True))


# Fisher


def test_fisher_of_one_layer_has_its_closed_form(mlp: Suite) -> None:
    # z = W x + b, h = relu(z), logits = H h + c: the gradient of log p_y is
    # (1{z > 0} ∘ Hᵀ(e_y − p)) xᵀ, whose squares average to 1{z > 0} diag(Hᵀ(diag p − ppᵀ)H) x².
    mlp = mlp_suite(mlp.root.parent / "one", widths=(5,))
    state = learnt(mlp, recipe_of("fisher", examples=1000))
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


@pytest.mark.parametrize("held", [1, 1 << 25])
def test_fisher_of_a_transformer_is_that_of_a_loop_over_classes(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    monkeypatch.setattr("analysis.learners.fisher.HELD_NUMBERS", held)
    state = learnt(suite, recipe_of("fisher", tasks=("shapes",), examples=3))
    own, recipe = state_of(suite, "shapes"), recipe_of("fisher", tasks=("shapes",))
    images = lesson_on(suite, recipe).images("shapes", 3)
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
    got = merged(mlp, recipe_of(method, examples=1000, off_diagonal=factor))
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


def watched(state: dict[str, Tensor], images: Tensor, layers: Sequence[str]) -> dict[str, Any]:
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
    got = merged(suite, recipe_of(method, examples=1000, off_diagonal=0.9))
    own = [state_of(suite, task) for task in TASKS]
    mean = {n: torch.stack([e[n].double() for e in own]).mean(0).float() for n in own[0]}
    seen = []
    for task, expert in zip(TASKS, own, strict=True):
        # RegMean++: the merged embedding before the block, which is the expert's own.
        inside = {n: v for n, v in expert.items() if n.startswith("blocks.0.")}
        run = expert if method == "regmean" else {**mean, **inside}
        seen.append(watched(run, inputs_of(suite, task), layers))
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
    one, other = learnt(mlp, recipe), learnt(mlp, make_recipe(document))
    all_at = learnt(mlp, recipe_of("regmean", off_diagonal=0.1))
    assert torch.equal(one["hidden.0.weight"], other["hidden.0.weight"])
    assert torch.equal(all_at["hidden.1.weight"], other["hidden.1.weight"])
    assert not torch.equal(one["hidden.1.weight"], other["hidden.1.weight"])


def test_blocks_come_in_the_order_of_the_images(suite: Suite, mlp: Suite) -> None:
    for given, blocks in ((suite, ["blocks.0"]), (mlp, ["hidden.0", "hidden.1"])):
        lesson = lesson_on(given, recipe_of("regmean"))
        layers = linear_layers(lesson)
        image = lesson.images("digits", 1)
        found = blocks_in_order(lesson, layers, lesson.expert("digits"), image)
        assert list(found) == blocks
        assert [name for inside in found.values() for name in inside] == list(layers)


# Every learner


def test_every_method_that_learns_has_its_learner() -> None:
    assert {m.learns for m in methods().values() if m.learns} == set(LEARNERS)
    assert set(QUICK) == {m.name for m in methods().values() if m.learns}


def test_other_methods_learn_nothing(suite: Suite) -> None:
    assert learnt(suite, make_recipe({"method": "average"})) is None


@pytest.mark.parametrize("method", QUICK)
def test_neither_labels_nor_test_images_are_used(suite: Suite, method: str) -> None:
    before = learnt(suite, recipe_of(method))
    for task in TASKS:
        path = suite.root / f"inputs/{task}.npz"
        labels = np.random.default_rng(9).integers(0, 4, IMAGES)
        edit_arrays(path, val_labels=labels, test_images=None, test_labels=None)
    assert same(before, learnt(load_suite(suite.root), recipe_of(method)))
    path = suite.root / "inputs/lines.npz"
    with np.load(path) as archive:
        images = archive["val_images"]
    edit_arrays(path, val_images=255 - images)
    assert not same(before, learnt(load_suite(suite.root), recipe_of(method)))


@pytest.mark.parametrize("method", QUICK)
def test_the_seed_alone_decides(suite: Suite, method: str) -> None:
    one = learnt(suite, recipe_of(method, seed=1))
    torch.manual_seed(99)
    assert same(one, learnt(suite, recipe_of(method, seed=1)))
    assert not same(one, learnt(suite, recipe_of(method, seed=2)))


def test_as_many_images_are_drawn_as_asked_for_and_none_twice(suite: Suite) -> None:
    lesson = lesson_on(suite, recipe_of("fisher"))
    whole = inputs_of(suite, "shapes").flatten(1)
    for most in (1, 7, IMAGES - 1):
        drawn = lesson.images("shapes", most).flatten(1)
        places = torch.cdist(drawn.double(), whole.double()).argmin(dim=1)
        assert len(set(places.tolist())) == len(drawn) == most
    torch.testing.assert_close(lesson.images("shapes", IMAGES).flatten(1), whole)


@pytest.mark.parametrize("method", ["fisher", "regmean", "regmean_plus_plus"])
def test_all_images_leave_nothing_to_the_seed(suite: Suite, method: str) -> None:
    recipes = [recipe_of(method, seed=s, examples=IMAGES) for s in (1, 2)]
    assert same(*[learnt(suite, recipe) for recipe in recipes])


@pytest.mark.parametrize("method", QUICK)
def test_the_order_of_the_suites_tasks_does_not_count(suite: Suite, method: str) -> None:
    one = merged(suite, recipe_of(method))
    experts = suite.spec.model_dump(mode="json", exclude_none=True)["experts"]
    turned = edit_document(suite.root, experts={task: experts[task] for task in TASKS[::-1]})
    assert turned.tasks == TASKS[::-1]
    for name, value in merged(turned, recipe_of(method)).items():
        torch.testing.assert_close(value, one[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", QUICK)
def test_equal_experts_and_a_single_one_give_that_expert(suite: Suite, method: str) -> None:
    own = state_of(suite, "shapes")
    one = merged(suite, recipe_of(method, tasks=("shapes",)))
    for task in TASKS:
        save_file(own, suite.root / f"experts/{task}.safetensors")
    several = merged(load_suite(suite.root), recipe_of(method))
    for name, value in own.items():
        if method != "adamerging":  # its coefficients do not sum to 1
            torch.testing.assert_close(one[name], value, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(several[name], value, rtol=1e-6, atol=1e-7)
        assert torch.isfinite(several[name]).all()


@pytest.mark.parametrize("method", QUICK)
def test_a_large_model_is_read_again_and_gives_the_same(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    one = learnt(suite, recipe_of(method))
    monkeypatch.setattr(engine, "HELD_BYTES", 0)
    assert same(one, learnt(suite, recipe_of(method)))


@pytest.mark.parametrize("method", QUICK)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_experts_of_any_dtype_are_learnt_from(
    suite: Suite, method: str, dtype: torch.dtype
) -> None:
    one = merged(suite, recipe_of(method))
    for path in [suite.root / "base.safetensors", *suite.root.glob("experts/*")]:
        save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path)
    for name, value in merged(load_suite(suite.root), recipe_of(method)).items():
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.isfinite(value).all()
        if dtype == torch.float64 and method != "fisher":
            torch.testing.assert_close(value.float(), one[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", QUICK)
def test_learning_can_be_cancelled_between_its_steps(suite: Suite, method: str) -> None:
    seen: list[tuple[int, int]] = []
    progress = Progress(lambda done, total, _: seen.append((done, total)))
    learnt(suite, recipe_of(method), progress)
    assert len(seen) >= 3
    assert all(0 <= done <= total for done, total in seen)
    assert seen == sorted(seen)
    stopping = Progress()

    def stop(done: int, total: int, label: str) -> None:
        if done == 1:
            stopping.cancel.set()

    stopping.listener = stop
    with pytest.raises(Cancelled):
        learnt(suite, recipe_of(method), stopping)


@pytest.mark.parametrize("method", QUICK)
def test_the_evaluator_learns_once_and_remembers_by_the_data(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str
) -> None:
    asked: list[str] = []

    def counting(*args: Any) -> Any:
        asked.append(args[1].method)
        return learn(*args)

    monkeypatch.setattr(analysis.evaluation, "learn", counting)
    store = PredictionStore(tmp_path / "predictions")
    evaluator, recipe = Evaluator(suite, store), recipe_of(method)
    session = MergeSession(suite, None, FactorStore())
    assert not evaluator.knows(recipe, session, "test")
    frame = evaluator.recipe(recipe, session, "test")
    assert asked == [method]
    weights = session.merge(recipe, learned=learn(evaluator, recipe, session))
    for row in frame.itertuples():
        _, labels = evaluator.inputs(row.task, "test", None)
        assert row.correct == (evaluator.predict(weights, row.task, "test") == labels).sum()
    assert evaluator.knows(recipe, session, "test")
    assert evaluator.recipe(recipe, session, "test").equals(frame)
    evaluator.recipe(recipe, session, "val")
    assert same(evaluator.learned(recipe, session), learn(evaluator, recipe, session))
    assert asked == [method]
    evaluator.learned(recipe_of(method, seed=5), session)
    assert asked == [method] * 2
    # Other data of one task change the merge, so nothing known of it counts any more.
    edit_arrays(suite.root / "inputs/lines.npz", val_images=np.zeros((5, 16, 16, 3), np.uint8),
                val_labels=np.zeros(5, np.int64))  # fmt: skip
    fresh = load_suite(suite.root)
    fresh_session = MergeSession(fresh, None, FactorStore())
    again = Evaluator(fresh, store)
    assert not again.knows(recipe, fresh_session, "test")
    again.recipe(recipe, fresh_session, "test")
    assert again.forward_images == len(TASKS) * IMAGES


def test_what_does_not_fit_is_said_before_anything_is_learnt(tmp_path: Path, suite: Suite) -> None:
    baseless = load_suite(write_evaluable(tmp_path / "baseless", with_base=False))
    with pytest.raises(SuiteError, match="needs the base"):
        learnt(baseless, recipe_of("adamerging"))
    other = MergeSession(suite, ("digits", "lines"), FactorStore())
    with pytest.raises(SuiteError, match="not the ones that this session holds"):
        learn(Evaluator(suite), recipe_of("fisher"), other)
    head = suite.root / "heads/lines.safetensors"
    save_file({"weight": torch.ones(4, 7), "bias": torch.zeros(4)}, head)
    for method in QUICK:
        with pytest.raises(SuiteError, match=r"width 7,.*gives 16"):
            learnt(load_suite(suite.root), recipe_of(method))


def test_outputs_that_are_not_finite_are_refused(suite: Suite) -> None:
    head = suite.root / "heads/lines.safetensors"
    save_file({"weight": torch.full((4, 16), 3e38), "bias": torch.zeros(4)}, head)
    with pytest.raises(SuiteError, match="non-finite outputs on task 'lines'"):
        learnt(load_suite(suite.root), recipe_of("adamerging"))

"""What holds for every method that learns from data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import analysis.evaluation.evaluator
from analysis.evaluation.evaluator import Evaluator
from analysis.learning.learn import LEARNERS, learn
from analysis.outputs.prediction_store import PredictionStore
from analysis.outputs.suite_outputs import SuiteOutputs
from merge_core.errors import Cancelled, SuiteError
from merge_core.factors.store import FactorStore
from merge_core.merging import engine
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import make_recipe
from merge_core.methods import methods
from merge_core.progress import Progress
from merge_core.suites.suite import Suite, load_suite
from tests.analysis.learning.learnable import (
    QUICK,
    context_on,
    inputs_of,
    learn_state,
    merge_learnt,
    mlp_suite,
    recipe_of,
)
from tests.evaluable import (
    IMAGES,
    TASKS,
    copy_evaluable,
    edit_arrays,
    edit_document,
    state_of,
    write_evaluable,
)


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return copy_evaluable(tmp_path / "suite")


@pytest.fixture
def mlp(tmp_path: Path) -> Suite:
    return mlp_suite(tmp_path / "mlp")


def numbers(state: Any) -> Iterator[Tensor]:
    """Every tensor of a learnt state, in a fixed order."""
    values = state if isinstance(state, dict) else state.values
    return iter([values[name] for name in sorted(values)])


def is_same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(numbers(one), numbers(other), strict=True))


def test_every_method_that_learns_has_its_learner() -> None:
    assert {m.learns for m in methods().values() if m.learns} == set(LEARNERS)
    assert set(QUICK) == {m.name for m in methods().values() if m.learns}


def test_other_methods_learn_nothing(suite: Suite) -> None:
    assert learn_state(suite, make_recipe({"method": "average"})) is None


@pytest.mark.parametrize("method", QUICK)
def test_neither_labels_nor_test_images_are_used(suite: Suite, method: str) -> None:
    before = learn_state(suite, recipe_of(method))
    for task in TASKS:
        path = suite.root / f"inputs/{task}.npz"
        labels = np.random.default_rng(9).integers(0, 4, IMAGES)
        edit_arrays(path, val_labels=labels, test_images=None, test_labels=None)
    assert is_same(before, learn_state(load_suite(suite.root), recipe_of(method)))
    path = suite.root / "inputs/lines.npz"
    with np.load(path) as archive:
        images = archive["val_images"]
    edit_arrays(path, val_images=255 - images)
    assert not is_same(before, learn_state(load_suite(suite.root), recipe_of(method)))


@pytest.mark.parametrize("method", QUICK)
def test_the_seed_alone_decides(suite: Suite, method: str) -> None:
    one = learn_state(suite, recipe_of(method, seed=1))
    torch.manual_seed(99)
    assert is_same(one, learn_state(suite, recipe_of(method, seed=1)))
    assert not is_same(one, learn_state(suite, recipe_of(method, seed=2)))


def test_as_many_images_are_drawn_as_asked_for_and_none_twice(suite: Suite) -> None:
    context = context_on(suite, recipe_of("fisher"))
    whole = inputs_of(suite, "shapes").flatten(1)
    for most in (1, 7, IMAGES - 1):
        drawn = context.images("shapes", most).flatten(1)
        places = torch.cdist(drawn.double(), whole.double()).argmin(dim=1)
        assert len(set(places.tolist())) == len(drawn) == most
    torch.testing.assert_close(context.images("shapes", IMAGES).flatten(1), whole)


@pytest.mark.parametrize("method", ["fisher", "regmean", "regmean_plus_plus"])
def test_all_images_leave_nothing_to_the_seed(suite: Suite, method: str) -> None:
    recipes = [recipe_of(method, seed=s, examples=IMAGES) for s in (1, 2)]
    assert is_same(*[learn_state(suite, recipe) for recipe in recipes])


@pytest.mark.parametrize("method", QUICK)
def test_the_order_of_the_suites_tasks_does_not_count(suite: Suite, method: str) -> None:
    one = merge_learnt(suite, recipe_of(method))
    experts = suite.spec.model_dump(mode="json", exclude_none=True)["experts"]
    turned = edit_document(suite.root, experts={task: experts[task] for task in TASKS[::-1]})
    assert turned.tasks == TASKS[::-1]
    for name, value in merge_learnt(turned, recipe_of(method)).items():
        torch.testing.assert_close(value, one[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", QUICK)
def test_equal_experts_and_a_single_one_give_that_expert(suite: Suite, method: str) -> None:
    own = state_of(suite, "shapes")
    one = merge_learnt(suite, recipe_of(method, tasks=("shapes",)))
    for task in TASKS:
        save_file(own, suite.root / f"experts/{task}.safetensors")
    several = merge_learnt(load_suite(suite.root), recipe_of(method))
    for name, value in own.items():
        if method != "adamerging":  # its coefficients do not sum to 1
            torch.testing.assert_close(one[name], value, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(several[name], value, rtol=1e-6, atol=1e-7)
        assert torch.isfinite(several[name]).all()


@pytest.mark.parametrize("method", QUICK)
def test_a_large_model_is_read_again_and_gives_the_same(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    one = learn_state(suite, recipe_of(method))
    monkeypatch.setattr(engine, "HELD_BYTES", 0)
    assert is_same(one, learn_state(suite, recipe_of(method)))


@pytest.mark.parametrize("method", QUICK)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_experts_of_any_dtype_are_learnt_from(
    suite: Suite, method: str, dtype: torch.dtype
) -> None:
    one = merge_learnt(suite, recipe_of(method))
    for path in [suite.root / "base.safetensors", *suite.root.glob("experts/*")]:
        save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path)
    for name, value in merge_learnt(load_suite(suite.root), recipe_of(method)).items():
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.isfinite(value).all()
        if dtype == torch.float64 and method != "fisher":
            torch.testing.assert_close(value.float(), one[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", QUICK)
def test_learning_can_be_cancelled_between_its_steps(suite: Suite, method: str) -> None:
    seen: list[tuple[int, int]] = []
    progress = Progress(lambda done, total, _: seen.append((done, total)))
    learn_state(suite, recipe_of(method), progress)
    assert len(seen) >= 3
    assert all(0 <= done <= total for done, total in seen)
    assert seen == sorted(seen)
    stopping = Progress()

    def stop(done: int, total: int, label: str) -> None:
        if done == 1:
            stopping.cancel.set()

    stopping.listener = stop
    with pytest.raises(Cancelled):
        learn_state(suite, recipe_of(method), stopping)


@pytest.mark.parametrize("method", QUICK)
def test_the_evaluator_learns_once_and_remembers_by_the_data(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str
) -> None:
    asked: list[str] = []

    def counting(*args: Any) -> Any:
        asked.append(args[1].method)
        return learn(*args)

    monkeypatch.setattr(analysis.evaluation.evaluator, "learn", counting)
    store = PredictionStore(tmp_path / "predictions")
    evaluator, recipe = Evaluator(suite, store), recipe_of(method)
    session = MergeSession(suite, None, FactorStore())
    assert not evaluator.knows(recipe, session, "test")
    frame = evaluator.recipe(recipe, session, "test")
    assert asked == [method]
    weights = session.merge(recipe, learned=learn(evaluator.outputs, recipe, session))
    for row in frame.itertuples():
        _, labels = evaluator.outputs.inputs(row.task, "test", None)
        assert row.correct == (evaluator.outputs.predict(weights, row.task, "test") == labels).sum()
    assert evaluator.knows(recipe, session, "test")
    assert evaluator.recipe(recipe, session, "test").equals(frame)
    evaluator.recipe(recipe, session, "val")
    assert is_same(evaluator.learn(recipe, session), learn(evaluator.outputs, recipe, session))
    assert asked == [method]
    evaluator.learn(recipe_of(method, seed=5), session)
    assert asked == [method] * 2
    # Other data of one task change the merge, so nothing known of it counts any more.
    edit_arrays(suite.root / "inputs/lines.npz", val_images=np.zeros((5, 16, 16, 3), np.uint8),
                val_labels=np.zeros(5, np.int64))  # fmt: skip
    fresh = load_suite(suite.root)
    fresh_session = MergeSession(fresh, None, FactorStore())
    again = Evaluator(fresh, store)
    assert not again.knows(recipe, fresh_session, "test")
    again.recipe(recipe, fresh_session, "test")
    assert again.outputs.forward_images == len(TASKS) * IMAGES


def test_what_does_not_fit_is_said_before_anything_is_learnt(tmp_path: Path, suite: Suite) -> None:
    baseless = load_suite(write_evaluable(tmp_path / "baseless", with_base=False))
    with pytest.raises(SuiteError, match="needs the base"):
        learn_state(baseless, recipe_of("adamerging"))
    other = MergeSession(suite, ("digits", "lines"), FactorStore())
    with pytest.raises(SuiteError, match="not the ones that this session holds"):
        learn(SuiteOutputs(suite), recipe_of("fisher"), other)
    head = suite.root / "heads/lines.safetensors"
    save_file({"weight": torch.ones(4, 7), "bias": torch.zeros(4)}, head)
    for method in QUICK:
        with pytest.raises(SuiteError, match=r"width 7,.*gives 16"):
            learn_state(load_suite(suite.root), recipe_of(method))


def test_outputs_that_are_not_finite_are_refused(suite: Suite) -> None:
    head = suite.root / "heads/lines.safetensors"
    save_file({"weight": torch.full((4, 16), 3e38), "bias": torch.zeros(4)}, head)
    with pytest.raises(SuiteError, match="non-finite outputs on task 'lines'"):
        learn_state(load_suite(suite.root), recipe_of("adamerging"))

"""CART-Indexing and TSV-C: one model per task, and what they cost to keep."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_core.checkpoints.shards import TensorInfo
from merge_core.errors import RecipeError
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import make_recipe
from merge_core.methods import get_method
from merge_core.methods.declaration import Run
from merge_core.suites.suite import Suite
from tests.merge_core.float64_reference import assert_same, states
from tests.merge_core.spectral_reference import cart_indexing, tsv_c

Make = Callable[..., Suite]
seeds = st.integers(0, 10_000)
NAMES = ("cart_indexing", "tsv_c")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def model(suite: Suite, method: str, task: str, **parameters: Any) -> dict[str, torch.Tensor]:
    recipe = make_recipe({"method": method, "parameters": parameters})
    with torch.inference_mode():
        return MergeSession(suite, None, FactorStore()).merge(recipe, task=task)


@given(seeds, st.integers(1, 4), st.floats(0.05, 1), st.floats(-1, 2))
def test_cart_indexing_follows_its_formula(
    synthetic_suite: Make, seed: int, T: int, rho: float, scale: float
) -> None:
    suite = synthetic_suite(T, seed=seed, with_base=False)
    for place in range(T):
        result = model(suite, "cart_indexing", f"task{place}", rank=rho, scale=scale)
        expected = cart_indexing(suite, place, lambda r: max(1, int(rho * r + 1e-9)), scale)
        assert_same(result, expected)


@given(seeds, st.integers(1, 8))
def test_tsv_c_follows_its_formula(synthetic_suite: Make, seed: int, T: int) -> None:
    suite = synthetic_suite(T, seed=seed)
    for place in (0, T - 1):
        assert_same(model(suite, "tsv_c", f"task{place}"), tsv_c(suite, place))


def test_by_hand(suite_of: Make) -> None:
    thetas = [np.diag([5.0, 2.0]), np.diag([1.0, 0.0])]
    suite = suite_of(
        {f"t{i}": {"w.weight": torch.tensor(x)} for i, x in enumerate(thetas)},
        {"w.weight": torch.zeros(2, 2, dtype=torch.float64)},
    )
    # Mean diag(3, 1), C_0 = diag(2, 1): its first direction is e1.
    kept = model(suite, "cart_indexing", "t0", rank=1)["w.weight"].numpy()
    assert kept == pytest.approx(np.diag([5.0, 1.0]), abs=1e-6)
    half = model(suite, "cart_indexing", "t1", rank=1, scale=0.5)["w.weight"].numpy()
    assert half == pytest.approx(np.diag([2.0, 1.0]), abs=1e-6)
    # Half of two directions about the base.
    assert model(suite, "tsv_c", "t0")["w.weight"].numpy() == pytest.approx(
        np.diag([5.0, 0.0]), abs=1e-6
    )


@given(seeds, st.integers(1, 4))
def test_all_directions_give_each_expert_back(synthetic_suite: Make, seed: int, T: int) -> None:
    suite = synthetic_suite(T, seed=seed, dtype=torch.float64)  # finer than stored factors
    for place in range(T):
        for rank in (1.0, 99):
            result = model(suite, "cart_indexing", f"task{place}", rank=rank)
            assert_same(result, states(suite)[0][place], 1e-14)
    if T == 1:
        assert_same(model(suite, "tsv_c", "task0"), states(suite)[0][0], 0)


@pytest.mark.parametrize("name", NAMES)
def test_one_or_equal_experts_come_back(
    suite_of: Make, synthetic_states: Callable, name: str
) -> None:
    members, base = synthetic_states(["only"], seed=7)
    for T in (1, 3):
        suite = suite_of({f"t{i}": members["only"] for i in range(T)}, base)
        if name == "cart_indexing" or T == 1:
            assert_same(model(suite, name, "t0"), states(suite)[0][0], 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape(synthetic_suite: Make, dtype: torch.dtype) -> None:
    suite = synthetic_suite(3, dtype=dtype, seed=2)
    for result, expected in (
        (model(suite, "tsv_c", "task1"), tsv_c(suite, 1)),
        (model(suite, "cart_indexing", "task1", rank=2), cart_indexing(suite, 1, lambda r: 2, 1)),
    ):
        assert_same(result, expected, 1e-5)
        for key in suite.parameters:
            assert result[key].shape == suite.expert("task0").info(key).shape


@pytest.mark.parametrize("name", NAMES)
def test_experts_equal_to_the_base_give_it_back(
    suite_of: Make, synthetic_states: Callable, name: str
) -> None:
    _, base = synthetic_states([], seed=3)
    suite = suite_of(dict.fromkeys("abc", base), base)
    assert_same(model(suite, name, "b"), states(suite)[1], 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_task_must_be_named(synthetic_suite: Make, name: str) -> None:
    suite = synthetic_suite(2)
    recipe = make_recipe({"method": name})
    with pytest.raises(RecipeError, match="one model per task"):
        MergeSession(suite, None, FactorStore()).merge(recipe)
    assert get_method(name).indexed


def group(shape: tuple[int, ...], tasks: int, decomposed: bool = True) -> Any:
    info = TensorInfo.of(torch.empty(shape))
    return SimpleNamespace(info=info, tasks=("t",) * tasks, decomposed=decomposed)


def stored_bytes(name: str, member: Any, **parameters: Any) -> int:
    method = get_method(name)
    assert method.storage is not None
    return method.storage(member, method.parameters(**parameters), Run())


def test_storage_counts_every_number_kept() -> None:
    # 20 x 10 with 4 tasks: the origin, and per task U 20 x k, V 10 x k, S k; two bytes each.
    assert stored_bytes("cart_indexing", group((20, 10), 4), rank=2) == 2 * (200 + 4 * 2 * 31)
    assert stored_bytes("tsv_c", group((20, 10), 4)) == 2 * (200 + 4 * 2 * 31)  # 10 // 4 = 2
    assert stored_bytes("tsv_c", group((20, 10), 3)) == 2 * (200 + 3 * 3 * 31)
    # A kernel as o x (i·kh·kw).
    assert stored_bytes("cart_indexing", group((5, 3, 3, 3), 2), rank=1) == 2 * (135 + 2 * 33)
    # Factors larger than the matrix are not kept.
    assert stored_bytes("cart_indexing", group((20, 10), 4), rank=1.0) == 2 * (200 + 4 * 200)
    # The rest is each expert's own: no origin is needed.
    for name in NAMES:
        assert stored_bytes(name, group((7,), 3, decomposed=False)) == 2 * 3 * 7
        assert stored_bytes(name, group((), 3, decomposed=False)) == 2 * 3


def test_eight_percent_of_a_vit_b_takes_what_the_paper_says() -> None:
    shapes = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
    once = sum(2 * m * n for m, n in shapes)
    more = [stored_bytes("cart_indexing", group(s, 2)) - stored_bytes("cart_indexing", group(s, 1))
            for s in shapes]  # fmt: skip
    assert sum(more) / once == pytest.approx(0.106, abs=5e-4)

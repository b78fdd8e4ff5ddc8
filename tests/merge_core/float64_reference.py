"""The merge rules once more, in float64 numpy and as few lines as possible: the tests' oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import make_recipe
from merge_core.suites.suite import Suite

Array = np.ndarray
State = dict[str, Array]


def merge(suite: Suite, method: str, tasks: tuple[str, ...] | None = None, **parameters: Any):
    """What the engine makes of a suite, in memory."""
    recipe = make_recipe({"method": method, "parameters": parameters, "tasks": tasks})
    with torch.inference_mode():
        return MergeSession(suite, tasks, FactorStore()).merge(recipe)


def states(suite: Suite) -> tuple[list[State], State]:
    """Experts and base (empty if none) as float64 arrays, floating tensors only."""

    def load(checkpoint) -> State:
        names = [n for n in checkpoint if checkpoint.info(n).is_floating]
        return {n: checkpoint.tensor(n).double().numpy() for n in names}

    experts = [load(suite.expert(task)) for task in suite.tasks]
    return experts, {} if suite.base is None else load(suite.base)


def svd_k(A: Array, k: int) -> Array:
    U, S, Vt = np.linalg.svd(A, full_matrices=False)
    return (U[:, :k] * S[:k]) @ Vt[:k]


def per_parameter(
    suite: Suite, rule: Callable[[list[Array], Array | None], Array], matrices_only: bool
) -> State:
    """Apply a rule to every parameter as a matrix; average the others where asked."""
    experts, base = states(suite)
    merged = {}
    for name, first in experts[0].items():
        thetas = [e[name] for e in experts]
        if matrices_only and name not in suite.matrices:
            merged[name] = sum(thetas) / len(thetas)
            continue
        as_rows = (first.shape[0], -1) if first.ndim > 1 else (1, -1)
        origin = base[name].reshape(as_rows) if base else None
        merged[name] = rule([t.reshape(as_rows) for t in thetas], origin).reshape(first.shape)
    return merged


def average(suite: Suite) -> State:
    return per_parameter(suite, lambda thetas, base: sum(thetas) / len(thetas), False)


def task_arithmetic(suite: Suite, scale: float) -> State:
    return per_parameter(suite, lambda th, base: base + scale * sum(t - base for t in th), False)


def cart(suite: Suite, k: Callable[[int], int], scale: float) -> State:
    def rule(thetas: list[Array], base: Array | None) -> Array:
        mean = sum(thetas) / len(thetas)
        return mean + scale * sum(svd_k(t - mean, k(min(mean.shape))) for t in thetas)

    return per_parameter(suite, rule, True)


def low_rank_task_arithmetic(suite: Suite, k: Callable[[int], int], scale: float) -> State:
    return per_parameter(
        suite,
        lambda th, base: base + scale * sum(svd_k(t - base, k(min(base.shape))) for t in th),
        True,
    )


def tsv_m(suite: Suite, scale: float) -> State:
    def rule(thetas: list[Array], base: Array) -> Array:
        k = max(1, min(base.shape) // len(thetas))
        parts = [np.linalg.svd(t - base, full_matrices=False) for t in thetas]

        def polar(X: Array) -> Array:  # X (XᵀX)^(-1/2), by another route than the SVD
            values, Q = np.linalg.eigh(X.T @ X)
            inverse = np.where(values > 1e-10, 1 / np.sqrt(np.maximum(values, 1e-300)), 0)
            return X @ (Q * inverse) @ Q.T

        U = polar(np.hstack([U[:, :k] for U, _, _ in parts]))
        V = polar(np.hstack([Vt[:k].T for _, _, Vt in parts]))
        return base + scale * (U * np.concatenate([S[:k] for _, S, _ in parts])) @ V.T

    return per_parameter(suite, rule, True)


def iso_c(suite: Suite, scale: float) -> State:
    def rule(thetas: list[Array], base: Array) -> Array:
        U, S, Vt = np.linalg.svd(sum(t - base for t in thetas), full_matrices=False)
        return base + scale * S.mean() * U @ Vt

    return per_parameter(suite, rule, True)


def ties_update(taus: Array, limits: Array) -> Array:
    """Algorithm 1 of TIES, entry by entry in plain Python: T x entries, T thresholds."""
    out = np.zeros(taus.shape[1])
    for j in range(taus.shape[1]):
        kept = [x if abs(x) >= limit else 0.0 for x, limit in zip(taus[:, j], limits, strict=True)]
        sign = np.sign(sum(kept))
        agreeing = [x for x in kept if x != 0 and np.sign(x) == sign]
        out[j] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return out


def ties_limits(taus: Array, density: float) -> Array:
    """The k-th largest magnitude of each row by a full sort; k = floor(density·n), at least 1."""
    total = taus.shape[1]
    if density == 0:
        return np.full(len(taus), np.inf)
    k = min(total, max(1, int(density * total + 1e-9)))
    return np.sort(np.abs(taus), axis=1)[:, total - k]


def ties(suite: Suite, density: float, scale: float, trim: str) -> State:
    experts, base = states(suite)
    taus = {
        n: np.stack(
            [(e[n].astype(np.float32) - base[n].astype(np.float32)).ravel() for e in experts]
        ).astype(float)
        for n in base
    }
    everywhere = ties_limits(np.hstack(list(taus.values())), density)
    merged = {}
    for name, tau in taus.items():
        limits = everywhere if trim == "global" else ties_limits(tau, density)
        merged[name] = base[name] + scale * ties_update(tau, limits).reshape(base[name].shape)
    return merged


def assert_same(merged: Mapping[str, Any], expected: State, tolerance: float = 2e-5) -> None:
    """Every floating parameter of `expected`, to a tolerance that float32 arithmetic allows."""
    assert expected
    for name, value in expected.items():
        got = merged[name].double().numpy()
        assert got.shape == value.shape, name
        np.testing.assert_allclose(got, value, rtol=tolerance, atol=tolerance, err_msg=name)

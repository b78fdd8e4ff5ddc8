"""Geometric and spectral methods once more, in float64 numpy: the oracle beside float64_reference.

Each follows its formula by another route than the library: least squares for WUDI, arccos in
place of arctangents on the sphere, eigenvectors in place of an SVD for polar factors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from merge_core.suites.suite import Suite
from tests.merge_core.float64_reference import Array, State, average, per_parameter, states, svd_k

Matrices = list[Array]


def polar(X: Array) -> Array:
    """X (XᵀX)^(-1/2), zero along directions that X does not have."""
    values, Q = np.linalg.eigh(X.T @ X)
    inverse = np.where(values > 1e-10, 1 / np.sqrt(np.maximum(values, 1e-300)), 0)
    return X @ (Q * inverse) @ Q.T


def slerp_of(a: Array, b: Array, t: float) -> Array:
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    cosine = np.sum(a * b) / lengths if lengths else 1.0
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    omega = np.arccos(cosine)
    return (np.sin((1 - t) * omega) * a + np.sin(t * omega) * b) / np.sin(omega)


def slerp(suite: Suite, t: float) -> State:
    return per_parameter(suite, lambda th, base: slerp_of(th[0], th[1], t), False)


def karcher_of(thetas: Matrices) -> Array:
    units = [x / np.linalg.norm(x) for x in thetas]
    mean = sum(units) / np.linalg.norm(sum(units))
    for _ in range(200):
        step = np.zeros_like(mean)
        for unit in units:
            cosine = np.clip(np.sum(mean * unit), -1, 1)
            if abs(cosine) < 1 - 1e-14:
                step += np.arccos(cosine) / np.sqrt(1 - cosine**2) * (unit - cosine * mean)
        mean = mean + step / len(units)  # the chord instead of the arc: the same fixed point
        mean /= np.linalg.norm(mean)
    return np.mean([np.linalg.norm(x) for x in thetas]) * mean


def karcher(suite: Suite) -> State:
    return per_parameter(suite, lambda th, base: karcher_of(th), False)


def model_stock_of(thetas: Matrices, base: Array) -> Array:
    taus = [(x - base).ravel() for x in thetas]
    N = len(taus)
    cosines = [
        taus[i] @ taus[j] / np.linalg.norm(taus[i]) / np.linalg.norm(taus[j])
        for i in range(N)
        for j in range(i)
        if np.linalg.norm(taus[i]) * np.linalg.norm(taus[j]) > 0
    ]
    pairs = N * (N - 1) / 2
    cosine = max(0.0, sum(cosines) / pairs) if pairs else 1.0
    t = N * cosine / ((N - 1) * cosine + 1)
    return t * sum(thetas) / N + (1 - t) * base


def model_stock(suite: Suite) -> State:
    return per_parameter(suite, model_stock_of, False)


def iso_cts_of(taus: Matrices, common: float) -> Array:
    r, T = min(taus[0].shape), len(taus)
    each = min(round((r - int(common * r + 1e-9)) / T), r // T)
    k = r - T * each
    U, S, Vt = np.linalg.svd(sum(taus), full_matrices=False)
    left, values, right = [U[:, :k]], [S[:k]], [Vt[:k]]
    outside = np.eye(len(U)) - U[:, :k] @ U[:, :k].T
    for tau in taus:
        u, s, vt = np.linalg.svd(outside @ tau, full_matrices=False)
        left.append(u[:, :each])
        values.append(s[:each])
        right.append(vt[:each])
    kept = np.concatenate(values)
    live = kept > 1e-12 * max(np.linalg.norm(t) for t in taus)
    A, B = np.hstack(left) * live, np.vstack(right).T * live
    return kept.mean() * polar(A) @ polar(B).T


def iso_cts(suite: Suite, common: float, scale: float) -> State:
    return per_parameter(
        suite,
        lambda th, base: base + scale * iso_cts_of([x - base for x in th], common),
        True,
    )


def wudi_of(taus: Matrices, norm: str = "squared") -> Array:
    """The least-squares solution of X τ_iᵀ/c_i = τ_i τ_iᵀ/c_i for all tasks at once."""
    power = 1 if norm == "squared" else 0.5
    live = [(t, np.linalg.norm(t) ** power) for t in taus if np.linalg.norm(t) > 0]
    if not live:
        return np.zeros_like(taus[0])
    left = np.vstack([t / c for t, c in live])
    right = np.vstack([t @ t.T / c for t, c in live])
    return np.linalg.lstsq(left, right, rcond=1e-5)[0].T


def wudi(suite: Suite, norm: str = "squared") -> State:
    return per_parameter(suite, lambda th, base: base + wudi_of([x - base for x in th], norm), True)


def ties_of(parts: Array, density: float) -> Array:
    flat = parts.reshape(len(parts), -1)
    n = flat.shape[1]
    if density == 0 or n == 0:
        return np.zeros(parts.shape[1:])
    k = min(n, max(1, int(density * n + 1e-9)))
    limit = np.sort(np.abs(flat), axis=1)[:, n - k, None]
    # Entries equal up to rounding are kept or dropped together, whatever the basis did to them.
    kept = np.where(np.abs(flat) >= limit * (1 - 1e-9), flat, 0)
    agree = np.where(np.sign(kept) == np.sign(kept.sum(axis=0)), kept, 0)
    count = np.maximum(1, (agree != 0).sum(axis=0))
    return (agree.sum(axis=0) / count).reshape(parts.shape[1:])


def knots_of(taus: Matrices, rule: str, variant: str, density: float, rank: int | None) -> Array:
    U, S, Vt = np.linalg.svd(np.hstack(taus), full_matrices=False)
    rank = int((S > 1e-6 * S[0]).sum()) if rank is None else rank
    U, S, Vt = U[:, :rank], S[:rank], Vt[:rank]
    Vt = np.where(np.abs(Vt) > 1e-12, Vt, 0)  # where a task has a zero, rounding must not vote
    parts = np.stack(np.split(Vt, len(taus), axis=1))
    if variant == "code":
        parts = S[:, None] * parts
    merged = ties_of(parts, density) if rule == "ties" else parts.sum(axis=0)
    return U @ (merged if variant == "code" else S[:, None] * merged)


def knots(
    suite: Suite,
    rule: str = "ties",
    variant: str = "paper",
    density: float = 0.2,
    scale: float = 1.0,
    rank: int | None = None,
) -> State:
    def of(thetas: Matrices, base: Array) -> Array:
        return base + scale * knots_of([x - base for x in thetas], rule, variant, density, rank)

    return per_parameter(suite, of, True)


def cart_energy(suite: Suite, energy: float, scale: float) -> State:
    def of(thetas: Matrices, base: Array | None) -> Array:
        mean = sum(thetas) / len(thetas)
        total = np.zeros_like(mean)
        for theta in thetas:
            squares = np.linalg.svd(theta - mean, compute_uv=False) ** 2
            k = next(
                (k for k in range(1, len(squares)) if squares[:k].sum() >= energy * squares.sum()),
                len(squares),
            )
            total += svd_k(theta - mean, k)
        return mean + scale * total

    return per_parameter(suite, of, True)


def _truncate(difference: Array, k: int) -> Array:
    return svd_k(difference.reshape(len(difference), -1), k).reshape(difference.shape)


def cart_indexing(suite: Suite, index: int, k: Callable[[int], int], scale: float) -> State:
    expert, mean = states(suite)[0][index], average(suite)
    merged = {}
    for name, value in expert.items():
        residual = value - mean[name]
        if name in suite.matrices:
            residual = _truncate(residual, k(min(len(value), value.size // len(value))))
        merged[name] = mean[name] + scale * residual
    return merged


def tsv_c(suite: Suite, index: int) -> State:
    experts, base = states(suite)
    merged = dict(experts[index])
    for name in suite.matrices:
        value = merged[name]
        k = max(1, min(len(value), value.size // len(value)) // len(experts))
        merged[name] = base[name] + _truncate(value - base[name], k)
    return merged


# For tests that run over all registered methods: parameters, and the formula with them.
# SLERP takes two experts.
SPECTRAL_REFERENCES: dict[str, tuple[dict[str, Any], Callable[[Suite], State]]] = {
    "slerp": ({"t": 0.3}, lambda s: slerp(s, 0.3)),
    "karcher": ({}, karcher),
    "model_stock": ({}, model_stock),
    "iso_cts": ({"common": 0.5}, lambda s: iso_cts(s, 0.5, 1.0)),
    "wudi": ({"cut": 1e-10}, wudi),
    "knots": ({"density": 0.4}, lambda s: knots(s, density=0.4)),
    "cart_energy": ({"energy": 0.6}, lambda s: cart_energy(s, 0.6, 1.0)),
}
INDEXED_REFERENCES: dict[str, tuple[dict[str, Any], Callable[[Suite, int], State]]] = {
    "cart_indexing": ({"rank": 2}, lambda s, place: cart_indexing(s, place, lambda r: 2, 1.0)),
    "tsv_c": ({}, tsv_c),
}

"""Sparse and masked methods once more, in float64 numpy and plain Python: the tests' oracle."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import make_recipe
from merge_core.suites.suite import Suite
from tests.merge_core.float64_reference import (
    Array,
    State,
    merge,
    states,
    ties_limits,
    ties_update,
)

# Every method of the family, each variant of it.
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("ties", {"combine": "sum"}),
    ("dare_task_arithmetic", {}),
    ("dare_ties", {"drop": 0.999}),
    ("breadcrumbs", {}),
    ("pcb", {"variant": "paper"}),
    ("pcb", {"variant": "code"}),
]


def run(suite: Suite, method: str, task: str | None = None, keep: bool = True, **fields: Any):
    """What the engine makes of a suite, with all of a recipe's fields; `task` for one model each.

    With `keep` off, each pass reads the parameters again, as it does for a large model.
    """
    recipe = make_recipe({"method": method, **fields})
    with torch.inference_mode():
        session = MergeSession(suite, recipe.tasks, FactorStore())
        session.groups.keep = keep
        return session.merge(recipe, task=task)


def task_vectors(suite: Suite) -> tuple[dict[str, Array], State]:
    """T x entries of every parameter, as float32 differences; and the base."""
    experts, base = states(suite)
    taus = {
        name: np.stack(
            [(e[name].astype(np.float32) - b.astype(np.float32)).ravel() for e in experts]
        ).astype(float)
        for name, b in base.items()
    }
    return taus, base


def move(base: State, scale: float, updates: dict[str, Array]) -> State:
    return {n: b + scale * updates[n].reshape(b.shape) for n, b in base.items()}


def disjoint(taus: Array, how: str) -> Array:
    """Elect and combine, entry by entry."""
    if how == "mean":
        return ties_update(taus, np.zeros(len(taus)))
    out = np.zeros(taus.shape[1])
    for j, column in enumerate(taus.T):
        out[j] = sum(x for x in column if np.sign(x) == np.sign(column.sum()))
    return out


def ties_sum(suite: Suite, density: float, scale: float, trim: str) -> State:
    taus, base = task_vectors(suite)
    everywhere = ties_limits(np.hstack(list(taus.values())), density)
    updates = {}
    for name, tau in taus.items():
        limits = everywhere if trim == "global" else ties_limits(tau, density)
        updates[name] = disjoint(np.where(np.abs(tau) >= limits[:, None], tau, 0), "sum")
    return move(base, scale, updates)


def coins(suite: Suite, name: str, drop: float, seed: int) -> Array:
    """Which entries DARE keeps: T x entries."""
    shape, rows = suite.expert(suite.tasks[0]).info(name).shape, []
    for task in suite.tasks:
        parts = [part.encode() for part in ("dare", str(seed), name, task)]
        digest = hashlib.sha256(b"".join(len(p).to_bytes(8, "little") + p for p in parts))
        source = torch.Generator().manual_seed(int(digest.hexdigest(), 16) >> 196)
        rows.append(torch.rand(shape, generator=source).numpy().ravel() >= drop)
    return np.stack(rows)


def dare(suite: Suite, drop: float, scale: float, how: str = "all", seed: int = 0) -> State:
    """`how`: all (Task Arithmetic), or mean or sum of those of the elected sign."""
    taus, base = task_vectors(suite)
    updates = {}
    for name, tau in taus.items():
        kept = tau * coins(suite, name, drop, seed) / (1 - drop)
        updates[name] = kept.sum(axis=0) if how == "all" else disjoint(kept, how)
    return move(base, scale, updates)


def breadcrumbs(suite: Suite, small: float, large: float, scale: float) -> State:
    taus, base = task_vectors(suite)
    updates = {}
    for name, tau in taus.items():
        n = tau.shape[1]
        out, bottom = int(large * n + 1e-9), int(small * n + 1e-9)
        updates[name] = np.zeros(n)
        for row in tau:
            middle = np.sort(np.abs(row))[bottom : n - out]
            if len(middle):
                inside = (np.abs(row) >= middle[0]) & (np.abs(row) <= middle[-1])
                updates[name] += np.where(inside, row, 0)
    return move(base, scale, updates)


def tall_masks_of(tau: Array, threshold: float) -> Array:
    total = tau.sum(axis=0)
    return np.stack([np.abs(row) >= threshold * np.abs(total - row) for row in tau])


def consensus(suite: Suite, threshold: float, scale: float) -> State:
    taus, base = task_vectors(suite)
    updates = {}
    for name, tau in taus.items():
        votes = tall_masks_of(tau, threshold).sum(axis=0)
        updates[name] = np.where(votes >= min(2, len(tau)), tau.sum(axis=0), 0)
    return move(base, scale, updates)


def tall(suite: Suite, threshold: float, index: int) -> State:
    taus, base = task_vectors(suite)
    masks = {n: tall_masks_of(tau, threshold)[index] for n, tau in taus.items()}
    return move(base, 1, {n: np.where(masks[n], tau.sum(axis=0), 0) for n, tau in taus.items()})


def emr(suite: Suite, index: int) -> State:
    taus, base = task_vectors(suite)
    whole = np.hstack(list(taus.values()))
    unified = np.zeros(whole.shape[1])
    for j, column in enumerate(whole.T):
        agreeing = [x for x in column if np.sign(x) == np.sign(column.sum()) != 0]
        unified[j] = max(agreeing, key=abs, default=0.0)
    own = whole[index]
    masked = np.where(own * unified > 0, unified, 0)
    factor = np.abs(own).sum() / np.abs(masked).sum() if masked.any() else 1.0
    cuts = np.cumsum([tau.shape[1] for tau in taus.values()])[:-1]
    return move(base, factor, dict(zip(taus, np.split(masked, cuts), strict=True)))


def minmax(x: Array) -> Array:
    return (x - x.min()) / (x.max() - x.min()) if x.max() > x.min() else np.zeros_like(x)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return e / e.sum()


def pcb_weights(whole: Array, density: float, variant: str) -> tuple[Array, Array]:
    """Weights and the (perhaps clipped) task vectors: T x D of the whole model at once."""
    T, D = whole.shape
    if variant == "paper":
        beta = np.stack(
            [softmax(T * minmax(a * a)) * sum(softmax(minmax(a * b)) for b in whole) for a in whole]
        )
        limit = np.sort(beta, axis=1)[:, [D - max(1, int(density * D + 1e-9))]]
        return np.where(beta >= limit * (1 - 1e-12), beta, 0), whole
    ascending = np.sort(np.abs(whole), axis=1)
    low, high = ascending[:, [int(D * 1e-4)]], ascending[:, [int(D * (1 - 1e-4) - 1)]]
    size = np.clip(np.abs(whole), low, high)
    intra = np.exp(T * np.stack([minmax(row) for row in size]) ** 2)
    beta = intra * np.tanh(whole * whole.sum(axis=0))
    limit = np.sort(beta, axis=1)[:, [min(D - 1, int(D * (1 - density)))]]
    # Where one entry is kept, or equals, the authors' 0/0 is 1 here.
    weights = np.stack(
        [
            minmax(row) if row.max() > row.min() else (b >= row.max()).astype(float)
            for row, b in zip(np.maximum(beta, limit), beta, strict=True)
        ]
    )
    return weights, np.sign(whole) * size


def pcb(suite: Suite, density: float, scale: float, variant: str, weights=None) -> State:
    taus, base = task_vectors(suite)
    beta, whole = pcb_weights(np.hstack(list(taus.values())), density, variant)
    factors = np.ones(len(whole)) if weights is None else np.array(weights)
    top = (factors[:, None] * beta * whole).sum(axis=0)
    merged = top / np.maximum(beta.sum(axis=0), 1e-300 if variant == "paper" else 1e-12)
    cuts = np.cumsum([tau.shape[1] for tau in taus.values()])[:-1]
    return move(base, scale, dict(zip(taus, np.split(merged, cuts), strict=True)))


# For tests that run over all registered methods: parameters, and the formula with them.
SPARSE_REFERENCES = {
    "dare_task_arithmetic": ({"drop": 0.6}, lambda s: dare(s, 0.6, 0.3)),
    "dare_ties": ({"drop": 0.4}, lambda s: dare(s, 0.4, 1.0, "mean")),
    "breadcrumbs": (
        {"drop_small": 0.3, "drop_large": 0.1},
        lambda s: breadcrumbs(s, 0.3, 0.1, 0.3),
    ),
    "consensus": ({}, lambda s: consensus(s, 0.4, 0.3)),
    "pcb": ({"density": 0.3}, lambda s: pcb(s, 0.3, 1.2, "paper")),
}
INDEXED_REFERENCES = {
    "tall_masks": ({}, lambda s, place: tall(s, 0.4, place)),
    "emr": ({}, emr),
}


def of_vectors(suite_of: Callable[..., Suite], *taus: Any, base: float = 0.0) -> Suite:
    """A suite of one parameter whose task vectors are these matrices."""
    start = torch.full_like(torch.tensor(taus[0]), base)
    members = {f"t{i}": {"w.weight": start + torch.tensor(tau)} for i, tau in enumerate(taus)}
    return suite_of(members, {"w.weight": start})


def matrix(suite: Suite, method: str, **parameters: Any) -> list[list[float]]:
    """That parameter's merge, as lists."""
    return merge(suite, method, **parameters)["w.weight"].tolist()

"""How a merged update acts where the experts' own updates act: scale and rank in closed form.

A fine-tuned linear layer changes its output for an input x by C_t x. The rows of C_t are
combinations of the inputs that it was trained on, so C_tᵀC_t stands for their covariance (WUDI,
arXiv:2503.08099, uses it so). With it every expected size over task t's inputs is a norm:
E‖A x‖² ∝ ‖A C_tᵀ‖²_F. The merged update is λD, D that of scale 1; then, relative to the expert's,

    strength  a = mean_t ‖D C_tᵀ‖² / ‖C_t C_tᵀ‖²         how strongly D acts on the tasks' inputs
    overlap   b = mean_t ⟨D C_tᵀ, C_t C_tᵀ⟩ / ‖C_t C_tᵀ‖²   how much of that is what the expert does
    error     mean_t ‖(λD − C_t) C_tᵀ‖² / ‖C_t C_tᵀ‖² = 1 − 2λb + λ²a

[derived] The error is least at λ = b/a. That is c/√a with c = b/√a, the cosine between the two
actions, which no λ changes: least squares shrinks the update by c, the more the tasks disturb
each other. λ = 1/√a leaves the shrinking out: the merged update then acts as strongly on the
tasks' inputs as their own do. The least error, 1 − c², is smallest where c is largest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.rank_selection.space import RANKS, SearchSpace
from merge_core.factors.decomposition import gram
from merge_core.factors.factorise import map_matrices
from merge_core.factors.low_rank import as_matrix
from merge_core.merging.recipe import Recipe
from merge_core.progress import Progress
from merge_core.task_vectors import TensorGroup, TensorGroups

PROPORTIONAL: tuple[str, ...] = (
    "cart",
    "low_rank_task_arithmetic",
    "task_arithmetic",
    "tsv_m",
    "iso_c",
    "iso_cts",
)
"""Methods of one model whose matrices are the origin plus λ times an update without λ."""

# A merge rounds each entry a few times, by at most half an ε of it.
ROUNDINGS = 4


def shares_of(space: SearchSpace) -> tuple[float, ...]:
    """The shares of directions at which curves over rank are computed.

    Those of the space, with :data:`RANKS` between them, so that a sparse axis does not make a
    coarse curve; empty for a method without a rank.
    """
    if not space.ranks:
        return ()
    return tuple(sorted({*RANKS, *(r for r in space.ranks if isinstance(r, float))}))


def split_progress(progress: Progress | None, count: int) -> list[Progress | None]:
    """One progress for each of several passes over the same matrices, seen as one work."""
    if progress is None:
        return [None] * count
    outer = progress

    def stage(index: int) -> Progress:
        def listener(done: int, total: int, label: str) -> None:
            outer.step(index * total + done, count * total, label)

        return Progress(listener, outer.cancel)

    return [stage(index) for index in range(count)]


def update(group: TensorGroup, recipe: Recipe) -> Tensor:
    """D: what a recipe adds to its origin in one matrix at scale 1, m x n, working dtype.

    An update that rounding alone could leave (CART of two tasks) is exactly zero.

    Args:
        group: a decomposed parameter.
        recipe: of one of :data:`PROPORTIONAL`, at scale 1.
    """
    merge = recipe.declaration.merge
    assert merge is not None
    run = recipe.run(group.tasks)
    merged = merge(group, recipe.parameters_of(group.name), run)
    D = as_matrix(merged - group.origin(run.origin))
    size = torch.linalg.vector_norm
    rounding = ROUNDINGS * torch.finfo(D.dtype).eps * size(group.experts)
    return D if size(D) > rounding else torch.zeros_like(D)


def targets(vectors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What strength and overlap of one matrix are taken against, for any number of updates.

    Args:
        vectors: task vectors C_t, m x n; those that changed nothing do not count.

    Returns:
        mean_t C_tᵀC_t / ‖C_t C_tᵀ‖² (n x n), mean_t C_t C_tᵀC_t / ‖C_t C_tᵀ‖² (m x n). Means over
        the tasks that changed the matrix; zeros if none did.
    """
    m, n = vectors[0].shape
    covariance = vectors[0].new_zeros(n, n)
    response = vectors[0].new_zeros(m, n)
    live = 0
    for C in vectors:
        inputs = gram(C)
        size = float(inputs.double().square().sum())
        if size > 0:
            live += 1
            covariance += inputs / size
            response += (gram(C.T) @ C if m < n else C @ inputs) / size
    return covariance / max(1, live), response / max(1, live)


def act(D: Tensor, vectors: Sequence[Tensor]) -> tuple[float, float]:
    """Strength and overlap of one update, from the products D C_tᵀ: no n x n matrix is made.

    Args:
        D: m x n.
        vectors: as for :func:`targets`.
    """
    strength = overlap = 0.0
    live = 0
    for C in vectors:
        outputs = gram(C.T)
        size = float(outputs.double().square().sum())
        if size > 0:
            live += 1
            acted = D @ C.T
            strength += float(acted.double().square().sum()) / size
            overlap += float((acted * outputs).double().sum()) / size
    return strength / max(1, live), overlap / max(1, live)


def responses(
    groups: TensorGroups,
    space: SearchSpace,
    progress: Progress | None = None,
    ranks: Sequence[float] | None = None,
) -> pd.DataFrame:
    """Strength and overlap of the merged update in every matrix, over the rank.

    Args:
        groups: the suite's parameters; those not decomposed are passed over.
        space: a method of :data:`PROPORTIONAL`; its ranks (see :func:`shares_of`) and, where it
            has none, its one update.
        progress: told after each matrix.
        ranks: the shares that are looked at; all of :func:`shares_of` when None.

    Returns:
        One row per matrix and rank: parameter, rank (share; NaN where the method has none),
        strength (a), overlap (b; both without unit, see the module), update_energy (‖D‖²_F) and
        task_energy (mean_t ‖C_t‖²_F), squared units of the weights.

    Raises:
        SuiteError: origin "base" without a base.
        Cancelled: by `progress`.
    """
    look = look_at_responses(groups.tasks, space, ranks)
    found = map_matrices(look, groups, progress)
    return pd.DataFrame(list(chain.from_iterable(found)))


def look_at_responses(
    tasks: Sequence[str], space: SearchSpace, ranks: Sequence[float] | None = None
) -> Callable[[TensorGroup], list[dict[str, object]]]:
    """What gives one matrix's rows of :func:`responses`."""
    shares: Sequence[float | None] = ranks or shares_of(space) or (None,)
    recipes = [space.recipe(share, 1.0) for share in shares]
    origin = recipes[0].run(tuple(tasks)).origin

    @torch.no_grad()
    def rows(group: TensorGroup) -> list[dict[str, object]]:
        vectors = [as_matrix(vector) for vector in group.task_vectors(origin)]
        m, n = vectors[0].shape
        # Products of m n² or m² n numbers: to make the targets, and then one for each update.
        T, count = len(vectors), len(shares)
        few = (1 + 2 * count) * T * m < T * (n + 3 * min(m, n)) + 2 * count * n
        covariance, response = (None, None) if few else targets(vectors)
        task_energy = float(np.mean([float(C.double().square().sum()) for C in vectors]))
        found: list[dict[str, object]] = []
        for share, recipe in zip(shares, recipes, strict=True):
            D = update(group, recipe)
            if covariance is None or response is None:
                strength, overlap = act(D, vectors)
            else:
                # tr(D A Dᵀ) and ⟨D, B⟩: one product a rank, however many tasks.
                strength = float(((D @ covariance) * D).double().sum())
                overlap = float((D * response).double().sum())
            found.append(
                {
                    "parameter": group.name,
                    "rank": np.nan if share is None else share,
                    "strength": strength,
                    "overlap": overlap,
                    "update_energy": float(D.double().square().sum()),
                    "task_energy": task_energy,
                }
            )
        return found

    return rows


def whole_model(frame: pd.DataFrame) -> pd.DataFrame:
    """The model's responses from those of its matrices, and the scales that follow.

    Args:
        frame: of :func:`responses`.

    Returns:
        One row per rank: rank, strength and overlap (means over matrices: each is relative, so
        every matrix counts alike), update_energy and task_energy (sums), alignment (b/√a),
        matched (λ = 1/√a), least_squares (λ = b/a), equal_norm (λ at which the update is as long
        as a task vector is on average: √(task_energy/update_energy)). NaN where D is zero.
    """
    result = frame.groupby("rank", as_index=False, dropna=False).agg(
        strength=("strength", "mean"),
        overlap=("overlap", "mean"),
        update_energy=("update_energy", "sum"),
        task_energy=("task_energy", "sum"),
    )
    live = result["strength"].where(result["strength"] > 0)
    length = result["update_energy"].where(result["update_energy"] > 0)
    return result.assign(
        alignment=result["overlap"] / np.sqrt(live),
        matched=1 / np.sqrt(live),
        least_squares=result["overlap"] / live,
        equal_norm=np.sqrt(result["task_energy"] / length),
    )

"""Spectra of task vectors: singular values, energy, ranks and noise bounds per matrix and task.

Singular values have the unit of the weights; energies are shares of Σσ²; ranks count directions.
Every scalar of an all-zero spectrum (a task that left the matrix as it was) is 0.
"""

from __future__ import annotations

from itertools import chain
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from analysis.spectral.noise_bounds import as_array, gavish_donoho_cut, noise_edge
from merge_core.checkpoints.parameter_roles import describe
from merge_core.executors.base import one_thread
from merge_core.factors.decomposition import singular_values
from merge_core.factors.factorise import map_matrices
from merge_core.factors.low_rank import as_matrix, count_directions
from merge_core.methods.spectral import energy_rank
from merge_core.progress import Progress
from merge_core.task_vectors import Origin, TensorGroup, TensorGroups

Part = Literal["whole", "q", "k", "v"]

# CART's recommended share of directions.
TOP_SHARE = 0.08


def stable_rank(S: Tensor | ArrayLike) -> float:
    """‖A‖_F² / σ_1², in [1, r]: how many directions as strong as the first the energy amounts to.

    Source: Rudelson and Vershynin, arXiv:math/0503442.

    Example:
        >>> stable_rank([2.0, 2.0, 0.0]), stable_rank([2.0, 1.0])
        (2.0, 1.25)
    """
    sigma = as_array(S)
    return float(np.sum((sigma / sigma[0]) ** 2)) if sigma[0] > 0 else 0.0


def effective_rank(S: Tensor | ArrayLike) -> float:
    """exp(−Σ p log p) with p = σ/Σσ, in [1, r]: the entropy of the spectrum as a count.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007, definition 1.

    Example:
        >>> round(effective_rank([1.0, 1.0, 1.0]), 6), effective_rank([1.0, 0.0])
        (3.0, 1.0)
    """
    sigma = as_array(S)
    p = sigma[sigma > 0]
    if p.size == 0:
        return 0.0
    p = p / p.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def participation_ratio(S: Tensor | ArrayLike) -> float:
    """(Σσ²)² / Σσ⁴, in [1, r]: the number of directions that share the energy.

    Example:
        >>> participation_ratio([1.0, 1.0, 1.0]), participation_ratio([1.0, 0.0])
        (3.0, 1.0)
    """
    sigma = as_array(S)
    if not sigma[0] > 0:
        return 0.0
    energy = (sigma / sigma[0]) ** 2
    return float(energy.sum() ** 2 / np.sum(energy**2))


def cumulative_energy(S: Tensor | ArrayLike) -> np.ndarray:
    """Σ_{i≤k} σ_i² / Σσ² for k = 1..r: r values, ascending to exactly 1 (all 0 without energy).

    Example:
        >>> cumulative_energy([2.0, 1.0, 1.0, 0.0]).round(3).tolist()
        [0.667, 0.833, 1.0, 1.0]
    """
    sigma = as_array(S)
    if not sigma[0] > 0:
        return np.zeros_like(sigma)
    energy = np.cumsum((sigma / sigma[0]) ** 2)
    return energy / energy[-1]


def parts_of(group: TensorGroup) -> tuple[Part, ...]:
    """The parts a matrix can be looked at in: q, k and v too where it fuses them.

    Example:
        >>> groups = TensorGroups(load_suite("vision"), ["digits", "dots"], FactorStore())
        >>> {group.name: parts_of(group) for group in groups.members}["blocks.0.attn.qkv.weight"]
        ('whole', 'q', 'k', 'v')
    """
    fused = group.decomposed and describe(group.name, group.info).parts
    return get_args(Part) if fused else ("whole",)


def _spectra(
    group: TensorGroup, origin: Origin, part: Part
) -> tuple[tuple[int, int], list[np.ndarray]]:
    """Rows and columns of a part of a matrix, and its singular values for each task."""
    if part == "whole":
        return group.info.matrix_shape, [as_array(S) for S in group.singular_values(origin)]
    parts = parts_of(group)
    if part not in parts:
        raise ValueError(f"{group.name!r} has no part {part!r}; it has {', '.join(parts)}")
    # Of GPT-2's weights, stored in x out, columns are outputs.
    outputs = int(group.stored_transposed)
    matrices = [
        as_matrix(tau).chunk(3, dim=outputs)[parts.index(part) - 1]
        for tau in group.task_vectors(origin)
    ]
    m, n = matrices[0].shape
    return (m, n), [as_array(singular_values(A)) for A in matrices]


@one_thread()
def spectrum(group: TensorGroup, origin: Origin, part: Part = "whole") -> pd.DataFrame:
    """Singular values of each task vector of one matrix.

    Args:
        group: a decomposed parameter, out x in (kernels as o x (i·kh·kw)).
        origin: what the task vectors are taken about.
        part: the whole matrix, or a third of the outputs of a fused qkv weight.

    Returns:
        One row per task and direction: task, origin, index (1..r), share (index/r), sigma
        (unit of the weights), energy (Σ_{i≤index}σ²/Σσ²).

    Raises:
        SuiteError: origin "base" without a base.
        ValueError: the matrix has no such part.

    Example:
        >>> suite = load_suite("vision")
        >>> group = TensorGroup(suite, suite.tasks, "blocks.0.attn.proj.weight", FactorStore())
        >>> frame = spectrum(group, "base")
        >>> len(frame), list(frame)
        (5120, ['task', 'origin', 'index', 'share', 'sigma', 'energy'])
    """
    _, spectra = _spectra(group, origin, part)
    r = spectra[0].size
    index = np.arange(1, r + 1)
    return pd.DataFrame(
        {
            "task": np.repeat(group.tasks, r),
            "origin": origin,
            "index": np.tile(index, len(spectra)),
            "share": np.tile(index / r, len(spectra)),
            "sigma": np.concatenate(spectra),
            "energy": np.concatenate([cumulative_energy(S) for S in spectra]),
        }
    )


@one_thread()
def cuts(group: TensorGroup, origin: Origin, part: Part = "whole") -> pd.DataFrame:
    """Noise bounds of each task vector of one matrix, and how many directions pass them.

    Args:
        group: a decomposed parameter.
        origin: what the task vectors are taken about.
        part: as in :func:`spectrum`.

    Returns:
        One row per task: task, origin, noise_edge and gavish_donoho (singular values), noise_rank
        and gavish_donoho_rank (counts). Their limits are told in
        :mod:`analysis.spectral.noise_bounds`.

    Raises:
        SuiteError: origin "base" without a base.
        ValueError: the matrix has no such part.

    Example:
        >>> suite = load_suite("vision")
        >>> group = TensorGroup(suite, suite.tasks, "blocks.0.attn.proj.weight", FactorStore())
        >>> bool((cuts(group, "base")["noise_rank"] < 256).all())
        True
    """
    (m, n), spectra = _spectra(group, origin, part)
    rows = []
    for task, S in zip(group.tasks, spectra, strict=True):
        edge, cut = noise_edge(S, m, n), gavish_donoho_cut(S, m, n)
        rows.append(
            {
                "task": task,
                "origin": origin,
                "noise_edge": edge,
                "noise_rank": int(np.sum(edge < S)),
                "gavish_donoho": cut,
                "gavish_donoho_rank": int(np.sum(cut < S)),
            }
        )
    return pd.DataFrame(rows)


def spectral_summary(
    groups: TensorGroups, origin: Origin, progress: Progress | None = None, apart: bool = False
) -> pd.DataFrame:
    """The spectrum of every matrix and task in a few numbers.

    Args:
        groups: the suite's parameters; those not decomposed are passed over.
        origin: what the task vectors are taken about.
        progress: told after each matrix.
        apart: look at queries, keys and values one by one where a matrix fuses them.

    Returns:
        One row per parameter, part and task: parameter, part, task, origin, rows, columns,
        frobenius (‖A‖_F) and spectral_norm (σ_1) in the unit of the weights, stable_rank,
        effective_rank, participation_ratio, top_share (energy in the leading 8 % of the
        directions), energy_rank_90 and noise_rank (counts).

    Raises:
        SuiteError: origin "base" without a base.
        Cancelled: by `progress`.

    Example:
        >>> groups = TensorGroups(load_suite("vision"), ["digits"], FactorStore())
        >>> frame = spectral_summary(groups, "base")
        >>> len(frame), bool((frame["stable_rank"] <= frame["effective_rank"]).all())
        (8, True)
    """

    def rows(group: TensorGroup) -> list[dict[str, object]]:
        found: list[dict[str, object]] = []
        parts = parts_of(group)
        for part in parts[1:] if apart and len(parts) > 1 else parts[:1]:
            shape, spectra = _spectra(group, origin, part)
            found += [
                {
                    "parameter": group.name,
                    "part": part,
                    "task": task,
                    "origin": origin,
                    **_summarise(S, *shape),
                }
                for task, S in zip(group.tasks, spectra, strict=True)
            ]
        return found

    found = map_matrices(rows, groups, progress)
    return pd.DataFrame(list(chain.from_iterable(found)))


def _summarise(S: np.ndarray, m: int, n: int) -> dict[str, float]:
    """The columns of a summary, of the singular values of an m x n matrix."""
    return {
        "rows": m,
        "columns": n,
        "frobenius": float(np.linalg.norm(S)),
        "spectral_norm": float(S[0]),
        "stable_rank": stable_rank(S),
        "effective_rank": effective_rank(S),
        "participation_ratio": participation_ratio(S),
        "top_share": float(cumulative_energy(S)[count_directions(TOP_SHARE, S.size) - 1]),
        "energy_rank_90": energy_rank(torch.as_tensor(S), 0.9),
        "noise_rank": int(np.sum(noise_edge(S, m, n) < S)),
    }

"""Rules that give a matrix a rank from its singular values alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pandas as pd
import torch

from analysis.spectral.noise_bounds import as_array, gavish_donoho_cut, noise_edge
from analysis.spectral.spectra import (
    effective_rank,
    participation_ratio,
    stable_rank,
)
from merge_core.factors.factorise import map_matrices
from merge_core.methods.spectral import energy_rank
from merge_core.progress import Progress
from merge_core.task_vectors import Origin, TensorGroup, TensorGroups


@dataclass(frozen=True)
class Spectrum:
    """The spectrum of one task vector in one matrix, as a rule reads it.

    Attributes:
        S: its r singular values, descending.
        rows, columns: of the matrix.
        tasks: how many are merged.
    """

    S: np.ndarray
    rows: int
    columns: int
    tasks: int


@dataclass(frozen=True)
class Rule:
    """A rule.

    Attributes:
        title: for people.
        why: what its rank means, one sentence.
        source: paper.
        count: directions to keep, possibly a fraction; 0 where there is no energy.
    """

    title: str
    why: str
    source: str
    count: Callable[[Spectrum], float]


def nuclear_share(S: np.ndarray) -> np.ndarray:
    """Σ_{i≤k} σ_i / Σσ for k = 1..r: r values, ascending to 1 (all 0 without energy)."""
    total = np.cumsum(as_array(S))
    return total / total[-1] if total[-1] > 0 else np.zeros_like(total)


def _energy_rule(share: float) -> Rule:
    return Rule(
        f"Energy {share:.0%}",
        f"the fewest directions that hold {share:.0%} of the task vectors' energy",
        "energy threshold, as in the authors' code of CART, arXiv:2412.12153",
        lambda s: energy_rank(torch.as_tensor(s.S), share),
    )


def _fixed_share_rule(share: float, why: str) -> Rule:
    return Rule(
        f"Share {share:.0%}", why, "CART, arXiv:2412.12153", lambda s: max(1.0, share * s.S.size)
    )


RULES: dict[str, Rule] = {
    "energy_80": _energy_rule(0.8),
    "energy_90": _energy_rule(0.9),
    "energy_95": _energy_rule(0.95),
    "nuclear_40": Rule(
        "Nuclear norm 40%",
        "the fewest directions that hold 40% of the sum of the singular values",
        "STAR, arXiv:2502.10339",
        lambda s: int(np.searchsorted(nuclear_share(s.S), 0.4)) + 1,
    ),
    "stable_rank": Rule(
        "Stable rank",
        "as many directions as would hold all energy if each were as strong as the first",
        "Rudelson and Vershynin, arXiv:math/0503442",
        lambda s: stable_rank(s.S),
    ),
    "participation_ratio": Rule(
        "Participation ratio",
        "the number of directions that share the energy, (Σσ²)²/Σσ⁴",
        "participation ratio of the energies",
        lambda s: participation_ratio(s.S),
    ),
    "effective_rank": Rule(
        "Effective rank",
        "the exponential of the spectrum's entropy",
        "Roy and Vetterli, EUSIPCO 2007",
        lambda s: effective_rank(s.S),
    ),
    "noise_edge": Rule(
        "Marchenko-Pastur edge",
        "the directions above what noise alone would reach",
        "Marchenko and Pastur, 1967",
        lambda s: float(np.sum(noise_edge(s.S, s.rows, s.columns) < s.S)),
    ),
    "gavish_donoho": Rule(
        "Gavish-Donoho cut",
        "the directions above the threshold that denoises best in the worst case",
        "Gavish and Donoho, arXiv:1305.5870",
        lambda s: float(np.sum(gavish_donoho_cut(s.S, s.rows, s.columns) < s.S)),
    ),
    "one_per_task": Rule(
        "Share 1/T",
        "an equal part of the directions for each task",
        "Task Singular Vectors, arXiv:2412.00081",
        lambda s: max(1, s.S.size // s.tasks),
    ),
    "share_8": _fixed_share_rule(0.08, "the share that the paper recommends"),
    "share_12": _fixed_share_rule(0.12, "the share that the authors ship for 8 tasks"),
}
"""Rules by name."""


def rule_ranks(
    groups: TensorGroups, origin: Origin, progress: Progress | None = None
) -> pd.DataFrame:
    """The rank that every rule gives to every matrix, from singular values alone.

    Args:
        groups: the suite's parameters; those not decomposed are passed over.
        origin: what the task vectors are taken about.
        progress: told after each matrix.

    Returns:
        One row per rule and matrix: proxy, parameter, share (directions over r, mean over the
        tasks that changed the matrix, in [1/r, 1]).

    Raises:
        SuiteError: origin "base" without a base.
        Cancelled: by `progress`.
    """

    found = map_matrices(look_at_rules(origin), groups, progress)
    return pd.DataFrame(list(chain.from_iterable(found)))


def look_at_rules(origin: Origin) -> Callable[[TensorGroup], list[dict[str, object]]]:
    """What gives one matrix's rows of :func:`rule_ranks`."""

    def rows(group: TensorGroup) -> list[dict[str, object]]:
        shape, values = group.info.matrix_shape, group.singular_values(origin)
        spectra = [Spectrum(as_array(S), *shape, len(values)) for S in values]
        live = [s for s in spectra if s.S[0] > 0]
        found: list[dict[str, object]] = []
        for name, rule in RULES.items():
            # A matrix that no task changed adds nothing at any rank.
            mean = float(np.mean([rule.count(s) for s in live])) if live else 1.0
            share = float(np.clip(mean / min(shape), 1 / min(shape), 1))
            found.append({"proxy": name, "parameter": group.name, "share": share})
        return found

    return rows

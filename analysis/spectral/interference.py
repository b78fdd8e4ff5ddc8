"""How task vectors get in each other's way: cosines, interference of subspaces, sign conflicts.

Row spaces are spanned by right singular vectors V, column spaces by left ones U. All sums are
float64; factors come in the float32 they are stored in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, combinations, product
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.spectral.overlap import overlap_of, random_overlap
from merge_core.errors import SuiteError
from merge_core.executors.base import one_thread
from merge_core.factors.factorise import map_matrices, map_parameters
from merge_core.factors.low_rank import Directions, count_directions
from merge_core.progress import Progress
from merge_core.task_vectors import Origin, TensorGroup, TensorGroups

Side = Literal["row", "column"]


def cosine_similarity(
    groups: TensorGroups,
    origin: Origin,
    parameter: str | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Cosines of whole task vectors, or of one parameter's.

    Args:
        groups: the suite's parameters; integer buffers are passed over.
        origin: what the task vectors are taken about.
        parameter: only this one; None for all of them as one long vector.
        progress: told after each parameter.

    Returns:
        One row per ordered pair: first, second, origin, cosine in [−1, 1] (0 where a task
        vector is zero). About the average the task vectors sum to zero, so the mean over pairs
        is near −1/(T−1) by construction: exactly there when all have one norm.

    Raises:
        SuiteError: unknown parameter, or origin "base" without a base.
        Cancelled: by `progress`.

    Example:
        >>> groups = TensorGroups(load_suite("vision"), ["digits", "dots"], FactorStore())
        >>> cosine_similarity(groups, "average", "cls_token")["cosine"].round(3).tolist()
        [1.0, -1.0, -1.0, 1.0]
    """

    def products(group: TensorGroup) -> Tensor:
        tau = _task_vectors(group, origin)
        return tau @ tau.T

    T = len(groups.tasks)
    gram = torch.zeros(T, T, dtype=torch.float64)
    for own in map_parameters(products, groups, _weights(groups, parameter), progress):
        gram += own
    norm = gram.diagonal().sqrt()
    cosine = (gram / torch.outer(norm, norm)).nan_to_num(0.0).clamp(-1, 1)
    return _ordered_pairs(groups.tasks, origin, {"cosine": cosine.numpy()})


def _weights(groups: TensorGroups, parameter: str | None) -> Callable[[TensorGroup], bool]:
    """Which parameters are weights, or the one asked for."""

    def chosen(group: TensorGroup) -> bool:
        return group.info.is_floating and parameter in (None, group.name)

    if not any(map(chosen, groups.members)):
        raise SuiteError(
            f"The suite {groups.suite.name!r} has no weights named {parameter!r} in all experts."
            if parameter
            else f"The experts of the suite {groups.suite.name!r} have no weights in common."
        )
    return chosen


def _task_vectors(group: TensorGroup, origin: Origin) -> Tensor:
    """T x numel, float64: centred about the float64 mean, so that they sum to zero."""
    experts = group.experts.double()
    about = group.base.double() if origin == "base" else experts.mean(dim=0)
    return (experts - about).flatten(1)


def _ordered_pairs(
    tasks: Sequence[str], origin: Origin, values: dict[str, np.ndarray | int]
) -> pd.DataFrame:
    """A frame of all T·T ordered pairs from T x T arrays."""
    first, second = zip(*product(tasks, tasks), strict=True)
    columns = {name: np.ravel(v) if np.ndim(v) else v for name, v in values.items()}
    return pd.DataFrame({"first": first, "second": second, "origin": origin, **columns})


def pair_interference(
    factors: Sequence[Directions], side: Side = "row", r: int | None = None
) -> np.ndarray:
    """Interference of every pair of task vectors of one matrix, for every rank at once.

    I_ij(k) = ‖S_i V_iᵀ V_j S_j‖_F with the top k directions and S_i = diag(σ_i)/√(Σ_{a≤k} σ_ia²).
    An entry (a, b) of V_iᵀ V_j counts from k = max(a, b) on, so a running sum over k of what is
    new gives all ranks in O(r²) per pair after one product.

    Args:
        factors: of T matrices of one shape.
        side: "row" compares row spaces (V), "column" column spaces (U).
        r: ranks that are looked at, beyond those held too; as many as are held when None.

    Returns:
        T x T x r, symmetric, in [0, 1]; entry k−1 of the last axis belongs to rank k. The
        diagonal is ‖S_i²‖_F, a matrix against itself. 0 for a task vector that is zero.

    Source: CART, arXiv:2412.12153, the row-space interference; that of columns uses U.

    Example:
        >>> one = Directions(torch.eye(4)[:, :1], torch.ones(1), torch.eye(4)[:, :1])
        >>> other = Directions(torch.eye(4)[:, 1:2], torch.ones(1), torch.eye(4)[:, :1])
        >>> rows, columns = (pair_interference([one, other], side) for side in ("row", "column"))
        >>> float(rows[0, 1, 0]), float(columns[0, 1, 0])
        (1.0, 0.0)
    """
    r = max(f.rank for f in factors) if r is None else r
    factors = [f.pad(r) for f in factors]
    bases = [(f.V if side == "row" else f.U).double() for f in factors]
    squares = [f.S.double() ** 2 for f in factors]
    energy = [s.cumsum(0) for s in squares]
    T = len(factors)
    pairs = np.zeros((T, T, r))
    for i in range(T):
        own = (squares[i] ** 2).cumsum(0).sqrt() / energy[i]
        pairs[i, i] = own.nan_to_num(0.0).numpy()
    for i, j in combinations(range(T), 2):
        weighted = (bases[i].T @ bases[j]).square_()
        weighted *= squares[i][:, None]
        weighted *= squares[j]
        new = weighted.tril().sum(dim=1) + weighted.triu(1).sum(dim=0)
        value = (new.cumsum(0) / energy[i] / energy[j]).sqrt().nan_to_num(0.0)
        pairs[i, j] = pairs[j, i] = value.numpy()
    return pairs


def _stored_side(group: TensorGroup, side: Side) -> Side:
    """The side of the stored matrix that a side of the layer's is: others in GPT-2's in x out."""
    if not group.stored_transposed:
        return side
    return "column" if side == "row" else "row"


def dimension_of(group: TensorGroup, side: Side) -> int:
    """The dimension of the space that a layer reads (rows) or writes (columns).

    Example:
        >>> suite = load_suite("vision")
        >>> group = TensorGroup(suite, suite.tasks, "blocks.0.mlp.fc2.weight", FactorStore())
        >>> dimension_of(group, "row") > dimension_of(group, "column")
        True
    """
    return int(group.info.matrix_shape[1 if _stored_side(group, side) == "row" else 0])


@one_thread()
def interference_pairs(
    group: TensorGroup, origin: Origin, k: int, side: Side = "row"
) -> pd.DataFrame:
    """The T x T interference of one matrix at one rank (see :func:`pair_interference`).

    Args:
        group: a decomposed parameter.
        origin: what the task vectors are taken about.
        k: directions kept, at least 1; more than r count as r.
        side: "row" or "column".

    Returns:
        One row per ordered pair, the pairs of a task with itself included: first, second,
        origin, k, interference in [0, 1].

    Raises:
        SuiteError: origin "base" without a base.

    Example:
        >>> suite = load_suite("vision")
        >>> name = "blocks.0.attn.proj.weight"
        >>> group = TensorGroup(suite, suite.tasks[:2], name, FactorStore())
        >>> frame = interference_pairs(group, "base", k=8)
        >>> frame["first"].tolist(), bool(frame["interference"].between(0, 1).all())
        (['digits', 'digits', 'letters', 'letters'], True)
    """
    k = min(k, *group.info.matrix_shape)
    pairs = pair_interference(group.directions(origin, k), _stored_side(group, side), k)[:, :, -1]
    return _ordered_pairs(group.tasks, origin, {"k": k, "interference": pairs})


def interference_over_rank(
    groups: TensorGroups | TensorGroup,
    origin: Origin,
    shares: Sequence[float],
    side: Side = "row",
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Interference against reconstruction over the rank, for every matrix.

    Args:
        groups: the suite's parameters (those not decomposed are passed over), or one of them.
        origin: what the task vectors are taken about.
        shares: shares ρ of the directions, in (0, 1]; k = max(1, floor(ρ·r)).
        side: "row" or "column".
        progress: told after each matrix.

    Returns:
        One row per parameter and share: parameter, origin, share, k, interference
        (I(k) = Σ_{i≠j} I_ij(k)), interference_normalised (I(k)/(T(T−1)), 0 for one task),
        reconstruction (R(k) = Σ_t Σ_{i>k} σ_ti²), energy (R(0)), reconstruction_share
        (R(k)/R(0)), update_norm (‖Σ_t SVD_k(task vector t)‖_F), overlap and random (means over
        pairs of :func:`analysis.spectral.overlap.overlap_of` and its level by chance).

    Raises:
        SuiteError: origin "base" without a base.
        Cancelled: by `progress`.

    Source: CART, arXiv:2412.12153.

    Example:
        >>> suite = load_suite("vision")
        >>> name = "blocks.0.attn.proj.weight"
        >>> group = TensorGroup(suite, suite.tasks[:2], name, FactorStore())
        >>> interference_over_rank(group, "base", [0.08, 1.0])["k"].tolist()
        [20, 256]
    """
    look = partial(_over_rank, origin=origin, shares=shares, side=side)
    found = map_matrices(look, groups, progress)
    return pd.DataFrame(list(chain.from_iterable(found)))


def _over_rank(
    group: TensorGroup, origin: Origin, shares: Sequence[float], side: Side
) -> list[dict[str, object]]:
    """One matrix's rows of :func:`interference_over_rank`."""
    T, r = len(group.tasks), min(group.info.matrix_shape)
    pairs = pair_interference(group.directions(origin), _stored_side(group, side), r)
    interference = pairs.sum(axis=(0, 1)) - np.trace(pairs)
    others = ~np.eye(T, dtype=bool)
    overlap = overlap_of(pairs)[others].sum(axis=0) / max(1, T * (T - 1))
    level = random_overlap(pairs, dimension_of(group, side))[others].sum(axis=0)
    # Summed from the small end, so that what little is lost near full rank stays exact.
    squares = np.sum([S.double().numpy() ** 2 for S in group.singular_values(origin)], axis=0)
    lost = np.append(squares[::-1].cumsum()[::-1], 0.0)
    rows: list[dict[str, object]] = []
    for share in shares:
        k = count_directions(float(share), r)
        rows.append(
            {
                "parameter": group.name,
                "origin": origin,
                "share": float(share),
                "k": k,
                "interference": interference[k - 1],
                "interference_normalised": interference[k - 1] / max(1, T * (T - 1)),
                "reconstruction": lost[k],
                "energy": lost[0],
                "reconstruction_share": lost[k] / lost[0] if lost[0] > 0 else 0.0,
                "update_norm": float(group.sum_of_truncations(origin, k).double().norm()),
                "overlap": overlap[k - 1],
                "random": level[k - 1] / max(1, T * (T - 1)),
            }
        )
    return rows


def mean_over_layers(frame: pd.DataFrame) -> pd.DataFrame:
    """The whole model's curve from the curves of its matrices.

    Args:
        frame: of :func:`interference_over_rank`, one origin or several.

    Returns:
        One row per origin and share: origin, share, interference, interference_normalised,
        overlap and random (means over matrices), reconstruction and energy (sums),
        reconstruction_share (of the sums), update_norm (root of the sum of squares: the norm of
        the whole update).

    Example:
        >>> suite = load_suite("vision")
        >>> names = [f"blocks.{i}.attn.proj.weight" for i in (0, 1)]
        >>> groups = (TensorGroup(suite, suite.tasks[:2], name, FactorStore()) for name in names)
        >>> frame = pd.concat([interference_over_rank(group, "base", [0.08]) for group in groups])
        >>> both, whole = frame["energy"], mean_over_layers(frame)["energy"]
        >>> len(both), len(whole), np.isclose(both.sum(), whole.sum()).item()
        (2, 1, True)
    """
    squared = frame.assign(update_norm=frame["update_norm"] ** 2)
    mean = squared.groupby(["origin", "share"], as_index=False).agg(
        interference=("interference", "mean"),
        interference_normalised=("interference_normalised", "mean"),
        overlap=("overlap", "mean"),
        random=("random", "mean"),
        reconstruction=("reconstruction", "sum"),
        energy=("energy", "sum"),
        update_norm=("update_norm", "sum"),
    )
    share = (mean["reconstruction"] / mean["energy"]).fillna(0.0)
    return mean.assign(reconstruction_share=share, update_norm=np.sqrt(mean["update_norm"]))


@one_thread()
def principal_angles(
    group: TensorGroup, origin: Origin, k: int, side: Side = "row"
) -> pd.DataFrame:
    """Principal angles between the top-k subspaces of every pair of tasks.

    Args:
        group: a decomposed parameter.
        origin: what the task vectors are taken about.
        k: directions kept, at least 1; those that carry nothing are left out.
        side: "row" or "column".

    Returns:
        One row per unordered pair and angle: first, second, index (1..k), angle in degrees,
        ascending, in [0, 90].

    Raises:
        SuiteError: origin "base" without a base.

    Source: Björck and Golub, 1973; small angles by their sine, which the cosine cannot resolve.

    Example:
        >>> suite = load_suite("vision")
        >>> name = "blocks.0.attn.proj.weight"
        >>> group = TensorGroup(suite, suite.tasks[:2], name, FactorStore())
        >>> principal_angles(group, "base", k=3)["index"].tolist()
        [1, 2, 3]
    """
    subspaces = []
    for f in group.directions(origin, k):
        span = f.V if _stored_side(group, side) == "row" else f.U
        # Stored in float32, orthonormal to 1e-7 only.
        subspaces.append(torch.linalg.qr(span.double()).Q)
    frames = []
    for i, j in combinations(range(len(subspaces)), 2):
        angle = np.degrees(_angles(subspaces[i], subspaces[j]))
        frames.append(
            pd.DataFrame(
                {
                    "first": group.tasks[i],
                    "second": group.tasks[j],
                    "index": np.arange(1, angle.size + 1),
                    "angle": angle,
                }
            )
        )
    columns = ["first", "second", "index", "angle"]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


def _angles(P: Tensor, Q: Tensor) -> np.ndarray:
    """Angles in radians, ascending, between the spans of orthonormal columns."""
    if P.shape[1] < Q.shape[1]:
        P, Q = Q, P
    if Q.shape[1] == 0:
        return np.empty(0)
    overlap = P.T @ Q
    cosine = torch.linalg.svdvals(overlap).clamp(max=1)
    sine = torch.linalg.svdvals(Q - P @ overlap).flip(0).clamp(max=1)
    return torch.where(cosine**2 < 0.5, cosine.arccos(), sine.arcsin()).numpy()


def mean_angles(angles: pd.DataFrame) -> pd.DataFrame:
    """The mean principal angle of each pair, as a full T x T table.

    Args:
        angles: of :func:`principal_angles`.

    Returns:
        One row per ordered pair: first, second, angle in degrees (0 with itself).

    Example:
        >>> angles = pd.DataFrame({"first": "a", "second": "b", "angle": [30.0, 60.0]})
        >>> mean_angles(angles)["angle"].tolist()
        [0.0, 45.0, 45.0, 0.0]
    """
    mean = angles.groupby(["first", "second"], sort=False)["angle"].mean().reset_index()
    mirrored = mean.rename(columns={"first": "second", "second": "first"})
    tasks = list(dict.fromkeys([*mean["first"], *mean["second"]]))
    itself = pd.DataFrame({"first": tasks, "second": tasks, "angle": 0.0})
    both = pd.concat([itself, mean, mirrored], ignore_index=True)
    index = {task: i for i, task in enumerate(tasks)}
    return both.sort_values(
        ["first", "second"], key=lambda column: column.map(index), ignore_index=True
    )


def sign_conflict(
    groups: TensorGroups, origin: Origin, parameter: str | None = None
) -> pd.DataFrame:
    """How far tasks pull single weights in opposite directions.

    Args:
        groups: the suite's parameters; integer buffers are passed over.
        origin: what the task vectors are taken about. About the average every entry sums to
            zero, so `conflict` is 1 by construction; ask about the base.
        parameter: only this one; None for each of them.

    Returns:
        One row per parameter: parameter, conflict (1 − Σ_e|Σ_t τ_te| / Σ_e Σ_t|τ_te|, in [0, 1]:
        the share of magnitude that cancels in the sum, so that entries count by their size),
        opposed (share of entries that some task raises and another lowers), entries (count).
        0 where nothing changed.

    Raises:
        SuiteError: unknown parameter, or origin "base" without a base.

    Source: the sign conflicts of TIES, arXiv:2306.01708, section 3, weighted by magnitude.

    Example:
        >>> groups = TensorGroups(load_suite("vision"), ["digits", "dots"], FactorStore())
        >>> sign_conflict(groups, "average", "cls_token")["conflict"].round(3).tolist()
        [1.0]
    """

    def row(group: TensorGroup) -> dict[str, object]:
        tau = _task_vectors(group, origin)
        magnitude = float(tau.abs().sum())
        kept = float(tau.sum(dim=0).abs().sum())
        opposed = (tau > 0).any(dim=0) & (tau < 0).any(dim=0)
        return {
            "parameter": group.name,
            "conflict": 1 - kept / magnitude if magnitude > 0 else 0.0,
            "opposed": float(opposed.double().mean()),
            "entries": tau.shape[1],
        }

    return pd.DataFrame(list(map_parameters(row, groups, _weights(groups, parameter))))

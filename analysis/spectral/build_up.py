"""A piece of one weight matrix as it is built up: the average, a task's change, and all changes.

What the first directions of C_t = θ_t − θ_avg add to a matrix is seen best where its rows and
columns stand in the order of the task's first direction: its largest entries are in the corners.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from merge_core.errors import SuiteError
from merge_core.factors.low_rank import Directions, as_matrix
from merge_core.task_vectors import TensorGroup, TensorGroups

SIDE = 32
DIRECTIONS = (1, 2, 4, 8, 16, 32, 64)


def counts_shown(group: TensorGroup) -> list[int]:
    """The numbers of directions at which a matrix is shown: those below its rank, and its rank.

    Example:
        >>> suite = load_suite("vision").restrict(["digits", "dots"])
        >>> group = TensorGroup(suite, suite.tasks, "blocks.0.attn.proj.weight", FactorStore())
        >>> counts_shown(group)
        [1, 2, 4, 8, 16, 32, 64, 256]
    """
    r = min(group.info.matrix_shape)
    return [*(k for k in DIRECTIONS if k < r), r]


def build_up_shown(groups: TensorGroups, task: str, side: int = SIDE) -> pd.DataFrame:
    """:func:`build_up` of the smallest matrix that the task changes: the quickest to look into.

    Args:
        groups: the suite's parameters, of two experts or more.
        task: whose change is shown.
        side: as in :func:`build_up`.

    Returns:
        The columns of :func:`build_up`, and layer.

    Raises:
        SuiteError: fewer than two experts, no matrix that is decomposed, or experts that do not
            differ in any.

    Example:
        >>> suite = load_suite("vision").restrict(["digits", "dots"])
        >>> frame = build_up_shown(TensorGroups(suite, suite.tasks, FactorStore()), "digits")
        >>> frame["layer"].unique().tolist()
        ['blocks.0.attn.proj.weight']
    """
    decomposed = [group for group in groups if group.decomposed]
    for group in sorted(decomposed, key=lambda group: group.info.numel):
        if len(group.tasks) < 2 or _differs(group, group.tasks.index(task)):
            return build_up(group, task, side).assign(layer=group.name)
    raise SuiteError(f"The expert {task!r} differs from the average in no matrix.")


def _differs(group: TensorGroup, place: int) -> bool:
    members = group.members
    return any(not torch.equal(member, members[place]) for member in members)


def build_up(group: TensorGroup, task: str, side: int = SIDE) -> pd.DataFrame:
    """Entries of a matrix of the average, and of SVD_k(C_t) of one task and summed over all.

    Args:
        group: a decomposed parameter of at least two experts.
        task: whose change is shown.
        side: rows and columns shown, at most, evenly spread in the order of the entries of the
            task's first left and right singular vectors.

    Returns:
        One row per entry, part and k: part (``average``, ``change`` or ``sum``), k (directions
        of each task; 0 of the average), energy (share of ‖C_t‖² within k, in [0, 1]; 1 of the
        average), row, column (from 0, in the order shown), value. With all r directions ``change``
        is C_t, and ``sum`` vanishes but for rounding, since Σ_t C_t = 0.

    Raises:
        SuiteError: fewer than two experts, or experts that do not differ here.

    Source: CART, arXiv:2412.12153, the sum θ_avg + λ Σ_t SVD_k(θ_t − θ_avg).

    Example:
        >>> suite = load_suite("vision").restrict(["digits", "dots"])
        >>> group = TensorGroup(suite, suite.tasks, "blocks.0.attn.proj.weight", FactorStore())
        >>> frame = build_up(group, "digits", side=4)
        >>> frame["part"].unique().tolist(), len(frame[frame["part"] == "average"])
        (['average', 'change', 'sum'], 16)
    """
    if len(group.tasks) < 2:
        raise SuiteError("One expert is its own average; choose two tasks or more.")
    place = group.tasks.index(task)
    most = [k for k in counts_shown(group) if k in DIRECTIONS]
    found = group.directions("average", max(most, default=1))
    if not found[place].rank:
        raise SuiteError(f"The expert {task!r} does not differ from the average in {group.name}.")
    rows, columns = (
        _spread(vectors, side) for vectors in (found[place].U[:, 0], found[place].V[:, 0])
    )
    whole = as_matrix(group.task_vectors("average")[place])[rows][:, columns]
    energies = torch.cumsum(group.singular_values("average")[place].double() ** 2, 0)
    energies = energies / energies[-1]
    parts = [_tidy("average", 0, 1.0, as_matrix(group.average)[rows][:, columns])]
    for k in counts_shown(group):
        energy = float(energies[k - 1])
        if k in most:
            kept = [_product(each.head(k), rows, columns) for each in found]
            change, total = kept[place], torch.stack(kept).sum(0)
        else:
            change, total = whole, torch.zeros_like(whole)
        parts += [_tidy("change", k, energy, change), _tidy("sum", k, energy, total)]
    return pd.concat(parts, ignore_index=True)


def _spread(vector: Tensor, side: int) -> Tensor:
    """Places of so many entries, evenly spread over all in ascending order."""
    order = torch.argsort(vector, stable=True)
    chosen = np.linspace(0, len(order) - 1, min(side, len(order))).round().astype(int)
    return order[torch.from_numpy(chosen)]


def _product(found: Directions, rows: Tensor, columns: Tensor) -> Tensor:
    return (found.U[rows] * found.S) @ found.V[columns].T


def _tidy(part: str, k: int, energy: float, values: Tensor) -> pd.DataFrame:
    rows, columns = np.indices(tuple(values.shape), dtype=np.int32)
    return pd.DataFrame(
        {
            "part": part,
            "k": k,
            "energy": energy,
            "row": rows.ravel(),
            "column": columns.ravel(),
            "value": values.numpy().astype(np.float32).ravel(),
        }
    )

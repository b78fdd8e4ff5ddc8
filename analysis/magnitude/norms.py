"""What averaging does to the norms of weights: mean‖θ_i‖² − ‖θ̄‖² = mean‖θ_i − θ̄‖².

All in float64, over parameters (no buffers), one tensor of all members at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.outputs.pool_outputs import PoolEvaluator
from merge_core.errors import PoolError
from merge_core.executors.base import one_thread

TOTAL = "all parameters"
BINS = 60


def _names(evaluator: PoolEvaluator) -> list[str]:
    return [name for name, _ in evaluator.network.module.named_parameters()]


def _stack(evaluator: PoolEvaluator, members: Sequence[int], name: str) -> Tensor:
    """N x the tensor's shape, float64."""
    try:
        tensors = [evaluator.pool.member(i).tensor(name).double() for i in members]
        return torch.stack(tensors)
    except (KeyError, RuntimeError) as fault:
        raise PoolError(
            f"{name!r} is missing or of another shape in a member of pool "
            f"{evaluator.pool.name!r}. Give members of one architecture."
        ) from fault


def _tensors(evaluator: PoolEvaluator, members: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    chosen = evaluator.pool.select(members)
    for name in _names(evaluator):
        yield name, _stack(evaluator, chosen, name)


@one_thread()
def identity_frame(evaluator: PoolEvaluator, members: Sequence[int]) -> pd.DataFrame:
    """Both sides of mean‖θ_i‖² − ‖θ̄‖² = mean‖θ_i − θ̄‖², computed apart.

    Args:
        evaluator: of the pool.
        members: member numbers.

    Returns:
        One row per parameter and, last, one for :data:`TOTAL`: parameter, mean_square
        (mean‖θ_i‖²), soup_square (‖θ̄‖²), lost (their difference), spread (mean‖θ_i − θ̄‖²),
        deviation (|lost − spread| / mean_square, rounding alone; 0 for a tensor of zeros).

    Raises:
        MergeScopeError: unknown, unreadable or unfit members.

    Source: [derived] expand ‖θ_i − θ̄‖² and average: the cross term is −2‖θ̄‖².

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> frame = identity_frame(PoolEvaluator(load_pool("digits-mlp-shared")), [0, 1])
        >>> bool((frame["deviation"] < 1e-12).all()), frame["parameter"].iloc[-1]
        (True, 'all parameters')
    """
    rows = []
    for name, stack in _tensors(evaluator, members):
        mean = stack.mean(dim=0)
        count = len(stack)
        rows.append(
            {
                "parameter": name,
                "mean_square": float(stack.square().sum()) / count,
                "soup_square": float(mean.square().sum()),
                "spread": float((stack - mean).square().sum()) / count,
            }
        )
    frame = pd.DataFrame(rows)
    total = {"parameter": TOTAL, **frame.drop(columns="parameter").sum()}
    frame = pd.concat([frame, pd.DataFrame([total])], ignore_index=True)
    frame.insert(3, "lost", frame["mean_square"] - frame["soup_square"])
    deviation = (frame["lost"] - frame["spread"]).abs() / frame["mean_square"]
    return frame.assign(deviation=deviation.fillna(0.0))


@one_thread()
def norms_frame(evaluator: PoolEvaluator, members: Sequence[int]) -> pd.DataFrame:
    """Norm and variance of every parameter, in the members and in their average.

    Args:
        evaluator: of the pool.
        members: member numbers.

    Returns:
        One row per parameter: parameter, entries, weight (whether it has two dimensions or
        more), norm_mean, norm_min, norm_max (Frobenius norms of the members), norm_soup,
        variance_mean, variance_min, variance_max, variance_soup (of the tensor's entries),
        ratio (‖θ̄‖ / √mean‖θ_i‖², in [0, 1]; NaN for a tensor of zeros), independent (1/√N: the
        ratio of independent members of mean zero).

    Raises:
        MergeScopeError: unknown, unreadable or unfit members.

    Source: [derived] for independent θ_i of mean zero E‖θ̄‖² = E‖θ_i‖²/N.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> frame = norms_frame(PoolEvaluator(load_pool("digits-mlp-independent")), [0, 1])
        >>> frame["independent"].round(3).unique().tolist()
        [0.707]
        >>> bool((frame["norm_soup"] < frame["norm_mean"]).all())
        True
    """
    rows = []
    for name, stack in _tensors(evaluator, members):
        flat = stack.flatten(1)
        mean = flat.mean(dim=0)
        norms, variances = flat.norm(dim=1), flat.var(dim=1, correction=0)
        root = float(norms.square().mean().sqrt())
        rows.append(
            {
                "parameter": name,
                "entries": flat.shape[1],
                "weight": stack.ndim > 2,
                **_summary("norm", norms, float(mean.norm())),
                **_summary("variance", variances, float(mean.var(correction=0))),
                "ratio": float(mean.norm()) / root if root > 0 else math.nan,
                "independent": 1 / math.sqrt(len(stack)),
            }
        )
    return pd.DataFrame(rows)


def _summary(what: str, values: Tensor, soup: float) -> dict[str, float]:
    return {
        f"{what}_mean": float(values.mean()),
        f"{what}_min": float(values.min()),
        f"{what}_max": float(values.max()),
        f"{what}_soup": soup,
    }


def histogram_frame(
    evaluator: PoolEvaluator, members: Sequence[int], parameter: str, bins: int = BINS
) -> pd.DataFrame:
    """The distribution of one parameter's entries, in members, soup and norm-restored soup.

    Args:
        evaluator: of the pool.
        members: member numbers.
        parameter: its name.
        bins: of equal width, on edges common to all.

    Returns:
        One row per subject and bin: subject ("individuals": mean over members, "uniform_soup",
        "norm_restored": the soup with this tensor at the members' mean norm), left, right
        (edges), density (per unit of weight; each subject's integrates to 1).

    Raises:
        PoolError: no such parameter.
        MergeScopeError: unknown, unreadable or unfit members.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> evaluator = PoolEvaluator(load_pool("digits-mlp-shared"))
        >>> frame = histogram_frame(evaluator, [0, 1], "head.weight", bins=10)
        >>> frame["subject"].value_counts().to_dict()
        {'individuals': 10, 'uniform_soup': 10, 'norm_restored': 10}
    """
    if parameter not in _names(evaluator):
        raise PoolError(
            f"The network has no parameter {parameter!r}. Choose one of "
            f"{', '.join(_names(evaluator)[:6])}, ..."
        )
    stack = _stack(evaluator, evaluator.pool.select(members), parameter)
    mean = stack.mean(dim=0)
    own = float(mean.norm())
    target = float(stack.flatten(1).norm(dim=1).mean())
    restored = mean * (target / own) if own > 0 else mean
    # Every member has as many entries, so the density of all together is the mean density.
    subjects = {"individuals": stack, "uniform_soup": mean, "norm_restored": restored}
    arrays = {name: value.numpy().ravel() for name, value in subjects.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(arrays.values())), bins)
    frames = [
        pd.DataFrame(
            {
                "subject": name,
                "left": edges[:-1],
                "right": edges[1:],
                "density": np.histogram(values, edges, density=True)[0],
            }
        )
        for name, values in arrays.items()
    ]
    return pd.concat(frames, ignore_index=True)

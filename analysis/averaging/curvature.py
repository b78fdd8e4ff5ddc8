"""The gap between soup and logit ensemble, predicted from the curvature of the network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from analysis.averaging.ensembles import rule_logits
from analysis.averaging.gaps import frame_by_image, sample_indices
from analysis.averaging.soups import uniform_soup
from analysis.networks.stateless import State
from analysis.outputs.pool_outputs import PoolEvaluator, PoolSplit
from merge_core.progress import Progress

BATCH = 100


def predicted_gap(
    evaluator: PoolEvaluator,
    members: Sequence[int],
    split: PoolSplit = "test",
    limit: int = 100,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Soup logits − ensemble logits, measured and to second order in the members' spread.

    The prediction is −½ tr(H Cov θ) = −(1/2N) Σ_i d_iᵀ H d_i with d_i = θ_i − θ̄ and H the second
    derivative of a logit at θ̄. [derived]: expand f(θ_i) about θ̄; the first order sums to zero.
    θ are all floating tensors, running statistics of BatchNorm included, as they are averaged
    too. Kinks of rectifiers have no second derivative and are not seen. Computed in float32:
    nothing cancels, and float64 gives the same to six digits.

    Args:
        evaluator: of the pool.
        members: member numbers.
        split: which images.
        limit: the number of images (see :func:`analysis.averaging.gaps.sample_indices`).
        progress: told after each member.

    Returns:
        One row per image and class: image (its index in the split), class, measured, predicted
        (logits).

    Raises:
        MergeScopeError: unfit members or data.
        Cancelled: by `progress`.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> evaluator = PoolEvaluator(load_pool("digits-linear"))  # which has no curvature
        >>> frame = predicted_gap(evaluator, [0, 1], limit=20)
        >>> bool((frame[["measured", "predicted"]].abs() < 1e-3).all(axis=None))
        True
    """
    soup = rule_logits(evaluator, members, "uniform_soup", split)
    measured = soup - rule_logits(evaluator, members, "logit_ensemble", split)
    indices = sample_indices(len(measured), limit)
    images = evaluator.images(split)[indices]
    centre = _floating_tensors(uniform_soup(evaluator, members))
    total = torch.zeros(len(indices), measured.shape[1], dtype=torch.float64)
    for done, member in enumerate(members, start=1):
        own = _floating_tensors(evaluator.weights(member))
        step = {name: own[name] - value for name, value in centre.items()}
        total += second_derivative(evaluator.network.module, centre, step, images)
        if progress is not None:
            progress.step(done, len(members), f"curvature towards member {member}")
    values = {"measured": measured[indices], "predicted": -total / (2 * len(members))}
    return frame_by_image(indices, values)


def gap_summary(frame: pd.DataFrame) -> pd.DataFrame:
    """How well a predicted gap matches the measured one.

    Args:
        frame: columns measured and predicted, as of :func:`predicted_gap`; rows that are not
            finite are left out.

    Returns:
        One row: correlation (Pearson; NaN where either side is constant), slope (of measured on
        predicted, through zero; 1 is ideal), relative_error (‖measured − predicted‖ /
        ‖measured‖), rms_measured, rms_predicted (logits), rows.

    Example:
        >>> frame = pd.DataFrame({"measured": [2.0, 4.0], "predicted": [1.0, 2.0]})
        >>> gap_summary(frame)[["slope", "relative_error"]].values.tolist()
        [[2.0, 0.5]]
    """
    values = frame[["measured", "predicted"]].to_numpy(dtype=float)
    measured, predicted = values[np.isfinite(values).all(axis=1)].T
    norm, power = float(np.linalg.norm(measured)), float(predicted @ predicted)
    varied = len(measured) > 0 and min(np.ptp(measured), np.ptp(predicted)) > 0
    row = {
        "correlation": float(np.corrcoef(measured, predicted)[0, 1]) if varied else np.nan,
        "slope": float(measured @ predicted) / power if power > 0 else np.nan,
        "relative_error": float(np.linalg.norm(measured - predicted)) / norm if norm else np.nan,
        "rms_measured": norm / max(len(measured), 1) ** 0.5,
        "rms_predicted": (power / max(len(measured), 1)) ** 0.5,
        "rows": len(measured),
    }
    return pd.DataFrame([row])


def second_derivative(module: nn.Module, centre: State, step: State, images: Tensor) -> Tensor:
    """dᵀ H d: the second derivative of every logit along a direction, at t = 0 of θ + t·d.

    Forward-mode differentiation twice: exact but for rounding.

    Args:
        module: a network in evaluation mode; it stays as it is.
        centre: θ by name.
        step: d by name, with the names of `centre`.
        images: N x C x H x W, in the dtype of `centre`, in which everything is computed.

    Returns:
        N x classes.

    Example:
        >>> chain = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
        >>> ones = {f"{i}.weight": torch.ones(1, 1) for i in (0, 1)}  # f = w₁·w₀·x
        >>> second_derivative(chain, ones, ones, torch.tensor([[1.0], [3.0]]))
        tensor([[2.],
                [6.]])
    """
    network: Any = copy.deepcopy(module).to(images.dtype)
    for layer in network.modules():
        if hasattr(layer, "fused_attn"):  # timm's switch: fused attention has no such derivative
            layer.fused_attn = False
    zero, one = images.new_zeros(()), images.new_ones(())

    def second(batch: Tensor) -> Tensor:
        def along(t: Tensor) -> Tensor:
            state = {name: value + t * step[name] for name, value in centre.items()}
            return torch.func.functional_call(network, state, (batch,))

        def first(t: Tensor) -> Tensor:
            return torch.func.jvp(along, (t,), (one,))[1]

        return torch.func.jvp(first, (zero,), (one,))[1]

    with torch.no_grad(), _Primitives():
        return torch.cat([second(batch) for batch in images.split(BATCH)])


def _floating_tensors(state: State) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if value.is_floating_point()}


class _Primitives(TorchFunctionMode):
    """Writes normalisation out, so that it can be differentiated forward twice.

    torch's own BatchNorm has no derivative in its statistics, and the second forward derivative
    of its LayerNorm is wrong (by a tenth in torch 2.15, against central differences).
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return WRITTEN_OUT.get(func, func)(*args, **(kwargs or {}))


def _layer_norm(
    value: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    axes = tuple(range(-len(shape), 0))
    value = value - value.mean(axes, keepdim=True)
    value = value * (value.square().mean(axes, keepdim=True) + eps).rsqrt()
    value = value if weight is None else value * weight
    return value if bias is None else value + bias


def _batch_norm(
    value: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    **_training: object,
) -> Tensor:
    """BatchNorm in evaluation mode."""
    shape = (1, -1, *[1] * (value.ndim - 2))
    value = (value - mean.reshape(shape)) * (variance.reshape(shape) + eps).rsqrt()
    value = value if weight is None else value * weight.reshape(shape)
    return value if bias is None else value + bias.reshape(shape)


WRITTEN_OUT: dict[Callable[..., Any], Callable[..., Any]] = {
    functional.layer_norm: _layer_norm,
    functional.batch_norm: _batch_norm,
}

"""What scaling parameters by m does to a network, where mathematics says so.

[derived] A layer's output is a sum of a product with its weight and a bias. If the layer's input
scales as m^d, the product scales as m^(d + 1) where the weight is scaled and as m^d where not,
the bias as m or 1. Rectifiers and max pooling pass positive factors on, so a chain is homogeneous
up to the first layer in which the two differ. Without biases all L layers are:
f(x; mθ) = m^L f(x; θ). With biases, f(x; mθ) is m^L times the network whose layer l has its bias
multiplied by m^(1−l); with weights scaled alone, by m^(−l).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from analysis.networks.plain import PlainNetwork
from analysis.networks.stateless import State
from analysis.outputs.pool_outputs import PoolEvaluator, PoolSplit
from merge_core.errors import PoolError

Law = Literal["homogeneous", "large", "small"]
What = Literal["weights", "parameters", "state", "layer"]
WHAT: dict[What, str] = {
    "weights": "weights (no biases, no norm scales)",
    "parameters": "all parameters",
    "state": "the whole state (BatchNorm statistics too)",
    "layer": "one layer",
}
LAWS: dict[Law, str] = {
    "homogeneous": "pure homogeneity, mᴸ",
    "large": "limit of large m: the biases that vanish are left out",
    "small": "limit of small m: the last bias decides",
}


@dataclass(frozen=True)
class PowerLaw:
    """Logits that follow m^degree · base.

    Attributes:
        base: logits at m = 1, N x C.
        degree: the power.
    """

    base: Tensor
    degree: int

    def logits(self, m: float) -> Tensor:
        """float64, N x C; not finite where float64 cannot hold them."""
        return self.base.double() * torch.tensor(m, dtype=torch.float64) ** self.degree


def layer_names(module: nn.Module) -> list[str]:
    """Layers that own parameters, and parameters of the network itself, in its order.

    Args:
        module: of a pool's network (:func:`analysis.networks.pool_network.pool_network`).

    Example:
        >>> layer_names(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)))
        ['0', '2']
    """
    owners = (name.rpartition(".")[0] or name for name, _ in module.named_parameters())
    return list(dict.fromkeys(owners))


def scaled_names(module: nn.Module, what: What, layer: str | None = None) -> frozenset[str]:
    """Names of the tensors that are multiplied by m.

    Args:
        module: of a pool's network (:func:`analysis.networks.pool_network.pool_network`).
        what: "weights": parameters of two dimensions or more (matrices, kernels, embeddings).
            "parameters": all of them, no buffers. "state": floating buffers too, that is the
            running statistics of BatchNorm. Its counters are integers, which evaluation mode
            never reads; they are left alone. "layer": all parameters of one layer.
        layer: the layer's name, or the beginning of several (``stages.0``).

    Raises:
        PoolError: no layer of that name.

    Example:
        >>> module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> sorted(scaled_names(module, "weights")), len(scaled_names(module, "parameters"))
        (['0.weight'], 4)
    """
    parameters = dict(module.named_parameters())
    if what == "weights":
        return frozenset(name for name, value in parameters.items() if value.ndim >= 2)
    if what == "parameters":
        return frozenset(parameters)
    if what == "state":
        state = module.state_dict()
        return frozenset(name for name, value in state.items() if value.is_floating_point())
    names = frozenset(n for n in parameters if n == layer or n.startswith(f"{layer}."))
    if not names:
        raise PoolError(
            f"The network has no layer {layer!r}. Choose one of "
            f"{', '.join(layer_names(module)[:6])}, ..."
        )
    return names


def affine_names(module: nn.Module) -> list[str]:
    """Names of the affine layers that follow upon each other, from input to output.

    Linear and convolutional layers in the order of definition; a residual network's shortcuts
    (``downsample``) lie beside others and are left out.

    Args:
        module: of a pool's network (:func:`analysis.networks.pool_network.pool_network`).

    Example:
        >>> affine_names(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)))
        ['0', '2']
    """
    return [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and "downsample" not in name.split(".")
    ]


def affine_depth(evaluator: PoolEvaluator, names: Collection[str] | None = None) -> int:
    """L: how many successive affine layers have their weight scaled.

    Args:
        evaluator: of the pool.
        names: tensors that are scaled; by default all.

    Raises:
        PoolError: the architecture cannot be built.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> affine_depth(PoolEvaluator(load_pool("digits-mlp-shared")))
        3
    """
    layers = affine_names(evaluator.network.module)
    return sum(names is None or f"{layer}.weight" in names for layer in layers)


def exact_degree(evaluator: PoolEvaluator, names: Collection[str]) -> int | None:
    """The d for which f(x; θ scaled by m > 0) = m^d f(x; θ) holds exactly, or None.

    Args:
        evaluator: of the pool.
        names: the tensors that are scaled; all others stay.

    Returns:
        For chains (linear, mlp, vgg): the degree where every layer's product and bias scale
        alike; for other networks 1 if their last linear layer alone is scaled, bias included.
        None where that is not so.

    Raises:
        PoolError: the architecture cannot be built.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> evaluator = PoolEvaluator(load_pool("digits-mlp-shared"))  # without biases
        >>> exact_degree(evaluator, scaled_names(evaluator.network.module, "parameters"))
        3
    """
    network = evaluator.network
    owned = [name for name, _ in network.module.named_parameters()]
    scaled = set(names) & set(owned)
    if not isinstance(network.module, PlainNetwork):
        head = {name for name in owned if name.rpartition(".")[0] == network.head_name}
        return 1 if scaled == head else None
    degree = 0
    for layer, _ in network.module.affine_layers():
        degree += f"{layer}.weight" in scaled
        if f"{layer}.bias" in owned and degree != (f"{layer}.bias" in scaled):
            return None
    return degree


def laws(evaluator: PoolEvaluator, names: Collection[str]) -> tuple[Law, ...]:
    """The laws that :func:`power_law` knows for a network and the tensors that are scaled.

    Pure homogeneity for every network (where it is not homogeneous: what it would do if it
    were); the limits for chains with biases, all their weights scaled.

    Raises:
        PoolError: the architecture cannot be built.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> evaluator = PoolEvaluator(load_pool("digits-mlp-shared"))
        >>> laws(evaluator, scaled_names(evaluator.network.module, "parameters"))
        ('homogeneous',)
    """
    module = evaluator.network.module
    if not isinstance(module, PlainNetwork) or exact_degree(evaluator, names) is not None:
        return ("homogeneous",)
    layers = module.affine_layers()
    whole = all(f"{layer}.weight" in names for layer, _ in layers)
    biased = layers[-1][1].bias is not None
    return ("homogeneous", "large", "small") if whole and biased else ("homogeneous",)


def power_law(
    evaluator: PoolEvaluator,
    weights: State,
    unscaled: Tensor,
    names: Collection[str],
    law: Law,
    split: PoolSplit,
) -> PowerLaw:
    """How a model's logits follow m, exactly or in a limit [derived, see the module].

    Args:
        evaluator: of the pool.
        weights: the model's, unscaled.
        unscaled: its logits at m = 1, N x C.
        names: the tensors that are scaled.
        law: "homogeneous": m^L times the logits at m = 1. "large": m^L times the logits of the
            network without the biases that vanish against the products (of layers 2 to L where
            biases are scaled too, of all layers where not). "small": the last bias itself, m·b
            where it is scaled, b where not, as every product vanishes against it.
        split: which images.

    Raises:
        PoolError: a law that does not hold for this network (see :func:`laws`), or weights that
            do not fit.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> evaluator = PoolEvaluator(load_pool("digits-mlp-shared"))
        >>> names = scaled_names(evaluator.network.module, "parameters")
        >>> unscaled = evaluator.member(0, "test").logits
        >>> law = power_law(evaluator, evaluator.weights(0), unscaled, names, "homogeneous", "test")
        >>> torch.equal(law.logits(2.0), 8 * unscaled.double())
        True
    """
    depth = affine_depth(evaluator, names)
    if law == "homogeneous":
        return PowerLaw(unscaled, depth)
    if law not in laws(evaluator, names):
        raise PoolError(
            f"There is no limit for {'large' if law == 'large' else 'small'} m for this choice in "
            f"pool {evaluator.pool.name!r}. Choose a chain with biases, all its weights scaled."
        )
    layers = affine_names(evaluator.network.module)
    last = f"{layers[-1]}.bias"
    if law == "small":
        return PowerLaw(weights[last].expand_as(unscaled), int(last in names))
    kept = {f"{layers[0]}.bias"} if last in names else set()
    vanishing = {f"{layer}.bias" for layer in layers} - kept
    reduced = {
        name: torch.zeros_like(value) if name in vanishing else value
        for name, value in weights.items()
    }
    return PowerLaw(evaluator.run(reduced, split).logits, depth)


def dominance(depths: Iterable[int], members: int, magnitudes: Sequence[float]) -> pd.DataFrame:
    """How much one member, scaled by m, outweighs the others of a pool.

    Args:
        depths: L of homogeneous networks.
        members: N, models of equal norms of logits and weights.
        magnitudes: positive.

    Returns:
        One row per magnitude, mean and depth: magnitude, mean ("soup": of the weights, once;
        "logit_ensemble": of the logits, for every depth), depth (1 for the soup), ratio (the
        scaled member's weight against that of one other: m in the soup, m^L in the ensemble),
        share (its part of all: ratio / (ratio + N − 1)) [derived from f(x; mθ) = m^L f(x; θ)].

    Example:
        >>> dominance([3], members=2, magnitudes=[2.0])[["mean", "ratio"]].round(6).values.tolist()
        [['soup', 2.0], ['logit_ensemble', 8.0]]
    """
    m = np.asarray(magnitudes, dtype=float)
    rows = []
    for mean, depth in [("soup", 1), *(("logit_ensemble", depth) for depth in depths)]:
        # Written with 1/m^L, which goes to 0 where m^L would overflow.
        share = 1 / (1 + (members - 1) * np.exp(np.minimum(-depth * np.log(m), 700.0)))
        columns = {"magnitude": m, "mean": mean, "depth": depth}
        ratio = np.exp(np.clip(depth * np.log(m), -700, 700))
        rows.append(pd.DataFrame({**columns, "ratio": ratio, "share": share}))
    return pd.concat(rows, ignore_index=True)

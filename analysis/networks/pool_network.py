"""The network that a pool names, run with any weights of its layout."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from analysis.networks.build import PerThread, State, build_network, check_state
from merge_core.errors import PoolError
from merge_core.suites.pool import Pool

BATCH = 250


@dataclass(frozen=True)
class Outputs:
    """What a model gives for N images.

    Attributes:
        features: the input of the head (the last linear layer), after any final norm, N x width.
        logits: N x classes.
    """

    features: Tensor
    logits: Tensor

    def __getitem__(self, images: slice | Tensor) -> Outputs:
        return Outputs(self.features[images], self.logits[images])


class _Split(nn.Module):
    """A network that gives features and logits at once."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        network: Any = self.network
        features = network.forward_head(network.forward_features(images), pre_logits=True)
        return features, network.get_classifier()(features)


class Network:
    """The architecture of a pool in evaluation mode; weights are given with each call.

    Args:
        pool: the pool that names it.
    """

    def __init__(self, pool: Pool) -> None:
        self._path = pool.path
        self.architecture = pool.spec.architecture

    @cached_property
    def module(self) -> Any:
        """The network itself (its own weights are never used).

        Raises:
            PoolError: it cannot be built, or does not end in one linear layer.
        """
        module: Any = build_network(self.architecture, self._path, PoolError)
        head = module.get_classifier() if hasattr(module, "get_classifier") else None
        if not isinstance(head, nn.Linear) or not hasattr(module, "forward_head"):
            raise PoolError(
                f"{self._path}: {self.architecture.name!r} does not end in one linear layer, "
                "which features and heads need. Choose another architecture."
            )
        return module

    @cached_property
    def _copies(self) -> PerThread:
        return PerThread(_Split(self.module))

    @cached_property
    def head_name(self) -> str:
        """The name of the last linear layer, such as ``head`` or ``fc``."""
        head = self.module.get_classifier()
        return next(name for name, module in self.module.named_modules() if module is head)

    def head(self, weights: State) -> tuple[Tensor, Tensor]:
        """Weight (classes x width) and bias (classes; zeros where it has none) of the last layer.

        Raises:
            PoolError: weights that do not fit.
        """
        self.check(weights)
        weight = weights[f"{self.head_name}.weight"].float()
        bias = weights.get(f"{self.head_name}.bias")
        return weight, torch.zeros(len(weight)) if bias is None else bias.float()

    def check(self, weights: State) -> None:
        """Refuse weights that do not fill the architecture.

        Raises:
            PoolError: a parameter missing or of another shape.
        """
        expected = self.module.state_dict()
        check_state(expected, weights, self.architecture.name, self._path, PoolError)

    @torch.no_grad()
    def outputs(
        self,
        weights: State,
        images: Tensor,
        dtype: torch.dtype = torch.float32,
        batch: int = BATCH,
    ) -> Outputs:
        """Features and logits in evaluation mode (no dropout, stored statistics).

        Args:
            weights: one tensor per parameter and buffer (more are ignored).
            images: N x channels x H x W, normalised.
            dtype: in which everything is computed; float64 where float32 would overflow.
            batch: images per forward pass.

        Raises:
            PoolError: weights or images that do not fit the architecture.
        """
        self.check(weights)
        known = self.module.state_dict().keys()
        state = {
            f"network.{name}": _laid_out(value.to(dtype)) if value.is_floating_point() else value
            for name, value in weights.items()
            if name in known
        }
        split = self._copies.module
        try:
            parts = [
                torch.func.functional_call(split, state, (_laid_out(part.to(dtype)),))
                for part in images.split(batch)
            ]
        except (RuntimeError, AssertionError) as fault:
            raise PoolError(
                f"{self._path}: images of shape {tuple(images.shape[1:])} do not fit the "
                f"architecture: {str(fault).splitlines()[0]:.200}"
            ) from fault
        features, logits = (torch.cat(column) for column in zip(*parts, strict=True))
        return Outputs(features, logits)


def _laid_out(tensor: Tensor) -> Tensor:
    """Images and kernels with channels last, which convolutions run up to twice as fast on."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor

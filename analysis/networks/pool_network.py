"""The network that a pool names."""

from __future__ import annotations

from typing import Any

from torch import nn

from analysis.networks.build import build_network
from analysis.networks.limits import Size
from analysis.networks.stateless import StatelessNetwork
from merge_core.errors import PoolError
from merge_core.suites.pool import Pool


def pool_network(pool: Pool) -> StatelessNetwork:
    """The architecture of a pool, with its head.

    Raises:
        PoolError: it cannot be built, or does not end in one linear layer.
        CheckpointError: the first member, by whose size it is bounded, cannot be opened.

    Example:
        >>> from merge_core.suites.pool import load_pool
        >>> network = pool_network(load_pool("digits-mlp-shared"))
        >>> network.head_name, network.module.get_classifier().out_features
        ('head', 10)
    """
    architecture = pool.spec.architecture
    module: Any = build_network(architecture, pool.path, PoolError, size=Size.of(pool.member(0)))
    head = module.get_classifier() if hasattr(module, "get_classifier") else None
    if not isinstance(head, nn.Linear) or not hasattr(module, "forward_head"):
        raise PoolError(
            f"{pool.path}: {architecture.name!r} does not end in one linear layer, "
            "which features and heads need. Choose another architecture."
        )
    name = next(name for name, each in module.named_modules() if each is head)
    return StatelessNetwork(
        module, architecture, pool.path, PoolError, head_name=name, channels_last=True
    )

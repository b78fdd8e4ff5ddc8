"""The backbone that a suite names, run with any weights of its layout."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from analysis.networks.build import check_state
from analysis.networks.pool_network import ModuleCopies
from analysis.networks.towers import suite_network
from merge_core.errors import SuiteError
from merge_core.executors.base import one_thread
from merge_core.suites.suite import Suite

# Few enough for every thread to have some of them, and enough for large products.
BATCH = 32


class Backbone:
    """A network without classifier, whose weights are given with each call.

    Args:
        suite: a suite that names an architecture.

    Raises:
        SuiteError: no architecture.
    """

    def __init__(self, suite: Suite) -> None:
        self._suite = suite
        self._architecture = suite.spec.architecture
        if self._architecture is None:
            raise SuiteError(
                f"The suite {suite.name!r} names no architecture, so its models cannot be run. "
                "Add 'architecture: {name: ..., args: {...}}' to suite.yaml."
            )

    @cached_property
    def _built(self) -> tuple[nn.Module, frozenset[str]]:
        return suite_network(self._suite)

    @property
    def model(self) -> nn.Module:
        """The network in evaluation mode; of its own weights only those of the base are used.

        Raises:
            MergeScopeError: its library does not know it, cannot build it or is not installed.
        """
        return self._built[0]

    @cached_property
    def _copies(self) -> ModuleCopies:
        return ModuleCopies(self.model)

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Refuse weights that do not fill the architecture.

        Raises:
            SuiteError: a parameter missing or of another shape.
        """
        assert self._architecture is not None
        model, given = self._built
        expected = {k: v for k, v in model.state_dict().items() if k not in given}
        check_state(expected, weights, self._architecture.name, self._suite.path, SuiteError)

    @one_thread()
    def features(self, weights: Mapping[str, Tensor], images: Tensor, batch: int = BATCH) -> Tensor:
        """Pooled features after the final norm, the input of the heads.

        Args:
            weights: one tensor per parameter and buffer of the architecture (more are ignored).
            images: float32, N x 3 x H x W, normalised; or tokens of texts, int64, N x L.
            batch: images per forward pass; several run side by side.

        Returns:
            float32, N x width.

        Raises:
            SuiteError: weights or images that do not fit the architecture.
        """
        self.check(weights)
        known = self.model.state_dict().keys()
        state = {
            name: value.float() if value.is_floating_point() else value
            for name, value in weights.items()
            if name in known
        }
        try:
            parts = self._copies.run(state, images.split(batch))
        except (RuntimeError, AssertionError, ValueError, IndexError) as error:
            kind = "texts" if images.ndim == 2 else "images"
            raise SuiteError(
                f"The {kind} of shape {tuple(images.shape[1:])} do not fit the architecture: "
                f"{str(error).splitlines()[0]:.200}"
            ) from error
        features = torch.cat(parts)
        if features.ndim != 2:
            raise SuiteError(
                f"{self._suite.path}: the architecture gives features of shape "
                f"{tuple(features.shape[1:])} per image, but heads take one vector. Set its "
                "global_pool (such as 'avg' or 'token')."
            )
        return features

"""The backbone that a suite names, run with any weights of its layout."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from analysis.networks import PerThread, build_network, check_state
from merge_core.errors import SuiteError
from merge_core.suite import Suite


class Backbone:
    """A network without classifier, whose weights are given with each call.

    Args:
        suite: a suite that names an architecture.

    Raises:
        SuiteError: no architecture, or one that timm does not know or cannot build.
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
    def model(self) -> nn.Module:
        """The network in evaluation mode (its own weights are never used)."""
        assert self._architecture is not None
        return build_network(self._architecture, self._suite.path, SuiteError, num_classes=0)

    @cached_property
    def _copies(self) -> PerThread:
        return PerThread(self.model)

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Refuse weights that do not fill the architecture.

        Raises:
            SuiteError: a parameter missing or of another shape.
        """
        assert self._architecture is not None
        expected = self.model.state_dict()
        check_state(expected, weights, self._architecture.name, self._suite.path, SuiteError)

    @torch.no_grad()
    def features(self, weights: Mapping[str, Tensor], images: Tensor, batch: int = 250) -> Tensor:
        """Pooled features after the final norm, the input of the heads.

        Args:
            weights: one tensor per parameter and buffer of the architecture (more are ignored).
            images: float32, N x 3 x H x W, normalised.
            batch: images per forward pass.

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
            model = self._copies.module
            parts = [
                torch.func.functional_call(model, state, (part,)) for part in images.split(batch)
            ]
        except (RuntimeError, AssertionError) as error:
            raise SuiteError(
                f"The images of shape {tuple(images.shape[1:])} do not fit the architecture: "
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

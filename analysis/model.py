"""The backbone that a suite names, run with any weights of its layout."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from merge_core.errors import SuiteError
from merge_core.suite import Suite

# Arguments of timm that would fetch weights or open other files.
REFUSED_ARGS = ("pretrained", "checkpoint_path", "cache_dir", "scriptable")


class Backbone:
    """A timm model without classifier, whose weights are given with each call.

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
        """The timm module in evaluation mode (its own weights are never used)."""
        import timm  # three seconds: only where a model is run

        assert self._architecture is not None
        name, args = self._architecture.name, self._architecture.args
        refused = [arg for arg in args if arg.startswith(REFUSED_ARGS)]
        if ":" in name or refused:
            what = f"the argument {refused[0]!r}" if refused else f"the name {name!r}"
            raise SuiteError(
                f"{self._suite.path}: architecture: {what} would fetch files. Give the plain "
                "timm name and its shape arguments; the weights come from the suite."
            )
        if not timm.is_model(name):
            near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:3])
            hint = f" Similar: {near}." if near else ""
            raise SuiteError(f"{self._suite.path}: timm knows no architecture {name!r}.{hint}")
        try:
            model = timm.create_model(name, pretrained=False, num_classes=0, **args)
        except Exception as error:  # wrong arguments raise almost anything, from deep inside
            raise SuiteError(
                f"{self._suite.path}: timm cannot build {name!r} with {args} "
                f"({type(error).__name__}: {error}). Correct the args."
            ) from error
        return model.eval().requires_grad_(False)

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Refuse weights that do not fill the architecture.

        Raises:
            SuiteError: a parameter missing or of another shape.
        """
        assert self._architecture is not None
        expected = self.model.state_dict()
        missing = [name for name in expected if name not in weights]
        if missing:
            raise SuiteError(
                f"The weights lack {missing[0]!r}, which the architecture "
                f"{self._architecture.name!r} needs ({len(missing)} missing in all). "
                f"Correct the architecture in {self._suite.path}."
            )
        for name, value in expected.items():
            if weights[name].shape != value.shape:
                raise SuiteError(
                    f"{name!r} has shape {tuple(weights[name].shape)}, but the architecture "
                    f"{self._architecture.name!r} needs {tuple(value.shape)}. "
                    f"Correct the architecture's args in {self._suite.path}."
                )

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
            parts = [
                torch.func.functional_call(self.model, state, (part,))
                for part in images.split(batch)
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

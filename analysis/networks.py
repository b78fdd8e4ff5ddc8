"""The network that a suite or a pool names, run with any weights of its layout."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from analysis.plain_networks import PLAIN
from merge_core.errors import MergeScopeError, PoolError
from merge_core.executors import Threads, one_thread
from merge_core.pool import Pool
from merge_core.suite import ArchitectureSpec

# Arguments of timm that would fetch weights or open other files.
REFUSED_ARGS = ("pretrained", "checkpoint_path", "cache_dir", "scriptable")
BATCH = 250

State = Mapping[str, Tensor]


def build_network(
    architecture: ArchitectureSpec,
    path: Path,
    error: type[MergeScopeError],
    num_classes: int | None = None,
) -> nn.Module:
    """A network in evaluation mode, without gradients; its own weights are random.

    Args:
        architecture: ``linear``, ``mlp``, ``vgg`` (see :mod:`analysis.plain_networks`) or a name
            of timm, and arguments.
        path: the file that names it, for messages.
        error: what is raised.
        num_classes: overrides the arguments'; 0 for no classifier.

    Raises:
        MergeScopeError: of the given kind: unknown, or not buildable with these arguments.
    """
    name, args = architecture.name, dict(architecture.args)
    if architecture.library != "timm":
        raise error(
            f"{path}: the networks of a pool are timm's, not those of {architecture.library}. "
            "Give the architecture's name in timm."
        )
    if num_classes is not None:
        if "num_classes" in args:
            raise error(
                f"{path}: timm cannot build {name!r} with num_classes here, as the classes come "
                "from the heads. Correct the args."
            )
        args["num_classes"] = num_classes
    refused = [arg for arg in args if arg.startswith(REFUSED_ARGS)]
    if ":" in name or refused:
        what = f"the argument {refused[0]!r}" if refused else f"the name {name!r}"
        raise error(
            f"{path}: architecture: {what} would fetch files. Give the plain "
            "timm name and its shape arguments; the weights come from the suite or pool."
        )
    try:
        if name in PLAIN:
            return PLAIN[name](**args).eval().requires_grad_(False)
        import timm  # three seconds: only where a model is run

        if timm.is_model(name):
            model: nn.Module = timm.create_model(name, pretrained=False, **args)
            return model.eval().requires_grad_(False)
    except Exception as fault:  # wrong arguments raise almost anything, from deep inside
        raise error(
            f"{path}: {'timm' if name not in PLAIN else 'MergeScope'} cannot build {name!r} with "
            f"{args} ({type(fault).__name__}: {fault}). Correct the args."
        ) from fault
    near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:3])
    raise error(
        f"{path}: timm knows no architecture {name!r}." + (f" Similar: {near}." if near else "")
    )


def check_state(
    expected: State, weights: State, name: str, path: Path, error: type[MergeScopeError]
) -> None:
    """Refuse weights that do not fill an architecture.

    Args:
        expected: the architecture's own state.
        weights: what is to be run; more than `expected` is ignored.
        name: of the architecture.
        path: the file that names it, for messages.
        error: what is raised.

    Raises:
        MergeScopeError: of the given kind: a parameter missing or of another shape.
    """
    missing = [key for key in expected if key not in weights]
    if missing:
        raise error(
            f"The weights lack {missing[0]!r}, which the architecture {name!r} needs "
            f"({len(missing)} missing in all). Correct the architecture in {path}."
        )
    for key, value in expected.items():
        if weights[key].shape != value.shape:
            raise error(
                f"{key!r} has shape {tuple(weights[key].shape)}, but the architecture {name!r} "
                f"needs {tuple(value.shape)}. Correct the architecture's args in {path}."
            )


@dataclass(frozen=True)
class Outputs:
    """What a model gives for N images.

    Attributes:
        features: the input of the last linear layer, after any final norm, N x width.
        logits: N x classes.
    """

    features: Tensor
    logits: Tensor


class ModuleCopies:
    """A module that runs on several threads at once, with any weights.

    Running a module with other weights puts them into it for that while, so that two threads
    with one module would run each other's weights: each takes a copy that no other has. Copies
    share the module's own tensors.

    Args:
        module: copied, never run.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._idle: list[nn.Module] = []

    @contextmanager
    def lent(self) -> Iterator[nn.Module]:
        """A copy for one thread at a time."""
        try:
            module = self._idle.pop()
        except IndexError:
            own = (*self._module.parameters(), *self._module.buffers())
            module = copy.deepcopy(self._module, {id(tensor): tensor for tensor in own})
        try:
            yield module
        finally:
            self._idle.append(module)

    def call(self, weights: State, value: Tensor) -> Any:
        """The module's output under weights, differentiable in them.

        Args:
            weights: one tensor per parameter and buffer.
            value: images, or tokens.
        """
        with self.lent() as module:
            return torch.func.functional_call(module, dict(weights), (value,))

    def run(self, weights: State, values: Iterable[Tensor]) -> list[Any]:
        """Outputs for several inputs, side by side, each by one torch thread."""
        return list(Threads().map(torch.no_grad()(partial(self.call, weights)), values))


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
    def _copies(self) -> ModuleCopies:
        return ModuleCopies(_Split(self.module))

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

    @one_thread()
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
            batch: images per forward pass; several run side by side.

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
        try:
            parts = self._copies.run(
                state, (_laid_out(part.to(dtype)) for part in images.split(batch))
            )
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

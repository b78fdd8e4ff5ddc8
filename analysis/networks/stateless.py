"""A network whose weights are given with each call, for suites and pools alike."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from analysis.networks.saved_names import UNUSED
from merge_core.devices import CPU, Device, compute, current_device, ran_out_of_memory
from merge_core.errors import MergeScopeError
from merge_core.executors.base import one_thread
from merge_core.executors.local import Threads
from merge_core.suites.suite_spec import ArchitectureSpec

# Few enough for every thread to have some of them, and enough for large products.
BATCH = 50
# Of texts on an accelerator, which are padded to the longest of them.
TEXTS = 256

# What networks raise about inputs, or a configuration, that do not fit.
FAULTS = (RuntimeError, AssertionError, ValueError, IndexError, AttributeError, TypeError, KeyError)

State = Mapping[str, Tensor]


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


@dataclass(frozen=True)
class Loaded:
    """Weights as a network runs them: checked, in one dtype, on one device.

    Attributes:
        state: tensor by parameter or buffer.
        dtype: of the floating ones, in which everything is computed.
        device: where they lie.
    """

    state: State
    dtype: torch.dtype
    device: Device


class ModuleCopies:
    """A module that runs on several threads at once, with any weights, on any device.

    Running a module with other weights puts them into it for that while, so that two threads
    with one module would run each other's weights: each takes a copy that no other has. Copies
    share the module's own tensors.

    Args:
        module: copied, never run.
        fixed: names that weights may leave out.
    """

    def __init__(self, module: nn.Module, fixed: Collection[str] = ()) -> None:
        self._module = module
        self._fixed = fixed
        self._idle: dict[tuple[str, torch.dtype], list[nn.Module]] = {}

    @contextmanager
    def lend(self, device: Device = CPU, dtype: torch.dtype = torch.float32) -> Iterator[nn.Module]:
        """A copy for one thread at a time, whose own tensors are on a device.

        Args:
            device: where it runs.
            dtype: of the weights that it is called with.
        """
        idle = self._idle.setdefault((device.name, dtype), [])
        try:
            module = idle.pop()
        except IndexError:
            module = self._copy(device, dtype)
        try:
            yield module
        finally:
            idle.append(module)

    def _copy(self, device: Device, dtype: torch.dtype) -> nn.Module:
        own = (*self._module.parameters(), *self._module.buffers())
        kept = {id(tensor): tensor for tensor in own}
        if device.accelerates:
            given = self._module.state_dict(keep_vars=True)
            replaced = {id(value) for name, value in given.items() if name not in self._fixed}
            kept = {
                number: tensor if number in replaced else device.send(tensor.detach())
                for number, tensor in kept.items()
            }
        made = copy.deepcopy(self._module, kept)
        for module in made.modules():
            for name in getattr(module, UNUSED, ()):  # they are computed with all the same
                module._buffers[name] = module.get_buffer(name).to(dtype)
        return made

    def call(
        self,
        weights: State,
        value: Tensor,
        device: Device = CPU,
        dtype: torch.dtype = torch.float32,
    ) -> Any:
        """The module's output under weights, differentiable in them.

        Args:
            weights: one tensor per parameter and buffer.
            value: images, or tokens.
            device: where both lie.
            dtype: of the weights.
        """
        with self.lend(device, dtype) as module:
            return torch.func.functional_call(module, dict(weights), (value,))

    def run(self, weights: Loaded, values: Iterable[Tensor]) -> list[Any]:
        """Outputs for several inputs on the CPU, side by side, each by one torch thread."""
        call = partial(self.call, weights.state, dtype=weights.dtype)
        return list(Threads().map(torch.inference_mode()(call), values))


class StatelessNetwork:
    """A network in evaluation mode (no dropout, stored statistics), run with any weights.

    Args:
        module: the network, from images to features; with a head, it has timm's interface.
        architecture: what it was built of, for messages.
        path: the file that names it, for messages.
        error: what is raised.
        fixed: parameters that weights may leave out: the module's own values count then. Of all
            others it is only the shape that counts.
        head_name: of the last linear layer, where the network has one.
        channels_last: the layout of images and kernels, in which convolutions run up to twice as
            fast.
    """

    def __init__(
        self,
        module: nn.Module,
        architecture: ArchitectureSpec,
        path: Path,
        error: type[MergeScopeError],
        *,
        fixed: Collection[str] = (),
        head_name: str = "",
        channels_last: bool = False,
    ) -> None:
        self.module: Any = module
        self.head_name = head_name
        self._architecture, self._path, self._error = architecture, path, error
        self._shapes = {name: value.shape for name, value in module.state_dict().items()}
        self.fixed = fixed
        self._channels_last = channels_last
        self._copies = ModuleCopies(
            _Features(module, bool(head_name)), {f"network.{name}" for name in fixed}
        )
        self._fitting: dict[tuple[str, torch.Size], int] = {}

    def check(self, weights: State) -> None:
        """Refuse weights that do not fill the architecture; more of them are ignored.

        Raises:
            MergeScopeError: of the network's kind: a parameter missing or of another shape.
        """
        name = self._architecture.name
        expected = {key: shape for key, shape in self._shapes.items() if key not in self.fixed}
        missing = [key for key in expected if key not in weights]
        if 2 * len(missing) > len(expected) and weights:
            other = next((key for key in weights if key not in expected), next(iter(weights)))
            raise self._error(
                f"The weights lack {missing[0]!r} and {len(missing)} of the {len(expected)} "
                f"parameters of the architecture {name!r}, before whatever prefix; theirs are "
                f"called {other!r} and so on. Correct the architecture in {self._path}: these are "
                "weights of another."
            )
        if missing:
            raise self._error(
                f"The weights lack {missing[0]!r}, which the architecture {name!r} needs "
                f"({len(missing)} of {len(expected)} are missing). Correct the architecture or its "
                f"args in {self._path}."
            )
        for key, shape in expected.items():
            if weights[key].shape != shape:
                raise self._error(
                    f"{key!r} has shape {tuple(weights[key].shape)}, but the architecture {name!r} "
                    f"needs {tuple(shape)}. Correct the architecture's args in {self._path}."
                )

    def load(self, weights: State, dtype: torch.dtype = torch.float32) -> Loaded:
        """Weights made ready to be run, once for all inputs.

        On the current device; on the CPU where that has no float64 for such a dtype, or too
        little memory.

        Args:
            weights: one tensor per parameter and buffer (more are ignored).
            dtype: in which everything is computed; float64 where float32 would overflow.

        Raises:
            MergeScopeError: of the network's kind: weights that do not fit it.
        """
        self.check(weights)
        # What weights leave out is the module's: of one dtype with the rest.
        own = {name: value.detach() for name, value in self.module.named_parameters()}
        own = {name: value for name, value in own.items() if name not in weights}
        own |= {name: value for name, value in weights.items() if name in self._shapes}

        def work(device: Device) -> Loaded:
            state = {
                f"network.{name}": self._cast(device.send(_narrow(value, dtype)), dtype)
                for name, value in own.items()
            }
            return Loaded(state, dtype, device)

        return compute(work, exact=dtype == torch.float64)

    def features(
        self,
        weights: State | Loaded,
        images: Tensor,
        dtype: torch.dtype = torch.float32,
        batch: int = BATCH,
    ) -> Tensor:
        """Pooled features after any final norm, the input of the head: N x width, on the CPU.

        Args:
            weights: one tensor per parameter and buffer (more are ignored); or what :meth:`load`
                made of them.
            images: N x channels x H x W, normalised; or tokens of texts, int64, N x L.
            dtype: see :meth:`load`, where the weights are not loaded yet.
            batch: images per forward pass on the CPU; several run side by side. An accelerator
                takes as many at once as fit.

        Raises:
            MergeScopeError: of the network's kind: weights or images that do not fit it.
        """
        loaded = weights if isinstance(weights, Loaded) else self.load(weights, dtype)
        return loaded.device.fetch(self.run(loaded, images, batch))

    @one_thread()
    def run(self, loaded: Loaded, images: Tensor, batch: int = BATCH) -> Tensor:
        """The same, left where the weights lie.

        Raises:
            MergeScopeError: of the network's kind: images that do not fit it.
        """
        order = _by_length(images)
        inputs = images if order is None else images[order]
        try:
            parts = self._run(loaded, inputs, batch)
        except FAULTS as fault:
            kind = "texts" if images.ndim == 2 else "images"
            raise self._error(
                f"{self._path}: {kind} of shape {tuple(images.shape[1:])} do not fit the "
                f"architecture: {(str(fault).splitlines() or [type(fault).__name__])[0]:.200}"
            ) from fault
        features = torch.cat(parts)
        if features.ndim != 2:
            raise self._error(
                f"{self._path}: the architecture gives features of shape "
                f"{tuple(features.shape[1:])} per input, but heads take one vector. Set its "
                "global_pool (such as 'avg' or 'token')."
            )
        return features if order is None else features[order.argsort()]

    def _run(self, loaded: Loaded, inputs: Tensor, batch: int) -> list[Tensor]:
        """Features of one part of the inputs after another, where the weights lie."""
        dtype, device = loaded.dtype, loaded.device
        if not device.accelerates:
            # Prepared inputs may lie on the accelerator that had no room for the weights.
            fetch = current_device().fetch
            here = (self._cast(fetch(part), dtype) for part in inputs.split(batch))
            return self._copies.run(loaded, here)
        parts: list[Tensor] = []
        kind = (device.name, inputs.shape[1:])
        size = self._fitting.get(kind, TEXTS if inputs.ndim == 2 else len(inputs))
        rest = inputs
        while len(rest):
            found = self._try(loaded, rest[:size])
            if found is not None:
                parts.append(found)
                rest = rest[size:]
                continue
            device.release()
            if min(size, len(rest)) == 1:
                state = {name: device.fetch(value) for name, value in loaded.state.items()}
                left = self._run(Loaded(state, dtype, CPU), rest, batch)
                return [*parts, *(device.send(part) for part in left)]
            size = self._fitting[kind] = min(size, len(rest)) // 2
        return parts

    def _try(self, loaded: Loaded, inputs: Tensor) -> Tensor | None:
        """Features of some inputs on an accelerator; None where its memory does not suffice."""
        device = loaded.device
        try:
            with device.inference():
                there = self._cast(device.send(inputs), loaded.dtype)
                features: Tensor = self._copies.call(loaded.state, there, device, loaded.dtype)
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            return None
        return features

    def head(self, weights: State, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Weight (classes x width) and bias (classes; zeros where it has none) of the last layer.

        Raises:
            MergeScopeError: of the network's kind: weights that do not fit.
        """
        self.check(weights)
        weight = weights[f"{self.head_name}.weight"].to(dtype)
        bias = weights.get(f"{self.head_name}.bias")
        return weight, torch.zeros(len(weight), dtype=dtype) if bias is None else bias.to(dtype)

    @one_thread()
    @torch.no_grad()
    def outputs(
        self,
        weights: State,
        images: Tensor,
        dtype: torch.dtype = torch.float32,
        batch: int = BATCH,
    ) -> Outputs:
        """Features and the logits of the network's own head (see :meth:`features`).

        Raises:
            MergeScopeError: of the network's kind: weights or images that do not fit it.
        """
        features = self.features(weights, images, dtype, batch)
        head = self.head(weights, dtype)
        logits = [functional.linear(part, *head) for part in features.split(batch)]
        return Outputs(features, torch.cat(logits))

    def _cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Numbers in the network's dtype and layout; tokens and counters as they are."""
        if not tensor.is_floating_point():
            return tensor
        tensor = tensor.to(dtype)
        laid_out = self._channels_last and tensor.ndim == 4
        return tensor.contiguous(memory_format=torch.channels_last) if laid_out else tensor


def _narrow(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 in the dtype that is wanted, as not every device has it; what is short as it is."""
    return value.to(dtype) if value.dtype == torch.float64 else value


def _by_length(inputs: Tensor) -> Tensor | None:
    """An order of texts by their numbers of tokens, so that a batch has little padding.

    Args:
        inputs: tokens, N x L, negative after the end of a text; anything else keeps its order.
    """
    if inputs.ndim != 2 or inputs.is_floating_point():
        return None
    return (inputs >= 0).sum(dim=1).argsort(stable=True)


class _Features(nn.Module):
    """A network without its head."""

    def __init__(self, network: nn.Module, has_head: bool) -> None:
        super().__init__()
        self.network = network
        self._has_head = has_head

    def forward(self, images: Tensor) -> Any:
        network: Any = self.network
        if not self._has_head:
            return network(images)
        return network.forward_head(network.forward_features(images), pre_logits=True)

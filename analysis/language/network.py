"""A causal language model of transformers, built from its configuration, run with any weights.

Nothing is fetched and no code of a checkpoint is run. The network is built without memory for its
parameters, and weights are put into it one by one: what is not needed twice is never there twice.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from analysis.networks.build import build_error
from analysis.networks.encoders import import_library
from analysis.networks.limits import Size, build_within, find_fetching
from analysis.networks.saved_names import saved_names
from analysis.networks.stateless import FAULTS
from analysis.networks.towers import common_prefix, refuse_deeper
from merge_core.devices import CPU, Device, current_device, ran_out_of_memory
from merge_core.errors import SuiteError
from merge_core.suites.architectures import causal_types
from merge_core.suites.suite import Suite
from merge_core.suites.suite_spec import ArchitectureSpec

# Weights up to this many elements are held in float32 (4 bytes each); larger ones as they are
# stored, and each layer's become float32 while it runs: the numbers are the same.
FLOAT32_ELEMENTS = 500_000_000
# Arguments whose numbers make nothing larger: bases, positions and windows.
NO_SIZE = ("theta", "position", "window", "rope", "token", "factor", "ctx", "len")


class LanguageNetwork:
    """The network of a suite of language models, without weights.

    Args:
        suite: of which base and experts are such models.

    Attributes:
        name: of its architecture.
        path: of the file that names it, or could.

    Raises:
        SuiteError: transformers knows no causal language model of that type, or cannot build it.
        CheckpointError: an expert that cannot be opened.
    """

    def __init__(self, suite: Suite) -> None:
        architecture = suite.architecture
        if architecture is None:
            raise SuiteError(
                f"No config.json beside the base or an expert of {suite.name!r} names a causal "
                "language model of transformers. Add it, or 'architecture:' to suite.yaml."
            )
        expert = suite.expert(suite.tasks[0])
        self.name, self.path = architecture.name, suite.path
        self._size = Size.of(expert)
        # In a thread of its own: the library keeps the frames that called it for a while, and
        # those of an evaluation hold weights.
        with ThreadPoolExecutor(1) as pool:
            self._module = pool.submit(_build, architecture, suite.path, self._size).result()
        if not self.in_float32:
            _compute_in_float32(self._module)
        self._idle: dict[str, list[nn.Module]] = {}
        self._expected = dict(self._module.named_parameters(remove_duplicate=False))
        self._vocabularies = _vocabularies(self._module)
        shapes = {name: tuple(expert.info(name).shape) for name in expert}
        places = _places(self._module, shapes)
        self._places = {own: place for own, place in places.items() if own in self._expected}
        found = {place for place in places.values() if place in shapes}
        refuse_deeper(architecture, found, shapes, suite.path)

    @property
    def in_float32(self) -> bool:
        """Whether weights are held in float32 rather than as they are stored."""
        return self._size.elements <= FLOAT32_ELEMENTS

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> LanguageModel:
        """The network with these weights, which are taken one by one, on the current device.

        On the CPU where that has no float64, in which sums are taken, or too little memory.

        Args:
            weights: name and tensor; names that the network has not are ignored.

        Raises:
            SuiteError: a parameter is missing, or of another shape.
        """
        wanted: dict[str, list[str]] = {}
        for own, place in self._places.items():
            wanted.setdefault(place, []).append(own)
        state: dict[str, nn.Parameter] = {}
        device = current_device().exact
        last: tuple[Tensor, nn.Parameter] | None = None
        for name, value in weights:
            for own in wanted.get(name, ()):
                self._check_shape(own, name, value)
                if last is None or last[0] is not value:  # two names of one tensor
                    kept = value.to(torch.float32 if self.in_float32 else value.dtype, copy=True)
                    device = _take(state, own, kept, device)
                    last = (value, state[own])
                state[own] = last[1]
        if len(self._vocabularies) == 2:  # a head that the weights have not is the embedding
            embedding, head = self._vocabularies
            if embedding in state:
                state.setdefault(head, state[embedding])
        if missing := [own for own in self._expected if own not in state]:
            raise SuiteError(
                f"The weights lack {self._places[missing[0]]!r}, which the language model "
                f"{self.name!r} needs ({len(missing)} of {len(self._expected)} are missing). "
                f"Correct the architecture in {self.path}, or config.json beside the base."
            )
        return LanguageModel(self, state, self._vocabularies, device)

    def _check_shape(self, own: str, name: str, value: Tensor) -> None:
        """Refuse another shape; a vocabulary may have more rows than the configuration says."""
        expected = self._expected[own]
        first = 1 if own in self._vocabularies else 0
        if value.ndim != expected.ndim or value.shape[first:] != expected.shape[first:]:
            raise SuiteError(
                f"{name!r} has shape {tuple(value.shape)}, but the language model {self.name!r} "
                f"needs {tuple(expected.shape)}. Correct the architecture in {self.path}, or "
                "config.json beside the base."
            )

    @contextmanager
    def lend(self, state: Mapping[str, nn.Parameter], device: Device = CPU) -> Iterator[Any]:
        """The network with weights that lie on a device, for one thread at a time."""
        idle = self._idle.setdefault(device.name, [])
        try:
            module = idle.pop()
        except IndexError:
            buffers = {id(value): device.send(value) for value in self._module.buffers()}
            module = copy.deepcopy(self._module, buffers)
        try:
            _put(module, state)
            yield module
        finally:
            _put(module, self._expected)
            idle.append(module)


class LanguageModel:
    """A language model with its weights, ready to run on several threads.

    Args:
        network: that they are put into.
        state: one tensor per parameter, by the library's name.
        vocabularies: names of the embedding and of the head.
        device: where they lie.

    Attributes:
        device: where it runs.
        nbytes: of its weights in memory.
        vocabulary: how many tokens its head knows.
    """

    def __init__(
        self,
        network: LanguageNetwork,
        state: Mapping[str, nn.Parameter],
        vocabularies: Sequence[str],
        device: Device = CPU,
    ) -> None:
        self._network, self._state, self.device = network, state, device
        self._vocabularies = vocabularies
        self.nbytes = sum(value.nbytes for value in {id(v): v for v in state.values()}.values())
        self._known, self.vocabulary = (len(state[vocabularies[i]]) for i in (0, -1))

    def on_cpu(self) -> LanguageModel:
        """The same on the CPU."""
        state = {
            name: nn.Parameter(self.device.fetch(value.detach()), requires_grad=False)
            for name, value in self._state.items()
        }
        return LanguageModel(self._network, state, self._vocabularies)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """What it says of the next token at every place, on its device.

        Float32, N x L x vocabulary.

        Args:
            tokens: int64, N x L, negative after the end of a text; on the CPU.

        Raises:
            SuiteError: the texts do not fit the network.
            RuntimeError: an accelerator has too little memory for them.
        """
        there = tokens >= 0
        arguments: dict[str, Any] = {"input_ids": tokens.clamp(min=0), "use_cache": False}
        if not bool(there.all()):
            arguments["attention_mask"] = there.long()
        if int(tokens.max()) >= self._known:
            raise SuiteError(
                f"The tokenizer gives the token {int(tokens.max())}, and the model knows "
                f"{self._known} of them. Name the base's own tokenizer in the data."
            )
        try:
            send = self.device.send
            given = {k: send(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
            with self._network.lend(self._state, self.device) as module:
                found: Tensor = module(**given).logits
        except FAULTS as fault:
            if self.device.accelerates and ran_out_of_memory(fault):
                raise
            reason = (str(fault).splitlines() or [type(fault).__name__])[0]
            raise SuiteError(
                f"{self._network.path}: texts of {tokens.shape[1]} tokens do not fit the language "
                f"model {self._network.name!r}: {reason:.200} Correct 'length' of the data or the "
                "architecture's args."
            ) from fault
        return found.float()


def _build(architecture: ArchitectureSpec, path: Path, size: Size) -> Any:
    """The library's language model of a type, its parameters on the meta device.

    Raises:
        SuiteError: there is none, or it cannot be built within the size of the weights.
    """
    name = architecture.name
    transformers = import_library("transformers", path)
    if architecture.library != "transformers" or name not in causal_types():
        raise SuiteError(
            f"{path}: {name!r:.80} of {architecture.library} is no causal language model of "
            "transformers, and texts of the kind 'language' are evaluated with one. Correct the "
            "architecture."
        )
    if (fetching := find_fetching(name, architecture.args)) is not None:
        raise SuiteError(
            f"{path}: architecture: {fetching} would have transformers fetch or open files. Give "
            "its plain name there and arguments of its shape; the weights come from the suite."
        )

    def build() -> nn.Module:
        with _parameters_without_memory():
            config = transformers.CONFIG_MAPPING[name].from_dict(
                {"pad_token_id": None, **architecture.args}  # the default may be no row
            )
            made: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
            return made

    numbers = {
        key: value
        for key, value in architecture.args.items()
        if not any(word in key for word in NO_SIZE)
    }
    try:
        model = build_within(size, numbers, build).eval().requires_grad_(False)
        heads = _vocabularies(model)
    except Exception as fault:  # wrong arguments raise almost anything, from deep inside
        raise build_error(architecture, path, fault, SuiteError) from fault
    if not heads or getattr(model.config, "is_encoder_decoder", False):
        raise SuiteError(f"{path}: {name!r} of transformers is no causal language model.")
    return model


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Parameters that modules of this thread register meanwhile are on the meta device."""
    mine = threading.get_ident()

    def move(_module: nn.Module, _name: str, value: Any) -> Any:
        if threading.get_ident() != mine:
            return None
        return None if value is None else nn.Parameter(value.to("meta"), requires_grad=False)

    registered = hooks.register_module_parameter_registration_hook(move)
    try:
        yield
    finally:
        registered.remove()


def _vocabularies(model: Any) -> tuple[str, ...]:
    """Names of the embedding and of the head."""
    owners = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {id(module): name for name, module in model.named_modules()}
    return tuple(f"{names[id(owner)]}.weight" for owner in owners if id(owner) in names)


def _places(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """What a checkpoint calls each parameter: as the library does, with any prefix or without."""
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    base = f"{model.base_model_prefix}."

    def find(guess: Mapping[str, str]) -> dict[str, str]:
        prefix = common_prefix({guess[name]: shape for name, shape in state.items()}, shapes)
        return {name: prefix + place for name, place in guess.items()}

    own = {name: name for name in state}
    found = [find(own), find({name: name.removeprefix(base) for name in own})]
    if max(_count(places.values(), shapes) for places in found) < len(own) - 1:  # a tied head
        saved = saved_names(model)
        found += [find(saved), find({n: place.removeprefix(base) for n, place in saved.items()})]
    return max(found, key=lambda places: _count(places.values(), shapes))


def _count(places: Collection[str], shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(place in shapes for place in places)


def _take(state: dict[str, nn.Parameter], name: str, value: Tensor, device: Device) -> Device:
    """Put one more weight on a device; all of them on the CPU where it has no room for them.

    Returns:
        Where the weights lie then.
    """
    try:
        state[name] = nn.Parameter(device.send(value), requires_grad=False)
    except RuntimeError as error:
        if not (device.accelerates and ran_out_of_memory(error)):
            raise
    else:
        return device
    moved: dict[int, nn.Parameter] = {}  # one tensor may stand under two names
    for own, kept in state.items():
        if id(kept) not in moved:
            fetched = device.fetch(kept.detach())
            moved[id(kept)] = nn.Parameter(fetched, requires_grad=False)
        state[own] = moved[id(kept)]
    state[name] = nn.Parameter(value, requires_grad=False)
    device.release()
    return CPU


def _put(module: nn.Module, state: Mapping[str, nn.Parameter]) -> None:
    for path, part in module.named_modules():
        for name in part._parameters:
            if part._parameters[name] is not None:
                part._parameters[name] = state[f"{path}.{name}" if path else name]


def _compute_in_float32(module: nn.Module) -> None:
    """Have every layer's weights be float32 while it runs, and only then."""
    for part in module.modules():
        if type(part) is nn.Embedding:  # rows are read as they are
            part.register_forward_hook(lambda _part, _inputs, output: output.float())
        elif part._parameters:
            part.register_forward_pre_hook(_widen)
            part.register_forward_hook(_restore)


def _widen(part: nn.Module, _inputs: Any) -> None:
    part.__dict__["_stored"] = dict(part._parameters)
    for name, value in part._parameters.items():
        if value is not None:
            part._parameters[name] = nn.Parameter(value.float(), requires_grad=False)


def _restore(part: nn.Module, _inputs: Any, _output: Any) -> None:
    part._parameters.update(part.__dict__.pop("_stored"))

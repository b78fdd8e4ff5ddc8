"""The names of parameters as a library saves them, where those of its modules are others.

transformers 5 renames parameters when it loads and saves: a ViT's ``layers.0.attention.q_proj``
lies in files as ``encoder.layer.0.attention.attention.query``. Merges and learners know a network
by the names of its checkpoints, so its modules are called so here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Modules that go through what they hold; it stays where it is.
ITERATED = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
Shapes = Mapping[str, tuple[int, ...]]

# Where a module notes which of its buffers were parameters that nothing depends on.
UNUSED = "_left_unused"


def names_in(model: Any, shapes: Shapes) -> dict[str, str]:
    """What a checkpoint calls each parameter of a model: as the library saves it, or as it is.

    Args:
        model: of transformers.
        shapes: of the checkpoint's tensors, by name.
    """
    own = {name: name for name in model.state_dict()}
    ends = {end for name in shapes for end in _ends(name)}
    if own.keys() <= ends:
        return own
    saved = saved_names(model)
    return max((own, saved), key=lambda names: sum(name in ends for name in names.values()))


def saved_names(model: Any) -> dict[str, str]:
    """The name under which transformers saves each parameter, told by its own saving.

    Numbers stand for the parameters, so that next to nothing is written. A parameter that is
    saved in parts, or joined with others, keeps its name.
    """
    from safetensors.torch import load_file
    from transformers.utils import logging

    own = list(model.state_dict())
    marks = {name: torch.tensor([number]) for number, name in enumerate(own)}
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, state_dict=marks)
            found = load_file(Path(folder) / "model.safetensors")
    except Exception:  # conversions that compute with the numbers
        return {name: name for name in own}
    finally:
        if shown:
            logging.enable_progress_bar()
    by_number = {int(mark): saved for saved, mark in found.items() if mark.numel() == 1}
    return {name: by_number.get(number, name) for number, name in enumerate(own)}


def rename(model: nn.Module, names: Mapping[str, str]) -> nn.Module:
    """The same model with its parameters, and the modules that hold them, under other names.

    Its code goes on to find its modules by their own attributes. Modules that hold parameters
    themselves, and those with a number (the blocks), stand at their new places; between them
    lie modules that only hold others.

    Args:
        model: changed.
        names: by name of each parameter and buffer the new one.
    """
    if all(own == new for own, new in names.items()):
        return model
    places = {"": ""} | dict(_places(model, names))
    for own in sorted(places, key=lambda path: -path.count(".") if path else 1):
        _regroup(model.get_submodule(own), own, places)
    return model


def _places(model: nn.Module, names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Path and new path of every module that holds parameters, and of every block."""
    for path, module in model.named_modules():
        if not path:
            continue
        held = [(own, new) for own, new in names.items() if own.startswith(f"{path}.")]
        direct = [new for own, new in held if own.rpartition(".")[0] == path]
        if direct:
            yield path, direct[0].rpartition(".")[0]
        elif held and not isinstance(module, ITERATED):
            place = _block(path, [new for _, new in held])
            if place is not None:
                yield path, place


def _block(path: str, names: Sequence[str]) -> str | None:
    """The new path of a numbered module whose parameters have these names; None for any other."""
    numbers = [word for word in path.split(".") if word.isdigit()]
    if not path.rpartition(".")[2].isdigit():
        return None
    words = names[0].split(".")
    places = [end for end, word in enumerate(words) if word.isdigit()][: len(numbers)]
    if [words[end] for end in places] != numbers:
        return None
    place = ".".join(words[: places[-1] + 1])
    return place if all(name.startswith(f"{place}.") for name in names) else None


def _regroup(module: nn.Module, path: str, places: Mapping[str, str]) -> None:
    """Put what lies below a module at its new places there; its attributes stay."""
    start = f"{path}." if path else ""
    below = [each for each in places if each.startswith(start) and each != path]
    outermost = [each for each in below if not any(each.startswith(f"{other}.") for other in below)]
    if not outermost:
        return
    found = {each: module.get_submodule(each.removeprefix(start)) for each in outermost}
    _hide_children(module)
    above = places[path]
    for each in sorted(found, key=lambda each: len(places[each])):  # holders before the held
        words = places[each].removeprefix(f"{above}." if above else "").split(".")
        holder = module
        for word in words[:-1]:
            holder = _holder(holder, word)
        holder._modules[words[-1]] = found[each]


def _holder(module: nn.Module, word: str) -> nn.Module:
    """The module of that name which only holds others: the module's own of that name, or a new
    one."""
    inner = module._modules.get(word)
    if inner is None:
        inner = module.__dict__.get(word)
        if inner is None:
            inner = nn.Module()
        else:
            _hide_children(inner)
        module._modules[word] = inner
    return inner


def _hide_children(module: nn.Module) -> None:
    """Make attributes of what a module holds: its code finds them, walks over modules do not."""
    module.__dict__ |= module._modules
    module._modules.clear()


def leave_unused(encoder: Any, names: Collection[str]) -> None:
    """Take out of a model's parameters those of the names that its features do not depend on.

    Such are a pooler behind another pooling and the token of a mask. They stay in its code, with
    random values. Constants of whole numbers are the model's own.

    Args:
        encoder: from inputs to features.
        names: of parameters that checkpoints lack.
    """
    state = dict(encoder.named_parameters())
    wanted = {name: state[name] for name in names if name in state}
    used = _used(encoder, wanted)
    for name in names:
        owner = encoder.get_submodule(name.rpartition(".")[0])
        own, value = name.rpartition(".")[2], state.get(name)
        if value is None:
            if not owner._buffers[own].is_floating_point():
                owner._non_persistent_buffers_set.add(own)
        elif name not in used:
            del owner._parameters[own]
            owner.register_buffer(own, value.detach(), persistent=False)
            setattr(owner, UNUSED, {own, *getattr(owner, UNUSED, ())})


def _used(encoder: Any, parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """The parameters of which features have a derivative."""
    with torch.enable_grad():
        for value in parameters.values():
            value.requires_grad_(True)
        features = encoder(_example(encoder)).sum() if parameters else torch.zeros(())
        if not features.requires_grad:
            return set()
        found = torch.autograd.grad(features, list(parameters.values()), allow_unused=True)
    return {name for name, slope in zip(parameters, found, strict=True) if slope is not None}


def _example(encoder: Any) -> torch.Tensor:
    """An input of the smallest kind."""
    config = encoder.config
    if encoder.main_input_name != "pixel_values":
        return torch.zeros(1, 2, dtype=torch.int64)
    side = getattr(config, "image_size", 64)
    sides = tuple(side) if isinstance(side, list | tuple) else (side, side)
    return torch.zeros(1, config.num_channels, *sides)


def _ends(name: str) -> Iterator[str]:
    """A name without any number of its first words."""
    words = name.split(".")
    return (".".join(words[start:]) for start in range(len(words)))

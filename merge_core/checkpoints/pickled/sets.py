"""Which dictionary of a pickled checkpoint holds the model's weights.

Trainers keep weights beside much else, and often twice: as trained, and averaged while training
(EMA, SWA). The averaged ones are taken where both are the same network, as timm
(``load_state_dict``, ``use_ema=True``), BasicSR and DINO take them; what was chosen is said, and a
key after the file's name chooses otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from merge_core.checkpoints.pickled.arrays import ArrayReader
from merge_core.checkpoints.pickled.machine import PickleFileError
from merge_core.checkpoints.pickled.names import (
    NamedTensor,
    Walk,
    is_mapping,
    kind_of,
    tensor_of,
)
from merge_core.checkpoints.pickled.tensors import StoredTensor, Unreadable
from merge_core.checkpoints.stored.names import public_names
from merge_core.errors import CheckpointError

# Usual keys of the weights, in the order in which they are tried.
USUAL = (
    *("state_dict", "model_state_dict", "model", "module", "net", "network", "params", "weights"),
    *("model_state", "model_weights", "student"),
)
# Of these the usual trainers write one, beside which a tensor is never the model.
CERTAIN = USUAL[:5]
# Usual keys of averaged weights, in that order; others are told by a word in them.
AVERAGED = ("state_dict_ema", "model_ema", "params_ema", "g_ema", "ema_state_dict", "ema_model")
AVERAGED_WORD = re.compile(
    r"(^|[^a-z])(ema|swa|avg|averaged?|shadow|polyak)([^a-z]|$)|EMA$|SWA$", re.IGNORECASE
)
# What trainers keep beside models, in dictionaries that hold tensors too.
NO_MODEL = re.compile(
    r"^_|(^|_)(optim|optimizers?|(lr_)?schedulers?|sched|scaler|rng|random|callbacks?|loops|hparams"
    r"|hyper_parameters|args|config|cfg|metrics?|history|loss(es)?|criterion|results?|statistics"
    r"|averaging_state)(_|$)",
    re.IGNORECASE,
)
# DeepSpeed writes this beside weights, whose values may lie in other files (ZeRO stage 3).
DEEPSPEED = "ds_version"
LIGHTNING = "pytorch-lightning_version"
MOST_WRAPPERS = 6
MOST_SHOWN = 8


@dataclass(frozen=True)
class ModelSet:
    """The weights of one model in a pickled file.

    Attributes:
        tensors: by name, in the order of ``state_dict()``.
        part: the keys under which they lie, joined by dots, where others could have been taken;
            else empty.
        notes: what was chosen and what was left, in sentences.
        lightning: whether PyTorch Lightning wrote the file.
    """

    tensors: dict[str, NamedTensor]
    part: str = ""
    notes: tuple[str, ...] = ()
    lightning: bool = False


@dataclass
class _Path:
    """Where the search has come to, and what it has noted on the way."""

    content: Any
    keys: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    chosen: bool = False
    lightning: bool = False


def find_model(content: Any, arrays: ArrayReader, part: str = "") -> ModelSet:
    """The weights of the model in a pickled state dict, module or checkpoint of a trainer.

    Args:
        content: what :func:`merge_core.checkpoints.pickled.machine.read_pickle` returned.
        arrays: makes tensors of numpy arrays.
        part: keys joined by dots under which the weights are to be taken; the usual ones if empty.

    Raises:
        PickleFileError: neither a dictionary nor a module, no tensors, no such part, several sets
            of weights of which none is usual, or more names than any model has.
    """
    walk = Walk()
    at = _Path(content)
    if part:
        at.lightning = is_mapping(content) and LIGHTNING in dict(walk.items(content, strict=False))
        at.content, at.keys, at.chosen = _follow(walk, content, part), [part], True
    _descend(walk, at, arrays)
    if not at.notes and any(key not in CERTAIN for key in at.keys):
        at.notes.append(f"the weights under {'.'.join(at.keys)!a} are taken")
    tensors = _collect(walk, at.content, arrays)
    if not tensors and is_mapping(at.content):
        keys = [key for key, _ in walk.items(at.content)]
        raise PickleFileError(
            f"it holds no tensors by name{_listed(keys, ' (its keys: {})')}. Give a file with "
            "model weights."
        )
    if _is_partitioned(walk, content, tensors):
        raise PickleFileError(
            "its tensors are empty: DeepSpeed keeps their values in other files. Join them with "
            "its zero_to_fp32.py."
        )
    return ModelSet(tensors, ".".join(at.keys) if at.chosen else "", tuple(at.notes), at.lightning)


def _is_partitioned(walk: Walk, content: Any, tensors: dict[str, NamedTensor]) -> bool:
    if not is_mapping(content) or DEEPSPEED not in dict(walk.items(content, strict=False)):
        return False
    plain = [each for each in tensors.values() if isinstance(each, StoredTensor)]
    return any(0 in each.shape for each in plain)


def _follow(walk: Walk, content: Any, part: str) -> Any:
    """What lies under keys joined by dots, which keys may have themselves."""
    left = part
    while left:
        entries = dict(walk.items(content)) if is_mapping(content) else {}
        fitting = [key for key in entries if left == key or left.startswith(f"{key}.")]
        if not fitting:
            raise PickleFileError(
                f"it holds nothing under {part!r:.80}{_listed(entries, '; its keys are {}')}. "
                "Correct what stands after '#'."
            )
        key = max(fitting, key=len)
        content, left = entries[key], left[len(key) + 1 :]
    return content


def _descend(walk: Walk, at: _Path, arrays: ArrayReader) -> None:
    """Go down to the weights through the keys that lead there."""
    for _ in range(MOST_WRAPPERS):
        if walk.is_module(at.content) or not is_mapping(at.content):
            return
        entries = dict(walk.items(at.content))
        sets = {k: v for k, v in entries.items() if _holds_model(walk, k, v, arrays)}
        direct = sum(_is_tensor(value, arrays) for value in entries.values())
        if direct and not any(key in CERTAIN or key in AVERAGED for key in sets):
            # A state dict with more in it than tensors, or a set with stray tensors beside it.
            least = {key: direct + (key not in USUAL) for key in sets}
            sets = {k: v for k, v in sets.items() if len(_layout(walk, v, arrays)) >= least[k]}
        if not sets:
            return
        key = _choose(walk, sets, arrays, at)
        at.lightning |= LIGHTNING in entries
        at.keys.append(key)
        at.content = sets[key]


def _choose(walk: Walk, sets: dict[str, Any], arrays: ArrayReader, at: _Path) -> str:
    """The key of the model among those of one or several sets of weights; a choice is noted."""
    if len(sets) == 1:
        return next(iter(sets))
    mean = _averaged(sets)
    plain = next((key for key in USUAL if key in sets), None)
    trained = plain or next((key for key in sets if mean and _is_trained(key, mean)), None)
    chosen = plain if mean is None else mean
    if mean is not None and trained is not None:
        same = _layout(walk, sets[mean], arrays) == _layout(walk, sets[trained], arrays)
        chosen = mean if same else trained
    if chosen is None:
        example = ".".join([*at.keys, next(iter(sets))])
        raise PickleFileError(
            f"it holds several sets of weights ({_shown(list(sets))}) and does not say which is "
            f"the model. Write the key of one after the file's name, as in 'name.pt#{example}'."
        )
    left = [key for key in sets if key != chosen]
    what = f"{chosen!a} (averaged while training)" if chosen == mean else ascii(chosen)
    other = ascii("#" + ".".join([*at.keys, left[0]]))
    at.notes.append(
        f"the weights under {what} are taken, those under {_shown(left)} are not ({other} after "
        "the file's name takes them)"
    )
    at.chosen = True
    return chosen


def _averaged(sets: dict[str, Any]) -> str | None:
    """The key of the averaged weights: the first usual one, or the only one."""
    usual = next((key for key in AVERAGED if key in sets), None)
    told = [key for key in sets if AVERAGED_WORD.search(key)]
    if "student" in sets and "teacher" in sets:
        told.append("teacher")
    return usual or (told[0] if len(told) == 1 else None)


def _is_trained(key: str, mean: str) -> bool:
    """Whether a key is that of averaged weights without the word that says so."""
    return re.sub(r"[^a-z]*(ema|swa|avg|averaged?)[^a-z]*", "", mean, flags=re.IGNORECASE) == key


def _holds_model(
    walk: Walk, key: str, value: Any, arrays: ArrayReader, depth: int = MOST_WRAPPERS
) -> bool:
    """Whether there are tensors of more than one number below a key."""
    if NO_MODEL.search(key) and key not in (*USUAL, *AVERAGED):
        return False
    if walk.is_module(value):
        return True
    if not is_mapping(value) or not depth:
        return False
    entries = list(walk.items(value, strict=False))
    if {"state", "param_groups"} <= {name for name, _ in entries}:  # an optimizer's
        return False
    tensors = [found for _, each in entries if (found := _found(each, arrays))]
    if tensors and key in CERTAIN:
        return True
    if any(isinstance(found, Unreadable) or found.shape for found in tensors):
        return True
    return any(_holds_model(walk, name, each, arrays, depth - 1) for name, each in entries)


def _found(value: Any, arrays: ArrayReader) -> NamedTensor | None:
    return tensor_of(value) or arrays.stored(value)


def _is_tensor(value: Any, arrays: ArrayReader) -> bool:
    return _found(value, arrays) is not None


def _layout(walk: Walk, value: Any, arrays: ArrayReader) -> dict[str, tuple[int, ...]]:
    """Shape by public name of a set's tensors; empty where it cannot be read."""
    inner, at = Walk(walk), _Path(value)
    try:
        _descend(inner, at, arrays)
        found = _collect(inner, at.content, arrays)
        shapes = {name: getattr(each, "shape", ()) for name, each in found.items()}
        return {name: shapes[stored] for name, stored in public_names(shapes, "").items()}
    except (PickleFileError, CheckpointError):
        return {}


def _collect(walk: Walk, content: Any, arrays: ArrayReader) -> dict[str, NamedTensor]:
    """The tensors of a module or of a dictionary, by name."""
    if walk.is_module(content):
        walk.module(content)
    elif is_mapping(content):
        for name, value in walk.items(content):
            if found := _found(value, arrays):
                walk.add(name, found)
    else:
        raise PickleFileError(
            f"it holds a {kind_of(content)}, not a model or a dictionary of named tensors. Save "
            "model.state_dict() instead."
        )
    return walk.tensors


def _listed(keys: Collection[str], frame: str) -> str:
    """Keys within a text that frames them; empty if there are none."""
    return frame.format(_shown(list(keys))) if keys else ""


def _shown(keys: list[str]) -> str:
    """Keys as they may stand in a message."""
    more = f" and {len(keys) - MOST_SHOWN} more" if len(keys) > MOST_SHOWN else ""
    return ", ".join(ascii(key[:60]) for key in keys[:MOST_SHOWN]) + more

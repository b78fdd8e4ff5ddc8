"""The tensors of unpickled data by name, as the model's ``state_dict()`` would name them.

Source of the rules: ``torch.nn.Module.state_dict``: a module's parameters, then its persistent
buffers, then its children's, each under its path joined by dots. A file written by
``torch.jit.save`` (OpenAI's CLIP) keeps them as attributes of its scripted classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from merge_core.checkpoints.pickled.machine import Blob, Global, Pairs, PickleFileError, Record
from merge_core.checkpoints.pickled.tensors import Storage, StoredTensor, Unreadable, view

NamedTensor = StoredTensor | Unreadable

MOST_NAMES = 100_000
MOST_VISITS = 500_000
LONGEST_NAME = 1 << 10
SCRIPTED = "__torch__"
LEGACY_PARAMETERS = ("torch.nn.parameter.Parameter", "torch.autograd.variable.Variable")


class Walk:
    """Collects tensors, and gives up on structures that no model has.

    A module inside itself has endless names, and a few hundred that share their children have
    astronomically many: every entry looked at counts.
    """

    def __init__(self, before: Walk | None = None) -> None:
        self.tensors: dict[str, NamedTensor] = {}
        self._visits: list[int] = (
            [0] if before is None else before._visits
        )  # shared: one file, one bound

    def add(self, name: str, tensor: NamedTensor) -> None:
        self.tensors[name] = tensor
        if len(self.tensors) > MOST_NAMES or len(name) > LONGEST_NAME:
            raise PickleFileError(
                f"it holds more than {MOST_NAMES:,} tensors, or names longer than "
                f"{LONGEST_NAME:,} characters. Save the weights of one model."
            )

    def items(self, mapping: Any, strict: bool = True) -> Iterator[tuple[str, Any]]:
        """The entries of a dictionary (or of nothing) whose keys are texts or small numbers.

        Args:
            mapping: what may be a dictionary.
            strict: whether tensors under other keys are refused rather than left out.

        Raises:
            PickleFileError: such a tensor, or a damaged dictionary.
        """
        pairs: Any = ()
        if isinstance(mapping, Pairs):
            pairs = zip(mapping[::2], mapping[1::2], strict=True)
        elif isinstance(mapping, Record) and mapping.pairs is not None:
            pairs = zip(mapping.pairs[::2], mapping.pairs[1::2], strict=True)
        elif isinstance(mapping, Record) and _is_ordered_dict(mapping):
            pairs = mapping.args[0]  # Python 2 made ordered dictionaries from a list of pairs
        for pair in pairs:
            self._visit()
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise PickleFileError.damaged("a dictionary in it has an entry that is no pair")
            key, value = pair
            if isinstance(key, str):
                yield key, value
            elif isinstance(key, int) and abs(key) < 1 << 63:
                yield str(key), value
            elif strict and tensor_of(value):
                raise PickleFileError(
                    "a tensor in it is named by something that is no text. Rename it."
                )

    def is_module(self, value: Any) -> bool:
        """Whether a record is a pickled ``torch.nn.Module``."""
        if not isinstance(value, Record):
            return False
        return _is_scripted(value) or any(
            name == "_modules" for name, _ in self.items(_attributes(value), strict=False)
        )

    def module(self, top: Record) -> None:
        """Add the tensors of a module and of all below it."""
        waiting: list[tuple[str, Any]] = [("", top)]
        while waiting:
            prefix, module = waiting.pop()
            children = []
            for name, value in self._members(module):
                if isinstance(value, StoredTensor | Unreadable):
                    self.add(prefix + name, value)
                elif isinstance(value, Record):
                    children.append((f"{prefix}{name}.", value))
                    if len(prefix) > LONGEST_NAME:
                        raise PickleFileError(
                            "its modules are nested without end. Save model.state_dict() instead."
                        )
            waiting.extend(reversed(children))

    def _members(self, module: Record) -> Iterator[tuple[str, Any]]:
        """A module's own parameters and persistent buffers, then its children, by name."""
        state = _attributes(module)
        if _is_scripted(module):
            yield from self.items(state)
            return
        parts = dict(self.items(state))
        hidden = set()
        for name in _elements(parts.get("_non_persistent_buffers_set")):
            self._visit()
            if isinstance(name, str):
                hidden.add(name)
        for part in ("_parameters", "_buffers"):
            for name, value in self.items(parts.get(part)):
                if value is not None and not (part == "_buffers" and name in hidden):
                    yield name, tensor_of(value) or Unreadable(kind_of(value))
        yield from self.items(parts.get("_modules"))

    def _visit(self) -> None:
        self._visits[0] += 1
        if self._visits[0] > MOST_VISITS:
            raise PickleFileError(
                "it holds more parameters or modules than any model, or modules nested without "
                "end. Save the weights of one model."
            )


def is_mapping(value: Any) -> bool:
    return isinstance(value, Pairs) or (
        isinstance(value, Record) and (value.pairs is not None or _is_ordered_dict(value))
    )


def _is_ordered_dict(record: Record) -> bool:
    """Whether a record is an ordered dictionary made from a list of pairs."""
    match record:
        case Record(maker=Global("collections", "OrderedDict"), args=(list(), *_)):
            return True
    return False


def _is_scripted(record: Record) -> bool:
    return isinstance(record.maker, Global) and record.maker.module.startswith(SCRIPTED)


def _attributes(record: Record) -> Any:
    """An object's ``__dict__``; objects with slots keep it first of two."""
    state = record.state
    return state[0] if isinstance(state, tuple) and len(state) == 2 else state


def _elements(collection: Any) -> list[Any]:
    """The elements of a set, as its protocol wrote it."""
    match collection:
        case list():
            return collection
        case Record(maker=Global(_, "set" | "frozenset"), args=(list() as elements,)):
            return elements
    return []


def tensor_of(value: Any) -> NamedTensor | None:
    """The value if it is a tensor, also in the form of parameters that torch before 0.4 pickled."""
    for _ in range(2):
        match value:
            case StoredTensor() | Unreadable():
                return value
            case Record(state=(Storage() as storage, offset, shape, strides)):
                return view(storage, offset, shape, strides)
            case (
                Record(maker=Global() as maker, state=(data, _, _, _, _))
                | Record(maker=Global() as maker, args=(data, *_))
            ) if str(maker) in LEGACY_PARAMETERS:
                value = data
            case _:
                return None
    return value if isinstance(value, StoredTensor | Unreadable) else None


def kind_of(value: Any) -> str:
    """A word for a value's kind, for messages."""
    match value:
        case StoredTensor() | Unreadable():
            return "Tensor"
        case Record(maker=Global() as maker):
            return maker.shown
        case Global():
            return f"reference to {value.shown}"
        case Blob():
            return "long text or bytes"
    return type(value).__name__

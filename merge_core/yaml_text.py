"""Plain YAML: read from anywhere, never with more work than its length is worth, and written."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.events import (
    CollectionEndEvent,
    CollectionStartEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
)

# The parser in C is ten times faster, and iterative; a build of PyYAML may lack it.
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
CHARACTERS = 500_000
NODES = 50_000
DEPTH = 50
INTEGER = 1 << 63
DIGITS = 100
NUMBER = re.compile(r"[-+]?[0-9.][0-9a-fA-FxXoO_:.+-]*")
# Control characters and halves of pairs: no terminal, page or file takes them all.
UNUSABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def load_yaml(text: str) -> Any:
    """The value of a YAML document: mappings, lists, texts, numbers, true, false and null.

    Args:
        text: one document.

    Raises:
        yaml.YAMLError: not YAML; too long or deep; an anchor or alias; a name written twice; a
            tag; or a value of another kind (a date, NaN).

    Example:
        >>> load_yaml("{rank: 0.08, tasks: [digits, dots]}")
        {'rank': 0.08, 'tasks': ['digits', 'dots']}
    """
    if len(text) > CHARACTERS:
        raise yaml.YAMLError(f"longer than {CHARACTERS:,} characters")
    try:
        _check_structure(text)
        value = yaml.load(text, Loader=LOADER)
    except (ValueError, RecursionError) as error:  # ValueError: month 13
        raise yaml.YAMLError(str(error)) from error
    _check_values(value)
    return value


class _Dumper(yaml.SafeDumper):
    """Writes out in full what :func:`load_yaml` reads back: a repeated object gets no anchor."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002  # PyYAML asks of each value
        return True


def dump_yaml(value: Any, *, flow: bool | None = False, width: int = 80) -> str:
    """A YAML document of plain values, mappings in their own order.

    Args:
        value: mappings, lists, texts, numbers, true, false and null; none within itself.
        flow: whether collections stand in brackets; None for those without further ones in them.
        width: characters of a line, as far as values can be broken.

    Example:
        >>> print(dump_yaml({"rank": 0.08, "tasks": ["digits", "dots"]}, flow=None))
        rank: 0.08
        tasks: [digits, dots]
    """
    text: str = yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=flow,
        width=width,
    )
    return text


def read_text_file(path: Path) -> str:
    """The text of a file that people write: a description, a list of names.

    Raises:
        OSError: it cannot be read.
        ValueError: not a file, not text, or too long.

    Example:
        >>> _ = Path("names.txt").write_text("cat, dog")
        >>> read_text_file(Path("names.txt"))
        'cat, dog'
    """
    if path.exists() and not path.is_file():
        raise ValueError("not a file")
    with path.open(encoding="utf-8") as stream:
        text = stream.read(CHARACTERS + 1)
    if len(text) > CHARACTERS:
        raise ValueError(f"longer than {CHARACTERS:,} characters")
    return text


@dataclass
class _Open:
    """A list or mapping that is being read, and a mapping's names so far."""

    mapping: bool
    children: int = 0
    names: set[str] = field(default_factory=set)


def _check_structure(text: str) -> None:
    """Follow the parser's events: how many and how deep, tags, anchors, repeated names."""
    nodes = 0
    stack: list[_Open] = []
    for event in yaml.parse(text, Loader=LOADER):
        if isinstance(event, CollectionEndEvent):
            stack.pop()
        if not isinstance(event, NodeEvent):
            continue
        if event.anchor is not None:
            raise yaml.YAMLError(
                f"anchors and aliases such as {event.anchor!r:.60} are not read; "
                "write the value out in each place"
            )
        if (tag := getattr(event, "tag", None)) not in (None, "!"):
            raise yaml.YAMLError(f"the tag {tag!r:.60}: only plain values are read")
        nodes += 1
        if nodes > NODES:
            raise yaml.YAMLError(f"more than {NODES:,} values")
        if isinstance(event, ScalarEvent):
            _check_number(event)
            _check_name(event, stack)
        if stack:
            stack[-1].children += 1
        if isinstance(event, CollectionStartEvent):
            stack.append(_Open(isinstance(event, MappingStartEvent)))
            if len(stack) > DEPTH:
                raise yaml.YAMLError(f"more than {DEPTH} levels deep")


def _check_number(event: ScalarEvent) -> None:
    """Refuse a number so long that turning it into one takes minutes."""
    if len(event.value) > DIGITS and event.implicit[0] and NUMBER.fullmatch(event.value):
        raise yaml.YAMLError(f"a number has {len(event.value):,} digits")


def _check_name(event: ScalarEvent, stack: list[_Open]) -> None:
    """Refuse a name that its mapping has already: one of the two would be lost."""
    if not stack or not stack[-1].mapping or stack[-1].children % 2:
        return
    if event.value in stack[-1].names:
        raise yaml.YAMLError(f"{event.value!r:.60} is written twice")
    stack[-1].names.add(event.value)


def _check_values(value: Any) -> None:
    """Refuse what is no plain value. Its size is bounded by now."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            waiting += [*each.keys(), *each.values()]
        elif isinstance(each, list):
            waiting += each
        elif isinstance(each, str):
            if UNUSABLE.search(each):
                raise yaml.YAMLError(f"a text holds characters that cannot be shown: {each!r:.60}")
        elif isinstance(each, int):
            if abs(each) >= INTEGER:
                raise yaml.YAMLError("a whole number has more than 18 digits")
        elif isinstance(each, float):
            if not math.isfinite(each):
                raise yaml.YAMLError(f"{each} is not a number to calculate with")
        elif each is not None:
            kind = type(each).__name__
            raise yaml.YAMLError(f"a {kind} stands where a text or number must; put it in quotes")

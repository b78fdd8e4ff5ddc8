"""What differs between the files beside the weights, and what that means for a merge."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

Level = Literal["refused", "warned", "noted"]
LEVELS: tuple[Level, ...] = ("refused", "warned", "noted")
BASE = "base"
LONGEST_VALUE = 48
MOST_NAMED = 3

Value = TypeVar("Value", bound=Hashable)


@dataclass(frozen=True)
class Finding:
    """One thing in which members differ.

    Attributes:
        level: ``refused`` (the same weights mean another network), ``warned`` (the merge is right,
            but its output speaks with the files of one member), or ``noted``.
        file: where it stands, such as ``config.json``.
        field: what differs there.
        values: who has what, in words, such as ``10000 in base, cars; 1000000 in dtd``.
        meaning: what follows from it, in words.
    """

    level: Level
    file: str
    field: str
    values: str
    meaning: str

    @property
    def sentence(self) -> str:
        """The finding on one line."""
        return f"{self.field} of {self.file} differs ({self.values}): {self.meaning}"


def sort_findings(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Findings by level, file and field, whatever the order in which they were found."""
    return tuple(sorted(findings, key=lambda f: (LEVELS.index(f.level), f.file, f.field, f.values)))


def group_members(values: Mapping[str, Value]) -> list[tuple[Value, tuple[str, ...]]]:
    """Members by what they have: the most common value first, the base's first among equals.

    Args:
        values: by member; their order does not count.

    Example:
        >>> group_members({"dtd": 2, "base": 1, "cars": 2})
        [(2, ('cars', 'dtd')), (1, ('base',))]
    """
    groups: dict[Value, list[str]] = {}
    for member in sort_members(values):
        groups.setdefault(values[member], []).append(member)
    ranked = sorted(groups.items(), key=lambda item: (-len(item[1]), _place(item[1][0])))
    return [(value, tuple(members)) for value, members in ranked]


def tell_values(shown: Mapping[str, str]) -> str:
    """Who has what, in words.

    Args:
        shown: each member's value as text.

    Example:
        >>> tell_values({"dtd": "1e6", "cars": "1e4", "base": "1e4"})
        '1e4 in base, cars; 1e6 in dtd'
    """
    return "; ".join(
        f"{value} in {name_members(members)}" for value, members in group_members(shown)
    )


def name_members(members: Sequence[str]) -> str:
    """Names in a row; of many only the first, and how many more."""
    if len(members) <= MOST_NAMED + 1:
        return ", ".join(members)
    return f"{', '.join(members[:MOST_NAMED])} and {len(members) - MOST_NAMED} more"


def shorten(value: object) -> str:
    """A value of a stranger's file as short printable text.

    Example:
        >>> shorten("a" * 100)[-5:], shorten(1e-05), shorten(None)
        ('aa...', '1e-05', 'none')
    """
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = "".join(letter if letter.isprintable() else " " for letter in text[:200])
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


def sort_members(members: Iterable[str]) -> list[str]:
    """Members by name, the base first."""
    return sorted(members, key=_place)


def _place(member: str) -> tuple[bool, str]:
    return member != BASE, member

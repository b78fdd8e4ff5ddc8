"""Values by patterns of layers' names, as PEFT's ``rank_pattern``, found with bounded work.

An adapter may have a pattern for each of its layers, and thousands of layers: trying each pattern
on each name would take minutes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from merge_core.errors import CheckpointError

PLAIN = re.compile(r"[\w./-]+")
QUANTIFIERS = re.compile(r"[*+?{]")
MOST_WORK = 200_000_000  # steps of matching: about a second
LOOK_UP = 200  # steps that a look-up takes the time of


class NamePatterns:
    """The value of the first pattern that matches a name from some dot to its end.

    Patterns without other signs than dots, which stand for any character, are looked up.

    Args:
        values: by pattern, a regular expression that is known to be right.

    Source: PEFT, ``get_pattern_key``.

    Example:
        >>> patterns = NamePatterns({"q_proj": 4, "layers.[01].v_proj": 8})
        >>> patterns.find("model.layers.1.v_proj"), patterns.find("model.layers.2.v_proj")
        (8, None)
    """

    def __init__(self, values: Mapping[str, float]) -> None:
        self._values = list(values.values())
        # Plain patterns by their length and the places of their dots, without those.
        self._plain: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        self._rich: list[tuple[int, re.Pattern[str], int]] = []
        for number, pattern in enumerate(values):
            if PLAIN.fullmatch(pattern):
                dots = tuple(i for i, sign in enumerate(pattern) if sign == ".")
                alike = self._plain.setdefault(len(pattern), {}).setdefault(dots, {})
                alike.setdefault(_without(pattern, dots), number)
            else:
                power = len(QUANTIFIERS.findall(pattern))
                self._rich.append((number, re.compile(pattern), power))
        self._found: dict[str, int | None] = {}
        self._work = 0

    def find(self, name: str) -> float | None:
        """The value for a name; None if no pattern matches it.

        Raises:
            CheckpointError: the patterns would take too long.
        """
        if name not in self._found:
            self._found[name] = min(self._matches(name), default=None)
        number = self._found[name]
        return None if number is None else self._values[number]

    def _matches(self, name: str) -> Iterator[int]:
        """Numbers of plain patterns that match, and of the first other one that does."""
        starts = [0, *(i + 1 for i, sign in enumerate(name) if sign == ".")]
        for start in starts:
            for dots, alike in self._plain.get(len(name) - start, {}).items():
                self._spend(LOOK_UP * (2 + len(dots)))
                if (number := alike.get(_without(name[start:], dots))) is not None:
                    yield number
        for number, pattern, power in self._rich:
            for start in starts:
                self._spend(LOOK_UP + (len(name) - start) ** power)
                if pattern.fullmatch(name, start):
                    yield number
                    return

    def _spend(self, steps: int) -> None:
        self._work += steps
        if self._work > MOST_WORK:
            raise CheckpointError(
                "The adapter's rank_pattern and alpha_pattern are too many and too intricate for "
                "its layers. Write them as names of layers, or merge it into its base with PEFT."
            )


def _without(text: str, places: tuple[int, ...]) -> str:
    """A text without the characters at these places."""
    begins = (0, *(place + 1 for place in places))
    return "".join(text[a:b] for a, b in zip(begins, (*places, len(text)), strict=True))

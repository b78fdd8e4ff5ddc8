"""Questions with choices, of which the likeliest to follow is the answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from merge_core.errors import SuiteError
from merge_core.suites.data_spec import DataSpec

MOST_CHOICES = 1000


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        text: what comes before a choice.
        choices: of which each may follow it, as it is appended.
        answer: the number of the right one.
        place: where it stands, for messages.
    """

    text: str
    choices: tuple[str, ...]
    answer: int
    place: str


def read_questions(data: DataSpec, table: Any, rows: Iterable[int], what: str) -> list[Question]:
    """The questions of some rows of a table.

    A space is put between question and choice where neither has one there.

    Args:
        data: what suite.yaml says.
        table: of ``datasets``, or what has its interface; these rows alone.
        rows: their numbers in the split, for messages.
        what: whose data these are, for messages.

    Raises:
        SuiteError: a column that is missing, fewer than two choices, or an answer that is none of
            them.
    """
    assert data.text_columns is not None
    columns = (data.text_columns[0], data.choices_column or "", data.answer_column or "")
    for name in columns:
        if name not in table.features:
            raise SuiteError(
                f"{what[0].upper()}{what[1:]}: there is no column {name!r}; there is "
                f"{', '.join(table.features)}."
            )
    found = []
    for row, *values in zip(rows, *(table[name] for name in columns), strict=True):
        place = f"question {row + 1} of {what}"
        text, (choices, labels) = str(values[0] or ""), _read_choices(values[1], place)
        if not text.strip():
            raise SuiteError(f"{place[0].upper()}{place[1:]} is empty. Correct or remove it.")
        answer = _read_answer(values[2], choices, labels, place)
        found.append(Question(text, tuple(_appended(text, c) for c in choices), answer, place))
    return found


def _appended(question: str, choice: str) -> str:
    apart = question[-1:].isspace() or choice[:1].isspace()
    return choice if apart else f" {choice}"


def _read_choices(value: Any, place: str) -> tuple[list[str], list[str]]:
    """Texts of choices and what they are called; a list, or the table ``{text, label}`` of ARC."""
    if isinstance(value, str):  # of CSV
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    labels: Sequence[Any] = ()
    if isinstance(value, Mapping):
        value, labels = value.get("text"), value.get("label", ())
    values = list(value) if isinstance(value, list | tuple | np.ndarray) else []
    texts = [each for each in values if isinstance(each, str) and each.strip()]
    if not 2 <= len(values) <= MOST_CHOICES or len(texts) < len(values):
        raise SuiteError(
            f"{place[0].upper()}{place[1:]} has no list of two or more choices, each a text. "
            "Correct or remove it, or name another choices_column."
        )
    named = [str(label) for label in labels]
    return texts, named if len(named) == len(texts) else []


def _read_answer(value: Any, choices: Sequence[str], labels: Sequence[str], place: str) -> int:
    """The number of the right choice."""
    found: set[int] = set()
    if isinstance(value, str) and value.strip():
        word = value.strip()
        if labels:
            found = {number for number, label in enumerate(labels) if label == word}
        if not found:
            found = {number for number, text in enumerate(choices) if text.strip() == word}
            if len(word) == 1 and word.isalpha() and word.isupper() and not found:
                found = {ord(word) - ord("A")}
            if word.isdigit():
                found.add(int(word))
    elif not isinstance(value, bool) and isinstance(value, int | float | np.integer):
        found = {int(value)} if float(value).is_integer() else set()
    if len(found) != 1 or not 0 <= min(found) < len(choices):
        raise SuiteError(
            f"{place[0].upper()}{place[1:]} has the answer {value!r:.80}, which names none of its "
            f"{len(choices)} choices (a number from 0, a letter from A, or the text). Correct or "
            "remove it."
        )
    return found.pop()

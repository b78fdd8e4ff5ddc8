"""Texts, and questions with choices, as sequences of tokens of which some are scored.

A text's first token has nothing before it and is not scored. A text longer than a window is cut
into windows; each begins with the last token of the one before, which is not scored again, so that
every token but the first counts once (rolling windows with one token of context, as in EleutherAI's
lm-evaluation-harness). Of a choice its own tokens are scored, after those of the question.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.data_sources.delimited import Table, split_of
from analysis.data_sources.source import UNLABELLED, WHOLE, Request
from analysis.data_sources.splits import Part, draw_part, name_of_part
from analysis.data_sources.text import read_tables_of_texts
from analysis.language.choices import Question, read_questions
from analysis.language.tokenizers import open_encoder
from merge_core.errors import SuiteError
from merge_core.input_files import check_regular, list_files
from merge_core.suites.data_files import (
    PLAIN_TEXT,
    TABLES,
    Resolve,
    locate_data,
    tokenizer_path,
)
from merge_core.suites.data_spec import DataSpec

Encoder = Callable[[str], list[int]]
TEXT = "text"  # the usual column
FEWEST = 2  # tokens of a text: one to begin with, one to score


@dataclass(frozen=True)
class Scored:
    """Tokens that are run at once.

    Attributes:
        tokens: int32, L.
        start: the first token that is scored, at least 1.
        unit: the number of the text, block or question that it is of.
        choice: of a question, which one; else 0.
    """

    tokens: np.ndarray
    start: int
    unit: int
    choice: int = 0

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return len(self.tokens) - self.start


@dataclass(frozen=True)
class LanguageInputs:
    """One split of one task.

    Attributes:
        sequences: in the order of their units.
        labels: int64, N: of questions the right choice, of texts :data:`UNLABELLED`.
        by_token: of questions: whether choices are likely by their mean token.
    """

    sequences: tuple[Scored, ...]
    labels: np.ndarray
    by_token: bool = False

    @cached_property
    def tokens(self) -> np.ndarray:
        """Scored tokens of each unit, int64, N."""
        counts = np.zeros(len(self.labels), dtype=np.int64)
        for each in self.sequences:
            counts[each.unit] += each.scored
        return counts

    @cached_property
    def ends(self) -> np.ndarray:
        """Where the sequences of each unit end, int64, N."""
        units = [each.unit for each in self.sequences]
        return np.searchsorted(units, np.arange(len(self.labels)), side="right")

    def of(self, units: np.ndarray) -> Iterator[Scored]:
        """The sequences of these units."""
        for unit in units:
            begin = 0 if unit == 0 else self.ends[unit - 1]
            yield from self.sequences[begin : self.ends[unit]]

    def first(self, limit: int | None) -> LanguageInputs:
        """The first so many units; all for None."""
        if limit is None or limit >= len(self.labels):
            return self
        kept = self.sequences[: int(self.ends[limit - 1])]
        return LanguageInputs(kept, self.labels[:limit], self.by_token)


def read_language(data: DataSpec, split: Part, resolve: Resolve, what: str) -> LanguageInputs:
    """One split of a task's texts, blocks or questions.

    Args:
        data: what suite.yaml says, of the kind ``language``.
        split: for choosing or for reporting.
        resolve: of paths of suite.yaml.
        what: whose data these are, for messages.

    Raises:
        SuiteError: data or a tokenizer that are missing or of another form; texts that are empty
            or of one token; a question without choices or answer.
        HubError: a tokenizer of the hub that cannot be fetched.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> words.save("tokenizer.json")
        >>> Path("texts.txt").write_text("a b\\nb a a\\n")
        10
        >>> data = DataSpec(kind="language", path="texts.txt", tokenizer="tokenizer.json")
        >>> [read_language(data, split, Path, "texts").tokens.tolist() for split in ("val", "test")]
        [[1], [2]]
    """
    path = locate_data(data, resolve, what)
    tables = _read_tables(data, path, resolve, what)
    table = tables[name_of_part(data, split, tables, what)]
    encode = open_encoder(tokenizer_path(data, resolve))
    if data.choices_column is not None:
        rows = draw_part(data, split, tables, len(table), what)
        questions = read_questions(data, table.select(rows), rows, what)
        return _cut_questions(questions, encode, data)
    column = _column(data, table, what)
    if data.blocks:
        place = f"the texts of {what}"
        whole = _encode(encode, "\n".join(map(str, table[column])), place)
        blocks = list(_windows(whole, data.window))
        rows = draw_part(data, split, tables, len(blocks), what)
        drawn = [(unit, *blocks[row]) for unit, row in enumerate(rows)]
    else:
        rows = draw_part(data, split, tables, len(table), what)
        drawn = []
        for unit, (row, text) in enumerate(zip(rows, table.select(rows)[column], strict=True)):
            tokens = _encode(encode, text, f"text {row + 1} of {what}")
            drawn += [(unit, *window) for window in _windows(tokens, data.window)]
    found = tuple(Scored(tokens, start, unit) for unit, tokens, start in drawn)
    return LanguageInputs(found, np.full(len(rows), UNLABELLED))


def _read_tables(data: DataSpec, path: Path, resolve: Resolve, what: str) -> dict[str, Any]:
    """The splits: of plain text one text a line (one text in all where it is cut into blocks)."""
    files = [path] if path.is_file() else sorted(list_files(path))
    plain = [file for file in files if file.suffix.lower() in PLAIN_TEXT and _is_shown(file, path)]
    if not plain or any(file.suffix.lower() in TABLES for file in files):
        return read_tables_of_texts(Request(data, path, resolve, what))
    texts: dict[str, list[str]] = defaultdict(list)
    for file in plain:
        try:
            check_regular(file)
            content = file.read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as fault:
            raise SuiteError(f"{file} ({what}) cannot be read as a text file: {fault}.") from fault
        lines = [content] if data.blocks else content.splitlines()
        texts[split_of(file, path)] += [line for line in lines if line.strip()]
    if len(texts) > 1:
        texts.pop(WHOLE, None)
    if empty := [split for split, lines in texts.items() if not lines]:
        raise SuiteError(f"{path} ({what}) holds no text in its part {empty[0]!r}.")
    return {split: Table(pd.DataFrame({TEXT: lines})) for split, lines in texts.items()}


def _is_shown(file: Path, root: Path) -> bool:
    return file == root or not any(p.startswith(".") for p in file.relative_to(root).parts)


def _column(data: DataSpec, table: Any, what: str) -> str:
    name = TEXT if data.text_columns is None else data.text_columns[0]
    if name not in table.features:
        raise SuiteError(
            f"{what[0].upper()}{what[1:]}: there is no column {name!r}; there is "
            f"{', '.join(table.features)}. Name the texts' as text_columns: [name]."
        )
    return name


def _encode(encode: Encoder, text: Any, place: str) -> np.ndarray:
    """Tokens of a text (int32), with what the tokenizer puts before and after it.

    Raises:
        SuiteError: it is no text, empty, or of one token.
    """
    if not isinstance(text, str) or not text.strip():
        raise SuiteError(
            f"{place[0].upper()}{place[1:]} is empty, so that nothing can be scored. Remove it."
        )
    tokens = np.asarray(encode(text), dtype=np.int32)
    if len(tokens) < FEWEST:
        raise SuiteError(
            f"{place[0].upper()}{place[1:]} ({text!r:.40}) has {len(tokens)} token, and the first "
            "has nothing before it to be scored by. Remove it, or join it to another."
        )
    return tokens


def _windows(tokens: np.ndarray, length: int) -> Iterator[tuple[np.ndarray, int]]:
    """Windows of at most `length` tokens, and the first token of each that is scored."""
    for begin in range(0, len(tokens) - 1, length - 1):
        yield tokens[begin : begin + length], 1


def _cut_questions(
    questions: Sequence[Question], encode: Encoder, data: DataSpec
) -> LanguageInputs:
    """Each choice after its question; of what is too long the end."""
    found = []
    for unit, question in enumerate(questions):
        before = encode(question.text)
        for choice, text in enumerate(question.choices):
            tokens = encode(question.text + text)
            alike = np.array(before[: len(tokens)]) == np.array(tokens[: len(before)])
            start = int(np.argmin(alike)) if not alike.all() else len(alike)
            start = max(min(start, len(tokens) - 1), 1)
            cut = max(len(tokens) - data.window, 0)
            if len(tokens) < FEWEST or start - cut < 1:
                raise SuiteError(
                    f"{question.place[0].upper()}{question.place[1:]}: its choice {choice} has "
                    f"{len(tokens) - start} tokens, which do not fit into a window of "
                    f"{data.window}. Give a larger 'length'."
                )
            row = np.asarray(tokens[cut:], dtype=np.int32)
            found.append(Scored(row, start - cut, unit, choice))
    answers = np.array([question.answer for question in questions])
    return LanguageInputs(tuple(found), answers, data.length_normalised)

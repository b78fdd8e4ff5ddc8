"""Tables of texts in plain files: CSV, TSV, JSON Lines and JSON."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.data_sources.source import WHOLE
from analysis.data_sources.splits import KNOWN
from merge_core.errors import SuiteError
from merge_core.input_files import check_regular, list_files

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON = (".jsonl", ".json")
OTHER_TABLES = (".parquet", ".arrow")
ALIASES = {"dev": "validation", "eval": "validation"}
WHOLE_NUMBER = re.compile(r"-?\d{1,18}")


@dataclass(frozen=True)
class Table:
    """A split, with what is used of the interface of a table of ``datasets``."""

    frame: pd.DataFrame

    def __len__(self) -> int:
        return len(self.frame)

    def __getitem__(self, column: str) -> list[Any]:
        """The values of a column: whole numbers where all are, else as they are written."""
        values = self.frame[column].tolist()
        if values and all(isinstance(v, str) and WHOLE_NUMBER.fullmatch(v) for v in values):
            return [int(value) for value in values]
        return values

    @cached_property
    def features(self) -> dict[str, None]:
        """Its columns; nothing is declared of them."""
        return dict.fromkeys(map(str, self.frame.columns))

    def select(self, rows: np.ndarray) -> Table:
        """Some of its rows."""
        return Table(self.frame.iloc[rows])


def find_delimited(path: Path, what: str) -> list[Path]:
    """The plain tables at a place; none where it holds tables of another kind.

    Args:
        path: a file, or a folder that holds them at any depth.
        what: whose data these are, for messages.

    Raises:
        SuiteError: the folder cannot be read.
    """
    try:
        files = [path] if path.is_file() else list(list_files(path))
    except OSError as fault:
        raise SuiteError(f"{path} ({what}) cannot be read: {fault}.") from fault
    files = [file for file in files if path == file or not _is_hidden(file, path)]
    if any(file.suffix.lower() in OTHER_TABLES for file in files):
        return []
    plain = [file for file in files if file.suffix.lower() in DELIMITERS]
    return sorted(plain or [file for file in files if file.suffix.lower() in JSON])


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def read_delimited(files: Sequence[Path], root: Path, what: str) -> dict[str, Table]:
    """The splits that files make by their names (``train.csv``, ``test/part-1.csv``).

    Files whose names say no split are one part, all together.

    Args:
        files: tables.
        root: the folder, or file, that was named.
        what: whose data these are, for messages.

    Raises:
        SuiteError: a file of another form.
    """
    parts: dict[str, list[pd.DataFrame]] = defaultdict(list)
    for file in files:
        parts[split_of(file, root)].append(_read(file, what))
    if len(parts) > 1:
        parts.pop(WHOLE, None)  # beside splits: notes, lists of classes
    return {split: Table(pd.concat(tables)) for split, tables in parts.items()}


def split_of(file: Path, root: Path) -> str:
    """The split that a file's name, or a folder's on the way to it, says."""
    below = file.relative_to(root).parts if root != file else (file.name,)
    for name in reversed(below):
        for word in re.split(r"[^a-z0-9]+", Path(name).stem.lower()):
            word = ALIASES.get(word, word)
            if word in KNOWN:
                return word
    return WHOLE


def _read(file: Path, what: str) -> pd.DataFrame:
    try:
        check_regular(file)
        delimiter = DELIMITERS.get(file.suffix.lower())
        if delimiter is not None:
            return pd.read_csv(file, sep=delimiter, dtype=str, keep_default_na=False)
        with file.open(encoding="utf-8") as text:
            start = text.read(1000).lstrip()[:1]
        return pd.read_json(file, lines=start != "[", dtype=False, convert_dates=False)
    except SuiteError:
        raise
    except Exception as fault:  # pandas raises almost anything about files of another form
        reason = " ".join(str(fault).split())
        raise SuiteError(
            f"{file} ({what}) cannot be read as a table: {reason:.200} Give columns with names in "
            "the first line (CSV), or one object a line (JSON Lines)."
        ) from fault

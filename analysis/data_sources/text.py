"""Texts with labels as rows of tokens: from CSV, JSON Lines, or datasets of the hub's form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from analysis.data_sources.delimited import find_delimited, read_delimited
from analysis.data_sources.hugging_face import read_file, read_tables
from analysis.data_sources.source import UNLABELLED, Request
from analysis.data_sources.splits import Part, draw_part, name_of_part
from analysis.networks.encoders import SEGMENT_BITS
from merge_core.errors import SuiteError
from merge_core.input_files import check_regular, read_bounded
from merge_core.suites.data_files import Resolve, locate_data, read_names, tokenizer_path
from merge_core.suites.data_spec import DataSpec

# What transformers reads of a tokenizer's folder.
FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
CLASSES_FILE = "classes.txt"
FILE_BYTES = 100_000_000
MOST_LABELS = 1_000_000
PADDING = -1  # no token has this number, so that none is taken for it


def read_texts(
    data: DataSpec, split: Part, resolve: Resolve, what: str
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """One split of a task's texts.

    Args:
        data: what suite.yaml says, of the kind ``text``.
        split: for fine-tuning, for choosing or for reporting.
        resolve: of paths of suite.yaml.
        what: whose data these are, for messages.

    Returns:
        Tokens, int32, N x L, at the end of a text :data:`PADDING`; labels, int64, N; class names.

    Raises:
        SuiteError: a dataset or tokenizer that is missing or of another form, or labels that are
            no classes.
        HubError: a tokenizer of the hub that cannot be fetched.
    """
    assert data.text_columns is not None
    path = locate_data(data, resolve, what)
    found = read_tables_of_texts(Request(data, path, resolve, what))
    table = found[name_of_part(data, split, found, what)]
    label = (data.label_column or "label") if data.labelled else None
    for name in (*data.text_columns, *((label,) if label else ())):
        if name not in table.features:
            raise SuiteError(
                f"{what[0].upper()}{what[1:]}: there is no column {name!r}; there is "
                f"{', '.join(table.features)}."
            )
    chosen = table.select(draw_part(data, split, found, len(table), what))
    tokens = _encode(
        open_tokenizer(tokenizer_path(data, resolve)),
        [[str(text) for text in chosen[name]] for name in data.text_columns],
        data.length,
    )
    if label is None:
        return tokens, np.full(len(tokens), UNLABELLED), ()
    names = _class_names(data, path, resolve, what)
    return (tokens, *_number_labels(found, chosen, label, names, what))


def read_tables_of_texts(request: Request) -> dict[str, Any]:
    """The splits of a dataset: of CSV, TSV and JSON Lines as they are, of others by ``datasets``.

    Raises:
        SuiteError: nothing that can be read.
    """
    if request.data.config is None and (files := find_delimited(request.path, request.what)):
        return read_delimited(files, request.path, request.what)
    if request.path.is_file():
        return read_file(request)
    return read_tables(request)


def _class_names(data: DataSpec, path: Path, resolve: Resolve, what: str) -> tuple[str, ...] | None:
    """Class names as suite.yaml gives them, else of ``classes.txt`` in the data's folder."""
    if data.classes is not None:
        return read_names(data.classes, resolve, f"classes of {what}")
    listed = path / CLASSES_FILE
    return read_names(str(listed), Path, f"classes of {what}") if listed.is_file() else None


def _number_labels(
    found: Mapping[str, Any], chosen: Any, label: str, names: tuple[str, ...] | None, what: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as numbers from 0, and the names of all classes.

    Labels that are texts are numbered in the order of the names; without names, in the order of
    the alphabet over all splits.

    Raises:
        SuiteError: labels that are no classes, or none of the names.
    """
    values = list(chosen[label])
    if values and all(isinstance(value, str) for value in values):
        if names is None:
            every = {value for table in found.values() for value in table[label]}
            names = tuple(sorted(value for value in every if isinstance(value, str)))
        numbers = {name: number for number, name in enumerate(names)}
        if odd := [value for value in values if value not in numbers]:
            raise SuiteError(
                f"{what[0].upper()}{what[1:]}: the label {odd[0]!r:.80} is none of the "
                f"{len(names)} classes. Add it to 'classes' (or to {CLASSES_FILE}), or correct it."
            )
        return np.array([numbers[value] for value in values]), names
    labels = np.asarray(values)
    if labels.dtype.kind not in "iub" or int(labels.min()) < 0:
        raise SuiteError(
            f"{what[0].upper()}{what[1:]}: the column {label!r} holds no class numbers from 0, nor "
            "names. Accuracy needs classes; choose another split or column."
        )
    names = getattr(chosen.features[label], "names", None) or names
    if names is None or len(names) <= int(labels.max()):
        names = tuple(str(number) for number in range(int(labels.max()) + 1))
    return labels.astype(np.int64), tuple(names)


@lru_cache(maxsize=4)
def open_tokenizer(folder: Path) -> Any:
    """A tokenizer of transformers; no code of its folder is run, and nothing is fetched.

    Raises:
        SuiteError: there is none, its files are too large, or transformers is not installed.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as fault:
        raise SuiteError(
            "Texts need the package transformers: pip install 'mergescope[text]'."
        ) from fault
    try:
        check_tokenizer_files(folder)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as fault:  # files of another form make the library raise almost anything
        reason = " ".join(str(fault).split())
        raise SuiteError(f"{folder} holds no tokenizer of transformers: {reason:.200}") from fault


def check_tokenizer_files(folder: Path) -> None:
    """Refuse files of a tokenizer that are no files, too large, or have a name for each of many.

    Raises:
        ValueError, OSError: there is one.
    """
    for name in FILES:
        if (folder / name).exists() and check_regular(folder / name).st_size > FILE_BYTES:
            raise ValueError(f"{name} is larger than {FILE_BYTES:,} bytes")
    with suppress(FileNotFoundError):
        config = json.loads(read_bounded(folder / FILES[0], FILE_BYTES))
        # The library makes a name for each, whoever asks for the tokenizer alone.
        labels = config.get("num_labels", 0)
        if not isinstance(labels, int) or labels > MOST_LABELS:
            raise ValueError(f"config.json says num_labels: {labels!r:.40}")


def _encode(tokenizer: Any, columns: list[list[str]], length: int) -> np.ndarray:
    """int32, N x length: one text a row, or two read as a pair.

    Bits above :data:`SEGMENT_BITS` say which text of a pair a token belongs to, where the tokenizer
    says it.
    """
    found = tokenizer(*columns, truncation=True, max_length=length)
    rows = found["input_ids"]
    segments = found.get("token_type_ids") or [[0] * len(row) for row in rows]
    tokens = np.full((len(rows), length), PADDING, dtype=np.int32)
    for place, row, segment in zip(tokens, rows, segments, strict=True):
        place[: len(row)] = np.asarray(row, np.int32) + (
            np.asarray(segment, np.int32) << SEGMENT_BITS
        )
    return tokens

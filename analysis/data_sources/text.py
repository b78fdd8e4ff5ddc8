"""Texts with labels as rows of tokens, from datasets of the Hugging Face hub's form."""

from __future__ import annotations

import json
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from analysis.data_sources.hugging_face import holds_texts, read_tables, sorted_names
from analysis.data_sources.source import UNLABELLED, Request
from analysis.data_sources.splits import Part, draw_part, name_of_part
from analysis.networks.encoders import SEGMENT_BITS
from merge_core.errors import SuiteError
from merge_core.input_files import check_regular, read_bounded
from merge_core.suites.data_files import Resolve, locate_data, tokenizer_path
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
)
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
    found = read_tables(Request(data, path, resolve, what))
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
    if holds_texts(table.features[label]):
        named = sorted_names(found, label, what)
        numbers = {name: number for number, name in enumerate(named)}
        return tokens, np.array([numbers[name] for name in chosen[label]]), named
    labels = np.asarray(chosen[label])
    if labels.dtype.kind not in "iub" or int(labels.min()) < 0:
        raise SuiteError(
            f"{what[0].upper()}{what[1:]}: the column {label!r} holds no class numbers from 0. "
            "Accuracy needs classes; choose another split or column."
        )
    names = getattr(table.features[label], "names", None)
    names = names or [str(number) for number in range(int(labels.max()) + 1)]
    return tokens, labels.astype(np.int64), tuple(names)


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
        _check_files(folder)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as fault:  # files of another form make the library raise almost anything
        reason = " ".join(str(fault).split())
        raise SuiteError(f"{folder} holds no tokenizer of transformers: {reason:.200}") from fault


def _check_files(folder: Path) -> None:
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

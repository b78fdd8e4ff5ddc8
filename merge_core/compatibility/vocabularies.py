"""Which token stands for which row of the embeddings, told from tokenizer files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from merge_core.compatibility.companions import TOKENIZER_BYTES, VOCABULARY_FILES, Companions
from merge_core.compatibility.findings import (
    BASE,
    Finding,
    Level,
    group_members,
    name_members,
    shorten,
    sort_members,
)

FIELD = "vocabulary"
# Rows that stand for no word until somebody takes them for one.
SPARE = re.compile(
    r"[\[<].*(unused|reserved|extra_id|extra_\d|placeholder|dummy|special).*[\]>]|madeupword\d+",
    re.IGNORECASE,
)
LONGEST_SPARE = 64
FEWEST = 2  # of one token there is no other order
LISTS = VOCABULARY_FILES[:3]
MODELS = VOCABULARY_FILES[-4:]  # pieces in a format that is compared as a whole
# What tokenizers' versions add without another meaning.
PLAIN_KEYS = frozenset({"use_regex", "trim_offsets", "split", "prepend_scheme"})


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one tokenizer.

    Attributes:
        tokens: token by row.
        special: rows of tokens that are no text.
        steps: parts of ``tokenizer.json`` that say how a text is cut, by name.
    """

    tokens: Mapping[int, str]
    special: frozenset[int]
    steps: Mapping[str, str]

    @cached_property
    def is_spare(self) -> frozenset[int]:
        """Rows that are special, or stand for nothing yet."""
        spare = {
            row
            for row, token in self.tokens.items()
            if len(token) <= LONGEST_SPARE and SPARE.fullmatch(token)
        }
        return self.special | spare


def read_vocabulary(files: Companions) -> Vocabulary | None:
    """The tokens that a folder's files list; None where none of them lists two or more.

    ``tokenizer.json`` counts before ``vocab.json`` and ``vocab.txt``.
    """
    found = _read_lists(files)
    return None if found is None or len(found.tokens) < FEWEST else found


def _read_lists(files: Companions) -> Vocabulary | None:
    """The tokens of the first list that can be read."""
    document = files.document("tokenizer.json", TOKENIZER_BYTES)
    if document is not None and isinstance(document.get("model"), dict):
        return _of_tokenizer(document)
    listed = files.document("vocab.json", TOKENIZER_BYTES)
    if listed is None:
        text = files.text("vocab.txt", TOKENIZER_BYTES)
        if text is None:
            return None
        lines = text.removesuffix("\n").split("\n")
        listed = {line.removesuffix("\r"): row for row, line in enumerate(lines)}
    added = files.document("added_tokens.json") or {}
    tokens = _by_row({**listed, **added})
    steps = {}
    merges = files.text("merges.txt", TOKENIZER_BYTES)
    if merges is not None:
        pairs = [line.strip() for line in merges.splitlines()]
        steps["merges"] = "\n".join(pair for pair in pairs if pair and pair[:8] != "#version")
    return Vocabulary(tokens, frozenset(_by_row(added)), steps)


def _of_tokenizer(document: dict[str, Any]) -> Vocabulary:
    model = document["model"]
    pieces = model.get("vocab")
    scores = ""
    if isinstance(pieces, list):  # of a unigram model: pairs of piece and score
        named = [piece[0] if isinstance(piece, list) and piece else "" for piece in pieces]
        tokens = {row: piece for row, piece in enumerate(named) if isinstance(piece, str)}
        scores = _canonical([piece[1:] for piece in pieces if isinstance(piece, list)])
    else:
        tokens = _by_row(pieces if isinstance(pieces, dict) else {})
    special = set()
    added = document.get("added_tokens")
    for entry in added if isinstance(added, list) else []:
        if isinstance(entry, dict) and type(entry.get("id")) is int:
            tokens[entry["id"]] = str(entry.get("content"))
            special.add(entry["id"])
    merges = model.get("merges")
    steps = {
        "merges": "\n".join(
            pair if isinstance(pair, str) else " ".join(map(str, pair))
            for pair in (merges if isinstance(merges, list) else [])
            if isinstance(pair, str | list)
        ),
        "scores": scores,
        "normalizer": _canonical(document.get("normalizer")),
        "pre_tokenizer": _canonical(document.get("pre_tokenizer")),
        "post_processor": _canonical(document.get("post_processor")),
    }
    return Vocabulary(tokens, frozenset(special), steps)


def _by_row(listed: Mapping[str, Any]) -> dict[int, str]:
    return {row: token for token, row in listed.items() if type(row) is int}


def _canonical(value: object) -> str:
    """A part of a tokenizer as text, without what only its version says."""

    def plain(part: object) -> object:
        if isinstance(part, dict):
            kept = {k: plain(v) for k, v in part.items() if k not in PLAIN_KEYS and v is not None}
            return dict(sorted(kept.items()))
        return [plain(item) for item in part] if isinstance(part, list) else part

    try:
        return json.dumps(plain(value))
    except RecursionError:
        return ""


def compare_vocabularies(members: Mapping[str, Companions], kept: bool) -> list[Finding]:
    """Whether the same row is the same token for all members.

    Args:
        members: files beside each member's weights.
        kept: whether the output has the base's embeddings as they are, so that a permuted
            vocabulary mixes no rows.

    Returns:
        Findings: ordinary tokens that stand for other rows are refused (warned of where `kept`);
        spare and special ones, and other ways to cut a text, are warned of; tokens that some
        members have besides are noted.
    """
    keys = {member: files.vocabulary_key for member, files in members.items()}
    keys = {member: key for member, key in keys.items() if any(key)}
    if len(set(keys.values())) < 2:
        return []
    groups = group_members(keys)
    read = {key: read_vocabulary(members[who[0]]) for key, who in groups}
    listed = [(read[key], who) for key, who in groups]
    known = [(vocabulary, who) for vocabulary, who in listed if vocabulary is not None]
    found = _compare_models(
        {m: members[m] for m in keys}, {m: read[key] for m, key in keys.items()}
    )
    found += _tell_unread({m: members[m] for m, key in keys.items() if read[key] is None})
    if len(known) < 2:
        return found
    # The base's counts where it has one, else the most common.
    first, reference = next((item for item in known if BASE in item[1]), known[0])
    for other, who in known:
        if who != reference:
            found += _compare_pair(first, reference, other, who, kept)
    return found


def _compare_pair(
    first: Vocabulary,
    reference: tuple[str, ...],
    other: Vocabulary,
    who: tuple[str, ...],
    kept: bool,
) -> list[Finding]:
    """How one tokenizer departs from the reference."""
    common = first.tokens.keys() & other.tokens.keys()
    differing = sorted(row for row in common if first.tokens[row] != other.tokens[row])
    ordinary = [row for row in differing if row not in first.is_spare | other.is_spare]
    there, here = name_members(reference), name_members(who)
    found = []
    if differing:
        row = (ordinary or differing)[0]
        values = (
            f"{len(differing):,} of {len(common):,} rows; row {row} is "
            f"{shorten(first.tokens[row])!r} in {there}, {shorten(other.tokens[row])!r} in {here}"
        )
        level: Level = "refused" if ordinary and not kept else "warned"
        meaning = "the same row is another token" if ordinary else "spare rows hold other tokens"
        found.append(Finding(level, "tokenizer", FIELD, values, meaning))
    elif len(first.tokens) != len(other.tokens):
        values = f"{len(first.tokens):,} in {there}; {len(other.tokens):,} in {here}"
        meaning = "tokens were added; common rows are the same tokens"
        found.append(Finding("noted", "tokenizer", FIELD, values, meaning))
    steps = [
        step
        for step in sorted(first.steps.keys() & other.steps.keys())
        if first.steps[step] != other.steps[step]
    ]
    if steps and not ordinary:
        values = f"not the same in {there} and {here}"
        meaning = "texts may be cut into other tokens"
        found.append(Finding("warned", "tokenizer", ", ".join(steps), values, meaning))
    return found


def _tell_unread(members: Mapping[str, Companions]) -> list[Finding]:
    """Members whose lists of tokens are there and cannot be read."""
    unread = [m for m, files in members.items() if any(files.digest(name) for name in LISTS)]
    if not unread:
        return []
    values = f"cannot be read in {name_members(sort_members(unread))}"
    meaning = "damaged, too large or out of reach: rows may be other tokens"
    return [Finding("warned", "tokenizer", FIELD, values, meaning)]


def _compare_models(
    members: Mapping[str, Companions], read: Mapping[str, Vocabulary | None]
) -> list[Finding]:
    """Files of sentence pieces, which are compared as a whole where no other file lists tokens."""
    found = []
    for name in MODELS:
        digests = {m: files.digest(name) for m, files in members.items() if read[m] is None}
        digests = {member: digest for member, digest in digests.items() if digest}
        if len(set(digests.values())) > 1:
            sides = [name_members(who) for _, who in group_members(digests)]
            values = f"one in {'; another in '.join(sides)}"
            meaning = "rows may be other tokens: compare the tokenizers"
            found.append(Finding("warned", name, FIELD, values, meaning))
    return found

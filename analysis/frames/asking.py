"""How an answer is come by: read where it is kept, else computed and kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from analysis.frames.entries import Asked, Frames, Question, Values
from merge_core.errors import MergeScopeError

T = TypeVar("T")
# What an entry that was made by another version, or damaged, gives when it is unpacked.
UNFIT = (LookupError, TypeError, ValueError, MergeScopeError)


def ask(
    frames: Frames,
    question: Question[T],
    inputs: str,
    arguments: Values,
    compute: Callable[[], T],
) -> T:
    """The answer to a question: as it is kept, else as it is computed, and then kept.

    Args:
        frames: where answers are kept.
        question: what is asked.
        inputs: digest of the content that it is asked of.
        arguments: plain values by name.
        compute: gives the answer.

    Raises:
        NotRecorded: it is not kept, and nothing can be computed here.
        MergeScopeError: whatever `compute` raises.
    """
    asked = Asked(question.name, question.version, inputs, arguments)
    known = _look_up(frames, question, asked)
    if known is not None:
        return known
    frames.refuse(asked)
    return _keep(frames, question, asked, compute())


def ask_if_known(
    frames: Frames,
    question: Question[T],
    inputs: str,
    arguments: Values,
    compute: Callable[[], T | None],
) -> T | None:
    """As :func:`ask`, where the answer may not be had now; None is not kept.

    Args:
        frames, question, inputs, arguments: as in :func:`ask`.
        compute: gives the answer, or None where it would take long.
    """
    asked = Asked(question.name, question.version, inputs, arguments)
    known = _look_up(frames, question, asked)
    if known is not None:
        return known
    found = compute() if frames.computes else None
    return None if found is None else _keep(frames, question, asked, found)


def _keep(frames: Frames, question: Question[T], asked: Asked, found: T) -> T:
    """Keep an answer; it is given as it will be read."""
    kept = question.pack(found)
    frames.put(asked, kept)
    return question.unpack(kept)


def refuse(frames: Frames, question: Question[T], inputs: str, arguments: Values) -> None:
    """Say that an answer is not there, where it is not and cannot be computed; else do nothing.

    Args:
        frames, question, inputs, arguments: as in :func:`ask`.

    Raises:
        NotRecorded: it is not in the record.
    """
    asked = Asked(question.name, question.version, inputs, arguments)
    if _look_up(frames, question, asked) is None:
        frames.refuse(asked)


def _look_up(frames: Frames, question: Question[T], asked: Asked) -> T | None:
    kept = frames.get(asked)
    if kept is not None:
        with suppress(*UNFIT):
            return question.unpack(kept)
    return None

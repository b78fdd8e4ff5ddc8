"""What is kept: a question in full, and its answer as frames and plain values.

A question is known by its name, its version, the digest of what it was asked of, and its
arguments; changing any of them makes another question. The version is a number that is written
beside the function that answers and is raised when its meaning changes: a digest of its source
would change with every comment, and would not change when something that it calls does. A test
holds the answers of every version on fixed inputs, so that a change that was not declared is
noticed (``tests/analysis/frames/test_versions.py``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

import pandas as pd

from merge_core.errors import MergeScopeError
from merge_core.files import digest_of

T = TypeVar("T")
FORMAT = "frames-1"
Values = Mapping[str, Any]


class NotRecorded(MergeScopeError):  # noqa: N818 - a state rather than a fault
    """A record was asked for something that it does not hold.

    Attributes:
        nearest: the arguments of the most similar question that it can answer, if there is one.
    """

    def __init__(self, message: str, nearest: Values | None = None) -> None:
        super().__init__(message)
        self.nearest = nearest


@dataclass(frozen=True)
class Asked:
    """A question in full.

    Attributes:
        name: of the question, such as ``spectral.spectrum``.
        version: of its meaning.
        inputs: digest of the content that it is asked of.
        arguments: by name; plain values (JSON).
    """

    name: str
    version: int
    inputs: str
    arguments: Values

    @cached_property
    def key(self) -> str:
        """Digest (hex) of all that the answer depends on.

        Example:
            >>> first = Asked("f", 1, "digest", {"rank": 1})
            >>> first.key == Asked("f", 1, "digest", {"rank": 1.0}).key
            False
        """
        arguments = json.dumps(dict(self.arguments), sort_keys=True, allow_nan=False)
        return digest_of(FORMAT, self.name, str(self.version), self.inputs, arguments)


@dataclass(frozen=True)
class Kept:
    """An answer in the form in which it is kept.

    Attributes:
        frames: by name; columns of numbers, booleans and texts, the rows numbered from 0.
        values: whatever else; plain values (JSON).
    """

    frames: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    values: Values = field(default_factory=dict)


class Frames(Protocol):
    """Where answers are kept: on this machine (:class:`.store.FrameStore`), or in a record.

    Attributes:
        computes: whether what is not kept can be computed.
    """

    computes: bool

    def get(self, asked: Asked) -> Kept | None:
        """The answer, or None where it is not kept."""

    def put(self, asked: Asked, kept: Kept) -> None:
        """Keep an answer."""

    def refuse(self, asked: Asked) -> None:
        """Say that an answer is not there, where nothing can be computed; else do nothing.

        Raises:
            NotRecorded: nothing can be computed.
        """


@dataclass(frozen=True)
class Question(Generic[T]):
    """A kind of question, and how its answer is kept.

    Attributes:
        name: such as ``spectral.spectrum``; stands in keys and records.
        version: raised whenever the answer to the same question becomes another one.
        title: what is asked for, in words: ``the spectrum``.
        pack: an answer in the form in which it is kept.
        unpack: an answer from that form; it raises LookupError, TypeError, ValueError or a
            MergeScopeError where what is kept is none.
    """

    name: str
    version: int
    title: str
    pack: Callable[[T], Kept]
    unpack: Callable[[Kept], T]


def frame_question(name: str, version: int, title: str) -> Question[pd.DataFrame]:
    """A question whose answer is one frame.

    Args:
        name, version, title: of the question.

    Example:
        >>> question = frame_question("spectral.spectrum", 1, "the spectrum")
        >>> question.unpack(question.pack(pd.DataFrame({"sigma": [2.0]})))["sigma"].tolist()
        [2.0]
    """
    return Question(
        name,
        version,
        title,
        lambda frame: Kept({"frame": frame.reset_index(drop=True)}),
        lambda kept: kept.frames["frame"],
    )

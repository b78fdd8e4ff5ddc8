"""What is equal for all sessions is made once: figures, and what pages derive from frames.

A result is known by the content of all that it is made from: the function's name and every byte of
its arguments, as pickle writes them. (Streamlit's own caches look at a sample of large frames and
arrays, so that two of them may be taken for one.) Equal arguments that pickle happens to write
otherwise cost another computation, never a wrong result.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from hashlib import blake2b
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import pandas as pd
import streamlit as st
from cachetools import LRUCache

BYTES = 96 << 20
P = ParamSpec("P")
R = TypeVar("R")


class _Made(NamedTuple):
    value: Any
    size: int


class Results:
    """Results of pure functions, by content; those that were not asked for longest go first.

    Sessions that ask for the same at once wait for one of them; others are not kept waiting.

    Args:
        limit: bytes that results may take, as pickle writes them.
    """

    def __init__(self, limit: int = BYTES) -> None:
        self._made: LRUCache[bytes, _Made] = LRUCache(limit, lambda made: made.size)
        self._under_way: dict[bytes, threading.Lock] = {}
        self._guard = threading.Lock()

    def get(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The function's result, read-only; it raises whatever the function raises.

        Args:
            function: pure, and at the top level of a module.
            args, kwargs: its arguments.

        Raises:
            pickle.PicklingError: the function or an argument has no content of its own, such as
                a lambda.
        """
        written = pickle.dumps((function, args, kwargs), protocol=5)
        key = blake2b(written, digest_size=16).digest()
        made = self._look_up(key)
        if made is None:
            with self._guard:
                busy = self._under_way.setdefault(key, threading.Lock())
            with busy:
                made = self._look_up(key) or self._make(key, lambda: function(*args, **kwargs))
        return cast(R, _shared(made.value))

    def _look_up(self, key: bytes) -> _Made | None:
        with self._guard:
            return self._made.get(key)

    def _make(self, key: bytes, function: Callable[[], object]) -> _Made:
        try:
            value = function()
            made = _Made(value, len(pickle.dumps(value, protocol=5)))
            with self._guard:
                if made.size <= self._made.maxsize:
                    self._made[key] = made
            return made
        finally:
            with self._guard:
                self._under_way.pop(key, None)


def _shared(value: object) -> object:
    """A frame may be given columns by whoever gets it: pandas copies what is written to."""
    return value.copy(deep=False) if isinstance(value, pd.DataFrame) else value


@st.cache_resource(show_spinner=False)
def _results() -> Results:
    """The server's one store of results."""
    return Results()


def once(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """See :meth:`Results.get`, of the server's one store."""
    return _results().get(function, *args, **kwargs)

"""Pools as all sessions share them: opened once, their outputs kept. Values are read-only."""

from __future__ import annotations

from dataclasses import dataclass

import streamlit as st

from analysis.frames.from_pools import PoolFrames
from analysis.outputs.pool_outputs import PoolEvaluator
from merge_core.files import digest_of
from merge_core.suites.pool import Pool, load_pool
from ui.server.catalog import POOLS
from ui.server.resources import shared_frames, stamp


@dataclass(frozen=True)
class PoolView:
    """What the sidebar and the link say: a pool and its chosen members.

    Attributes:
        name: the pool as named in the link.
        key: digest that changes when any of its files does.
        pool: the loaded pool.
        members: chosen members, from 0, in the pool's order.
    """

    name: str
    key: str
    pool: Pool
    members: tuple[int, ...]


@st.cache_resource(max_entries=256, show_spinner=False)
def _read_description(path: str, state: str) -> Pool:
    """What a pool's file says, as it is in that state."""
    return load_pool(path)


def describe_pools() -> dict[str, Pool]:
    """All pools on offer by name, for choosing among them; their files may have changed since.

    Raises:
        PoolError: a pool's file is missing or wrong.
    """
    paths = POOLS.list_offered()
    return {name: _read_description(str(path), stamp(path)) for name, path in paths.items()}


@st.cache_resource(max_entries=8, show_spinner=False)
def _open(key: str, path: str) -> Pool:
    return load_pool(path)


def open_pool(described: Pool) -> tuple[str, Pool]:
    """A pool as its files are now, and a digest that changes when any of them does."""
    files = (described.path, *described.files)
    key = digest_of(*(stamp(path) for path in files))
    return key, _open(key, str(described.path))


@st.cache_resource(max_entries=8, show_spinner=False)
def pool_evaluator(key: str, _pool: Pool) -> PoolEvaluator:
    """The evaluator of a pool, known by its key."""
    return PoolEvaluator(_pool)


@st.cache_resource(max_entries=8, show_spinner=False)
def _pool_frames(key: str, members: tuple[int, ...], _pool: Pool) -> PoolFrames:
    return PoolFrames(_pool, members, shared_frames(), lambda: pool_evaluator(key, _pool))


def frames(view: PoolView) -> PoolFrames:
    """What is asked of the view's members, read where it is kept."""
    return frames_of(view.key, view.pool, view.members)


def frames_of(key: str, pool: Pool, members: tuple[int, ...] = ()) -> PoolFrames:
    """What is asked of some members of a pool, known by its key."""
    return _pool_frames(key, members, pool)


def evaluator(view: PoolView) -> PoolEvaluator:
    """The evaluator of the view's pool."""
    return pool_evaluator(view.key, view.pool)

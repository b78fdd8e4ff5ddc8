"""The global choices beside every page: a suite with tasks and layer, or a pool with members."""

from __future__ import annotations

from collections.abc import Mapping

import streamlit as st

from merge_core.suites.pool import REGIMES, Pool
from ui.plain_text import plain
from ui.server import pool_resources, resources, session_files
from ui.server.pool_resources import PoolView
from ui.server.resources import View


def choose_suite() -> View:
    """Suite, tasks and layer, kept across pages and in the link."""
    name = st.selectbox(
        "Suite",
        list(session_files.list_offered()),
        key="suite",
        bind="query-params",
        help="Experts fine-tuned from one base. The page Open checkpoints adds your own.",
    )
    key = resources.suite_key(name)
    suite = resources.open_suite(name, key)
    chosen = st.pills(
        "Tasks to merge",
        suite.tasks,
        selection_mode="multi",
        default=suite.tasks,
        format_func=plain,
        key="tasks",
        bind="query-params",
        help="Which experts take part. CART needs three or more: with two it equals the average.",
    )
    if not chosen:
        st.info("Choose at least one task.")
        st.stop()
    layer = st.selectbox(
        "Layer",
        suite.matrices,
        key="layer",
        bind="query-params",
        help="The weight matrix that Spectra and Interference look into.",
    )
    if layer is None:
        st.warning("This suite has no weight matrix to decompose.")
        st.stop()
    return View(name, key, suite, suite.select(chosen), layer)


def choose_pool(opened: str) -> PoolView:
    """Task and architecture, kind of starts, and members, kept across pages and in the link.

    Args:
        opened: the pool that is chosen at first, where it is on offer.
    """
    pools = pool_resources.describe_pools()
    if not pools:
        st.warning("There is no pool. Build one with `mergescope pool build`.")
        st.stop()
    groups = group_pools(pools)
    label = st.selectbox(
        "Pool",
        list(groups),
        index=next((i for i, starts in enumerate(groups.values()) if opened in starts.values()), 0),
        key="pool",
        bind="query-params",
        on_change=choose_all_members,
        help="Models of one architecture trained on one task. Start with "
        "`mergescope app my/pool.yaml` to see your own.",
    )
    starts = groups[label]
    start = st.radio(
        "Where training began",
        list(starts),
        key="start",
        bind="query-params",
        help="Shared: every member goes on from the same short pre-training. "
        "Independent: every member has initial weights of its own.",
    )
    name = starts[start]
    key, pool = pool_resources.open_pool(pools[name])
    numbers = range(len(pool))
    chosen = st.pills(
        "Members",
        numbers,
        selection_mode="multi",
        default=list(numbers),
        key="members",
        bind="query-params",
        help="Which models take part, in the order in which they are added.",
    )
    if not chosen:
        st.info("Choose at least one member.")
        st.stop()
    return PoolView(name, key, pool, pool.select(chosen))


def choose_all_members() -> None:
    """Another pool has other members: choose all of them again."""
    st.session_state.pop("members", None)


def group_pools(pools: Mapping[str, Pool]) -> dict[str, dict[str, str]]:
    """Pools by task and architecture, then by where their training began.

    Args:
        pools: by name.

    Returns:
        Group label to start label to name. Independent starts come first. Pools that would be
        the same in both labels get a group of their own, with their name in it.
    """
    groups: dict[str, dict[str, str]] = {}
    ordered = sorted(pools.items(), key=lambda item: item[1].spec.regime != "independent")
    for name, pool in ordered:
        spec = pool.spec
        label, start = f"{spec.task}, {spec.family}", REGIMES[spec.regime].capitalize()
        if start in groups.get(label, {}):
            label = f"{label} ({name})"
        groups.setdefault(label, {})[start] = name
    return dict(sorted(groups.items()))

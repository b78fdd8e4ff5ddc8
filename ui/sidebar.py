"""The global choices beside every page: a suite with tasks and layer, or a pool with members."""

from __future__ import annotations

from collections.abc import Mapping

import streamlit as st

from merge_core.devices import GIB, find_devices, set_device
from merge_core.devices import choose_device as choose_named_device
from merge_core.errors import MergeScopeError
from merge_core.merging.engine import check_fits
from merge_core.suites.bundled import bundled_title
from merge_core.suites.pool import REGIMES, Pool
from merge_core.suites.recorded import RecordedSuite
from merge_core.suites.suite import Suite
from ui import kept
from ui.controls import choice, pills, radio, selectbox
from ui.server import pool_resources, resources, session_files
from ui.server.catalog import POOLS, SUITES
from ui.server.pool_resources import PoolView
from ui.server.resources import View


class NothingChosen(MergeScopeError):  # noqa: N818 - a state rather than a fault
    """A page has nothing to show, since nothing is chosen beside it."""


def choose_suite() -> View:
    """Suite, tasks and layer, kept across pages and in the link.

    Raises:
        NothingChosen: no task.
    """
    name = selectbox(
        "Suite",
        session_files.list_offered(),
        "suite",
        rest=SUITES.opened(),
        shown=bundled_title,
        help="Experts fine-tuned from one base. The page Open checkpoints adds your own, "
        "and records.",
    )
    key = resources.suite_key(name)
    suite = resources.open_suite(name, key)
    if isinstance(suite, RecordedSuite):
        st.caption("A record: what was found in a suite, without its weights and data.")
    preset = _choose_preset(suite, name)
    chosen = pills(
        "Tasks to merge",
        suite.tasks,
        "tasks",
        "Which experts take part. CART needs three or more: with two it equals the average.",
        slot=f"tasks of {name}" if preset is None else f"tasks of {name}, {preset}",
        rest=None if preset is None else suite.select([preset]),
    )
    if not chosen:
        raise NothingChosen("No task is chosen. Choose at least one task in the sidebar.")
    if not suite.matrices:
        check_fits(suite, suite.tasks)  # says which member has other shapes
        st.warning("This suite has no weight matrix to decompose.")
        st.stop()
    layer = selectbox(
        "Layer",
        suite.matrices,
        "layer",
        help="The weight matrix that Spectra and Interference look into.",
        slot=f"layer of {name}",
    )
    return View(name, key, suite, suite.select(chosen), layer)


def choose_device() -> None:
    """What computes, kept for the session and in no link: a stranger's machine has others.

    Nothing is drawn where there is nothing to choose.
    """
    there = {device.name: device for device in find_devices()}
    if len(there) == 1:
        set_device(choose_named_device())
        return

    def words(name: str) -> str:
        device = there[name]
        return f"{device.title} ({name})" if device.accelerates else device.title

    name = selectbox(
        "Computes on",
        there,
        "device",
        rest=choose_named_device().name,
        words=words,
        help="Decompositions, forward passes and learning. Results agree but for rounding.",
        linked=False,
    )
    free = there[name].free_bytes()
    if free is not None:
        st.caption(f"{free / GIB:.1f} GiB of memory free")
    set_device(there[name])


def use_kept_device() -> None:
    """Compute on the device that this session chose, in a run that does not draw the sidebar."""
    name = kept.shared_value("device")
    set_device(choose_named_device() if name is None else choose_named_device(name))


def _choose_preset(suite: Suite, name: str) -> str | None:
    """The set of tasks that is chosen at rest; None where the suite names no sets."""
    presets = list(suite.spec.presets)
    if not presets:
        return None
    return choice(
        "Set of tasks",
        {preset: preset for preset in presets},
        "preset",
        "Sets that the suite names. Any of them can be changed below.",
        slot=f"preset of {name}",
    )


def choose_pool(opened: str) -> PoolView:
    """Task and architecture, kind of starts, and members, kept across pages and in the link.

    Args:
        opened: the pool that is chosen at first, where it is on offer.

    Raises:
        NothingChosen: no member.
    """
    pools = pool_resources.describe_pools()
    if not pools:
        st.warning("There is no pool. Build one with `mergescope pool build`.")
        st.stop()
    groups = group_pools(pools)
    opened = POOLS.opened() or opened
    answer_to_name(groups, pools)
    label = selectbox(
        "Pool",
        groups,
        "pool",
        rest=next((label for label, starts in groups.items() if opened in starts.values()), None),
        help="Models of one architecture trained on one task. Start with "
        "`mergescope app my/pool.yaml` to see your own.",
    )
    starts = groups[label]
    start = radio(
        "Where training began",
        starts,
        "start",
        rest=next((start for start, name in starts.items() if name == opened), None),
        help="Shared: every member goes on from the same short pre-training. "
        "Independent: every member has initial weights of its own.",
        slot=f"start of {label}",
    )
    name = starts[start]
    key, pool = pool_resources.open_pool(pools[name])
    numbers = range(len(pool))
    chosen = pills(
        "Members",
        numbers,
        "members",
        "Which models take part, in the order in which they are added.",
        slot=f"members of {name}",
    )
    if not chosen:
        raise NothingChosen("No member is chosen. Choose at least one member in the sidebar.")
    return PoolView(name, key, pool, pool.select(chosen))


def answer_to_name(groups: Mapping[str, Mapping[str, str]], pools: Mapping[str, Pool]) -> None:
    """A link may name a pool as its file or its folder does, instead of its group and start."""
    asked = kept.asked("pool")
    if not asked or asked in groups:
        return
    for label, starts in groups.items():
        for start, name in starts.items():
            if asked in (name, pools[name].spec.name):
                kept.answer("pool", label)
                kept.answer("start", start)
                return


def other_start(view: PoolView) -> tuple[str, PoolView] | None:
    """The same task and architecture from the other kind of starts: its label, and the view.

    Of as many of its first members; None where no such pool is on offer.
    """
    pools = pool_resources.describe_pools()
    for starts in group_pools(pools).values():
        if view.name in starts.values():
            for start, name in starts.items():
                if name != view.name:
                    key, pool = pool_resources.open_pool(pools[name])
                    count = min(len(pool), len(view.members))
                    return start, PoolView(name, key, pool, tuple(range(count)))
    return None


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

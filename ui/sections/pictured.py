"""Models whose weights are looked at as pictures: of the suites and of the pools on offer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import streamlit as st
from torch import Tensor

from analysis.networks.pool_network import pool_network
from analysis.networks.towers import suite_network
from analysis.patterns.filters import head_count, pictured_names
from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.suites.pool import Pool
from merge_core.suites.suite import Suite
from ui.server import pool_resources, resources, session_files

AVERAGE = "average of all"


@dataclass(frozen=True)
class Source:
    """Models that can be looked at and compared.

    Attributes:
        key: digest that changes when any of their files does.
        single: model name to the function that opens its checkpoint.
        averaged: the names that the average is of.
        heads: gives the number of attention heads, None where it is not known.
    """

    key: str
    single: dict[str, Callable[[], Checkpoint]]
    averaged: tuple[str, ...]
    heads: Callable[[], int | None]

    @property
    def models(self) -> tuple[str, ...]:
        """All names, single models first."""
        return (*self.single, AVERAGE)


def source_names() -> dict[str, str]:
    """What can be chosen: label to the kind and name behind it."""
    suites = {f"Suite {name}": f"suite:{name}" for name in session_files.list_offered()}
    pools = {
        f"Pool {pool.title}": f"pool:{name}"
        for name, pool in pool_resources.describe_pools().items()
        if pool.spec.architecture.name not in ("linear", "mlp")
    }
    return suites | pools


def open_source(reference: str) -> Source:
    """A source by what :func:`source_names` says of it.

    Raises:
        MergeScopeError: a suite or pool that cannot be read.
    """
    kind, _, name = reference.partition(":")
    if kind == "suite":
        key = resources.suite_key(name)
        return _source_of_suite(key, resources.open_suite(name, key))
    return _source_of_pool(*pool_resources.open_pool(pool_resources.describe_pools()[name]))


def _source_of_suite(key: str, suite: Suite) -> Source:
    def expert(task: str) -> Callable[[], Checkpoint]:
        return lambda: suite.expert(task)

    single = {task: expert(task) for task in suite.tasks}
    base = suite.base
    if base is not None:
        single = {"base": lambda: base} | single

    def heads() -> int | None:
        return head_count(suite_network(suite).module) if suite.architecture else None

    return Source(key, single, suite.tasks, heads)


def _source_of_pool(key: str, pool: Pool) -> Source:
    def member(number: int) -> Callable[[], Checkpoint]:
        return lambda: pool.member(number)

    single = {f"member {i}": member(i) for i in range(len(pool))}
    averaged = tuple(single)
    start = pool.start
    if start is not None:
        single["shared start"] = lambda: start
    return Source(key, single, averaged, lambda: head_count(pool_network(pool).module))


@st.cache_resource(max_entries=12, show_spinner="Reading weights …")
def pictured_tensors(key: str, model: str, _source: Source) -> dict[str, Tensor]:
    """The tensors of a model that pictures are made of, float32; read-only.

    Raises:
        MergeScopeError: unreadable or unfit weights.
    """
    if model != AVERAGE:
        return _tensors(_source.single[model]())
    total: dict[str, Tensor] = {}
    for name in _source.averaged:
        for parameter, value in _tensors(_source.single[name]()).items():
            share = value.double() / len(_source.averaged)
            total[parameter] = total[parameter] + share if parameter in total else share
    return {parameter: value.float() for parameter, value in total.items()}


def _tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    names = pictured_names({name: checkpoint.info(name).shape for name in checkpoint})
    return {name: checkpoint.tensor(name).float() for name in names}

"""Fixtures: a tiny suite, its parameters, and where factors are kept."""

from __future__ import annotations

import pytest

from merge_core.factors.store import FactorStore
from merge_core.suites.suite import Suite
from merge_core.task_vectors import TensorGroup, TensorGroups
from tests.analysis.tiny_suite import FC, QKV, TASKS, random_states, write_suite


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return write_suite(tmp_path_factory.mktemp("tiny"), *random_states())


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> FactorStore:
    return FactorStore(tmp_path_factory.mktemp("factors"))


@pytest.fixture
def groups(suite: Suite, store: FactorStore) -> TensorGroups:
    return TensorGroups(suite, None, store)


@pytest.fixture
def fc(suite: Suite, store: FactorStore) -> TensorGroup:
    return TensorGroup(suite, TASKS, FC, store)


@pytest.fixture
def qkv(suite: Suite, store: FactorStore) -> TensorGroup:
    return TensorGroup(suite, TASKS, QKV, store)

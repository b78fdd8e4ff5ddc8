"""What tests of pages share: empty caches, and a tiny pool on offer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import streamlit as st

from merge_core.suites.pool import Pool
from tests.pools import write_pool


@pytest.fixture(autouse=True)
def empty_caches() -> Iterator[None]:
    """No test sees what another one left in the server's caches."""
    yield
    st.cache_data.clear()
    st.cache_resource.clear()


@pytest.fixture
def offer_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Pool]:
    """Write a pool named ``mine`` and offer it to the dashboard; options of `write_pool`."""

    def make(architecture: str = "mlp", **options: object) -> Pool:
        pool = write_pool(tmp_path / "mine", architecture, **options)  # type: ignore[arg-type]
        monkeypatch.setenv("MERGESCOPE_POOLS", str(pool.path))
        return pool

    return make

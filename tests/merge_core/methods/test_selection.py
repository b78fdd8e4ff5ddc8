"""Order statistics over the whole model, one block at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_core.errors import Cancelled
from merge_core.factors.store import FactorStore
from merge_core.methods import blockwise, get_method, selection
from merge_core.methods.declaration import Run
from merge_core.methods.selection import Passes, kth_largest, kth_of_rows
from merge_core.progress import Progress
from merge_core.suites.suite import Suite
from merge_core.task_vectors import TensorGroups
from tests.merge_core.sparse_reference import SETTINGS, run

Make = Callable[..., Suite]
VARIANTS = ("paper", "code")


@given(
    st.lists(
        st.one_of(
            st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0000001, -3e38, 3e38, 1e-45, -1e-45]),
            st.floats(width=32, allow_nan=False, allow_infinity=False),
        ),
        min_size=12,
        max_size=12,
    ),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
)
def test_signed_order_statistics_are_the_full_sorts(
    suite_of: Make, entries: list[float], ranks: list[int]
) -> None:
    values = torch.tensor(entries, dtype=torch.float32).reshape(2, 6)
    suite = suite_of(
        {t: {"a": row[:4], "b": row[4:]} for t, row in zip("xy", values, strict=True)},
        {"a": torch.zeros(4), "b": torch.zeros(2)},
    )
    groups = TensorGroups(suite, None, FactorStore())
    passes = Passes(groups, "base", lambda tau: tau, Progress(), 0, 1)
    got = kth_largest(passes, lambda tau: tau, ranks, "entries")
    descending = np.sort(values.numpy().astype(float), axis=1)[:, ::-1]
    assert passes.entries == 6
    assert got.tolist() == [[row[r - 1] for r in ranks] for row in descending]


@given(
    st.integers(1, 400),
    st.integers(1, 60),
    st.sampled_from([1.0, 0.3, 0.02]),
    st.sampled_from([0.0, 0.5, 6.0]),
    st.integers(0, 99),
)
def test_order_statistics_of_a_sampled_model_are_the_full_sorts(
    suite_of: Make, n: int, sample: int, step: float, deviations: float, seed: int
) -> None:
    """Whatever the sample says: with ties (a coarse step) and with bounds that miss."""
    source = np.random.default_rng(seed)
    values = (source.normal(size=(2, n)) / step).round() * step
    values = values.astype(np.float32)
    rows = {
        t: {"a": row[: n // 2], "b": row[n // 2 :]} for t, row in zip("xy", values, strict=True)
    }
    suite = suite_of(
        {t: {name: torch.tensor(part) for name, part in row.items()} for t, row in rows.items()},
        {"a": torch.zeros(n // 2), "b": torch.zeros(n - n // 2)},
    )
    ranks = sorted({1, n, *source.integers(1, n + 1, 2).tolist()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "BLOCK", 7)
        for name, value in (("SAMPLE", sample), ("DEVIATIONS", deviations)):
            patch.setattr(selection, name, value)
        groups = TensorGroups(suite, None, FactorStore())
        passes = Passes(groups, "base", lambda tau: tau, Progress(), 0, 1)
        got = kth_largest(passes, lambda tau: tau, ranks, "entries")
    descending = np.sort(values, axis=1)[:, ::-1]
    assert got.tolist() == [[row[r - 1] for r in ranks] for row in descending.tolist()]


@pytest.mark.parametrize(("method", "parameters"), SETTINGS)
def test_neither_blocks_nor_streaming_change_a_merge(
    synthetic_suite: Make, monkeypatch, method: str, parameters: dict[str, Any]
) -> None:
    suite = synthetic_suite(3, seed=2)
    whole = run(suite, method, parameters=parameters)
    streamed = run(suite, method, parameters=parameters, keep=False)
    monkeypatch.setattr(blockwise, "BLOCK", 7)
    blocked = run(suite, method, parameters=parameters)
    for key, value in whole.items():
        assert torch.equal(value, streamed[key])
        torch.testing.assert_close(value, blocked[key], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("settings", [{"trim": "global"}, *({"variant": v} for v in VARIANTS)])
def test_passes_report_every_parameter_and_can_be_cancelled(
    synthetic_suite: Make, settings: dict[str, Any]
) -> None:
    name = "ties" if "trim" in settings else "pcb"
    method, groups = get_method(name), TensorGroups(synthetic_suite(2), None, FactorStore())
    checked = method.parameters.model_validate(settings)
    seen: list[tuple[int, int]] = []
    assert method.prepare is not None
    method.prepare(
        groups, checked, Run(), Progress(lambda done, total, label: seen.append((done, total)))
    )
    passes = {"ties": 1, "paper": 3, "code": 2}[settings.get("variant", "ties")]
    assert seen == [(i, passes * len(groups)) for i in range(passes * len(groups))]
    stopped = Progress()
    stopped.cancel.set()
    with pytest.raises(Cancelled):
        method.prepare(groups, checked, Run(), stopped)


@pytest.mark.parametrize("sample", [8, 64, 1 << 14])
@given(st.integers(1, 3), st.integers(1, 700), st.integers(0, 99), st.sampled_from([0, 1, 6]))
def test_order_statistics_of_rows_are_the_full_sorts(
    sample: int, rows: int, size: int, seed: int, digits: int
) -> None:
    source = np.random.default_rng(seed)
    values = torch.from_numpy(source.standard_normal((rows, size)).round(digits))
    before, rank = values.clone(), int(source.integers(1, size + 1))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(selection, "ROW_SAMPLE", sample)
        got = kth_of_rows(values, rank)
    assert torch.equal(values, before)
    assert got.tolist() == np.sort(values.numpy(), axis=1)[:, size - rank].tolist()

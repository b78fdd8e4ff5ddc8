"""``mergescope inspect``: the parameters by kind, and in full; differences in few rows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from merge_core.suites import estimates
from merge_core.suites.estimates import Job, Part, Rates
from merge_core.suites.preflight import Preflight, preflight
from merge_core.suites.suite import Suite
from mergescope import cli
from mergescope.preflight_report import print_preflight
from mergescope.terminal import console

D = 8
STATE = {
    **{f"blocks.{i}.attn.qkv.weight": torch.randn(3 * D, D) for i in range(12)},
    **{f"blocks.{i}.attn.qkv.bias": torch.randn(3 * D) for i in range(12)},
    **{f"blocks.{i}.norm1.weight": torch.randn(D) for i in range(12)},
    **{f"blocks.{i}.mlp.fc1.weight": torch.randn((i + 1) * D, D) for i in range(5)},
    "h.0.attn.c_attn.weight": torch.randn(D, 3 * D),
    "scale": torch.tensor(1.0),
}


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[..., tuple[int, str]]:
    """Exit code and output of ``mergescope inspect SUITE --headers-only …``."""
    monkeypatch.setenv("COLUMNS", "220")

    def run(suite: Suite, *options: str) -> tuple[int, str]:
        arguments = ["mergescope", "inspect", str(suite.path), "--headers-only", *options]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert isinstance(caught.value.code, int)
        return caught.value.code, capsys.readouterr().out

    return run


def row(text: str, word: str) -> list[str]:
    """The cells of the one row that has a cell beginning so."""
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    (found,) = (cells for cells in rows if any(cell.startswith(word) for cell in cells))
    return found


def test_parameters_are_shown_by_kind(suite_of: Callable[..., Suite], printed: Any) -> None:
    code, text = printed(suite_of({"a": STATE, "b": STATE}))
    assert code == 0
    name = "blocks.0.attn.qkv.weight"
    assert row(text, name) == ["12", "attention qkv", "decomposed", "24 x 8", name]
    assert row(text, "bias")[:3] == ["12", "bias", "averaged"]
    assert row(text, "norm")[:3] == ["12", "norm", "averaged"]
    assert row(text, "mlp in")[3] == "8 x 8, 16 x 8, 24 x 8, and 2 more"
    assert row(text, "attention qkv, stored in x out")[0] == "1"
    assert row(text, "scale")[3] == "one number"
    assert "blocks.1.attn.qkv.weight" not in text


def test_the_cost_is_told_and_time_only_where_weights_are_read(
    suite_of: Callable[..., Suite], printed: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    suite = suite_of({"a": STATE, "b": STATE})
    monkeypatch.setattr(estimates, "rates", lambda: Rates(0.02, 1e10, 1e9, 1e9))
    print_preflight(console(), preflight(suite))
    timed = capsys.readouterr().out
    monkeypatch.setattr(estimates, "rates", None)  # not even asked for
    _, text = printed(suite)
    # 12 attention matrices of 24 x 8, one more, five of the MLP: 8 x 8, 8 values, 8 bounds each.
    assert f"up to {2 * 18 * 4 * (8 * 8 + 2 * 8) / 1000:.3g} KB of factors" in text
    assert "MB of memory on one thread and" in text
    assert f"{sum(4 * value.numel() for value in STATE.values()) / 1000:.3g} KB on disk" in text
    assert timed.startswith(text.partition("parameters:")[1])
    assert "time on this machine: under 1 s to average, under 1 s by CART" in timed
    assert "time" not in text
    large = Preflight((), job=Job((Part(10**8, 4, (10**4, 10**4)),), tasks=2, workers=2))
    print_preflight(console(), large, timed=False)
    assert "GB of memory on 2 threads (1.55 GB by methods that" in capsys.readouterr().out


def test_no_time_is_told_of_what_cannot_be_merged(
    suite_of: Callable[..., Suite], capsys: Any
) -> None:
    suite = suite_of({"a": STATE, "b": {**STATE, "scale": torch.ones(3)}})
    print_preflight(console(), preflight(suite))
    assert "time on this machine" not in capsys.readouterr().out


def test_every_parameter_is_shown_on_request(suite_of: Callable[..., Suite], printed: Any) -> None:
    suite = suite_of({"a": STATE, "b": STATE}, average=["blocks.3.*"])
    code, text = printed(suite, "--full")
    assert code == 0
    for each in preflight(suite).plan:
        cells = row(text, each.name)
        assert cells[0] == each.name
        assert cells[3:] == ["decomposed" if each.decomposed else "averaged", each.reason]
    assert "'average' in the suite" in row(text, "blocks.3.attn.qkv.weight")[4]


def test_many_differences_of_a_kind_are_one_row(
    suite_of: Callable[..., Suite], printed: Any
) -> None:
    half = {name: value.half() for name, value in STATE.items()}
    suite = suite_of({"a": STATE, "b": half})
    code, text = printed(suite)
    assert code == 0
    assert row(text, f"blocks.0.attn.qkv.bias and {len(STATE) - 1} more")[2] == "dtype"
    code, text = printed(suite, "--full")
    assert text.count("float16, others have float32") == len(STATE)


def test_a_member_that_is_missing_does_not_hide_the_rest(
    suite_of: Callable[..., Suite], printed: Any
) -> None:
    suite = suite_of({"a": STATE, "b": STATE, "c": {**STATE, "more": torch.ones(2)}})
    suite.file("b.safetensors").unlink()
    code, text = printed(suite)
    assert code == 2
    assert row(text, "unreadable")[0] == "b"
    assert row(text, "missing")[0] == "a"

"""Commands on a suite of language models: nats per token, lower first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests.language_models import LLAMA, TASKS, build, save_tokenizer, texts, write_suite
from tests.mergescope import test_cli

Call = Callable[..., tuple[str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Call:
    """Runs a command; what it says, and says of an error."""

    def run(*arguments: str, code: int = 0) -> tuple[str, str]:
        found = test_cli.call(monkeypatch, *arguments)
        said = capsys.readouterr()
        assert found == code, said.err
        return said.out, said.err

    return run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random experts: what is checked is what is said."""
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")
    torch.manual_seed(0)
    save_tokenizer(tmp_path / "base")
    model = build("llama", **LLAMA)
    for name in ("base", *TASKS):
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.02 * torch.randn_like(value))
    experts = {}
    for task in TASKS:
        (tmp_path / f"{task}.txt").write_text("\n".join(texts(task, 12, 3)))
        data = {"kind": "language", "path": f"{task}.txt", "val_share": 0.5}
        experts[task] = {"weights": task, "data": data}
    write_suite(tmp_path, experts)
    return tmp_path


def test_evaluate_gives_cross_entropy_and_perplexity(folder: Path, call: Call) -> None:
    csv = folder / "out.csv"
    said, _ = call("evaluate", str(folder), "--csv", str(csv))
    assert "nats per token" in said
    assert "lower is better" in said
    frame = pd.read_csv(csv)
    np.testing.assert_allclose(frame["perplexity"], np.exp(frame["cross_entropy"]))
    assert frame["texts"].dropna().eq(6).all()
    for model, part in frame.groupby("model"):
        tasks = part[part["task"] != "mean over tasks"]
        mean = part[part["task"] == "mean over tasks"]["cross_entropy"].item()
        assert mean == pytest.approx(tasks["cross_entropy"].mean()), model


def test_compare_and_select_rank_say_lower(folder: Path, call: Call) -> None:
    csv = folder / "out.csv"
    methods = "average,task_arithmetic,ties"
    said, _ = call("compare", str(folder), "--methods", methods, "--csv", str(csv))
    values = pd.read_csv(csv)["cross_entropy"]
    assert values.is_monotonic_increasing
    assert "Mean cross-entropy (nats per token)" in said
    said, _ = call(
        *("select-rank", str(folder), "--method", "task_arithmetic", "--scales", "0.1,0.3,1"),
        *("--mode", "labels", "--full-grid", "--csv", str(csv)),
    )
    points = pd.read_csv(csv)
    best = points.loc[points["score"].idxmin()]
    assert f"recommended: scale {best['scale']:g}" in said
    assert f"validation: {best['score']:.3f} nats per token" in said
    assert "lowest cross-entropy" in " ".join(said.split())


def test_methods_that_learn_are_for_classifiers(folder: Path, call: Call) -> None:
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"suite: {folder / 'suite.yaml'}\nmethod: adamerging\n")
    _, error = call("evaluate", str(recipe), code=2)
    assert "learns from the inputs of classifiers" in " ".join(error.split())

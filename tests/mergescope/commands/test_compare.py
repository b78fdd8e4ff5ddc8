"""``mergescope compare`` on a tiny suite: its table, its file, and which differences it prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.accuracy import difference
from analysis.comparison import run as comparison
from analysis.comparison.tuning import candidates
from analysis.evaluation.evaluator import Evaluator
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import make_recipe
from merge_core.methods import methods
from merge_core.suites.suite import load_suite
from mergescope import cli
from tests.evaluable import TASKS, by_hand, copy_evaluable, edit_document, state_of


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "220")
    copy_evaluable(tmp_path / "suite")
    return tmp_path / "suite"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    """Run the command; gives its exit code, output and errors."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mergescope", "compare", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, captured.out, captured.err

    return call


def rows_of(text: str, place: int) -> dict[str, list[str]]:
    """Rows of one of the tables, by method."""
    table = text.split("└")[place]
    rows = [[part.strip() for part in line.split("│")[1:-1]] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows if row}


def test_a_comparison(folder: Path, run: Any, tmp_path: Path) -> None:
    names = "average,cart_indexing,dare_task_arithmetic,regmean"
    csv = tmp_path / "deep" / "table.csv"
    code, out, err = run(folder, "--methods", names, "--seeds", 2, "--csv", csv)
    assert (code, err) == (0, "")
    table = pd.read_csv(csv).set_index("label")
    dare = [f"DARE with Task Arithmetic, seed {seed}" for seed in (0, 1)]
    others = {"Weight average", "CART-Indexing", "RegMean"}
    assert set(table.index) == {*others, *dare}
    assert table["accuracy"].is_monotonic_decreasing
    # The average, by timm and numpy alone.
    states = [state_of(load_suite(folder), task) for task in TASKS]
    average = {name: sum(s[name] for s in states) / 3 for name in states[0]}
    own, merged = [], []
    for task, state in zip(TASKS, states, strict=True):
        for weights, shares in ((average, merged), (state, own)):
            predicted, labels = by_hand(weights, folder, task, "test")  # type: ignore[arg-type]
            shares.append(float((predicted == labels).mean()))
    row = table.loc["Weight average"]
    assert row["accuracy"] == pytest.approx(np.mean(merged))
    assert row["normalised"] == pytest.approx(np.mean(np.array(merged) / own))
    assert (row["worst"], row["worst_task"]) == (min(merged), TASKS[int(np.argmin(merged))])
    # What is printed is what is in the file, in its order.
    rows, costs = rows_of(out, 0), rows_of(out, 1)
    assert list(rows) == list(costs) == table.index.tolist()
    for label, (accuracy, interval, normalised, worst) in rows.items():
        each = table.loc[label]
        assert accuracy == f"{each['accuracy']:.1%}"
        assert interval == f"{100 * each['low']:.1f} to {100 * each['high']:.1f}"
        assert normalised == f"{each['normalised']:.1%}"
        assert worst == f"{each['worst_task']} {each['worst']:.1%}"
        seconds, _, storage, needs = costs[label]
        assert float(seconds) == pytest.approx(each["seconds"], rel=0.06)
        assert float(storage) == pytest.approx(each["storage_mb"], rel=0.01)
        assert needs == each["needs"]
    assert costs["RegMean"][-1] == "unlabelled data"
    assert f"experts, each on its own task: {np.mean(own):.1%}; base: " in out
    seeds = table.loc[dare, "accuracy"]
    line = (
        f"DARE with Task Arithmetic, 2 seeds: {seeds.mean():.1%} ± {100 * seeds.std():.1f} "
        "(standard deviation over seeds; "
    )
    assert line in out


def test_differences_to_the_best(folder: Path, run: Any) -> None:
    suite = load_suite(folder)
    session, evaluator = MergeSession(suite, None, FactorStore()), Evaluator(suite)
    code, out, _ = run(folder, "--methods", "tsv_c,average,task_arithmetic,tsv_m")
    assert code == 0
    result = comparison.run_comparison(
        str(folder), ["tsv_c", "average", "task_arithmetic", "tsv_m"], session, evaluator
    )
    best = result.summary["label"].iloc[0]
    table = out.split(f"Real differences to {best}")[1]
    printed = [line.split("│")[1:-1] for line in table.splitlines() if "│" in line]
    assert printed
    gaps = {}
    for label, gap, interval, _ in ([cell.strip() for cell in row] for row in printed):
        expected = difference(result.hits[label], result.hits[best])
        assert gap == f"{100 * expected.gap:+.1f}"
        assert interval.startswith(f"{100 * expected.low:+.1f} to ")
        gaps[label] = expected.gap
    assert list(gaps.values()) == sorted(gaps.values(), reverse=True)
    assert max(gaps.values()) < 0
    alike = set(result.summary["label"]) - set(gaps) - {best}
    assert "differ on at least 8 inputs" in " ".join(out.split())  # 2⁻⁷ < 5 % / 6 pairs
    last = out.strip().splitlines()[-1]
    assert last.startswith(f"not told apart from {best}: ")
    assert all(label in last for label in alike)
    assert not any(label in last for label in gaps)


def test_which_methods(folder: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def stop(reference: str, names: list[str], *arguments: object, **keywords: object) -> None:
        asked.append(names)
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "run_comparison", stop)
    learn = {name for name, method in methods().items() if method.learns}
    assert run(folder)[0] == 130
    assert run(folder, "--methods", "all")[0] == 130
    assert run(folder, "--methods", " ties, cart,ties ", "--tasks", "lines,digits")[0] == 130
    assert run(folder, "--methods", "all", "--tasks", "lines,digits")[0] == 130
    edit_document(folder, base=None)
    assert run(folder)[0] == 130
    everything = set(methods())
    assert set(asked[0]) == everything - learn - {"slerp"}
    assert set(asked[1]) == everything - {"slerp"}  # which takes two experts
    assert asked[2] == ["ties", "cart"]
    assert set(asked[3]) == everything
    assert "average" in asked[4]
    assert "cart" in asked[4]
    assert not {"ties", "task_arithmetic", "tsv_m", "emr", *learn} & set(asked[4])


def test_best_of(folder: Path, run: Any, tmp_path: Path) -> None:
    """The best of a few settings on val, evaluated on the first images of test."""
    csv = tmp_path / "t.csv"
    arguments = ["--methods", "task_arithmetic", "--best-of", 4, "--limit", 8, "--csv", csv]
    code, out, _ = run(folder, *arguments)
    assert code == 0
    assert "Real differences" not in out
    suite = load_suite(folder)
    base, experts = state_of(suite), [state_of(suite, task) for task in TASKS]

    def accuracy(scale: float, split: str) -> float:
        merged = {
            name: value + scale * sum((expert[name] - value for expert in experts), 0 * value)
            for name, value in base.items()
        }
        hits = [np.equal(*by_hand(merged, folder, task, split, 8)) for task in TASKS]
        return float(np.mean([each.mean() for each in hits]))

    tried = candidates(make_recipe({"method": "task_arithmetic"}), 4)
    scales = [recipe.parameters["scale"] for recipe in tried]
    best = max(scales, key=lambda scale: accuracy(scale, "val"))
    row = pd.read_csv(csv).iloc[0]
    assert row["setting"] == f"scale {best:g}"
    assert row["accuracy"] == pytest.approx(accuracy(best, "test"))
    _, _, err = run(folder, *arguments[:4], "--limit", 8, "--split", "val")
    assert "too high" in err


def test_own_recipes(folder: Path, run: Any, tmp_path: Path) -> None:
    """From a file, a query and an address; their tasks give way to those of the comparison."""
    file = tmp_path / "mine=1.yaml"
    file.write_text("suite: elsewhere.yaml\nmethod: cart\nparameters: {rank: 0.5}\n")
    csv = tmp_path / "t.csv"
    address = "http://127.0.0.1:8501/merge_lab?tasks=digits&method=task_arithmetic&scale=0.7"
    own = ["--recipe", file, "--recipe", "method=ties&density=0.5", "--recipe", address]
    arguments = ["--methods", "average", "--tasks", "digits,lines", "--csv", csv, "--limit", 9]
    code, out, err = run(folder, *arguments, *own)
    assert code == 0
    assert err.startswith("note: ")
    assert "is a recipe for digits; like the others it is compared on digits, lines" in err
    suite = load_suite(folder)
    tasks = ("digits", "lines")
    session, evaluator = MergeSession(suite, tasks, FactorStore()), Evaluator(suite)
    table = pd.read_csv(csv).set_index("label")
    expected = {
        "CART (rank 0.5)": ("cart", {"rank": 0.5}),
        "TIES (density 0.5)": ("ties", {"density": 0.5}),
        "Task Arithmetic (scale 0.7)": ("task_arithmetic", {"scale": 0.7}),
    }
    assert set(table.index) == {"Weight average", *expected}
    for label, (method, parameters) in expected.items():
        recipe = make_recipe({"tasks": tasks, "method": method, "parameters": parameters})
        wanted = evaluator.recipe(recipe, session, "test", 9)["accuracy"].mean()
        assert table.loc[label, "accuracy"] == pytest.approx(wanted)
    settings = rows_of(out, 2)
    assert settings["CART (rank 0.5)"] == ["your recipe", "rank 0.5, scale 1"]
    assert settings["Weight average"] == ["default", ""]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "bogus"], "no method 'bogus'"),
        (["--methods", ","], "mergescope methods"),
        (["--methods", "slerp"], "merges 2 experts, not 3"),
        (["--tasks", "cats"], "no task 'cats'"),
        (["--split", "train"], "--split must be val or test"),
        (["--best-of", "0"], "--best-of"),
        (["--csv", "."], "is a folder"),
        (["--recipe", "nope.yaml"], "nope.yaml cannot be read"),
        (["--recipe", "rank=3"], "The link: method"),
        (["--recipe", "method=cart&rnk=3"], "no parameter 'rnk'"),
        (["--recipe", 'method=ties&weights={"cats":2}'], "does not merge 'cats'"),
        (["--recipe", "method=slerp"], "merges 2 experts, not 3"),
    ],
)
def test_mistakes(folder: Path, run: Any, arguments: list[str], words: str) -> None:
    code, out, err = run(folder, *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert words in err


def test_no_base(folder: Path, run: Any) -> None:
    edit_document(folder, base=None)
    code, out, _ = run(folder, "--methods", "average,cart", "--limit", 4)
    assert code == 0
    assert "; base:" not in out
    code, _, err = run(folder, "--methods", "average,task_arithmetic")
    assert code == 2
    assert "needs the base" in err


def test_no_evaluation(folder: Path, run: Any) -> None:
    edit_document(folder, architecture=None)
    code, _, err = run(folder)
    assert code == 2
    assert "names no architecture" in err

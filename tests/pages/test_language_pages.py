"""Pages on a suite of language models: cross-entropy, and lower is better."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.evaluation.evaluator import Evaluator
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import make_recipe
from merge_core.suites.suite import load_suite
from tests.language_models import trained_suite
from tests.pages.test_pages import array, assert_healthy, figures, finish, metrics, open_page


@pytest.fixture(scope="module")
def suite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language") / "spoken"
    folder.mkdir()
    return trained_suite(folder)


@pytest.fixture(autouse=True)
def offered(suite_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGESCOPE_SUITES", str(suite_file))


def words(at: object) -> str:
    kinds = ("markdown", "info", "caption", "warning")
    return " ".join(str(each.value) for kind in kinds for each in at.get(kind))  # type: ignore[attr-defined]


def test_the_lab_measures_in_nats_and_lower_is_better(suite_file: Path) -> None:
    at = assert_healthy(finish(open_page("merge_lab", suite="spoken", method="Weight average")))
    shown = metrics(at)
    suite = load_suite(suite_file)
    session = MergeSession(suite, None, FactorStore())
    recipe = make_recipe({"suite": str(suite_file), "method": "average"})
    frame = Evaluator(suite).recipe(recipe, session)
    mean = frame["cross_entropy"].mean()
    assert float(shown["Mean cross-entropy"]) == pytest.approx(mean, abs=6e-4)
    worst = frame.loc[frame["cross_entropy"].idxmax()]
    assert shown[f"Worst task: {worst['task']}"] == f"{worst['cross_entropy']:.3f}"
    assert float(shown["Experts"]) < mean
    dots = next(f for f in figures(at) if "each task" in str(f["layout"]["title"]))
    assert "nats per token" in str(dots["layout"]["xaxis"]["title"])


def test_compare_puts_the_lowest_first() -> None:
    at = open_page("compare", suite="spoken", methods=["Weight average", "Task Arithmetic", "TIES"])
    button = next((b for b in at.button if "ompare" in b.label), None)
    at = finish(button.click().run() if button is not None else at)
    assert_healthy(at)
    dots = next(f for f in figures(at) if "Which method" in str(f["layout"]["title"]))
    means = array(dots["data"][0]["x"])
    assert list(means) == sorted(means, reverse=True)  # drawn from below, the best on top
    assert dots["layout"]["xaxis"]["title"]["text"].endswith("(nats per token), lower is better")


@pytest.mark.parametrize("name", ["overview", "spectra", "interference", "rank_and_scale"])
def test_other_pages_open(name: str) -> None:
    at = assert_healthy(finish(open_page(name, suite="spoken")))
    if name == "overview":
        assert "The tasks are of texts" in words(at)
        button = next(b for b in at.button if "Evaluate base" in b.label)
        at = assert_healthy(finish(button.click().run()))
        assert "Experts" in metrics(at)
        at = assert_healthy(open_page(name, suite="spoken"))  # what was evaluated is known now
        assert "What does merging give?" in [each.value for each in at.subheader]

"""The comparison page, on a tiny suite that can be evaluated."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from streamlit.testing.v1 import AppTest

from analysis.evaluation import Evaluator
from merge_core.engine import MergeSession
from merge_core.factors import FactorStore
from merge_core.methods import get_method
from merge_core.recipe import make_recipe
from merge_core.suite import load_suite
from tests.evaluable import write_evaluable
from tests.pages.test_pages import array, figures, healthy, open_page

Offer = Callable[..., Path]


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Offer:
    """Write a suite named ``mine`` and offer it to the dashboard."""

    def make() -> Path:
        path = write_evaluable(tmp_path / "mine")
        monkeypatch.setenv("MERGESCOPE_SUITES", str(path))
        return path

    return make


def compared(at: AppTest, seconds: float = 120) -> AppTest:
    """Press the button, and run again until the job has ended."""
    next(button for button in at.button if button.label == "Compare these methods").click().run()
    end = time.monotonic() + seconds
    while any(button.label == "Cancel" for button in at.button):
        assert time.monotonic() < end, "the job did not end"
        time.sleep(0.1)
        at.run()
    return healthy(at)


def test_a_comparison_shows_the_evaluators_accuracies(offer: Offer) -> None:
    path = offer()
    chosen = ["Weight average", "CART", get_method("dare_ties").title, "TSV-C"]
    at = compared(healthy(open_page("compare", suite="mine", methods=chosen)))
    drawn = next(f for f in figures(at) if "keeps most" in f["layout"]["title"]["text"])
    dots = dict(zip(drawn["data"][0]["y"], array(drawn["data"][0]["x"]), strict=True))
    suite = load_suite(path)
    session, evaluator = MergeSession(suite, None, FactorStore()), Evaluator(suite)
    for name, title in (("average", "Weight average"), ("cart", "CART"), ("tsv_c", "TSV-C")):
        recipe = make_recipe({"suite": str(path), "method": name})
        wanted = evaluator.recipe(recipe, session, "test")["accuracy"].mean()
        assert dots[title] == pytest.approx(100 * wanted)
    assert len([label for label in dots if label.startswith(f"{chosen[2]}, seed")]) == 3


def test_tuned_settings_are_chosen_on_validation(offer: Offer) -> None:
    offer()
    at = open_page("compare", suite="mine", methods=["Task Arithmetic"], budget="Best of 4")
    at = compared(healthy(at))
    assert any("scale" in str(frame.value.to_dict()) for frame in at.dataframe)


def test_published_figures_need_no_evaluation(offer: Offer) -> None:
    path = offer()
    document = yaml.safe_load(path.read_text())
    del document["architecture"]
    path.write_text(yaml.safe_dump(document))
    at = healthy(open_page("compare", suite="mine"))
    assert any("analysed and merged but not evaluated" in info.value for info in at.info)
    assert any("Not comparable" in text.value for text in at.markdown)
    assert not [button for button in at.button if button.label == "Compare these methods"]


def test_two_tasks_offer_methods_for_two(offer: Offer) -> None:
    offer()
    two = healthy(open_page("compare", suite="mine", tasks=["digits", "lines"]))
    three = healthy(open_page("compare", suite="mine"))
    boxes = [next(m for m in at.multiselect if m.key == "methods") for at in (two, three)]
    assert ["SLERP" in box.options for box in boxes] == [True, False]

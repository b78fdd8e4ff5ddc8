"""The pages about pools, on tiny pools that are offered to the dashboard."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from streamlit.testing.v1 import AppTest
from torch import Tensor

from analysis.averaging.ensembles import accuracy_over_members
from analysis.networks.pool_network import pool_network
from analysis.outputs.pool_outputs import PoolEvaluator
from merge_core.suites.pool import Pool, bundled_pools, load_pool
from tests.pages.test_pages import assert_healthy, figures, finish, metrics, open_page
from tests.pools import ARCHITECTURES
from ui import shell, sidebar

POOL_PAGES = ("weights_or_features", "magnitude_and_stability")
Offer = Callable[..., Pool]


def open_pool_page(name: str, pool: Pool, **query: str | list[str]) -> AppTest:
    start = "Independent starts" if pool.spec.regime == "independent" else "Shared start"
    return open_page(name, pool=f"{pool.spec.task}, {pool.spec.family}", start=start, **query)


def by_hand(pool: Pool, split: str, states: list[dict[str, Tensor]]) -> tuple[np.ndarray, Tensor]:
    """Labels, and logits of each state: load_state_dict and the module itself, in float64."""
    with np.load(pool.root / "inputs.npz") as archive:
        raw, labels = archive[f"{split}_images"] / 255.0, archive[f"{split}_labels"]
    images = torch.tensor(((raw - 0.5) / 0.25).transpose(0, 3, 1, 2))
    module = pool_network(pool).module.double()
    logits = []
    for state in states:
        module.load_state_dict(state)
        with torch.no_grad():
            logits.append(module.eval()(images))
    return labels, torch.stack(logits)


def percent(hits: np.ndarray) -> str:
    return f"{hits.mean():.1%}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("page", POOL_PAGES)
def test_every_architecture_opens(offer_pool: Offer, page: str, architecture: str) -> None:
    at = assert_healthy(finish(open_pool_page(page, offer_pool(architecture))))
    assert len(figures(at)) >= 5


@pytest.mark.parametrize("architecture", ["mlp", "resnet"])
def test_accuracies_are_the_models(offer_pool: Offer, architecture: str) -> None:
    pool = offer_pool(architecture, members=4, spread=0.3)
    shown = metrics(assert_healthy(open_pool_page("weights_or_features", pool)))
    states = [load_file(pool.root / f"{i}.safetensors") for i in range(4)]
    mean = {
        name: torch.stack([state[name].double() for state in states]).mean(0)
        if states[0][name].is_floating_point()
        else states[0][name]
        for name in states[0]
    }
    labels, logits = by_hand(pool, "test", [*states, mean])
    single = (logits[:4].argmax(-1).numpy() == labels).mean(axis=1)
    assert shown["Individuals"] == percent(single)
    assert shown["Uniform soup"] == percent(logits[4].argmax(-1).numpy() == labels)
    assert shown["Logit ensemble"] == percent(logits[:4].mean(0).argmax(-1).numpy() == labels)


def test_a_linear_soup_is_the_ensemble(offer_pool: Offer) -> None:
    shown = metrics(assert_healthy(open_pool_page("weights_or_features", offer_pool("linear"))))
    assert shown["Uniform soup"] == shown["Logit ensemble"] == shown["Feature ensemble"]
    assert shown["Predictions that differ"] == shown["Predictions it changes"] == "0.0%"


def test_members_and_split_are_choices(offer_pool: Offer) -> None:
    pool = offer_pool("mlp", members=4)
    states = [load_file(pool.root / f"{i}.safetensors") for i in (1, 3)]
    at = open_pool_page("weights_or_features", pool, members=["1", "3"], split="Validation")
    labels, logits = by_hand(pool, "val", states)
    shown = metrics(assert_healthy(at))
    assert shown["Logit ensemble"] == percent(logits.mean(0).argmax(-1).numpy() == labels)
    assert any("ensemble of 2 members" in text.value for text in at.markdown)


def test_one_member_is_every_rule(offer_pool: Offer) -> None:
    pool = offer_pool("vgg")
    at = assert_healthy(open_pool_page("weights_or_features", pool, members=["2"]))
    shown = metrics(at)
    assert shown["Individuals"] == shown["Uniform soup"] == shown["Logit ensemble"]
    assert any("With one member every rule is that member" in text.value for text in at.markdown)
    assert any("two or more" in info.value for info in at.info)


def test_batchnorm_is_a_choice_only_where_there_is_some(offer_pool: Offer) -> None:
    def handling(at: AppTest) -> list[str]:
        return [group.label for group in at.segmented_control if "BatchNorm" in group.label]

    at = assert_healthy(open_pool_page("weights_or_features", offer_pool("resnet")))
    assert len(handling(at)) == 1
    before = metrics(at)
    group = next(g for g in at.segmented_control if "BatchNorm" in g.label)
    group.set_value("reestimate").run()
    after = metrics(assert_healthy(at))
    assert before["Logit ensemble"] == after["Logit ensemble"]
    assert before["Soup − ensemble"] != after["Soup − ensemble"]


def test_without_batchnorm_there_is_no_such_choice(offer_pool: Offer) -> None:
    at = assert_healthy(open_pool_page("weights_or_features", offer_pool("vit")))
    assert not [group for group in at.segmented_control if "BatchNorm" in group.label]


def test_non_finite_logits_are_counted_and_shown(offer_pool: Offer) -> None:
    def blow_up(number: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: 1e15 * value for name, value in state.items()} if number == 1 else state

    at = open_pool_page("weights_or_features", offer_pool("mlp", change=blow_up))
    assert not at.exception
    assert [error.value for error in at.error] == []
    assert any("50 images get non-finite logits" in text.value for text in at.markdown)


def test_jobs_on_demand(offer_pool: Offer) -> None:
    at = assert_healthy(open_pool_page("weights_or_features", offer_pool("mlp", spread=0.05)))
    before = len(figures(at))
    for label in ("Predict soup − ensemble from the curvature", "Compare the members' layers"):
        next(button for button in at.button if button.label == label).click().run()
        assert_healthy(finish(at))
    assert len(figures(at)) == before + 2


def test_a_bias_free_network_keeps_its_predictions(offer_pool: Offer) -> None:
    at = assert_healthy(finish(open_pool_page("magnitude_and_stability", offer_pool("mlp"))))
    assert any("exactly homogeneous" in text.value for text in at.markdown)
    cards = [card for card in at.metric if str(card.delta).endswith("unchanged")]
    assert len(cards) == 4
    assert {card.delta for card in cards} == {"100.0% unchanged"}
    weights = metrics(open_pool_page("weights_or_features", offer_pool("mlp")))
    assert cards[0].value == weights["Individuals"]


def test_biases_break_small_magnitudes(offer_pool: Offer) -> None:
    at = assert_healthy(
        finish(open_pool_page("magnitude_and_stability", offer_pool("vgg"), m="0.001"))
    )
    assert any("biases" in text.value for text in at.markdown)
    assert any("At **m = 0.001**" in text.value for text in at.markdown)
    card = next(card for card in at.metric if card.label == "Logit ensemble")
    # The last bias alone decides: one class for all images.
    assert card.value in ("24.0%", "26.0%")


@pytest.mark.parametrize(
    ("what", "architecture"),
    [("Weights only", "mlp"), ("Whole state", "resnet"), ("One layer", "vgg")],
)
@pytest.mark.parametrize("who", ["All members", "The first member", "All but the last member"])
def test_who_and_what_are_scaled(offer_pool: Offer, who: str, what: str, architecture: str) -> None:
    pool = offer_pool(architecture)
    at = assert_healthy(finish(open_pool_page("magnitude_and_stability", pool, who=who, what=what)))
    titles = [figure["layout"]["title"]["text"] for figure in figures(at)]
    assert any("Who decides" in title for title in titles) == (who != "All members")


def test_norms_are_the_members(offer_pool: Offer) -> None:
    pool = offer_pool("vgg")
    shown = metrics(assert_healthy(finish(open_pool_page("magnitude_and_stability", pool))))
    states = [load_file(pool.root / f"{i}.safetensors") for i in range(3)]
    vectors = torch.stack(
        [torch.cat([value.double().flatten() for value in s.values()]) for s in states]
    )
    assert shown["Mean ‖θᵢ‖²"] == f"{vectors.square().sum(1).mean():.4g}"
    assert shown["‖average‖²"] == f"{vectors.mean(0).square().sum():.4g}"
    assert float(shown["Identity holds to"]) < 1e-12


def test_noise_and_corruption_run_on_demand(offer_pool: Offer) -> None:
    at = assert_healthy(finish(open_pool_page("magnitude_and_stability", offer_pool("mlp"))))
    before = len(figures(at))
    for label in ("Disturb the weights", "Corrupt the images"):
        next(button for button in at.button if button.label == label).click().run()
        assert_healthy(finish(at))
    assert len(figures(at)) == before + 2


@pytest.mark.parametrize("page", POOL_PAGES)
def test_a_missing_member_is_said_in_words(offer_pool: Offer, page: str) -> None:
    pool = offer_pool("mlp")
    (pool.root / "1.safetensors").unlink()
    at = open_pool_page(page, pool)
    assert not at.exception
    assert any("member 1" in error.value for error in finish(at).error)


def test_a_broken_pool_is_said_in_words_and_suites_still_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pool.yaml"
    path.write_text("name: x\nmembers: []\n", encoding="utf-8")
    monkeypatch.setenv("MERGESCOPE_POOLS", os.pathsep.join([str(path)]))
    at = open_page("weights_or_features")
    assert not at.exception
    messages = [error.value.replace("\\", "") for error in at.error]
    assert any(path.name in message and str(path.parent) not in message for message in messages)
    assert_healthy(open_page("spectra"))


def test_the_dashboard_opens_on_the_pool_that_was_named(offer_pool: Offer) -> None:
    pool = offer_pool()
    for page in ("weights_or_features", "magnitude_and_stability"):
        at = assert_healthy(open_page(page))
        chosen = sidebar.group_pools({"mine": pool})
        assert at.selectbox(key="pool").value == next(iter(chosen))
    assert shell.first_page().subject == "pool"


def test_a_link_may_name_a_pool_as_its_file_does(offer_pool: Offer) -> None:
    pool = offer_pool()
    bundled = "digits-resnet-shared"
    at = assert_healthy(open_page("weights_or_features", pool=bundled))
    assert at.selectbox(key="pool").value == "digits, ResNet"
    assert at.radio(key="start").value == "Shared start"
    at = assert_healthy(open_page("weights_or_features", pool=pool.spec.name))
    assert at.selectbox(key="pool").value == next(iter(sidebar.group_pools({"mine": pool})))
    at = open_page("weights_or_features", pool="no such pool")
    assert any("not on offer here (Pool)" in warning.value for warning in at.warning)


def test_the_first_pool_shows_both_kinds_of_starts() -> None:
    """Averaging weights helps one, and ruins the other."""
    at = assert_healthy(open_page("weights_or_features"))
    (said,) = (text.value for text in at.markdown if "against a single member. Ind" in text.value)
    shared, independent = (float(x) for x in re.findall(r"\*\*([+-][\d.]+) points\*\*", said))
    assert shared > 0
    pools = bundled_pools()
    gains = []
    for start in ("shared", "independent"):
        evaluator = PoolEvaluator(load_pool(pools[f"digits-resnet-{start}"]))
        frame = accuracy_over_members(evaluator, tuple(range(10)), "test", "average")
        last = frame[frame["n"] == 10].set_index("rule")["accuracy"]
        gains.append(100 * (last["uniform_soup"] - last["individuals"]))
    assert [shared, independent] == pytest.approx(gains, abs=0.05)
    assert independent < -50


def test_magnitude_opens_where_nothing_is_scaled(offer_pool: Offer) -> None:
    pool = offer_pool("vgg")
    at = assert_healthy(finish(open_pool_page("magnitude_and_stability", pool)))
    assert float(at.select_slider(key="m").value) == 1
    states = [load_file(file) for file in sorted(pool.root.glob("[0-9]*.safetensors"))]
    labels, logits = by_hand(pool, "test", states)
    single = (logits.argmax(-1).numpy() == labels).mean(axis=1)
    assert metrics(at)["Individuals"] == percent(single)

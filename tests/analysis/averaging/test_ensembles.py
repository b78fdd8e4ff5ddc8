"""Every rule against float64 loops over modules in evaluation mode, and identities."""

from __future__ import annotations

import threading
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from analysis.accuracy import wilson_interval
from analysis.averaging.ensembles import (
    ENSEMBLES,
    RULES,
    accuracy_over_members,
    agreement,
    head,
    rule_logits,
    rules_frame,
)
from analysis.averaging.soups import greedy_soup, predict_classes
from analysis.networks.pool_network import pool_network
from analysis.outputs.pool_outputs import PoolEvaluator
from merge_core.errors import Cancelled
from merge_core.progress import Progress
from tests.pools import ARCHITECTURES, IMAGES, write_pool

MEMBERS = (0, 1, 2)
JOINT = [rule for rule in RULES if rule != "individuals"]
# Dropout everywhere, so that anything run in training mode shows.
FAMILIES: dict[str, Any] = {
    **ARCHITECTURES,
    "vit": {
        **ARCHITECTURES["vit"],
        "args": {**ARCHITECTURES["vit"]["args"], "drop_rate": 0.5, "proj_drop_rate": 0.5},
    },
    "resnet": {
        **ARCHITECTURES["resnet"],
        "args": {**ARCHITECTURES["resnet"]["args"], "drop_rate": 0.5},
    },
}


@pytest.fixture(scope="module")
def evaluators(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PoolEvaluator]:
    folder = tmp_path_factory.mktemp("ensembles")
    return {
        family: PoolEvaluator(write_pool(folder / family, spec))
        for family, spec in FAMILIES.items()
    }


@pytest.fixture(scope="module")
def mlp(evaluators: dict[str, PoolEvaluator]) -> PoolEvaluator:
    return evaluators["mlp"]


def overflow(number: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The last member's logits leave float32."""
    return {name: 1e16 * value for name, value in state.items()} if number == 2 else state


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> PoolEvaluator:
    folder = tmp_path_factory.mktemp("broken")
    return PoolEvaluator(write_pool(folder / "p", "mlp", change=overflow))


def reference(evaluator: PoolEvaluator, split: str = "test") -> dict[str, np.ndarray]:
    """Logits of the rules from float64 modules in evaluation mode, one rule after the other."""
    module = pool_network(evaluator.pool).module.double()
    assert not module.training
    images = evaluator.images(split).double()
    states = [{k: v.double() for k, v in evaluator.weights(m).items()} for m in MEMBERS]

    def run(state: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
        held: list[Tensor] = []
        module.load_state_dict(state)
        hook = module.get_classifier().register_forward_hook(
            lambda _module, inputs, _output: held.append(inputs[0])
        )
        logits = module(images)
        hook.remove()
        return held[0].numpy(), logits.numpy()

    features, logits = zip(*(run(state) for state in states), strict=True)
    name = next(n for n, m in module.named_modules() if m is module.get_classifier())
    W = np.stack([state[f"{name}.weight"].numpy() for state in states])
    b = np.stack([state.get(f"{name}.bias", torch.zeros(W.shape[1])).numpy() for state in states])
    phi = np.mean(features, axis=0)
    shares = [np.exp(z) / np.exp(z).sum(axis=1, keepdims=True) for z in logits]
    _, soup = run({k: torch.stack([s[k] for s in states]).mean(dim=0) for k in states[0]})
    return {
        "uniform_soup": soup,
        "logit_ensemble": np.mean(logits, axis=0),
        "probability_ensemble": np.log(np.mean(shares, axis=0)),
        "feature_ensemble_first_head": phi @ W[0].T + b[0],
        "feature_ensemble_averaged_head": phi @ W.mean(axis=0).T + b.mean(axis=0),
    }


@pytest.mark.parametrize("family", list(FAMILIES))
def test_rules_are_their_definitions(evaluators: dict[str, PoolEvaluator], family: str) -> None:
    evaluator = evaluators[family]
    for rule, expected in reference(evaluator).items():
        logits = rule_logits(evaluator, MEMBERS, rule, "test")
        assert logits.dtype == torch.float64
        assert logits.numpy() == pytest.approx(expected, rel=2e-4, abs=2e-4), rule


@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_training_mode_would_give_something_else(
    evaluators: dict[str, PoolEvaluator], family: str
) -> None:
    evaluator = evaluators[family]
    module = pool_network(evaluator.pool).module.train()
    module.load_state_dict(evaluator.weights(0))
    trained = module(evaluator.images("test"))
    assert float((trained - evaluator.member(0, "test").logits).abs().max()) > 0.05


def test_linear_soups_are_logit_ensembles(evaluators: dict[str, PoolEvaluator]) -> None:
    linear = evaluators["linear"]
    soup = rule_logits(linear, MEMBERS, "uniform_soup", "test")
    for rule in ("logit_ensemble", "feature_ensemble_averaged_head"):
        whole = rule_logits(linear, MEMBERS, rule, "test")
        assert soup.numpy() == pytest.approx(whole.numpy(), abs=1e-5)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("statistics", ["average", "reestimate"])
def test_one_member_makes_every_rule_that_member(
    evaluators: dict[str, PoolEvaluator], family: str, statistics
) -> None:
    evaluator = evaluators[family]
    own = evaluator.member(1, "test").logits.double()
    for rule in JOINT:
        logits = rule_logits(evaluator, (1,), rule, "test", statistics)
        if rule == "probability_ensemble":
            own_shares = own.log_softmax(dim=1)
            assert torch.allclose(logits, own_shares, atol=1e-9)
        else:
            assert torch.allclose(logits, own, atol=1e-5), rule
    frame = rules_frame(evaluator, (1,), "test", statistics)
    assert frame["accuracy"].nunique() == 1
    assert set(frame["passes"]) == {1}


def test_rules_do_not_depend_on_the_order_of_members(
    evaluators: dict[str, PoolEvaluator],
) -> None:
    free = [rule for rule in JOINT if rule != "feature_ensemble_first_head"]
    for family in ("mlp", "resnet"):
        for rule in free:
            logits = [
                rule_logits(evaluators[family], order, rule, "test")
                for order in permutations(MEMBERS)
            ]
            assert all(torch.allclose(logits[0], other, atol=1e-10) for other in logits[1:])


def test_the_first_head_is_that_of_the_first_chosen_member(mlp: PoolEvaluator) -> None:
    phi = np.mean([mlp.member(m, "test").features.double().numpy() for m in (2, 0)], axis=0)
    expected = phi @ mlp.weights(2)["head.weight"].double().numpy().T
    logits = rule_logits(mlp, (2, 0), "feature_ensemble_first_head", "test")
    assert logits.numpy() == pytest.approx(expected, abs=1e-6)


def test_heads_are_read_alone(evaluators: dict[str, PoolEvaluator]) -> None:
    for evaluator in evaluators.values():
        for mine, whole in zip(
            head(evaluator, 0), evaluator.network.head(evaluator.weights(0)), strict=True
        ):
            assert mine.dtype == torch.float64
            assert torch.equal(mine.float(), whole)


def test_individuals_have_no_joint_logits(mlp: PoolEvaluator) -> None:
    with pytest.raises(ValueError, match="many models"):
        rule_logits(mlp, MEMBERS, "individuals", "test")


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_table_of_rules(evaluators: dict[str, PoolEvaluator], family: str) -> None:
    evaluator = evaluators[family]
    labels = evaluator.labels("test")
    frame = rules_frame(evaluator, MEMBERS, "test").set_index("rule")
    assert list(frame.index) == list(RULES)
    assert frame["label"].to_dict() == RULES
    single = [float(np.mean(evaluator.member(m, "test").logits.argmax(1).numpy() == labels))
              for m in MEMBERS]  # fmt: skip
    row = frame.loc["individuals"]
    assert row[["accuracy", "worst", "best"]].tolist() == pytest.approx(
        [np.mean(single), min(single), max(single)]
    )
    for rule, logits in reference(evaluator).items():
        assert frame.loc[rule, "accuracy"] == pytest.approx(
            np.mean(logits.argmax(axis=1) == labels)
        )
        assert np.isnan(frame.loc[rule, "worst"])
    n = IMAGES["test"]
    assert set(frame["images"]) == {n}
    assert (frame["correct"] / n).to_numpy() == pytest.approx(frame["accuracy"].to_numpy())
    low, high = wilson_interval(frame["correct"].to_numpy(), np.full(len(RULES), n))
    assert frame["low"].to_numpy() == pytest.approx(low)
    assert frame["high"].to_numpy() == pytest.approx(high)
    assert frame["passes"].to_dict() == {rule: 3 if rule in ENSEMBLES else 1 for rule in RULES}
    assert set(frame["non_finite"]) == {0}
    kept, _ = greedy_soup(evaluator, MEMBERS)
    assert frame["models"].to_dict() == {
        rule: {"best_individual": 1, "greedy_soup": len(kept)}.get(rule, 3) for rule in RULES
    }


def test_the_best_individual_is_picked_on_validation(tmp_path: Path) -> None:
    telling = 0
    for seed in range(6):
        evaluator = PoolEvaluator(write_pool(tmp_path / str(seed), "mlp", 4, seed=seed))
        accuracy = {
            split: [
                float(np.mean(predict_classes(evaluator.member(m, split).logits) == labels))
                for m in range(4)
            ]
            for split, labels in ((s, evaluator.labels(s)) for s in ("val", "test"))
        }
        pick = int(np.argmax(accuracy["val"]))
        row = rules_frame(evaluator, range(4), "test").set_index("rule").loc["best_individual"]
        assert row["accuracy"] == accuracy["test"][pick]
        telling += accuracy["test"][pick] < max(accuracy["test"])
    assert telling  # a pick on test would have shown


@pytest.mark.parametrize("statistics", ["average", "reestimate"])
def test_accuracy_over_members_is_the_table_for_each_n(
    evaluators: dict[str, PoolEvaluator], statistics
) -> None:
    evaluator = evaluators["resnet"]
    order = (2, 0, 1)
    frame = accuracy_over_members(evaluator, order, "test", statistics)
    assert frame.columns[0] == "n"
    for n in (1, 2, 3):
        mine = frame[frame["n"] == n].drop(columns="n").reset_index(drop=True)
        expected = rules_frame(evaluator, order[:n], "test", statistics)
        if n < 3:  # greedy soups are made of all members only
            expected = expected[expected["rule"] != "greedy_soup"].reset_index(drop=True)
        assert mine.equals(expected)


def test_only_soups_cost_forward_passes(mlp: PoolEvaluator) -> None:
    fresh = PoolEvaluator(mlp.pool)
    for split in ("val", "test"):
        for member in MEMBERS:
            fresh.member(member, split)
    before = fresh.forward_images
    rules = ("individuals", "best_individual", *ENSEMBLES)
    accuracy_over_members(fresh, MEMBERS, "test", rules=rules)
    assert fresh.forward_images == before
    accuracy_over_members(fresh, MEMBERS, "test", rules=("uniform_soup",))
    assert fresh.forward_images == before + 2 * IMAGES["test"]  # one member is no new model


def test_progress_and_cancellation(mlp: PoolEvaluator) -> None:
    seen: list[tuple[int, int, str]] = []
    progress = Progress(lambda *step: seen.append(step))
    accuracy_over_members(mlp, MEMBERS, rules=("logit_ensemble",), progress=progress)
    assert [(done, total) for done, total, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        accuracy_over_members(mlp, MEMBERS, progress=Progress(cancel=cancel))


def test_non_finite_logits_are_counted_and_wrong(broken: PoolEvaluator) -> None:
    n, labels = IMAGES["test"], broken.labels("test")
    frame = rules_frame(broken, MEMBERS, "test").set_index("rule")
    for rule in ("logit_ensemble", "probability_ensemble"):
        assert frame.loc[rule, ["non_finite", "accuracy"]].tolist() == [n, 0]
    assert frame.loc["individuals", "non_finite"] == n
    sound = [np.sum(broken.member(m, "test").logits.argmax(1).numpy() == labels) for m in (0, 1)]
    assert frame.loc["individuals", "correct"] == pytest.approx(sum(sound) / 3)
    assert frame.loc["individuals", "worst"] == 0
    assert frame.loc["best_individual", "non_finite"] == 0
    # One member's overflow is no other's: without it nothing is lost.
    assert set(rules_frame(broken, (0, 1), "test")["non_finite"]) == {0}


def test_a_probability_of_zero_is_still_a_prediction(tmp_path: Path) -> None:
    """Logits apart by thousands: their probabilities underflow, their logarithms do not."""

    def loud(number: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: 100 * value for name, value in state.items()}

    evaluator = PoolEvaluator(write_pool(tmp_path / "p", "mlp", change=loud))
    logits = rule_logits(evaluator, (0,), "probability_ensemble", "test")
    assert float(logits.min()) < -1000
    assert torch.isfinite(rule_logits(evaluator, MEMBERS, "probability_ensemble", "test")).all()


def test_agreement_is_a_loop_over_images(evaluators: dict[str, PoolEvaluator]) -> None:
    evaluator = evaluators["vgg"]
    frame = agreement(evaluator, MEMBERS, "test")
    names = ["member 0", "member 1", "member 2", "uniform soup", "logit ensemble"]
    classes = [evaluator.member(m, "test").logits.argmax(1).tolist() for m in MEMBERS]
    joint = reference(evaluator)
    classes += [joint[r].argmax(axis=1).tolist() for r in ("uniform_soup", "logit_ensemble")]
    labels = evaluator.labels("test").tolist()
    assert list(dict.fromkeys(frame["first"])) == names
    values = {(r.first, r.second): (r.agreement, r.error_overlap) for r in frame.itertuples()}
    for a, mine in zip(names, classes, strict=True):
        for b, other in zip(names, classes, strict=True):
            alike = sum(x == y for x, y in zip(mine, other, strict=True)) / len(labels)
            wrong = [(x != t, y != t) for x, y, t in zip(mine, other, labels, strict=True)]
            shared = sum(x and y for x, y in wrong) / max(sum(x or y for x, y in wrong), 1)
            assert values[a, b] == pytest.approx((alike, shared))


def test_an_undecided_model_agrees_with_nothing(broken: PoolEvaluator) -> None:
    frame = agreement(broken, MEMBERS, "test")
    own = frame[frame["first"] == "member 2"]
    assert set(own["agreement"]) == {0.0}
    first = frame[(frame["first"] == "member 0") & (frame["second"] == "member 0")]
    assert first["agreement"].tolist() == [1.0]

"""Comparing recipes: paired differences, summaries, settings to try, seeds."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analysis.accuracy import difference, paired_differences, task_frame
from analysis.comparison.published import published_results
from analysis.comparison.run import evaluate_recipes, summarise
from analysis.comparison.tuning import candidates, depends_on_seed, repeat_with_seeds, tune
from analysis.evaluation.evaluator import Evaluator
from merge_core.errors import Cancelled
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import Recipe, make_recipe
from merge_core.progress import Progress
from merge_core.suites.suite import load_suite
from tests.evaluable import IMAGES, TASKS, write_evaluable


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[MergeSession, Evaluator]:
    suite = load_suite(write_evaluable(tmp_path_factory.mktemp("suite") / "s"))
    return MergeSession(suite, None, FactorStore()), Evaluator(suite)


def recipe(method: str, session: MergeSession, **fields: object) -> Recipe:
    return make_recipe({"suite": str(session.suite.path), "method": method, **fields})


hit_lists = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=30)


@given(hit_lists)
def test_one_task_is_mcnemars_exact_test(pairs: list[tuple[bool, bool]]) -> None:
    """Against scipy: of the images on which two methods differ, each is better on half."""
    first, second = (np.array(column) for column in zip(*pairs, strict=True))
    found = difference({"t": first}, {"t": second})
    ahead, behind = int((first & ~second).sum()), int((second & ~first).sum())
    expected = stats.binomtest(ahead, ahead + behind).pvalue if ahead + behind else 1.0
    assert found.gap == pytest.approx(first.mean() - second.mean())
    assert found.p == pytest.approx(expected)
    assert found.low <= found.gap <= found.high
    assert (found.low <= 0 <= found.high) == (found.p >= 0.05)
    turned = difference({"t": second}, {"t": first})
    assert turned == pytest.approx((-found.gap, -found.high, -found.low, found.p))


def test_tasks_count_alike_whatever_their_size() -> None:
    rng = np.random.default_rng(0)
    first = {"a": rng.random(40) < 0.9, "b": rng.random(1000) < 0.5}
    second = {"a": rng.random(40) < 0.5, "b": rng.random(1000) < 0.5}
    found = difference(first, second)
    means = {t: first[t].mean() - second[t].mean() for t in first}
    assert found.gap == pytest.approx((means["a"] + means["b"]) / 2)
    # Against resampling of the images of each task; the interval counts E d² for the variance.
    d = {t: first[t].astype(float) - second[t] for t in first}
    draws = [
        np.mean([rng.choice(d[t], len(d[t])).mean() for t in d]) for _ in range(4000)
    ]  # fmt: skip
    assert 1 < (found.high - found.low) / (2 * 1.96 * np.std(draws)) < 1.2
    # The test, against signs drawn at random.
    signs = [
        np.mean([(rng.choice([-1, 1], len(d[t])) * d[t]).mean() for t in d]) for _ in range(20_000)
    ]
    assert found.p == pytest.approx(np.mean(np.abs(signs) >= found.gap - 1e-12), abs=0.01)


def test_pairing_sees_what_independent_intervals_hide() -> None:
    """Two models that differ on few images, all in one direction."""
    rng = np.random.default_rng(1)
    worse = rng.random(1000) < 0.6
    better = worse.copy()
    better[np.flatnonzero(~worse)[:20]] = True
    frame = paired_differences(
        {"better": {"t": better}, "worse": {"t": worse}, "twin": {"t": worse.copy()}}
    )
    row = frame.set_index(["first", "second"])
    assert row.loc[("better", "worse"), "real"]
    assert row.loc[("better", "worse"), "difference"] == pytest.approx(0.02)
    assert not row.loc[("worse", "twin"), "real"]
    assert row.loc[("worse", "twin"), "p"] == 1.0


def test_holm_is_the_step_down_rule() -> None:
    rng = np.random.default_rng(2)
    hits = {f"m{i}": {"t": rng.random(300) < 0.5 + 0.05 * i} for i in range(4)}
    frame = paired_differences(hits)
    assert len(frame) == 6
    real = set()
    for step, (place, p) in enumerate(sorted(enumerate(frame["p"]), key=lambda item: item[1])):
        if p >= 0.05 / (6 - step):
            break
        real.add(place)
    assert set(np.flatnonzero(frame["real"])) == real
    assert 0 < len(real) < 6  # the case tells the rule from accepting all or none


def test_summary_by_hand() -> None:
    hits = {
        "x": {"a": np.array([1, 1, 0, 0], bool), "b": np.array([1, 1, 1, 0], bool)},
        "y": {"a": np.array([1, 1, 1, 1], bool), "b": np.array([0, 0, 0, 1], bool)},
    }
    experts = pd.DataFrame({"task": ["a", "b"], "accuracy": [1.0, 0.75]})
    costs = pd.DataFrame({"label": ["x", "y"], "seconds": [1.0, 2.0]})
    frame = summarise(task_frame(hits), experts, costs).set_index("label")
    assert frame.loc["x", "accuracy"] == 0.625
    assert frame.loc["x", "normalised"] == pytest.approx((0.5 + 1) / 2)
    assert frame.loc["y", "normalised"] == pytest.approx((1 + 1 / 3) / 2)
    assert tuple(frame.loc["y", ["worst_task", "worst", "seconds"]]) == ("b", 0.25, 2.0)
    nothing = pd.DataFrame({"task": ["a", "b"], "accuracy": [0.0, 0.75]})
    assert summarise(task_frame(hits), nothing, costs)["normalised"].isna().all()


def test_candidates_fill_the_declared_ranges() -> None:
    base = make_recipe({"method": "cart"})
    tried = candidates(base, 32, seed=1)
    assert tried[0] == base
    assert len({str(r.parameters) for r in tried}) == len(tried) == 32
    ranks = np.array([r.parameters["rank"] for r in tried[1:]])
    scales = np.array([r.parameters["scale"] for r in tried[1:]])
    assert 0.01 <= ranks.min() < 0.02
    assert 0.5 < ranks.max() <= 1
    assert np.median(ranks) == pytest.approx(0.1, rel=0.3)  # log scale
    assert 0 <= scales.min() < 0.5
    assert 7.5 < scales.max() <= 8
    assert candidates(base, 32, seed=1) == tried
    assert candidates(base, 32, seed=2) != tried
    assert candidates(make_recipe({"method": "average"}), 8) == [make_recipe({"method": "average"})]
    assert candidates(base, 1) == [base]


def test_tuning_takes_the_best_validation_accuracy(
    parts: tuple[MergeSession, Evaluator],
) -> None:
    session, evaluator = parts
    base = recipe("task_arithmetic", session)
    best, frame = tune(base, session, evaluator, 5)
    by_hand = [evaluator.recipe(r, session, "val")["accuracy"].mean() for r in candidates(base, 5)]
    np.testing.assert_allclose(frame["accuracy"], by_hand)
    assert best == candidates(base, 5)[int(np.argmax(by_hand))]


def test_comparing_gives_the_evaluators_hits(parts: tuple[MergeSession, Evaluator]) -> None:
    session, evaluator = parts
    recipes = {name: recipe(name, session) for name in ("average", "cart", "tsv_c")}
    hits, costs = evaluate_recipes(recipes, session, evaluator)
    for name, each in hits.items():
        wanted = evaluator.recipe_hits(recipes[name], session, "test")
        assert list(each) == list(TASKS)
        assert all(np.array_equal(each[task], wanted[task]) for task in TASKS)
    assert costs["label"].tolist() == list(recipes)
    assert (costs["seconds"] > 0).all()


def test_the_seed_counts_where_something_is_drawn(parts: tuple[MergeSession, Evaluator]) -> None:
    """Against the merged weights under two seeds."""
    session, evaluator = parts
    settings: list[tuple[str, dict[str, object]]] = [
        ("cart", {}),
        ("dare_task_arithmetic", {}),
        ("regmean", {}),
        ("regmean", {"examples": 5}),
        ("fisher", {"examples": IMAGES}),
        ("fisher", {"examples": IMAGES - 1}),
        ("adamerging", {"steps": 2, "learning_rate": 0.1}),
        ("cart_adaptive", {"steps": 2, "learning_rate": 0.1}),
    ]
    found = []
    for method, parameters in settings:
        first, second = repeat_with_seeds(recipe(method, session, parameters=parameters, seed=4), 2)
        assert (first.seed, second.seed) == (4, 5)
        merges = [session.merge(r, learned=evaluator.learn(r, session)) for r in (first, second)]
        differ = any(not merges[0][name].equal(merges[1][name]) for name in merges[0])
        assert depends_on_seed(first, evaluator, TASKS) == differ, (method, parameters)
        found.append(differ)
    assert found == [False, True, False, True, False, True, True, True]


def test_a_comparison_can_be_cancelled(parts: tuple[MergeSession, Evaluator]) -> None:
    session, evaluator = parts
    progress = Progress()

    def stop(done: int, total: int, label: str) -> None:
        if done == 1:
            progress.cancel.set()

    progress.listener = stop
    recipes = {name: recipe(name, session) for name in ("average", "cart", "ties")}
    with pytest.raises(Cancelled):
        evaluate_recipes(recipes, session, evaluator, progress=progress)


def test_published_figures_stand_by_protocol() -> None:
    frame = published_results()
    assert (frame["low"] <= frame["high"]).all()
    assert frame["low"].between(40, 100).all()
    cart = frame[(frame["method"] == "CART") & (frame["model"] == "ViT-B/32")]
    assert set(cart[cart["tasks"] == 8]["low"]) == {84.7}
    assert not frame.duplicated(["source", "protocol", "model", "tasks", "method"]).any()

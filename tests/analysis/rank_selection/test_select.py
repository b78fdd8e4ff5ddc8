"""The one door to rank and scale: against brute force, and what each mode reads."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.evaluation.evaluator import Evaluator
from analysis.networks.stateless import StatelessNetwork
from analysis.outputs.prediction_store import PredictionStore
from analysis.rank_selection import rule as rules
from analysis.rank_selection.input_proxies import INPUT_PROXIES
from analysis.rank_selection.rule import Mode
from analysis.rank_selection.select import (
    Selection,
    SelectionOptions,
    select_rank,
    selectable_methods,
    setting_words,
    stored_selection,
    task_curves,
)
from analysis.rank_selection.space import SearchSpace, search_space
from merge_core.errors import Cancelled, RecipeError, SuiteError
from merge_core.executors.base import Executor
from merge_core.executors.local import Processes, Serial, Threads
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import recipe_from_yaml
from merge_core.progress import Progress
from merge_core.suites.suite import Suite
from tests.evaluable import CLASSES, TASKS, by_hand, copy_evaluable, edit_arrays

RANKS, SCALES = (0.07, 0.26, 0.6), (0.5, 1.5, 4.0)


def evidence() -> pd.DataFrame:
    """Two rules of each mode, of which the first loses less."""
    rows = []
    for mode, search, proxies in (
        ("labels", "adaptive", ("accuracy",)),
        ("labels", "grid", ("accuracy",)),
        ("inputs", "adaptive", ("overlap", "entropy")),
        ("inputs", "grid", ("overlap", "entropy")),
        ("weights", "rule", ("alignment", "energy_80")),
    ):
        for place, proxy in enumerate(proxies):
            for case, regret in (("a", 0.002), ("b", 0.004)):
                loss = (place + 1) * regret
                rows.append((case, "cart", mode, proxy, search, loss, loss, -0.01, 60))
    rows += [("a", "iso_c", *row[2:]) for row in rows if row[:1] == ("a",) and row[3] != "overlap"]
    columns = ["subset", "method", "mode", "proxy", "search", "regret", "test_regret", "test_low"]
    return pd.DataFrame(rows, columns=[*columns, "images"]).assign(suite="vision")


@pytest.fixture(autouse=True)
def known_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the rules rest on here, whatever the shipped table says."""
    monkeypatch.setattr(rules, "evidence", evidence)


class Bench:
    """A suite, its merges and its evaluation, with a store of its own."""

    def __init__(self, folder: Path, suite: Suite) -> None:
        self.suite = suite
        self.session = MergeSession(suite, None, FactorStore(folder / "factors"))
        self.path = folder / "predictions.sqlite"

    @property
    def evaluator(self) -> Evaluator:
        return Evaluator(self.suite, PredictionStore(self.path))

    def space(self, method: str = "cart", **axes: Any) -> SearchSpace:
        if not axes:
            axes = {"scales": SCALES} | ({"ranks": RANKS} if method == "cart" else {})
        return search_space(method, ".", **axes)

    def select(self, mode: Mode, **options: Any) -> Selection:
        space = options.pop("space", None) or self.space()
        run = {key: options.pop(key) for key in ("progress", "executor") if key in options}
        asked = SelectionOptions(mode, **options)
        return select_rank(space, self.session, self.evaluator, asked, **run)

    def accuracy(self, recipe: Any, split: str = "val") -> float:
        """Mean over tasks through timm and F.linear."""
        state = self.session.merge(recipe)
        pairs = [by_hand(state, self.suite.root, task, split) for task in TASKS]
        return float(np.mean([(predicted == labels).mean() for predicted, labels in pairs]))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, copy_evaluable(tmp_path / "suite"))


def test_with_labels_the_full_grid_gives_the_best_of_all(bench: Bench) -> None:
    found = bench.select("labels", full_grid=True)
    truth = {
        (rank, scale): bench.accuracy(bench.space().recipe(rank, scale))
        for rank in RANKS
        for scale in SCALES
    }
    assert len(found.points) == len(truth)
    for row in found.points.to_dict("records"):
        assert row["score"] == pytest.approx(truth[row["rank"], row["scale"]])
    assert truth[found.rank, found.scale] == pytest.approx(max(truth.values()))
    assert found.accuracy is not None
    assert found.accuracy["accuracy"] == pytest.approx(max(truth.values()))
    assert found.report is not None
    assert found.report["accuracy"].mean() == pytest.approx(bench.accuracy(found.recipe, "test"))
    assert found.recipe.parameters == {"rank": found.rank, "scale": found.scale}
    assert ((found.tied["rank"] == found.rank) & (found.tied["scale"] == found.scale)).any()
    assert found.asked_images == found.grid_images == 9 * 60


@pytest.mark.parametrize("mode", ["labels", "weights"])
def test_the_end_of_an_axis_is_said(bench: Bench, mode: Mode) -> None:
    # Of two scales each is an end.
    space = search_space("cart", str(bench.suite.path), TASKS, ranks=RANKS, scales=[0.5, 1.0])
    found = bench.select(mode, space=space, report=False)
    word = "lowest" if found.scale == 0.5 else "highest"
    assert f"The scale {found.scale:g} is the {word} of the grid" in found.at_edge
    for row in found.picks.to_dict("records"):
        at_end = row["scale"] in (0.5, 1.0) or row["rank"] in (min(RANKS), max(RANKS))
        assert bool(row["at_edge"]) == at_end


# One process: each has to import everything anew, and what two do at once is tested beside them.
@pytest.mark.parametrize("where", [Threads(2), Processes(1)], ids=["threads", "a process"])
def test_settings_evaluated_side_by_side_are_those_evaluated_here(
    tmp_path: Path, where: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tests of pages leave a page as ``__main__``, which spawned processes would run.
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    suite = copy_evaluable(tmp_path / "suite")
    alone, many = Bench(tmp_path / "alone", suite), Bench(tmp_path / "many", suite)
    told: list[str] = []
    progress = Progress(lambda done, total, label: told.append(label))
    expected = alone.select("labels", full_grid=True)
    found = many.select("labels", full_grid=True, executor=where, progress=progress)
    pd.testing.assert_frame_equal(found.points, expected.points)
    assert (found.rank, found.scale) == (expected.rank, expected.scale)
    assert found.forward_images == expected.forward_images
    assert told.count("settings") == 9
    # What came back was stored: nothing is run again.
    assert many.select("labels", full_grid=True, executor=Serial()).forward_images == 0


def test_an_executor_without_a_full_grid_is_refused(bench: Bench) -> None:
    for mode, full in (("labels", False), ("weights", True)):
        with pytest.raises(RecipeError, match="full grid"):
            bench.select(mode, full_grid=full, executor=Serial())


@pytest.mark.parametrize("mode", ["inputs", "weights"])
def test_what_is_chosen_without_labels_does_not_depend_on_them(tmp_path: Path, mode: Mode) -> None:
    plain = Bench(tmp_path / "a", copy_evaluable(tmp_path / "a" / "suite"))
    suite = copy_evaluable(tmp_path / "b" / "suite")
    for task in TASKS:
        path = suite.root / f"inputs/{task}.npz"
        with np.load(path) as archive:
            changed = {
                f"{split}_labels": (archive[f"{split}_labels"] + 1) % CLASSES
                for split in ("val", "test")
            }
        edit_arrays(path, **changed)
    shuffled = Bench(tmp_path / "b", suite)
    first, second = (b.select(mode, every_proxy=True) for b in (plain, shuffled))
    assert (first.rank, first.scale) == (second.rank, second.scale)
    settings = ["proxy", "mode", "rank", "scale"]
    pd.testing.assert_frame_equal(first.picks[settings], second.picks[settings])
    assert first.accuracy is not None
    assert second.accuracy is not None
    assert first.accuracy["accuracy"] != second.accuracy["accuracy"]  # the labels did change


def test_each_mode_follows_the_rule_that_lost_least(bench: Bench) -> None:
    for mode, rule in (("labels", "accuracy"), ("inputs", "overlap")):
        found = bench.select(mode)  # type: ignore[arg-type]
        assert found.rule == found.score == rule
        assert "lost 0.3 points" in found.why  # mean of 0.2 and 0.4
        assert "0.4 points at worst" in found.why
        assert "2 sets of tasks" in found.why


def test_weights_alone_need_no_evaluation(bench: Bench) -> None:
    found = select_rank(bench.space(), bench.session, None, SelectionOptions("weights"))
    assert found.mode == "weights"
    assert (found.forward_images, found.asked_images) == (0, 0)
    assert found.accuracy is None
    assert found.report is None
    assert found.points.empty
    assert set(found.picks["mode"]) == {"weights"}
    chosen = found.picks[found.picks["proxy"] == found.rule].iloc[0]
    assert found.rank == pytest.approx(chosen["rank"], rel=5e-3)
    assert found.scale == pytest.approx(chosen["scale"], rel=5e-3)
    again = bench.select("weights")
    assert (again.rank, again.scale) == (found.rank, found.scale)
    assert again.report is not None  # what it reaches, where that can be measured


@pytest.mark.parametrize("mode", ["labels", "inputs"])
def test_without_an_evaluator_modes_that_need_one_say_so(bench: Bench, mode: Mode) -> None:
    with pytest.raises(RecipeError, match="Take the mode 'weights'"):
        select_rank(bench.space(), bench.session, None, SelectionOptions(mode))


def test_only_the_recommended_recipe_sees_the_test_split(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []
    original = Evaluator.measure_recipe

    def spy(
        self: Evaluator,
        recipe: Any,
        session: Any,
        images: Any,
        split: str = "val",
        *a: Any,
        **k: Any,
    ) -> Any:
        asked.append((split, recipe.to_query()))
        return original(self, recipe, session, images, split, *a, **k)  # type: ignore[arg-type]

    monkeypatch.setattr(Evaluator, "measure_recipe", spy)
    found = bench.select("labels", every_proxy=True)
    on_test = [place for place, (split, _) in enumerate(asked) if split == "test"]
    assert {asked[place][1] for place in on_test} == {found.recipe.to_query()}
    asked.clear()
    bench.select("labels", report=False)
    assert all(split == "val" for split, _ in asked)


def assert_same(first: Selection, second: Selection) -> None:
    """The two say the same, apart from what it cost."""
    assert first.recipe == second.recipe
    assert first.why == second.why
    for name in ("points", "curve", "picks", "report"):
        pd.testing.assert_frame_equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("full_grid", [False, True])
def test_what_is_stored_is_known_at_once_and_nothing_else(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, full_grid: bool
) -> None:
    options: Any = {"full_grid": full_grid, "every_proxy": True}
    monkeypatch.setattr(StatelessNetwork, "features", None)
    asked = SelectionOptions("labels", **options)
    assert stored_selection(bench.space(), bench.session, bench.evaluator, asked) is None
    monkeypatch.undo()
    monkeypatch.setattr(rules, "evidence", evidence)
    found = bench.select("labels", **options)
    assert found.forward_images > 0
    monkeypatch.setattr(StatelessNetwork, "features", None)
    known = stored_selection(bench.space(), bench.session, bench.evaluator, asked)
    assert known is not None
    assert_same(known, found)
    assert known.forward_images == 0
    assert known.asked_images == found.asked_images


def test_cancelled_and_begun_again_it_says_the_same(bench: Bench, tmp_path: Path) -> None:
    steps = 0

    def stop(done: int, total: int, label: str) -> None:
        nonlocal steps
        steps += 1
        if steps == 6:
            progress.cancel.set()

    progress = Progress(stop)
    with pytest.raises(Cancelled):
        bench.select("labels", progress=progress)
    resumed = bench.select("labels")
    whole = Bench(tmp_path / "other", bench.suite).select("labels")
    assert_same(resumed, whole)
    assert resumed.forward_images < whole.forward_images


def test_bytes_are_those_of_the_factors(bench: Bench) -> None:
    found = bench.select("labels", full_grid=True)
    total = 0
    first = bench.suite.expert(TASKS[0])
    for name in bench.suite.matrices:
        m, n = first.tensor(name).flatten(1).shape
        k = max(1, int(found.rank * min(m, n) + 1e-9))
        total += len(TASKS) * k * (m + n + 1) * 4
    assert found.low_rank_bytes == total
    assert found.model_bytes == sum(first.tensor(n).nbytes for n in first)


def test_a_method_with_a_scale_alone(bench: Bench) -> None:
    space = bench.space("task_arithmetic", scales=(0.1, 0.4, 1.0))
    found = bench.select("labels", space=space, full_grid=True)
    best = max((bench.accuracy(space.recipe(None, s)), -s) for s in space.scales)
    assert bench.accuracy(found.recipe) == pytest.approx(best[0])
    assert np.isnan(found.rank)
    assert found.low_rank_bytes is None
    assert len(found.curve) == 3
    assert setting_words(found.rank, found.scale) == f"scale {found.scale:g}"
    assert "the whole grid" in found.why
    own = found.picks[found.picks["proxy"] == "accuracy"].iloc[0]
    assert own["accuracy"] == pytest.approx(best[0])


def test_recipes_can_be_written_and_read(bench: Bench) -> None:
    found = bench.select("weights")
    again = recipe_from_yaml(found.recipe.to_yaml())
    assert again == found.recipe
    assert len(f"{found.rank:g}".lstrip("0.")) <= 3


def test_every_proxy_is_asked_once(bench: Bench) -> None:
    assert bench.select("inputs", every_proxy=True).picks["proxy"].is_unique
    found = bench.select("labels", every_proxy=True)
    assert set(INPUT_PROXIES) <= set(found.picks["proxy"])
    assert found.picks["proxy"].is_unique
    assert found.picks.set_index("proxy")["mode"]["accuracy"] == "labels"
    own = found.picks[found.picks["proxy"] == "accuracy"].iloc[0]
    assert own["accuracy"] == pytest.approx(bench.accuracy(found.recipe))


def test_curves_of_tasks_are_those_tasks_accuracies(bench: Bench) -> None:
    found = bench.select("labels", full_grid=True)
    frame = task_curves(found, bench.session, bench.evaluator)
    experts = bench.evaluator.experts(TASKS).set_index("task")["accuracy"]
    assert len(frame) == len(RANKS) * len(TASKS)
    for row in frame.to_dict("records"):
        state = bench.session.merge(bench.space().recipe(row["rank"], row["scale"]))
        predicted, labels = by_hand(state, bench.suite.root, row["task"], "val")
        assert row["accuracy"] == pytest.approx((predicted == labels).mean())
        assert row["normalised"] == pytest.approx(row["accuracy"] / experts[row["task"]])


def test_methods_that_can_be_chosen(bench: Bench) -> None:
    offered = selectable_methods(bench.suite, TASKS)
    assert {"cart", "low_rank_task_arithmetic", "task_arithmetic", "ties"} <= set(offered)
    assert not {"average", "cart_indexing", "cart_adaptive", "slerp"} & set(offered)


def test_inputs_without_any_labels_give_the_same_choice(tmp_path: Path) -> None:
    with_labels = Bench(tmp_path / "labelled", copy_evaluable(tmp_path / "labelled"))
    wanted = with_labels.select("inputs")
    suite = copy_evaluable(tmp_path / "bare")
    for task in TASKS:
        edit_arrays(suite.root / f"inputs/{task}.npz", val_labels=None, test_labels=None)
    bare = Bench(tmp_path / "bare", suite)
    found = bare.select("inputs")
    assert (found.rank, found.scale) == (wanted.rank, wanted.scale)
    assert wanted.accuracy is not None
    assert wanted.report is not None
    assert found.accuracy is None
    assert found.report is None
    with pytest.raises(SuiteError, match=r"validation images of task 'digits' have no labels"):
        bare.select("labels")

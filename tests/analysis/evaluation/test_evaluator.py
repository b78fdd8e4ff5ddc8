"""Accuracies equal those computed by hand, and are computed no oftener than needed."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from scipy.stats import binomtest

from analysis.accuracy import accuracy_frame, mean_accuracy, mean_interval, wilson_interval
from analysis.evaluation.evaluator import Evaluator
from analysis.networks.stateless import Outputs
from analysis.outputs.prediction_store import PredictionStore
from analysis.outputs.suite_outputs import SuiteOutputs
from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.errors import Cancelled, CheckpointError, SuiteError
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import Recipe, make_recipe
from merge_core.output.model_folder import merge_to_folder
from merge_core.progress import Progress
from merge_core.suites.suite import Suite, load_suite
from tests.evaluable import (
    IMAGES,
    TASKS,
    by_hand,
    copy_evaluable,
    edit_arrays,
    edit_document,
    state_of,
    write_evaluable,
)

RUN = SuiteOutputs._run
ENDLESS = """CREATE VIEW predictions AS
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)
SELECT i AS key, zeroblob(1000000) AS labels FROM n"""


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
    return copy_evaluable(tmp_path / "suite")


def recipe(method: str = "average", **parameters: float) -> Recipe:
    return make_recipe({"suite": ".", "method": method, "parameters": parameters})


class TestIntervals:
    @pytest.mark.parametrize("images", [1, 7, 20, 500])
    def test_wilson_against_scipy(self, images: int) -> None:
        correct = np.unique(np.linspace(0, images, 9).astype(int))
        low, high = wilson_interval(correct, np.full(len(correct), images))
        for k, lower, upper in zip(correct, low, high, strict=True):
            expected = binomtest(int(k), images).proportion_ci(method="wilson")
            assert lower == pytest.approx(expected.low, abs=1e-12)
            assert upper == pytest.approx(expected.high, abs=1e-12)

    def test_accuracy_frame(self) -> None:
        frame = accuracy_frame({"b": np.array([1, 0, 1, 1], bool), "a": np.zeros(3, bool)})
        assert frame["task"].tolist() == ["b", "a"]
        assert frame["correct"].tolist() == [3, 0]
        assert frame["images"].tolist() == [4, 3]
        assert frame["accuracy"].tolist() == [0.75, 0.0]
        assert ((frame["low"] <= frame["accuracy"]) & (frame["accuracy"] <= frame["high"])).all()

    def test_mean_and_its_interval_against_simulation(self) -> None:
        shares, images = np.array([0.9, 0.5, 0.7]), np.array([50, 200, 100])
        frame = accuracy_frame(
            {
                str(i): np.arange(n) < round(p * n)
                for i, (p, n) in enumerate(zip(shares, images, strict=True))
            }
        )
        got = mean_accuracy(frame).iloc[0]
        assert got["accuracy"] == pytest.approx(0.7)  # not the share of all images, 0.614
        drawn = np.random.default_rng(0).binomial(images, shares, (40_000, 3)) / images
        spread = drawn.mean(axis=1).std()
        assert (got["high"] - got["low"]) / 2 == pytest.approx(1.96 * spread, rel=0.03)
        assert got["low"] < got["accuracy"] < got["high"]

    def test_the_interval_stays_a_share(self) -> None:
        got = mean_accuracy(accuracy_frame({"a": np.arange(4) < 3})).iloc[0]
        assert got["high"] == 1.0
        more = 4 + stats.norm.ppf(0.975) ** 2  # successes and failures, half of what was added each
        p = (3 + (more - 4) / 2) / more
        half = stats.t.ppf(0.975, more) * np.sqrt(p * (1 - p) / more)
        assert got["low"] == pytest.approx(p - half)

    @pytest.mark.parametrize("images", [1, 2, 3, 5, 10, 20, 50])
    def test_it_covers_at_few_images(self, images: int) -> None:
        # Every outcome of one task at its probability: no draw is involved. A discrete variable
        # cannot be covered at 95 % everywhere; Wilson's interval falls to 0.79 here.
        p = np.linspace(0.005, 0.995, 199)
        covered = np.zeros_like(p)
        for correct in range(images + 1):
            got = mean_accuracy(accuracy_frame({"a": np.arange(images) < correct})).iloc[0]
            inside = (got["low"] <= p) & (p <= got["high"])
            covered += inside * stats.binom.pmf(correct, images, p)
        assert covered.min() > 0.935
        assert covered.mean() > 0.95

    def test_all_right_is_not_certain(self) -> None:
        got = mean_accuracy(accuracy_frame({"a": np.full(3, True)})).iloc[0]
        assert got["accuracy"] == got["high"] == 1
        # Clopper and Pearson's bound of three of three is 0.025 ** (1/3).
        assert got["low"] == pytest.approx(0.025 ** (1 / 3), abs=0.05)

    def test_scores_have_students_interval(self) -> None:
        values = np.random.default_rng(1).normal(size=12)
        expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert mean_interval({"t": values}) == pytest.approx(tuple(expected))
        assert np.isnan(mean_interval({"t": values[:1]})).all()
        hits = {"a": np.array([1.0, 0.0, 1.0]), "b": np.array([1.0, 1.0])}
        got = mean_accuracy(accuracy_frame(hits)).iloc[0]
        assert mean_interval(hits) == pytest.approx((got["low"], got["high"]))

    def test_settings_are_kept_apart(self) -> None:
        one = accuracy_frame({"a": np.arange(4) < 1, "b": np.arange(4) < 3})
        other = accuracy_frame({"a": np.arange(4) < 4, "b": np.arange(4) < 2})
        frame = pd.concat([one.assign(rank=np.nan, scale=2.0), other.assign(rank=0.5, scale=1.0)])
        got = mean_accuracy(frame, by=["rank", "scale"])
        assert got["accuracy"].tolist() == [0.5, 0.75]  # rank NaN is a setting, order is kept
        assert got["scale"].tolist() == [2.0, 1.0]
        assert list(got.columns) == ["rank", "scale", "accuracy", "low", "high"]
        assert list(mean_accuracy(frame).columns) == ["accuracy", "low", "high"]
        assert mean_accuracy(frame)["accuracy"].tolist() == [0.625]


class TestAccuracy:
    @pytest.mark.parametrize(("split", "limit"), [("val", None), ("test", None), ("val", 7)])
    def test_experts_and_base_by_hand(self, suite: Suite, split: str, limit: int | None) -> None:
        evaluator = Evaluator(suite)
        experts = evaluator.experts(suite.tasks, split, limit)  # type: ignore[arg-type]
        assert suite.base is not None
        base = evaluator.checkpoint(suite.base, suite.tasks, split, limit)  # type: ignore[arg-type]
        for frame, owner in ((experts, lambda t: t), (base, lambda t: None)):
            assert frame["task"].tolist() == list(TASKS)
            for row in frame.itertuples():
                predicted, labels = by_hand(
                    state_of(suite, owner(row.task)), suite.root, row.task, split, limit
                )
                assert row.correct == (predicted == labels).sum()
                assert row.images == (limit or IMAGES)
        if limit is None:
            assert experts["correct"].tolist() == [15, 15, 15]  # as the suite was made

    def test_merges_by_hand(self, suite: Suite) -> None:
        session = MergeSession(suite, None, FactorStore())
        base, experts = state_of(suite), [state_of(suite, task) for task in TASKS]
        average = {name: sum(e[name] for e in experts) / 3 for name in base}
        arithmetic = {n: base[n] + 0.6 * sum(e[n] - base[n] for e in experts) for n in base}
        for each, state in (
            (recipe(), average),
            (recipe("task_arithmetic", scale=0.6), arithmetic),
        ):
            frame = Evaluator(suite).recipe(each, session, "test")
            for row in frame.itertuples():
                predicted, labels = by_hand(state, suite.root, row.task, "test")  # type: ignore[arg-type]
                assert row.correct == (predicted == labels).sum()

    def test_a_subset_of_tasks(self, suite: Suite) -> None:
        session = MergeSession(suite, ("lines", "digits"), FactorStore())
        each = make_recipe({"suite": ".", "tasks": ["lines", "digits"], "method": "average"})
        assert Evaluator(suite).recipe(each, session)["task"].tolist() == ["digits", "lines"]

    def test_progress_and_cancel(self, suite: Suite) -> None:
        session = MergeSession(suite, None, FactorStore())
        events: list[tuple[int, int, str]] = []
        progress = Progress(lambda *event: events.append(event))
        Evaluator(suite).recipe(recipe(), session, progress=progress)
        # Sixty images make one batch.
        assert events == [(0, 60, "digits, shapes, lines"), (60, 60, "done")]
        progress.cancel.set()
        with pytest.raises(Cancelled):
            Evaluator(suite).recipe(recipe(), session, progress=progress)


class TestForwardPasses:
    def test_what_is_known_is_not_run_again(self, suite: Suite) -> None:
        session = MergeSession(suite, None, FactorStore())
        first = Evaluator(suite)
        assert not first.knows(recipe(), session)
        frame = first.recipe(recipe(), session)
        assert first.outputs.forward_images == 3 * IMAGES
        for again in (first, Evaluator(suite), Evaluator(load_suite(suite.path))):
            before = again.outputs.forward_images
            assert again.knows(recipe(), session)
            pd.testing.assert_frame_equal(again.recipe(recipe(), session), frame)
            assert again.outputs.forward_images == before

    def test_other_settings_are_run(self, suite: Suite) -> None:
        session = MergeSession(suite, None, FactorStore())
        Evaluator(suite).recipe(recipe(), session)
        evaluator = Evaluator(suite)
        evaluator.recipe(recipe(), session, "test")
        assert evaluator.outputs.forward_images == 3 * IMAGES
        assert not evaluator.knows(recipe("cart"), session)

    def test_the_first_images_are_part_of_all(self, suite: Suite) -> None:
        session = MergeSession(suite, None, FactorStore())
        evaluator = Evaluator(suite)
        evaluator.recipe(recipe(), session, "val", 5)
        assert evaluator.outputs.forward_images == 15
        assert evaluator.knows(recipe(), session, "val", 5)
        assert not evaluator.knows(recipe(), session, "val", 6)
        evaluator.recipe(recipe(), session)
        assert evaluator.outputs.forward_images == 3 * IMAGES
        assert evaluator.knows(recipe(), session, "val", 6)

    @pytest.mark.parametrize("what", ["weights", "data", "head", "mean", "base"])
    def test_a_change_on_disk_is_run(self, suite: Suite, what: str) -> None:
        Evaluator(suite).recipe(recipe(), MergeSession(suite, None, FactorStore()))
        root = suite.root
        if what in ("weights", "base"):
            path = root / ("base.safetensors" if what == "base" else "experts/digits.safetensors")
            save_file({k: v * 1.01 for k, v in load_file(path).items()}, path)
        elif what == "head":
            path = root / "heads/digits.safetensors"
            save_file({k: v + 0.01 for k, v in load_file(path).items()}, path)
        elif what == "data":
            edit_arrays(root / "inputs/digits.npz", val_labels=np.zeros(IMAGES, int))
        else:
            text = suite.path.read_text()
            suite.path.write_text(text.replace("mean:\n      - 0.5\n", "mean:\n      - 0.25\n", 1))
            assert suite.path.read_text() != text
        changed = load_suite(suite.path)
        evaluator = Evaluator(changed)
        evaluator.recipe(recipe(), MergeSession(changed, None, FactorStore()))
        # A change of weights concerns all tasks; one of a task's data or head only that task.
        expected = 3 * IMAGES if what in ("weights", "base") else IMAGES
        assert evaluator.outputs.forward_images == expected

    def test_members(self, suite: Suite) -> None:
        evaluator = Evaluator(suite)
        expert = suite.expert("digits")
        assert not evaluator.knows_member(expert, ["digits"])
        evaluator.experts(["digits"])
        assert evaluator.knows_member(expert, ["digits"])
        assert not evaluator.knows_member(expert, ["digits", "shapes"])
        assert not evaluator.knows_member(expert, ["digits"], "test")

    def test_a_store_that_fails_costs_only_time(self, suite: Suite, tmp_path: Path) -> None:
        expected = Evaluator(suite).experts(suite.tasks)
        (tmp_path / "damaged.sqlite").write_bytes(b"damaged" * 999)
        (tmp_path / "file").touch()
        # A damaged file is replaced, so its second evaluation is known; no folder, never known.
        for path, runs in ((tmp_path / "damaged.sqlite", 1), (tmp_path / "file" / "p.sqlite", 2)):
            evaluator = Evaluator(suite, PredictionStore(path))
            for _ in range(2):
                pd.testing.assert_frame_equal(evaluator.experts(suite.tasks), expected)
            assert evaluator.outputs.forward_images == runs * 3 * IMAGES

    def test_predictions_that_a_stranger_ships_are_not_believed(self, suite: Suite) -> None:
        expected = Evaluator(suite, PredictionStore(suite.root / "p.sqlite")).experts(suite.tasks)
        forged = PredictionStore(suite.root / "predictions.sqlite")
        with patch.object(SuiteOutputs, "_run", run_to_nothing):
            wrong = Evaluator(suite, forged).experts(suite.tasks)
        assert not wrong["correct"].equals(expected["correct"])
        evaluator = Evaluator(suite)
        pd.testing.assert_frame_equal(evaluator.experts(suite.tasks), expected)
        assert evaluator.outputs.forward_images == 3 * IMAGES

    @pytest.mark.parametrize("content", [ENDLESS, "CREATE TABLE predictions (key, labels)"])
    def test_predictions_that_a_stranger_ships_are_not_even_opened(
        self, suite: Suite, content: str
    ) -> None:
        """An endless view took gigabytes or spun for ever."""
        with closing(sqlite3.connect(suite.root / "predictions.sqlite")) as connection:
            connection.executescript(content)
        with patch("sqlite3.connect", wraps=sqlite3.connect) as opened:
            assert Evaluator(suite).experts(["digits"])["correct"].tolist() == [15]
        assert not [call for call in opened.call_args_list if str(suite.root) in str(call)]

    def test_no_pipe_is_taken_for_predictions(self, suite: Suite) -> None:
        os.mkfifo(suite.root / "predictions.sqlite")
        assert Evaluator(suite).experts(["digits"])["correct"].tolist() == [15]

    def test_a_stored_row_that_is_short_is_completed(self, suite: Suite) -> None:
        class Short(PredictionStore):
            def get(self, wanted):  # type: ignore[no-untyped-def]
                return {key: vector[:1] for key, vector in super().get(wanted).items()}

        Evaluator(suite).experts(["digits"])
        evaluator = Evaluator(suite, Short())
        assert evaluator.experts(["digits"])["correct"].tolist() == [15]
        assert evaluator.outputs.forward_images == IMAGES - 1


def run_to_nothing(outputs: SuiteOutputs, *arguments: Any) -> dict[str, Outputs]:
    """What a model gives, with all logits alike."""
    real = RUN(outputs, *arguments)
    return {t: Outputs(o.features, torch.zeros_like(o.logits)) for t, o in real.items()}


class TestRefusals:
    def test_without_architecture(self, suite: Suite) -> None:
        with pytest.raises(SuiteError, match="not evaluated: the suite names no architecture"):
            Evaluator(edit_document(suite.root, architecture=None))

    @pytest.mark.parametrize("field", ["head", "data"])
    def test_without_head_or_data(self, suite: Suite, field: str) -> None:
        experts = suite.spec.model_dump(mode="json")["experts"]
        del experts["shapes"][field]
        with pytest.raises(SuiteError, match=f"no {field} is given for shapes"):
            Evaluator(edit_document(suite.root, experts=experts))

    def test_files_that_are_missing(self, suite: Suite) -> None:
        (suite.root / "heads/shapes.safetensors").unlink()
        with pytest.raises(
            SuiteError, match=r"heads/shapes.safetensors \(head of task 'shapes'.*exist"
        ):
            Evaluator(suite).experts(["shapes"])

    def test_nan_weights(self, suite: Suite) -> None:
        path = suite.root / "experts/digits.safetensors"
        state = load_file(path)
        state["norm.weight"][0] = torch.nan
        save_file(state, path)
        with pytest.raises(CheckpointError, match=r"'norm.weight' has 1 NaN or infinite"):
            Evaluator(suite).experts(["digits"])

    def test_weights_that_overflow(self, suite: Suite) -> None:
        path = suite.root / "huge.safetensors"
        state = {k: v * 1e37 for k, v in state_of(suite, "digits").items()}
        assert all(v.isfinite().all() for v in state.values())
        save_file(state, path)
        evaluator = Evaluator(suite)
        with pytest.raises(SuiteError, match=r"non-finite outputs on task 'digits'.*smaller scale"):
            evaluator.checkpoint(Checkpoint(path), ["digits"])
        assert not evaluator.knows_member(Checkpoint(path), ["digits"])  # nothing was kept

    @pytest.mark.parametrize(("classes", "width"), [(4, 12), (2, 16)])
    def test_a_head_that_does_not_fit(self, suite: Suite, classes: int, width: int) -> None:
        head = {"weight": torch.zeros(classes, width), "bias": torch.zeros(classes)}
        save_file(head, suite.root / "heads/digits.safetensors")
        with pytest.raises(
            SuiteError, match=rf"head of task 'digits' \({classes} classes of width {width}\)"
        ):
            Evaluator(suite).experts(["digits"])


def test_what_is_evaluated_is_what_would_be_written(tmp_path: Path) -> None:
    """A merge written in float16 is judged by its float16 weights, not by what was rounded."""
    suite = load_suite(write_evaluable(tmp_path / "suite"))
    recipe = make_recipe({"suite": str(suite.path), "method": "average", "dtype": "float16"})
    session = MergeSession(suite, None, FactorStore(tmp_path / "factors"))
    folder = merge_to_folder(recipe, suite, tmp_path / "merged")
    written = Checkpoint(folder)
    state = {name: written.tensor(name) for name in written}
    assert {value.dtype for value in state.values()} == {torch.float16}
    shown = Evaluator(suite, PredictionStore(tmp_path / "p.sqlite")).recipe(recipe, session)
    for task in suite.tasks:
        predicted, labels = by_hand(state, tmp_path / "suite", task, "val")
        row = shown[shown["task"] == task].iloc[0]
        assert row["correct"] == (predicted == labels).sum()

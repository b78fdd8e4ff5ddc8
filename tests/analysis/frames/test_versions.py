"""A question whose answer changes gets a new version; any change of what it depends on, a new key.

``answers.json`` holds what each version answers on fixed inputs, made by running this file:
``python -m tests.analysis.frames.test_versions``. Where a test here fails because an answer was
changed on purpose, raise the question's version beside its name and run that.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from analysis.evaluation.evaluator import Evaluator
from analysis.frames.entries import Asked, Kept
from analysis.frames.flips import flips_if_known
from analysis.frames.from_outputs import OutputFrames
from analysis.frames.from_pools import PoolFrames, pool_inputs
from analysis.frames.from_weights import WeightFrames
from analysis.frames.record import TITLES
from analysis.frames.scaling import scaling
from analysis.outputs.pool_outputs import PoolEvaluator
from analysis.rank_selection.select import SelectionOptions
from analysis.rank_selection.space import search_space
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import make_recipe
from merge_core.suites.suite import Suite, load_suite
from tests.analysis.tiny_suite import FC, MATRICES, QKV, random_states, write_suite
from tests.evaluable import write_evaluable
from tests.pools import write_pool

ANSWERS = Path(__file__).with_name("answers.json")
DIGITS = 1e-3  # of a float32 decomposition, far below any change of meaning


class Listener:
    """A store that keeps nothing and remembers what was asked."""

    computes = True

    def __init__(self) -> None:
        self.heard: dict[str, tuple[Asked, Kept]] = {}

    def get(self, asked: Asked) -> Kept | None:
        return None

    def put(self, asked: Asked, kept: Kept) -> None:
        self.heard[asked.key] = (asked, kept)

    def refuse(self, asked: Asked) -> None:
        pass


def ask_weights(suite: Suite, listener: Listener, folder: Path) -> None:
    frames = WeightFrames(suite, suite.tasks, listener, FactorStore(folder / "factors"))
    space = search_space("cart", "tiny", suite.tasks, ranks=[0.25, 0.5], scales=[1.0, 2.0])
    frames.spectrum(FC, "average")
    frames.cuts(FC, "average")
    frames.summary("average")
    frames.cosines(FC, "average")
    frames.pairs(FC, "average", 0.5)
    frames.over_rank(FC, "average")
    frames.centring(0.5)
    frames.angles(FC, "average", 3)
    frames.signs()
    frames.build_up(suite.tasks[0])
    frames.proxy_curves(space)
    frames.weight_picks(space)
    frames.ranks_per_layer(space, 0.25)


def ask_outputs(folder: Path, listener: Listener) -> None:
    suite = load_suite(write_evaluable(folder / "suite"))
    session, evaluator = MergeSession(suite, None, FactorStore(folder / "f")), Evaluator(suite)
    frames = OutputFrames("mine", suite, suite.tasks, listener, lambda: session, lambda: evaluator)
    space = search_space("cart", "mine", suite.tasks, ranks=[0.25, 0.5], scales=[1.0, 2.0])
    frames.experts("val")
    frames.recipe(make_recipe({"suite": "mine", "tasks": suite.tasks, "method": "average"}), "val")
    chosen = frames.select(space, SelectionOptions("labels", full_grid=True))
    frames.task_curves(chosen)
    frames.storage(chosen)
    frames.compare(["average"], 1, [])
    for method in ("cart", "task_arithmetic"):
        frames.select(search_space(method, "mine", suite.tasks), SelectionOptions("labels"))
    frames.suggestion(search_space("cart", "mine", suite.tasks))
    frames.first_result(frames.first_recipes())
    frames.first_result_if_known()
    average, cart = (
        make_recipe({"suite": "mine", "tasks": suite.tasks, "method": name})
        for name in ("average", "cart")
    )
    frames.recipe(average, "test")
    frames.recipe(cart, "test")
    assert flips_if_known(frames, average, cart) is not None
    scaling(frames, [suite.tasks], FactorStore(folder / "f"))


def ask_pools(folder: Path, listener: Listener) -> None:
    fields = [{"seed": i, "weight_decay": 0.1 * (i // 2)} for i in range(4)]
    pool = write_pool(folder / "pool", "mlp", members=4)
    frames = PoolFrames(pool, (0, 1, 2), listener, lambda: PoolEvaluator(pool))
    frames.rules("test", "average")
    frames.agreement("test", "average")
    frames.greedy("average")
    frames.covariance("test")
    frames.covariance_summary("test")
    frames.gap("test", "average")
    frames.sweep((0.5, 1.0, 2.0), "all", "weights", None)
    frames.predicted((0.5, 1.0, 2.0), "all", "weights", None, "homogeneous")
    frames.noise((0.0, 0.2), True)
    frames.corrupted("noise")
    frames.identity()
    frames.norms()
    frames.histogram(next(iter(pool.member(0))))
    linear = write_pool(folder / "linear", "linear", members=4, fields=fields)
    of_linear = PoolFrames(linear, (), listener, lambda: PoolEvaluator(linear))
    of_linear.over_decay()


def describe(kept: Kept) -> dict[str, Any]:
    """An answer's columns and the mean of each number, its values' names."""
    frames = {
        name: {
            column: round(float(np.nanmean(frame[column])), 6)
            if pd.api.types.is_numeric_dtype(frame[column]) and frame[column].notna().any()
            else None
            for column in frame.columns
        }
        for name, frame in kept.frames.items()
    }
    rows = {name: len(frame) for name, frame in kept.frames.items()}
    return {"frames": frames, "rows": rows, "values": sorted(kept.values)}


@cache
def answers() -> dict[str, dict[str, Any]]:
    """What every question answers on fixed inputs, the last where it was asked twice."""
    folder = Path(tempfile.mkdtemp())
    listener = Listener()
    ask_weights(write_suite(folder / "tiny", *random_states()), listener, folder)
    ask_outputs(folder, listener)
    ask_pools(folder, listener)
    found = {}
    for asked, kept in listener.heard.values():
        found[asked.name] = {"version": asked.version, **describe(kept)}
    return found


# What is measured anew each time.
MEASURED = {"seconds", "peak_mb"}


def numbers(described: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {
        (name, column): value
        for name, columns in described["frames"].items()
        for column, value in columns.items()
        if value is not None and column not in MEASURED
    }


def test_every_question_is_held() -> None:
    held = set(json.loads(ANSWERS.read_text()))
    assert set(answers()) == held
    assert {name for name in held if not name.startswith("pool.")} == set(TITLES)


@pytest.mark.parametrize("name", sorted(json.loads(ANSWERS.read_text())))
def test_an_answer_that_changed_has_a_new_version(name: str) -> None:
    mine, held = answers()[name], json.loads(ANSWERS.read_text())[name]
    assert mine["version"] == held["version"], "run python -m tests.analysis.frames.test_versions"
    changed = f"the answer to {name} changed: raise its version, and run this file"
    assert (mine["rows"], mine["values"]) == (held["rows"], held["values"]), changed
    one, other = numbers(mine), numbers(held)
    assert one.keys() == other.keys(), changed
    for place, value in other.items():
        # An image on the edge between two classes may fall to the other side elsewhere.
        slack = 0.05 if name.startswith(("accuracy", "rank.s", "rank.task", "pool.")) else DIGITS
        assert one[place] == pytest.approx(value, rel=slack, abs=slack), (place, changed)


def changed_suites(folder: Path) -> Iterator[tuple[str, Suite]]:
    """Suites that differ from the first in one thing each."""
    base, experts = random_states()
    yield "itself", write_suite(folder / "0", base, experts)
    other = {task: dict(state) for task, state in experts.items()}
    other["dots"][QKV] = other["dots"][QKV] + 1e-3
    yield "an expert", write_suite(folder / "1", base, other)
    yield "the base", write_suite(folder / "2", {**base, FC: base[FC] + 1e-3}, experts)
    yield "no base", write_suite(folder / "3", None, experts)
    named = {("points" if task == "dots" else task): state for task, state in experts.items()}
    yield "a name", write_suite(folder / "4", base, named)
    yield "the order", write_suite(folder / "5", base, dict(reversed(experts.items())))
    yield "fewer", write_suite(folder / "6", base, {t: experts[t] for t in list(experts)[:3]})
    for number, rule in enumerate(("average: ['*fc1*']", "decompose: ['*bias*']"), start=7):
        suite = write_suite(folder / str(number), base, experts)
        suite.path.write_text(suite.path.read_text() + rule + "\n")
        yield rule, load_suite(suite.path)


def test_whatever_a_suite_differs_in_makes_other_keys(tmp_path: Path) -> None:
    inputs = {}
    for what, suite in changed_suites(tmp_path):
        frames = WeightFrames(suite, suite.tasks, Listener(), FactorStore(tmp_path))
        inputs[what] = frames.inputs
    assert len(set(inputs.values())) == len(inputs)
    base, experts = random_states()
    copied = write_suite(tmp_path / "elsewhere", base, experts)
    assert WeightFrames(copied, copied.tasks, Listener(), FactorStore()).inputs == inputs["itself"]


def test_whatever_is_asked_otherwise_makes_another_key(tmp_path: Path) -> None:
    listener = Listener()
    suite = write_suite(tmp_path / "tiny", *random_states())
    frames = WeightFrames(suite, suite.tasks, listener, FactorStore(tmp_path))
    asked = 0
    for layer in MATRICES[:2]:
        for origin in ("average", "base"):
            frames.spectrum(layer, origin)
            frames.cuts(layer, origin)
            frames.cosines(layer, origin)
            asked += 3
            for side in ("row", "column"):
                frames.over_rank(layer, origin, side)
                asked += 1
                frames.centring(0.25 if origin == "base" else 0.5, side, layer)
                asked += 1
                for share, k in ((0.25, 2), (0.5, 3)):
                    frames.pairs(layer, origin, share, side)
                    frames.angles(layer, origin, k, side)
                    asked += 2
    for origin in ("average", "base"):
        for apart in (False, True):
            frames.summary(origin, apart)
            asked += 1
    frames.spectrum(QKV, "average", "q")
    frames.signs()
    for method in ("cart", "low_rank_task_arithmetic"):
        for ranks in ([0.25, 0.5], [0.25, 0.75]):
            space = search_space(method, "tiny", suite.tasks, ranks=ranks, scales=[1.0])
            frames.proxy_curves(space)
            frames.weight_picks(space)
            frames.ranks_per_layer(space, 0.25)
            frames.ranks_per_layer(space, 0.5)
            asked += 4
    assert len(listener.heard) == asked + 2


def test_what_outputs_are_asked_by_makes_another_key(tmp_path: Path) -> None:
    suite = load_suite(write_evaluable(tmp_path / "suite"))

    def key(**other: Any) -> str:
        listener = Listener()
        session, evaluator = MergeSession(suite, None, FactorStore(tmp_path)), Evaluator(suite)
        frames = OutputFrames(
            "mine", suite, suite.tasks, listener, lambda: session, lambda: evaluator
        )
        document = {"suite": "mine", "tasks": suite.tasks, "method": "task_arithmetic", **other}
        frames.recipe(make_recipe({**document}), "val")
        (only,) = listener.heard
        return only

    keys = {
        key(),
        key(parameters={"scale": 0.7}),
        key(method="average"),
        key(seed=1),
        key(dtype="float16"),
        key(weights={"digits": 2.0}),
        key(then=[{"method": "svc"}]),
        key(overrides=[{"match": "*", "parameters": {"scale": 0.1}}]),
    }
    assert len(keys) == 8
    before = key()
    with np.load(tmp_path / "suite/inputs/digits.npz") as arrays:
        changed = {name: arrays[name].copy() for name in arrays.files}
    changed["val_labels"][0] = (changed["val_labels"][0] + 1) % 4
    np.savez(tmp_path / "suite/inputs/digits.npz", **changed)
    suite = load_suite(suite.path)
    assert key() != before


def test_whatever_a_pool_is_asked_otherwise_makes_another_key(tmp_path: Path) -> None:
    listener = Listener()
    pool = write_pool(tmp_path / "pool", "mlp", members=3)
    evaluator = PoolEvaluator(pool)
    asked = 0
    for members in ((0, 1), (1, 0), (0, 1, 2)):
        frames = PoolFrames(pool, members, listener, lambda: evaluator)
        for split in ("val", "test"):
            frames.rules(split, "average")
            frames.covariance(split)
            asked += 2
        for who in ("all", "first"):
            for largest in (1.0, 2.0):
                frames.predicted((0.5, largest), who, "weights", None, "homogeneous")
                asked += 1
        frames.norms()
        frames.noise((0.0, 0.1), True)
        frames.noise((0.0, 0.1), False)
        asked += 3
    assert len(listener.heard) == asked
    other = write_pool(tmp_path / "other", "mlp", members=3, seed=1)
    assert pool_inputs(other) != pool_inputs(pool)
    assert pool_inputs(write_pool(tmp_path / "same", "mlp", members=3)) == pool_inputs(pool)


if __name__ == "__main__":
    torch.set_num_threads(1)
    ANSWERS.write_text(json.dumps(answers(), indent=1, sort_keys=True) + "\n")

"""Inputs on which two merges differ, against predictions counted one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from analysis.evaluation.evaluator import Evaluator
from analysis.evaluation.flips import flipped_inputs
from analysis.frames.flips import flips_if_known
from analysis.frames.from_outputs import OutputFrames
from analysis.frames.store import FrameStore
from analysis.outputs.inputs import load_inputs
from analysis.outputs.prediction_store import CLASSES, PredictionStore
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import make_recipe
from tests.evaluable import copy_evaluable


def test_every_flip_is_counted_and_the_first_one_is_named(tmp_path: Path) -> None:
    suite = copy_evaluable(tmp_path / "suite")
    evaluator = Evaluator(suite, PredictionStore(tmp_path / "predictions"))
    session = MergeSession(suite, suite.tasks, FactorStore(tmp_path / "factors"))
    outputs = OutputFrames(
        *("mine", suite, suite.tasks, FrameStore(tmp_path / "frames")),
        *(lambda: session, lambda: evaluator),
    )
    before, after = (
        make_recipe({"suite": "mine", "tasks": suite.tasks, "method": "task_arithmetic"} | more)
        for more in ({"parameters": {"scale": 1.0}}, {"parameters": {"scale": 0.2}})
    )
    assert flips_if_known(outputs, before, after) is None  # nothing was run
    frame = flipped_inputs(before, after, session, evaluator)
    counts = {task: len(load_inputs(suite, task, "test").labels) for task in suite.tasks}
    images = {task: np.arange(count) for task, count in counts.items()}
    first, then = (
        evaluator.measure_recipe(each, session, images, "test") for each in (before, after)
    )
    assert frame["count"].sum() > 0
    for row in frame.to_dict("records"):
        held = load_inputs(suite, row["task"], "test")
        pairs = zip(first[row["task"]][CLASSES], then[row["task"]][CLASSES], strict=True)
        right = [(b == t, a == t) for (b, a), t in zip(pairs, held.labels, strict=True)]
        wanted = (False, True) if row["kind"] == "righted" else (True, False)
        places = [place for place, each in enumerate(right) if each == wanted]
        assert row["count"] == len(places)
        assert row["inputs"] == counts[row["task"]]
        assert row["place"] == (places[0] if places else -1)
        if not places:
            assert (row["truth"], row["before"], row["after"]) == ("", "", "")
            continue
        truth = held.class_names[held.labels[places[0]]]
        assert row["truth"] == truth
        assert (row["before"] == truth) == (row["kind"] == "spoilt")
        assert (row["after"] == truth) == (row["kind"] == "righted")
    known = flips_if_known(outputs, before, after)
    assert known is not None
    assert known.equals(frame)

"""What methods measure over the whole model before they merge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import make_recipe
from merge_core.methods.selection import Passes
from merge_core.suites.suite import Suite

Make = Callable[..., Suite]


@pytest.mark.parametrize("name", ["emr", "pcb", "ties"])
def test_what_is_measured_over_the_model_is_measured_once_for_tasks_and_scales(
    synthetic_suite: Make, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    suite, passes = synthetic_suite(3, seed=2), []
    run = Passes.run

    def counted(self: Passes, label: str, *rest: Any, **named: Any) -> Any:
        passes.append(label)
        return run(self, label, *rest, **named)

    monkeypatch.setattr(Passes, "run", counted)
    session = MergeSession(suite, None, FactorStore())
    document = {"suite": str(suite.path), "tasks": suite.tasks, "method": name}
    if name == "emr":
        for task in suite.tasks:
            session.merge(make_recipe(document), task=task)
        assert len(passes) == 1
        return
    for scale in (0.5, 1.0, 2.0):
        session.merge(make_recipe({**document, "parameters": {"scale": scale}}))
    once = len(passes)
    other = make_recipe({**document, "parameters": {"density": 0.5}})
    got = session.merge(other)
    assert len(passes) == 2 * once  # another density, another threshold
    fresh = MergeSession(suite, None, FactorStore()).merge(other)
    assert all(torch.equal(got[key], fresh[key]) for key in fresh)

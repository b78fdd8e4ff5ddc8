"""What a merge takes: measured from cold, for all tasks, once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.comparison import costs
from analysis.comparison.costs import cost, storage_bytes
from analysis.evaluation.evaluator import Evaluator
from merge_core.errors import Cancelled
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import Recipe, make_recipe
from merge_core.progress import Progress
from tests.evaluable import TASKS, copy_evaluable


@pytest.fixture
def parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[MergeSession, Evaluator, FactorStore]:
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
    suite = copy_evaluable(tmp_path / "s")
    store = FactorStore()
    return MergeSession(suite, None, store), Evaluator(suite), store


def recipe(method: str, session: MergeSession, **fields: object) -> Recipe:
    return make_recipe({"suite": str(session.suite.path), "method": method, **fields})


class Clock:
    """A clock of its own: every decomposition takes 100 s, every merge of a model 1 s."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        get, merge = FactorStore._get, MergeSession.merge

        def timed_get(store: FactorStore, *arguments: Any) -> Any:
            before = store.decompositions
            found = get(store, *arguments)
            self.now += 100 * (store.decompositions - before)
            return found

        def timed_merge(session: MergeSession, *arguments: Any, **keywords: Any) -> Any:
            self.now += 1
            return merge(session, *arguments, **keywords)

        monkeypatch.setattr(FactorStore, "_get", timed_get)
        monkeypatch.setattr(MergeSession, "merge", timed_merge)
        monkeypatch.setattr(costs.time, "thread_time", lambda: self.now)


def test_factors_that_are_stored_count_all_the_same(
    parts: tuple[MergeSession, Evaluator, FactorStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, evaluator, store = parts
    cart = recipe("cart", session)
    session.merge(cart)
    stored = store.decompositions
    files = set(store.folder.rglob("*"))
    matrices = sum(group.decomposed for group in session.groups)
    assert stored == matrices * len(TASKS) > 0
    Clock(monkeypatch)
    assert cost(cart, session, evaluator).seconds == 100 * matrices * len(TASKS) + 1
    # Nor is anything left behind, neither here nor in the store that others use.
    assert store.decompositions == stored
    assert set(store.folder.rglob("*")) == files
    assert {path.name for path in store.folder.parent.iterdir()} == {"costs", "digests", "factors"}


def test_methods_that_know_the_task_count_all_their_models(
    parts: tuple[MergeSession, Evaluator, FactorStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, evaluator, _ = parts
    Clock(monkeypatch)
    assert cost(recipe("tall_masks", session), session, evaluator).seconds == len(TASKS)
    assert cost(recipe("task_arithmetic", session), session, evaluator).seconds == 1
    once = 100 * len(TASKS) * sum(group.decomposed for group in session.groups)
    found = cost(recipe("cart_indexing", session), session, evaluator).seconds
    assert found == once + len(TASKS)


def test_the_members_are_in_memory_before_the_time_begins(
    parts: tuple[MergeSession, Evaluator, FactorStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, evaluator, _ = parts
    reading = False

    def now() -> float:
        nonlocal reading
        reading = not reading
        return 0.0

    monkeypatch.setattr(costs.time, "thread_time", now)
    checkpoint = type(session.suite.expert(TASKS[0]))
    tensor = checkpoint.tensor

    def read(self: Any, name: str) -> Any:
        assert not reading, f"{name} was read within the time"
        return tensor(self, name)

    monkeypatch.setattr(checkpoint, "tensor", read)
    assert cost(recipe("ties", session), session, evaluator).seconds == 0


def test_short_merges_count_with_their_best_of_three(
    parts: tuple[MergeSession, Evaluator, FactorStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, evaluator, _ = parts
    runs = iter([(0.3, 5.0), (0.1, 1.0), (0.2, 7.0), (9.0, 2.0)])
    monkeypatch.setattr(costs, "_measure", lambda *arguments: next(runs))
    short = cost(recipe("average", session), session, evaluator)
    assert (short.seconds, short.peak_mb) == (0.1, 7.0)
    assert cost(recipe("ties", session), session, evaluator).seconds == 9.0
    assert next(runs, None) is None


def test_learning_counts_once_and_is_kept_for_the_evaluation(
    parts: tuple[MergeSession, Evaluator, FactorStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, evaluator, _ = parts
    runs: list[str] = []
    learned = evaluator.learn

    def counted(each: Recipe, *arguments: Any) -> Any:
        runs.append(each.method)
        return learned(each, *arguments)

    monkeypatch.setattr(evaluator, "learn", counted)
    regmean = recipe("regmean", session)
    cost(regmean, session, evaluator)
    assert runs == ["regmean"]  # short, but a second time would be a warm one
    steps: list[str] = []
    progress = Progress(lambda done, total, label: steps.append(label))
    evaluator.recipe_hits(regmean, session, "test", progress=progress)
    assert not any("activations" in label for label in steps)


def test_a_cost_is_remembered_by_what_it_depends_on(
    parts: tuple[MergeSession, Evaluator, FactorStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, evaluator, _ = parts
    measured: list[str] = []

    def measure(each: Recipe, *arguments: Any) -> tuple[float, float]:
        measured.append(each.method)
        return 1.0 + len(measured), float("nan")

    monkeypatch.setattr(costs, "_measure", measure)
    cart = recipe("cart", session)
    first = cost(cart, session, evaluator)
    assert repr(cost(cart, session, evaluator)) == repr(first)  # NaN where memory is unknown
    assert len(measured) == 1
    cost(cart.with_parameters(rank=0.5), session, evaluator)
    assert len(measured) == 2
    monkeypatch.setattr(costs, "RULE", "another rule")
    cost(cart, session, evaluator)
    assert len(measured) == 3
    torch.set_num_threads(2)  # a merge is measured on one thread all the same
    try:
        cost(cart, session, evaluator)
    finally:
        torch.set_num_threads(1)
    assert len(measured) == 3
    for path in (Path(session.suite.root).parent / "cache" / "costs").iterdir():
        path.write_text(json.dumps({"seconds": 1}))  # damaged since
    cost(cart, session, evaluator)
    assert len(measured) == 4


def test_only_the_processors_time_counts(
    parts: tuple[MergeSession, Evaluator, FactorStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge that works for 0.2 s and waits as long, as on a busy machine."""
    session, evaluator, _ = parts
    merge = MergeSession.merge

    def slow(*arguments: Any, **keywords: Any) -> Any:
        costs.time.sleep(0.2)
        end = costs.time.thread_time() + 0.2
        while costs.time.thread_time() < end:
            pass
        return merge(*arguments, **keywords)

    monkeypatch.setattr(MergeSession, "merge", slow)
    assert 0.2 <= cost(recipe("average", session), session, evaluator).seconds < 0.35


def test_memory_counts_what_the_merge_holds(
    parts: tuple[MergeSession, Evaluator, FactorStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge that holds 48 MB for a while, after as much was freed."""
    session, evaluator, _ = parts
    del_me = [bytearray(b"x" * (1 << 20)) for _ in range(64)]
    del del_me
    merge = MergeSession.merge

    def wasteful(*arguments: Any, **keywords: Any) -> Any:
        held = [bytearray(b"x" * (1 << 20)) for _ in range(48)]
        result = merge(*arguments, **keywords)
        costs.time.sleep(0.05)
        assert len(held) == 48
        return result

    monkeypatch.setattr(MergeSession, "merge", wasteful)
    assert 45 < cost(recipe("average", session), session, evaluator).peak_mb < 90


def test_it_can_be_cancelled_between_two_parameters(
    parts: tuple[MergeSession, Evaluator, FactorStore],
) -> None:
    session, evaluator, store = parts
    progress = Progress()
    progress.cancel.set()
    with pytest.raises(Cancelled):
        cost(recipe("cart", session), session, evaluator, progress)
    assert not list(store.folder.parent.glob("cold*"))


def test_storage(parts: tuple[MergeSession, Evaluator, FactorStore]) -> None:
    session, _, _ = parts
    path = Path(session.suite.expert(TASKS[0]).path)
    numbers = sum(group.info.numel for group in session.groups)
    stored = session.suite.expert(TASKS[0]).nbytes
    assert storage_bytes(recipe("cart", session), session) == stored <= path.stat().st_size
    assert storage_bytes(recipe("cart", session, dtype="float16"), session) == 2 * numbers
    indexed = storage_bytes(recipe("tsv_c", session), session)
    assert 2 * numbers < indexed < 2 * numbers * (1 + len(TASKS))

"""Merged folders: bitwise the session's result, readable by others, and whole or absent."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load, load_file
from torch import Tensor

import merge_core.output.model_folder as export
from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.errors import (
    Cancelled,
    CheckpointError,
    MergeScopeError,
    OutputError,
    RecipeError,
    SuiteError,
)
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import Recipe, load_recipe, make_recipe
from merge_core.methods import methods
from merge_core.output.model_folder import PlannedTensor, merge_to_folder, merged_bytes, plan_shards
from merge_core.progress import Progress
from merge_core.suites.suite import Suite
from merge_core.task_vectors import TensorGroups

Make = Callable[..., Suite]
COUNTER = "bn.num_batches_tracked"


def recipe_for(suite: Suite, method: str = "cart", **fields: Any) -> Recipe:
    return make_recipe({"suite": str(suite.path), "method": method, **fields})


def in_memory(suite: Suite, recipe: Recipe) -> dict[str, Tensor]:
    return MergeSession(suite, None, FactorStore()).merge(recipe)


def read(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.tensor(name) for name in checkpoint}


def assert_bitwise(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert sorted(got) == sorted(expected)
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), name


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("method", [m.name for m in methods().values() if m.learns is None])
def test_a_streamed_folder_is_bitwise_the_sessions_result(
    synthetic_suite: Make, tmp_path: Path, method: str
) -> None:
    declared = methods()[method]
    suite = synthetic_suite(declared.tasks or 3, seed=3)
    recipe = recipe_for(suite, method)
    folder = merge_to_folder(recipe, suite, tmp_path / "out", FactorStore(tmp_path / "factors"))
    session = MergeSession(suite, None, FactorStore())
    if declared.indexed:
        assert leftovers(folder) == ["README.md", "recipe.yaml", *suite.tasks]
        for task in suite.tasks:
            assert_bitwise(read(folder / task), session.merge(recipe, task=task))
            with safe_open(folder / task / "model.safetensors", "pt") as file:
                assert json.loads(file.metadata()["mergescope"])["task"] == task
        with pytest.raises(RecipeError, match="one model per task"):
            merged_bytes(recipe, session.groups, suite)
        return
    expected = session.merge(recipe)
    assert_bitwise(read(folder), expected)
    assert_bitwise(load_file(folder / "model.safetensors"), expected)
    bytes_ = merged_bytes(recipe, TensorGroups(suite, None, FactorStore()), suite)
    assert_bitwise(load(bytes_), expected)


@pytest.mark.parametrize("shard_bytes", [1, 500, 1000, 10**9])
def test_shards_read_back_as_one_model(
    synthetic_suite: Make, tmp_path: Path, shard_bytes: int
) -> None:
    suite = synthetic_suite(seed=3)
    recipe = recipe_for(suite)
    folder = merge_to_folder(recipe, suite, tmp_path / "out", shard_bytes=shard_bytes)
    expected = in_memory(suite, recipe)
    assert_bitwise(read(folder), expected)
    shards = sorted(folder.glob("*.safetensors"))
    parts: dict[str, Tensor] = {}
    for shard in shards:
        content = load_file(shard)
        size = sum(v.numel() * v.element_size() for v in content.values())
        assert size <= shard_bytes or len(content) == 1
        parts |= content
    assert_bitwise(parts, expected)
    index = folder / "model.safetensors.index.json"
    assert index.exists() == (len(shards) > 1) == (shard_bytes < 10**9)
    if index.exists():
        document = json.loads(index.read_text())
        assert sorted(document["weight_map"]) == sorted(expected)
        total = sum(v.numel() * v.element_size() for v in expected.values())
        assert document["metadata"]["total_size"] == total


def test_shards_are_filled_in_order_and_never_empty() -> None:
    plan = [
        PlannedTensor(str(i), (size,), torch.uint8) for i, size in enumerate([3, 3, 9, 1, 1, 4, 1])
    ]
    sizes = [[t.nbytes for t in shard] for shard in plan_shards(plan, 6)]
    assert sizes == [[3, 3], [9], [1, 1, 4], [1]]
    assert [t for shard in plan_shards(plan, 6) for t in shard] == plan


def test_the_file_says_what_it_was_made_of(synthetic_suite: Make, tmp_path: Path) -> None:
    suite = synthetic_suite()
    recipe = recipe_for(suite, "ties", tasks=["task2", "task0"], parameters={"density": 0.5})
    folder = merge_to_folder(recipe, suite, tmp_path / "out")
    with safe_open(folder / "model.safetensors", "pt") as file:
        notes = file.metadata()
    assert notes["format"] == "pt"
    about = json.loads(notes["mergescope"])
    assert about["recipe"]["parameters"] == recipe.parameters
    assert recipe.parameters["density"] == 0.5
    assert about["recipe"]["suite"] == suite.name
    assert make_recipe({**about["recipe"], "suite": str(suite.path)}) == recipe
    assert about["digest"] == recipe.digest(suite)
    assert suite.base is not None
    assert about["inputs"] == {
        "task0": suite.expert("task0").digest,
        "task2": suite.expert("task2").digest,
    }
    assert about["base"] == suite.base.digest
    assert about["versions"]["torch"] == torch.__version__
    assert set(about["versions"]) == {"mergescope", "torch", "python"}
    card = (folder / "README.md").read_text()
    for word in ("TIES", suite.name, suite.base.digest, "density: 0.5", "arXiv:2306.01708"):
        assert word in card
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["merge", "mergescope", "ties"]


def test_the_recipe_in_the_folder_runs_again_from_anywhere(
    synthetic_suite: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = synthetic_suite()
    monkeypatch.chdir(suite.root)
    recipe = make_recipe({"suite": "suite.yaml", "method": "cart", "parameters": {"rank": 2}})
    first = merge_to_folder(recipe, suite, tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    again, loaded = load_recipe(first / "recipe.yaml")
    second = merge_to_folder(again, loaded, tmp_path / "second", FactorStore(tmp_path / "empty"))
    for name in ("model.safetensors", "recipe.yaml", "README.md"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
        assert str(suite.root).encode() not in (first / name).read_bytes()


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_the_chosen_dtype_is_a_single_cast_of_the_merge(
    synthetic_suite: Make, tmp_path: Path, dtype: str
) -> None:
    suite = synthetic_suite()
    recipe = recipe_for(suite, dtype=dtype)
    merged = in_memory(suite, recipe)
    expected = {k: v if k == COUNTER else v.to(getattr(torch, dtype)) for k, v in merged.items()}
    assert_bitwise(read(merge_to_folder(recipe, suite, tmp_path / "out")), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_input_keeps_each_parameters_own(
    suite_of: Make, tmp_path: Path, dtype: torch.dtype
) -> None:
    state = {
        "a.weight": torch.randn(4, 4).to(dtype),
        "flag": torch.tensor([True, False, True]),
        "b": torch.ones(3),
        "none": torch.zeros(0, 3),
        "n": torch.tensor(3, dtype=torch.uint8),
    }
    suite = suite_of({"x": state, "y": state})
    assert_bitwise(read(merge_to_folder(recipe_for(suite), suite, tmp_path / "out")), state)


def test_overflow_in_half_precision_is_refused_and_nothing_is_left(
    suite_of: Make, tmp_path: Path
) -> None:
    big = {"fine": torch.ones(2), "big.weight": torch.full((2, 2), 70_000.0)}
    suite = suite_of({"x": big, "y": big})
    with pytest.raises(OutputError, match=r"'big\.weight'.*float16.*float32"):
        merge_to_folder(recipe_for(suite, dtype="float16"), suite, tmp_path / "out")
    assert leftovers(tmp_path) == []
    merge_to_folder(recipe_for(suite, dtype="bfloat16"), suite, tmp_path / "out")


def test_large_float64_weights_are_not_mistaken_for_overflow(
    suite_of: Make, tmp_path: Path
) -> None:
    state = {"w": torch.tensor([1e300, -1e200], dtype=torch.float64)}
    suite = suite_of({"x": state})
    assert_bitwise(read(merge_to_folder(recipe_for(suite), suite, tmp_path / "out")), state)


@pytest.mark.parametrize("method", ["cart", "ties"])
@pytest.mark.parametrize("stop", [0, 1, 4, 7])
def test_a_cancelled_merge_leaves_nothing(
    synthetic_suite: Make, tmp_path: Path, method: str, stop: int
) -> None:
    suite = synthetic_suite()
    calls: list[str] = []

    def listen(done: int, total: int, label: str) -> None:
        assert 0 <= done <= total
        calls.append(label)
        if len(calls) > stop:
            progress.cancel.set()

    progress = Progress(listen)
    with pytest.raises(Cancelled, match="nothing was written"):
        merge_to_folder(recipe_for(suite, method), suite, tmp_path / "out", progress=progress)
    assert len(calls) == stop + 1
    assert leftovers(tmp_path) == []


def test_progress_names_every_parameter_and_reaches_its_end(
    synthetic_suite: Make, tmp_path: Path
) -> None:
    suite = synthetic_suite()
    events: list[tuple[int, int, str]] = []
    progress = Progress(lambda *event: events.append(event))
    merge_to_folder(recipe_for(suite), suite, tmp_path / "out", progress=progress)
    n = len(suite.parameters)
    assert [label for *_, label in events[:-1]] == list(suite.parameters)
    assert [(done, total) for done, total, _ in events] == [(i, n) for i in range(n + 1)]


@pytest.mark.parametrize("where", ["safetensors_header", "write_tensor", "write_text"])
def test_a_full_disk_is_said_and_leaves_nothing(
    synthetic_suite: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    suite = synthetic_suite()
    holder = Path if where == "write_text" else export
    original, calls = getattr(holder, where), []

    def full(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if where == "write_tensor" and len(calls) < 3:  # after two tensors were written
            return original(*args, **kwargs)
        assert where != "write_text" or leftovers(args[0].parent)  # something had been written
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(holder, where, full)
    with pytest.raises(OutputError, match="disk is full") as caught:
        merge_to_folder(recipe_for(suite), suite, tmp_path / "out")
    assert calls
    assert str(tmp_path / "out") in str(caught.value)
    assert leftovers(tmp_path) == []


def test_a_folder_with_content_is_refused_before_any_work(
    synthetic_suite: Make, tmp_path: Path
) -> None:
    (tmp_path / "precious").write_text("p")
    started: list[str] = []
    progress = Progress(lambda done, total, label: started.append(label))
    suite = synthetic_suite()
    with pytest.raises(OutputError, match="not empty"):
        merge_to_folder(recipe_for(suite), suite, tmp_path, progress=progress)
    assert not started
    assert leftovers(tmp_path) == ["precious"]


@pytest.mark.parametrize("act", ["removed", "replaced"])
def test_an_input_that_changes_in_mid_run_is_refused(
    synthetic_suite: Make, tmp_path: Path, act: str
) -> None:
    suite, other = synthetic_suite(seed=1), synthetic_suite(seed=2)

    def meddle(done: int, total: int, label: str) -> None:
        victim = suite.root / "task1.safetensors"
        if done == 3 and act == "removed":
            victim.unlink()
        elif done == 3:
            (other.root / "task1.safetensors").replace(victim)

    with pytest.raises(CheckpointError, match=r"task1\.safetensors.*(removed|changed)"):
        merge_to_folder(recipe_for(suite), suite, tmp_path / "out", progress=Progress(meddle))
    assert leftovers(tmp_path) == []


def test_a_bad_tensor_in_mid_run_leaves_nothing(suite_of: Make, tmp_path: Path) -> None:
    good = {"a": torch.ones(2), "z": torch.ones(2)}
    suite = suite_of({"x": good, "y": {**good, "z": torch.tensor([1.0, float("nan")])}})
    with pytest.raises(CheckpointError, match=r"y\.safetensors.*'z'.*1 NaN"):
        merge_to_folder(recipe_for(suite), suite, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_a_method_that_needs_a_base_says_so_before_any_work(
    synthetic_suite: Make, tmp_path: Path
) -> None:
    for name, method in methods().items():
        if method.indexed or method.learns is not None:
            continue  # one model per task; what data teach
        suite = synthetic_suite(method.tasks or 3, with_base=False)
        recipe = recipe_for(suite, name)
        runs: list[Callable[[], Any]] = [
            lambda r=recipe, s=suite, n=name: merge_to_folder(r, s, tmp_path / n),
            lambda r=recipe, s=suite: in_memory(s, r),
            lambda r=recipe, s=suite: merged_bytes(r, TensorGroups(s, None, FactorStore()), s),
        ]
        for run in runs:
            if method.needs_base():
                with pytest.raises(SuiteError, match="base"):
                    run()
            else:
                assert run()


def test_a_download_refuses_experts_that_do_not_fit(suite_of: Make) -> None:
    suite = suite_of({"x": {"a": torch.ones(2), "b": torch.ones(2)}, "y": {"a": torch.ones(2)}})
    with pytest.raises(MergeScopeError, match="'b'"):
        merged_bytes(recipe_for(suite), TensorGroups(suite, None, FactorStore()), suite)


def test_a_session_refuses_a_recipe_for_other_tasks(synthetic_suite: Make) -> None:
    suite = synthetic_suite()
    session = MergeSession(suite, ("task0", "task1"), FactorStore())
    with pytest.raises(SuiteError, match="tasks"):
        session.merge(recipe_for(suite))
    session.merge(recipe_for(suite, tasks=["task1", "task0"]))


def test_a_session_decomposes_once_for_all_ranks_and_scales(
    synthetic_suite: Make, tmp_path: Path
) -> None:
    suite = synthetic_suite(seed=21)
    store = FactorStore(tmp_path)
    session = MergeSession(suite, None, store)
    for rank in (1, 0.3, 4, 2):
        for scale in (0.5, 2.0):
            recipe = recipe_for(suite, parameters={"rank": rank, "scale": scale})
            fresh = MergeSession(suite, None, FactorStore()).merge(recipe)
            assert_bitwise(session.merge(recipe), fresh)
    assert store.decompositions == 3 * len(suite.matrices)


def test_write_tensor_casts_once_and_in_row_major_order() -> None:
    stream = io.BytesIO()
    turned = torch.arange(6.0).reshape(2, 3).T
    export.write_tensor(stream, turned, PlannedTensor("w", (3, 2), torch.float16))
    assert stream.getvalue() == turned.to(torch.float16).contiguous().numpy().tobytes()


def test_merged_weights_can_be_used_like_any_tensors(synthetic_suite: Callable[..., Suite]) -> None:
    suite = synthetic_suite()
    recipe = make_recipe({"suite": str(suite.path), "method": "cart"})
    session = MergeSession(suite, None, FactorStore())
    merged = session.merge(recipe)
    before = {name: value.clone() for name, value in merged.items()}
    for value in merged.values():
        value.mul_(2)
    # What a user does to a result never reaches the next merge.
    assert all(value.equal(before[name]) for name, value in session.merge(recipe).items())
    name = suite.matrices[0]
    layer = torch.nn.Parameter(merged[name])
    (layer.sum() ** 2).backward()
    assert layer.grad is not None

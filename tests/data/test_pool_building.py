"""Pools from plan to disk: what is written, from which start, and whether it is the same again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from analysis.outputs.pool_outputs import PoolEvaluator
from data.build_pools import DESIGNS, LINEAR_TASKS, main
from data.pool_building import Member, PoolPlan, build_pool, complete_architecture, vary_members
from data.pool_images import ImageTask
from data.pool_tasks import POOL_TASKS, Sizes
from data.pool_training import Training
from merge_core.errors import Cancelled, OutputError, PoolError
from merge_core.progress import Progress
from merge_core.suites.pool import Pool, Regime, load_pool

CPU = torch.device("cpu")
RESNET = {"layers": [1, 1, 1, 1], "channels": [4, 4, 6, 8], "stem_width": 4}
BUNDLED_NAMES = {f"{task}-linear" for task in LINEAR_TASKS} | {
    f"{task}-{key}-{regime}"
    for key, design in DESIGNS.items()
    for task in design.epochs
    for regime in ("shared", "independent")
}


@pytest.fixture(scope="module")
def letters() -> ImageTask:
    return POOL_TASKS["letters"](Sizes(train=60, val=30, test=30), 0)


def tiny_plan(
    task: ImageTask, regime: Regime, architecture: str = "mlp", **args: object
) -> PoolPlan:
    family, spec = complete_architecture(architecture, args or {"widths": [6], "bias": False}, task)
    training = Training(2, batch=20, rate=0.01, shift=1)
    return PoolPlan(
        name="tiny",
        family=family,
        architecture=spec,
        regime=regime,
        training=training,
        members=tuple(Member(i, 0.01, 0.0, (0, 1)) for i in range(2)),
        mean=task.mean,
        std=task.std,
        pretraining=training if regime == "shared" else None,
    )


def build(folder: Path, task: ImageTask, plan: PoolPlan, seed: int = 0) -> Pool:
    build_pool(folder, plan, task, seed, CPU)
    return load_pool(folder)


def states(pool: Pool, epoch: int) -> list[dict[str, Tensor]]:
    """Stored states of all members after an epoch."""
    return [
        load_file(pool.file(s.weights))
        for member in pool.spec.members
        for s in member.trajectory
        if s.epoch == epoch
    ]


def is_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_the_same_seed_gives_the_same_bytes(letters: ImageTask, tmp_path: Path) -> None:
    plan = tiny_plan(letters, "shared")
    torch.manual_seed(1)
    for place, seed in (("a", 0), ("b", 0), ("c", 1)):
        build(tmp_path / place, letters, plan, seed)
        torch.rand(3)  # whatever else draws random numbers has no part in it
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) == 1 + 2 * 3 + 2
    for name in names:
        first, again, other = ((tmp_path / p / name).read_bytes() for p in "abc")
        assert first == again, name
        assert (first == other) == (name in ("pool.yaml", "inputs.npz")), name


def test_where_members_start(letters: ImageTask, tmp_path: Path) -> None:
    pools = {
        regime: build(tmp_path / regime, letters, tiny_plan(letters, regime))
        for regime in ("shared", "shared_random", "independent")
    }
    for regime in ("shared", "shared_random"):
        start = load_file(tmp_path / regime / "start.safetensors")
        for state in states(pools[regime], 0):
            assert is_equal(state, start)
        first, second = states(pools[regime], 2)
        assert not is_equal(first, second)
    random = load_file(tmp_path / "shared_random" / "start.safetensors")
    trained = load_file(tmp_path / "shared" / "start.safetensors")
    assert not is_equal(random, trained)
    assert pools["independent"].spec.start is None
    assert not (tmp_path / "independent" / "start.safetensors").exists()
    first, second = states(pools["independent"], 0)
    assert not is_equal(first, second)


def test_what_stands_in_the_file(letters: ImageTask, tmp_path: Path) -> None:
    plan = replace(
        tiny_plan(letters, "independent"),
        members=(Member(3, 0.02, 0.5), Member(4, 0.03, 0.25, (1,))),
        mean=(0.0,),
        std=(1.0,),
    )
    spec = build(tmp_path / "pool", letters, plan).spec
    assert [(m.seed, m.learning_rate, m.weight_decay, m.epochs) for m in spec.members] == [
        (3, 0.02, 0.5, 2),
        (4, 0.03, 0.25, 2),
    ]
    assert [s.epoch for s in spec.members[1].trajectory] == [1, 2]
    assert spec.members[1].trajectory[-1].weights == spec.members[1].weights
    assert spec.members[0].trajectory == ()
    assert (spec.data.mean, spec.data.std) == ((0.0,), (1.0,))
    assert spec.architecture.args["num_classes"] == 10
    assert spec.architecture.args["in_chans"] == 1
    assert spec.architecture.args["img_size"] == 20


def test_precision_of_what_is_stored(letters: ImageTask, tmp_path: Path) -> None:
    plan = replace(
        tiny_plan(letters, "shared", "resnet18", **RESNET), members=vary_members(1, 0.01, 0)
    )
    pool = build(tmp_path / "pool", letters, plan)
    for name in ("0.safetensors", "start.safetensors"):
        for key, value in load_file(pool.root / name).items():
            if key.endswith("num_batches_tracked"):
                assert value.dtype == torch.int64
                assert int(value) == (12 if name[0] == "0" else 6)  # 3 steps, 2 epochs, twice
            elif "running" in key:
                assert value.dtype == torch.float32
            else:
                assert value.dtype == torch.float16
    for path in (pool.root, *pool.root.iterdir()):
        assert path.stat().st_mode & 0o044 == 0o044, path  # readable by everybody


def test_rates_of_members_surround_the_middle_one() -> None:
    rates = [member.rate for member in vary_members(10, 0.1, 0.0)]
    assert rates[:5] == rates[5:]
    assert min(rates) < 0.1 < max(rates)
    assert rates[0] == 0.1


@pytest.mark.parametrize("step", [1, 4])
def test_cancelling_leaves_nothing(letters: ImageTask, tmp_path: Path, step: int) -> None:
    progress = Progress()
    seen = []

    def listen(done: int, total: int, label: str) -> None:
        seen.append((done, total, label))
        if done == step:
            progress.cancel.set()

    progress.listener = listen
    with pytest.raises(Cancelled):
        build_pool(tmp_path / "pool", tiny_plan(letters, "shared"), letters, 0, CPU, progress)
    assert list(tmp_path.iterdir()) == []
    assert [done for done, _, _ in seen] == list(range(1, step + 1))
    assert {total for _, total, _ in seen} == {2 + 2 * 2}
    assert seen[0][2] == "common start"


def test_refusals_leave_nothing(letters: ImageTask, tmp_path: Path) -> None:
    plan = tiny_plan(letters, "independent")
    unknown = plan.architecture.model_copy(update={"name": "resnet99"})
    narrow = plan.architecture.model_copy(
        update={"args": {**plan.architecture.args, "img_size": 7}}
    )
    few = plan.architecture.model_copy(
        update={"args": {**plan.architecture.args, "num_classes": 3}}
    )
    cases = [
        (replace(plan, architecture=unknown), "resnet99"),
        (replace(plan, architecture=narrow), "Correct the architecture's args"),
        (replace(plan, architecture=few), "Correct the architecture's args"),
        (replace(plan, members=()), "member"),
        (replace(plan, members=(Member(0, 0.0, 0.0),)), "above 0"),
        (replace(plan, members=(Member(0, 1e6, 0.0),)), "learning rate"),
    ]
    for each, message in cases:
        with pytest.raises(PoolError, match=message):
            build_pool(tmp_path / "pool", each, letters, 0, CPU)
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "mine").touch()
    with pytest.raises(OutputError, match="not empty"):
        build_pool(tmp_path / "pool", plan, letters, 0, CPU)
    assert [path.name for path in (tmp_path / "pool").iterdir()] == ["mine"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pools") / "pools"
    output.mkdir()
    (output / "old").touch()  # what was there before is replaced
    main(["--quick", "--output", str(output)])
    return output


def test_the_quick_build_makes_every_bundled_pool(quick: Path) -> None:
    folders = {path.name for path in quick.iterdir()}
    assert folders == BUNDLED_NAMES | {"inputs"}
    assert [path.name for path in quick.parent.iterdir()] == ["pools"]
    assert {path.stem for path in (quick / "inputs").iterdir()} == set(POOL_TASKS)


@pytest.mark.parametrize("name", sorted(BUNDLED_NAMES))
def test_every_pool_of_the_quick_build_runs(quick: Path, name: str) -> None:
    pool = load_pool(quick / name)
    evaluator = PoolEvaluator(pool)
    assert all(path.is_file() for path in pool.files)
    assert pool.name == name
    for split in ("train", "val", "test"):
        logits = evaluator.member(len(pool) - 1, split).logits  # type: ignore[arg-type]
        assert logits.shape == (len(evaluator.labels(split)), len(evaluator.class_names))  # type: ignore[arg-type]
        assert bool(logits.isfinite().all())
    if pool.spec.family == "Linear":
        assert len(pool) == 12
        assert sorted({m.weight_decay for m in pool.spec.members}) == [0, 1e-4, 1e-2, 0.1]
        assert np.allclose([m.learning_rate for m in pool.spec.members], 0.01)
        lengths = [len(member.trajectory) for member in pool.spec.members]
        assert lengths == [3, 0, 0] * 4
    else:
        assert (pool.start is None) == (pool.spec.regime == "independent")

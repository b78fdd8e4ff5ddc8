"""Builds that are killed, builds that share a pre-training, and the domain that tasks share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data.build_suite
import data.training
from data.build_suite import Build, main
from data.suite_plans import PLANS, QUICK, Plan
from data.tasks import TASKS, draw_auxiliary, stream
from data.tasks.styles import Domain, Paper, clean_style
from merge_core.suites.bundled import bundled_suites
from merge_core.suites.suite import load_suite

CPU = torch.device("cpu")
TINY = replace(
    QUICK,
    pretrained=TASKS[4:7],
    tasks=TASKS[4:7],
    domain=Domain(),
    adaptation=QUICK.pretraining,
    pool=40,
    train=24,
    val=12,
    test=16,
)


def weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {p.relative_to(folder).as_posix(): load_file(p) for p in folder.rglob("*.safetensors")}


def assert_same(first: Path, second: Path) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    for name, state in a.items():
        assert all(torch.equal(state[key], b[name][key]) for key in state), name


def test_a_build_that_was_killed_goes_on_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Build(TINY, 0, tmp_path / "whole", CPU).run()
    monkeypatch.setattr(data.training, "KEEP_EVERY", 1)

    def killed(after: int, name: str) -> None:
        """Begin the build in ``work`` and be killed at a call of a function."""
        kept, calls = getattr(data.build_suite, name), iter(range(after))

        def fragile(*given: object) -> object:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return kept(*given)

        with monkeypatch.context() as patch:
            patch.setattr(data.build_suite, name, fragile)
            with pytest.raises(KeyboardInterrupt):
                Build(TINY, 0, tmp_path / "work", CPU).run()

    begun = data.training._lay_down
    with monkeypatch.context() as patch:

        def lay_down_once(kept: Path, step: int, *rest: object) -> None:
            if step == 2:
                raise KeyboardInterrupt
            begun(kept, step, *rest)  # type: ignore[arg-type]

        patch.setattr(data.training, "_lay_down", lay_down_once)
        with pytest.raises(KeyboardInterrupt):
            Build(TINY, 0, tmp_path / "work", CPU).run()
    killed(0, "fine_tune")  # no expert is done
    killed(1, "fine_tune")  # one expert is done
    first = tmp_path / "work" / whole.name / "experts" / "shapes.safetensors"
    written = first.stat().st_mtime_ns
    resumed = Build(TINY, 0, tmp_path / "work", CPU).run()
    assert first.stat().st_mtime_ns == written
    assert_same(whole, resumed)


def test_another_plan_or_seed_takes_up_nothing(tmp_path: Path) -> None:
    first = Build(TINY, 0, tmp_path, CPU)
    others = (
        Build(TINY, 1, tmp_path, CPU),
        Build(replace(TINY, pretraining=replace(TINY.pretraining, rate=2e-3)), 0, tmp_path, CPU),
    )
    assert len({first.folder, *(other.folder for other in others)}) == 3
    assert len({first.pretraining, *(other.pretraining for other in others)}) == 3
    slower = Build(replace(TINY, finetuning=replace(TINY.finetuning, rate=1e-3)), 0, tmp_path, CPU)
    assert slower.pretraining == first.pretraining
    assert slower.folder != first.folder


def test_all_experts_begin_from_the_adapted_base(tmp_path: Path) -> None:
    still = replace(TINY, finetuning=replace(TINY.finetuning, rate=0.0))
    folder = Build(still, 0, tmp_path, CPU).run()
    base = load_file(folder / "base.safetensors")
    shapes, lines, dots = (
        load_file(folder / f"experts/{task.name}.safetensors") for task in still.tasks
    )
    for key, value in shapes.items():
        assert torch.equal(value, lines[key])
        assert torch.equal(value, dots[key])
    assert any(not torch.equal(value, base[key]) for key, value in shapes.items())
    unadapted = Build(replace(still, adaptation=None), 0, tmp_path, CPU).run()
    expert = load_file(unadapted / "experts/lines.safetensors")
    assert all(torch.equal(value, base[key]) for key, value in expert.items())


def test_the_bundled_suites_share_base_and_inputs(tmp_path: Path) -> None:
    main(["--quick", "--output", str(tmp_path), "--device", "cpu"])
    assert {path.name for path in tmp_path.iterdir()} == set(bundled_suites())
    suites = {name: load_suite(tmp_path / name) for name in bundled_suites()}
    vision, small, apart = suites.values()
    assert vision.tasks == small.tasks == tuple(task.name for task in TASKS)
    assert [len(vision.select([name])) for name in ("8", "14", "20")] == [8, 14, 20]
    assert apart.tasks == ("digits", "letters", "shapes", "lines", "dots", "textures")
    assert small.base is not None
    assert apart.base is not None
    assert apart.base.digest == small.base.digest
    # Frozen heads come of the same pre-training.
    first, second = (load_file(s.root / "heads/digits.safetensors") for s in (small, apart))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not (apart.root / "base.safetensors").exists()
    for suite in (vision, small):
        data_of = suite.spec.experts["moons"].data
        assert data_of is not None
        assert data_of.file is not None
        assert suite.file(data_of.file) == tmp_path / "vision/inputs/moons.npz"
    assert suites["vision-apart"].spec.presets == {}


def test_a_pre_training_is_kept_for_other_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PLANS, "vision", (TINY, TINY))
    apart = replace(TINY, name="apart", domain=None, adaptation=None)
    monkeypatch.setitem(PLANS, "vision-apart", (apart, apart))
    toy = ("--quick", "--device", "cpu")
    main([*toy, "--plan", "vision", "--output", str(tmp_path / "one"), "--keep"])
    kept = list((tmp_path / ".build").glob("pretraining-*.pt"))
    assert len(kept) == 1
    written = kept[0].stat().st_mtime_ns
    main([*toy, "--plan", "vision-apart", "--output", str(tmp_path / "two"), "--keep"])
    assert kept[0].stat().st_mtime_ns == written
    assert_same_base(tmp_path)
    main([*toy, "--plan", "vision-apart", "--output", str(tmp_path / "two")])
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


def assert_same_base(folder: Path) -> None:
    first, second = (load_file(folder / name / "base.safetensors") for name in ("one", "two"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def plan_names(plan: Plan) -> list[str]:
    return [task.name for task in plan.tasks]


@pytest.mark.parametrize("plan", [plan for plan, _ in PLANS.values()], ids=list(PLANS))
def test_plans_know_their_tasks(plan: Plan) -> None:
    names = [task.name for task in plan.pretrained]
    assert [task.name for task in plan.tasks] == [n for n in names if n in plan_names(plan)]
    for name, tasks in plan.presets.items():
        assert len(tasks) == int(name)
    assert (plan.adaptation is None) == (plan.domain is None)


def test_images_of_a_domain_have_its_pattern_in_common_and_one_of_their_own() -> None:
    ink = np.zeros((40, 32, 32), dtype=np.float32)
    paper, domain = Paper((0.9, 0.8, 0.7), (0.1, 0.2, 0.3)), Domain(shade=0.05, mark=0.03)
    means = {
        task: clean_style(ink, paper, stream(0, task), domain, task).mean(axis=0) / 255 - 0.3
        for task in ("", "digits", "dots")
    }
    common = means[""]
    assert abs(common.std() - 0.05) < 0.005
    own = [means[task] - common for task in ("digits", "dots")]
    for mark in own:
        assert abs(mark.std() - 0.03) < 0.005
    correlation = np.corrcoef([common.ravel(), *(mark.ravel() for mark in own)])
    assert np.abs(correlation - np.eye(3)).max() < 0.35


def test_a_mark_covers_squares_of_the_tasks_own() -> None:
    ink = np.zeros((1, 32, 32), dtype=np.float32)
    paper, domain = Paper((0.9, 0.8, 0.7), (0.1, 0.2, 0.3)), Domain(shade=0.0, mark=0.1, squares=3)
    covered = {}
    for task in ("digits", "dots"):
        (image,) = clean_style(ink, paper, stream(0, task), domain, task)
        squares = image.reshape(4, 8, 4, 8, 3).swapaxes(1, 2).reshape(16, -1)
        covered[task] = {place for place in range(16) if np.ptp(squares[place]) > 1}
        assert len(covered[task]) == 3
    assert covered["digits"] != covered["dots"]


def test_a_domain_mixes_colours_and_rulings() -> None:
    paper = Paper((1.0, 0.0, 0.5), (0.0, 1.0, 0.5), "lined", 8.0, 2.0, 0.4)
    mixed = Domain(paper=(0.2, 0.2, 0.2), ink=(0.8, 0.8, 0.8), own=0.25, ruling=0.5).apply(paper)
    np.testing.assert_allclose(mixed.paper, (0.4, 0.15, 0.275))
    np.testing.assert_allclose(mixed.ink, (0.6, 0.85, 0.725))
    assert mixed.strength == 0.2
    assert mixed.ruling == "lined"


def test_auxiliary_images_of_a_domain_have_its_look() -> None:
    domain = Domain(shade=0.0)
    images, labels = draw_auxiliary(60, 0, domain)
    again, _ = draw_auxiliary(60, 0, domain)
    np.testing.assert_array_equal(images, again)
    assert len(np.unique(labels)) == 60
    corner = images[:, :2, :2] / 255
    np.testing.assert_allclose(corner, np.full_like(corner, 0.3), atol=0.003)

"""What is said before a merge: differences, treatment, memory and disk, from headers alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.errors import CheckpointError, SuiteError
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession, check_fits
from merge_core.merging.recipe import make_recipe
from merge_core.output.model_folder import merge_to_folder
from merge_core.suites.estimates import IMPORTS_BYTES
from merge_core.suites.preflight import preflight
from merge_core.suites.suite import Suite

W = torch.ones(4, 6)


def three(odd: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    plain = {"fc.weight": W, "mlp.weight": W, "b": torch.ones(4)}
    return {"a": plain, "b": plain, "odd": odd}


def differences(suite: Suite) -> list[tuple[str, str, str, bool]]:
    return [(d.member, d.parameter, d.kind, d.blocking) for d in preflight(suite).differences]


def test_members_that_fit_have_no_differences(synthetic_suite: Callable[..., Suite]) -> None:
    report = preflight(synthetic_suite())
    assert report.differences == report.blocking == ()


@pytest.mark.parametrize(
    ("odd", "expected"),
    [
        ({"fc.weight": W, "mlp.weight": W}, ("odd", "b", "missing", True)),
        (
            {"fc.weight": W, "mlp.weight": W, "b": torch.ones(4), "more": W},
            ("odd", "more", "extra", False),
        ),
        (
            {"fc.weight": W, "mlp.weight": W.T.contiguous(), "b": torch.ones(4)},
            ("odd", "mlp.weight", "shape", True),
        ),
        (
            {"fc.weight": W, "mlp.weight": W.half(), "b": torch.ones(4)},
            ("odd", "mlp.weight", "dtype", False),
        ),
    ],
)
def test_each_difference_is_told_with_member_and_parameter(
    suite_of: Callable[..., Suite], odd: dict[str, Tensor], expected: tuple[str, str, str, bool]
) -> None:
    suite = suite_of(three(odd))
    assert differences(suite) == [expected]
    if expected[3]:
        with pytest.raises(SuiteError, match=rf"'odd'.*'{expected[1]}'.*{expected[2]}"):
            check_fits(suite, suite.tasks)
        with pytest.raises(SuiteError, match="do not fit"):
            MergeSession(suite, None, FactorStore())
    else:
        check_fits(suite, suite.tasks)


def test_a_base_that_departs_is_told(suite_of: Callable[..., Suite]) -> None:
    plain = three({})["a"]
    suite = suite_of({"a": plain, "b": plain}, base={**plain, "mlp.weight": torch.ones(5, 6)})
    assert differences(suite) == [("base", "mlp.weight", "shape", True)]


def test_everything_is_told_in_one_report(suite_of: Callable[..., Suite]) -> None:
    """Not the first fault alone: whoever repairs it would meet the next after another long wait."""
    good = {"wte.weight": torch.ones(7, 4), "mlp.weight": W, "b": torch.ones(4), "head.weight": W}
    suite = suite_of(
        {
            "gone": good,
            "a": good,
            "short": {**good, "wte.weight": torch.ones(5, 4)},
            "odd": {"mlp.weight": W.T.contiguous(), "wte.weight": torch.ones(7, 4).half()},
            "damaged": good,
        },
        base={**good, "head.weight": torch.ones(2, 6), "only": W},
        decompose=["mlp*", "nowhere.*"],
    )
    suite.file(suite.spec.experts["gone"].weights).unlink()
    break_file(suite, "damaged")
    report = preflight(suite)
    assert [(d.member, d.parameter, d.kind, d.blocking) for d in report.differences] == [
        ("gone", "", "unreadable", True),
        ("damaged", "", "unreadable", True),
        ("short", "wte.weight", "vocabulary", True),
        ("odd", "b", "missing", True),
        ("odd", "head.weight", "head", False),
        ("odd", "mlp.weight", "shape", True),
        ("odd", "wte.weight", "dtype", False),
        ("base", "head.weight", "head", False),
        ("base", "only", "extra", False),
    ]
    assert "does not exist" in report.differences[0].detail
    assert report.notes == ("'nowhere.*' under 'decompose' in suite.yaml matches no parameter",)
    assert report.plan == ()  # nothing that all others share fits
    with pytest.raises(CheckpointError, match="does not exist"):
        check_fits(suite, suite.tasks)


def test_a_base_that_cannot_be_read_is_told_with_the_rest(suite_of: Callable[..., Suite]) -> None:
    plain = three({})["a"]
    suite = suite_of({"a": plain, "b": {**plain, "more": W}}, base=plain)
    suite.file(str(suite.spec.base)).write_bytes(b"")
    report = preflight(suite)
    assert [(d.member, d.kind) for d in report.differences] == [
        ("base", "unreadable"),
        ("a", "missing"),  # or b has too much: only the base could tell
    ]
    assert len(report.plan) == 3


def test_no_member_can_be_read(suite_of: Callable[..., Suite]) -> None:
    suite = suite_of({"a": {"w": W}})
    break_file(suite, "a")
    report = preflight(suite)
    assert [d.kind for d in report.blocking] == ["unreadable"]
    assert report.plan == ()


def test_methods_that_decompose_nothing_take_less_memory(
    synthetic_suite: Callable[..., Suite],
) -> None:
    matrices = preflight(synthetic_suite(shapes={"l0.attn.qkv.weight": (64, 64), "b": (9,)}))
    assert 2 * 64 * 64 * 4 <= matrices.entrywise_bytes - IMPORTS_BYTES
    assert matrices.entrywise_bytes < matrices.memory_bytes == matrices.job.spectral_bytes
    vectors = preflight(synthetic_suite(shapes={"b": (4096,)}))
    assert vectors.entrywise_bytes == vectors.memory_bytes
    assert vectors.factor_bytes == 0 < matrices.factor_bytes


def test_no_tensor_is_read(
    synthetic_suite: Callable[..., Suite], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Checkpoint, name: str) -> Tensor:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(Checkpoint, "read_unchecked", refuse)
    suite = synthetic_suite()
    assert preflight(suite).plan
    with pytest.raises(AssertionError, match="was read"):
        suite.expert("task0").tensor("norm.weight")


def test_the_plan_tells_every_parameters_treatment(synthetic_suite: Callable[..., Suite]) -> None:
    suite = synthetic_suite()
    plan = {row.name: row for row in preflight(suite).plan}
    assert sorted(plan) == sorted(suite.parameters)
    assert {name for name, row in plan.items() if row.decomposed} == set(suite.matrices)
    assert plan["conv.weight"].shape == (5, 3, 3, 3)
    assert plan["bn.num_batches_tracked"].dtype == "int64"


def test_the_disk_estimate_is_the_tensors_size_in_the_merged_file(
    synthetic_suite: Callable[..., Suite], tmp_path: Path
) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        suite = synthetic_suite(dtype=dtype)
        folder = merge_to_folder(make_recipe({"method": "cart"}), suite, tmp_path / str(dtype))
        with safe_open(folder / "model.safetensors", "pt") as file:
            tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
        assert preflight(suite).disk_bytes == sum(t.numel() * t.element_size() for t in tensors)


def test_the_memory_estimate_follows_the_largest_parameter_and_the_experts(
    synthetic_suite: Callable[..., Suite],
) -> None:
    def memory(
        tasks: int = 3, layers: int = 2, width: int = 64, dtype: torch.dtype = torch.float32
    ) -> int:
        shapes = {f"l{i}.attn.qkv.weight": (width, width) for i in range(layers)}
        suite = synthetic_suite(tasks=tasks, shapes=shapes, dtype=dtype, counter=False)
        return preflight(suite).job.spectral_bytes - IMPORTS_BYTES

    assert memory(layers=8) == memory(layers=2)
    assert memory(width=128) == pytest.approx(4 * memory(width=64), rel=0.05)
    assert memory(tasks=6) - memory(tasks=3) >= 3 * 64 * 64 * 4
    assert memory(dtype=torch.float64) > memory()
    # Half precision is converted: all experts at once.
    assert memory(dtype=torch.bfloat16) - memory() == 3 * 64 * 64 * 4


def break_file(suite: Suite, task: str) -> None:
    suite.file(suite.spec.experts[task].weights).write_bytes(b"no longer weights")


def test_experts_that_are_not_chosen_neither_block_nor_narrow_a_merge(
    suite_of: Callable[..., Suite],
) -> None:
    plain = {"mlp.weight": torch.randn(4, 6), "b": torch.ones(4)}
    for place in (0, 1, 2):  # the odd one first, amid, and last
        names = [f"t{i}" for i in range(3)]
        states = dict.fromkeys(names, plain)
        states[names[place]] = {"mlp.weight": torch.ones(2, 2)}
        chosen = tuple(n for i, n in enumerate(names) if i != place)
        recipe = make_recipe({"method": "cart", "tasks": chosen})
        for act in ("narrower", "broken"):
            suite = suite_of(states)
            if act == "broken":
                break_file(suite, names[place])
            assert preflight(suite, chosen).blocking == ()
            merged = MergeSession(suite, chosen, FactorStore()).merge(recipe)
            assert sorted(merged) == ["b", "mlp.weight"]
            torch.testing.assert_close(merged["mlp.weight"].clone(), plain["mlp.weight"])

"""Which tensors a merge has: all members decide, in whatever order they stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import permutations
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from merge_core.errors import CheckpointError, SuiteError
from merge_core.merging.engine import check_fits
from merge_core.merging.recipe import make_recipe
from merge_core.output.model_folder import merge_to_folder
from merge_core.suites.manifest import Manifest
from merge_core.suites.preflight import merge_notes, preflight
from merge_core.suites.suite import Suite

Make = Callable[..., Suite]
State = Mapping[str, Tensor]

QUERY, FIRST, SECOND = (
    "layers.0.self_attn.q_proj.weight",
    "layers.0.mlp.up_proj.weight",
    "norm.weight",
)
DEEP = "layers.1.mlp.up_proj.weight"
IDS, FREQUENCIES = "embeddings.position_ids", "layers.0.rotary_emb.inv_freq"


def network(seed: int, **more: Tensor) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(seed)
    shapes = {QUERY: (4, 4), FIRST: (6, 4), DEEP: (6, 4), SECOND: (4,)}
    drawn = {name: torch.randn(shape, generator=source) for name, shape in shapes.items()}
    return drawn | more


def without(state: State, *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name not in names}


def merged_of(suite: Suite, folder: Path) -> dict[str, Tensor]:
    out = merge_to_folder(make_recipe({"method": "average"}), suite, folder)
    return load_file(out / "model.safetensors")


def in_every_order(
    suite_of: Make, experts: Mapping[str, State], base: State | None, folder: Path
) -> dict[str, Tensor] | str:
    """The model, or the refusal, that every order of the experts gives."""
    found: list[dict[str, Tensor] | str] = []
    for order in permutations(experts):
        suite = suite_of({task: experts[task] for task in order}, base)
        try:
            found.append(merged_of(suite, Path(mkdtemp(dir=folder))))
        except (SuiteError, CheckpointError) as error:
            found.append(str(error))
    first = found[0]
    for other in found[1:]:
        assert type(other) is type(first)
        if isinstance(first, dict) and isinstance(other, dict):
            assert first.keys() == other.keys()
            for name, value in first.items():
                assert value.dtype == other[name].dtype
                torch.testing.assert_close(value, other[name])
    return first


@pytest.mark.parametrize("with_base", [True, False])
def test_an_incomplete_expert_is_named_whatever_the_order(
    suite_of: Make, tmp_path: Path, with_base: bool
) -> None:
    experts = {"a": without(network(1), DEEP), "b": network(2), "c": network(3)}
    base = network(0) if with_base else None
    said = in_every_order(suite_of, experts, base, tmp_path)
    assert isinstance(said, str)
    assert "'a'" in said
    assert repr(DEEP) in said
    assert "missing" in said


@pytest.mark.parametrize("with_base", [True, False])
def test_an_expert_with_more_blocks_is_another_network(
    suite_of: Make, tmp_path: Path, with_base: bool
) -> None:
    shallow = {f"{task}": without(network(i), DEEP) for i, task in enumerate("ab")}
    base = without(network(9), DEEP) if with_base else None
    said = in_every_order(suite_of, {**shallow, "deep": network(4)}, base, tmp_path)
    assert isinstance(said, str)
    assert "'deep'" in said
    assert "networks differ" in said
    two = in_every_order(suite_of, {"a": shallow["a"], "deep": network(4)}, base, tmp_path)
    assert isinstance(two, str)


def test_a_base_that_lacks_a_weight_is_named(suite_of: Make) -> None:
    suite = suite_of({"a": network(1), "b": network(2)}, without(network(0), SECOND))
    with pytest.raises(SuiteError, match=rf"'base'.*'{SECOND}'.*missing, present in a, b"):
        check_fits(suite, suite.tasks)


def test_what_only_one_expert_adds_is_left_out_and_told(suite_of: Make, tmp_path: Path) -> None:
    value = {"v_head.summary.weight": torch.ones(1, 4)}
    experts = {"a": network(1, **value), "b": network(2), "c": network(3)}
    for base in (network(0), None):
        merged = in_every_order(suite_of, experts, base, tmp_path)
        assert isinstance(merged, dict)
        assert merged.keys() == network(0).keys()
    suite = suite_of(experts, network(0))
    report = preflight(suite)
    assert [(d.member, d.kind, d.blocking) for d in report.differences] == [("a", "extra", False)]
    (note,) = merge_notes(suite, suite.tasks)
    assert "v_head.summary.weight" in note
    assert "left out" in note


def test_of_two_experts_nobody_can_say_that_a_tensor_is_extra(
    suite_of: Make, tmp_path: Path
) -> None:
    experts = {"a": network(1, own=torch.ones(1, 4)), "b": network(2)}
    said = in_every_order(suite_of, experts, None, tmp_path)
    assert isinstance(said, str)
    assert "'b'" in said
    assert "'own'" in said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (IDS, torch.arange(5)[None]),
        ("bn.num_batches_tracked", torch.tensor(7)),
        (FREQUENCIES, torch.tensor([1.0, 0.1])),
        ("h.0.attn.bias", torch.ones(1, 1, 3, 3).tril()),
        ("h.0.attn.masked_bias", torch.tensor(-1e4)),
        ("layers.0.blocks.1.attn.relative_position_index", torch.arange(4)),
    ],
)
def test_a_buffer_that_a_member_lacks_comes_from_the_base_or_the_most(
    suite_of: Make, tmp_path: Path, name: str, value: Tensor
) -> None:
    experts = {"a": network(1), "b": network(2, **{name: value}), "c": network(3, **{name: value})}
    for base in (network(0, **{name: value}), network(0), None):
        merged = in_every_order(suite_of, experts, base, tmp_path)
        assert isinstance(merged, dict)
        if base is None or name in base:
            assert torch.equal(merged[name], value)
    suite = suite_of(experts, network(0, **{name: value}))
    assert list(merge_notes(suite, suite.tasks)) == [f"a: {name}: absent; copied from the base"]
    # Nor does it narrow what a method that looks at all parameters first sees.
    for method in ("ties", "dare_ties", "consensus"):
        recipe = make_recipe({"method": method})
        out = merge_to_folder(recipe, suite, tmp_path / method)
        assert torch.equal(load_file(out / "model.safetensors")[name], value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_integers_in_some_members_are_integers_in_the_output(
    suite_of: Make, tmp_path: Path, dtype: torch.dtype
) -> None:
    ids = torch.arange(5)[None]
    experts = {"a": network(1, **{IDS: ids.to(dtype)}), "b": network(2, **{IDS: ids})}
    for base in (network(0, **{IDS: ids}), network(0, **{IDS: ids.to(dtype)}), None):
        merged = in_every_order(suite_of, experts, base, tmp_path)
        assert isinstance(merged, dict)
        assert merged[IDS].dtype == torch.int64
        assert torch.equal(merged[IDS], ids)


def test_without_a_base_the_commonest_value_of_a_buffer_is_taken(
    suite_of: Make, tmp_path: Path
) -> None:
    counts = {"a": 7, "b": 3, "c": 7}
    experts = {
        task: network(i, **{"bn.num_batches_tracked": torch.tensor(count)})
        for i, (task, count) in enumerate(counts.items())
    }
    merged = in_every_order(suite_of, experts, None, tmp_path)
    assert isinstance(merged, dict)
    assert merged["bn.num_batches_tracked"] == 7


def test_weights_of_integers_are_refused(suite_of: Make, tmp_path: Path) -> None:
    packed = {**network(1), FIRST: torch.ones(6, 4, dtype=torch.int8)}
    said = in_every_order(suite_of, {"a": packed, "b": network(2)}, network(0), tmp_path)
    assert isinstance(said, str)
    assert "'a'" in said
    assert "packed or quantised" in said
    bias = {**network(1), "norm.bias": torch.ones(4, dtype=torch.int32)}
    plain = {"norm.bias": torch.ones(4)}
    experts = {"a": bias, "b": network(2, **plain)}
    said = in_every_order(suite_of, experts, network(0, **plain), tmp_path)
    assert isinstance(said, str)
    assert "'a'" in said
    assert "'norm.bias'" in said


@pytest.mark.parametrize("with_base", [True, False])
def test_mixed_precisions_are_written_in_the_widest(
    suite_of: Make, tmp_path: Path, with_base: bool
) -> None:
    dtypes = {"a": torch.float16, "b": torch.bfloat16, "c": torch.float64}
    for tasks, expected in (("ab", torch.float32), ("abc", torch.float64), ("a", torch.float16)):
        experts = {t: {n: v.to(dtypes[t]) for n, v in network(ord(t)).items()} for t in tasks}
        base = network(0) if with_base else None
        merged = in_every_order(suite_of, experts, base, tmp_path)
        assert isinstance(merged, dict)
        for name, value in merged.items():
            assert value.dtype == expected
            mean = np.mean([e[name].double().numpy() for e in experts.values()], axis=0)
            # Three roundings of sums of entries below 8, in the dtype that is computed in.
            tolerance = 8 * 3 * max(torch.finfo(expected).eps, torch.finfo(value.dtype).eps)
            np.testing.assert_allclose(value.double().numpy(), mean, atol=tolerance)


def test_an_encoders_language_head_and_pooler_belong_to_tasks(
    suite_of: Make, tmp_path: Path
) -> None:
    own = {"cls.predictions.decoder.weight": torch.ones(9, 4), "pooler.dense.weight": torch.eye(4)}
    experts = {"a": network(1, **own), "b": network(2)}
    merged = in_every_order(suite_of, experts, network(0, **own), tmp_path)
    assert isinstance(merged, dict)
    for name, value in own.items():
        assert torch.equal(merged[name], value)


def test_a_decoders_own_language_head_may_not_be_missing(suite_of: Make, tmp_path: Path) -> None:
    head = {"model.embed_tokens.weight": torch.ones(9, 4), "lm_head.weight": torch.eye(9, 4)}
    experts = {"a": without(network(1, **head), "lm_head.weight"), "b": network(2, **head)}
    said = in_every_order(suite_of, experts, network(0, **head), tmp_path)
    assert isinstance(said, str)
    assert "'a'" in said
    assert "'lm_head.weight'" in said


def manifest_of(suite: Suite) -> Manifest:
    return suite.manifest(sorted(suite.tasks))


@given(st.data())
def test_no_order_changes_what_is_decided(suite_of: Make, data: st.DataObject) -> None:
    """Members with what they have drawn at random: one verdict, one set of tensors."""
    names = [*network(0), IDS, FREQUENCIES, "pooler.dense.weight", "head.weight", "odd"]
    floating = (torch.float32, torch.float16)
    dtypes = {IDS: (torch.float16, torch.int64), FREQUENCIES: (*floating, torch.int32)}

    def member(i: int) -> dict[str, Tensor]:
        full = network(i, odd=torch.ones(3))
        full |= {IDS: torch.arange(3), FREQUENCIES: torch.ones(2)}
        full |= {"pooler.dense.weight": torch.eye(4), "head.weight": torch.ones(3 + i % 2, 4)}
        lost = data.draw(st.sets(st.sampled_from(names), max_size=2))
        other = data.draw(st.sampled_from(names))
        kinds = dtypes.get(other, floating)
        full[other] = full[other].to(data.draw(st.sampled_from(kinds)))
        return without(full, *lost) or {SECOND: full[SECOND]}

    experts = {task: member(i) for i, task in enumerate("abc")}
    base = member(7) if data.draw(st.booleans()) else None
    order = data.draw(st.permutations(list(experts)))
    one = manifest_of(suite_of(experts, base))
    other = manifest_of(suite_of({task: experts[task] for task in order}, base))
    for field in ("infos", "buffers", "also_written", "copied", "differences", "completed"):
        assert getattr(one, field) == getattr(other, field), field

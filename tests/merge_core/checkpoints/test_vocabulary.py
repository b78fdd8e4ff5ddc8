"""Members whose vocabularies or heads differ in size, row by row against brute force."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from merge_core.checkpoints.vocabulary import complete_rows, filler, longest_shape
from merge_core.errors import SuiteError
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession, check_fits
from merge_core.merging.recipe import make_recipe
from merge_core.output.layout import layout
from merge_core.output.model_folder import merge_to_folder, output_plan
from merge_core.suites.preflight import preflight
from merge_core.suites.suite import Suite, load_suite
from merge_core.task_vectors import TensorGroups

Make = Callable[..., Suite]
WTE, HEAD, FC = "transformer.wte.weight", "lm_head.weight", "transformer.h.0.mlp.c_fc.weight"


def member(rows: int, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        WTE: torch.randn(rows, 4, generator=g),
        HEAD: torch.randn(rows, 4, generator=g),
        FC: torch.randn(4, 8, generator=g),
    }


EXPERTS = {"a": member(6, 1), "b": member(8, 2), "c": member(7, 3)}
BASE = member(6, 0)


def merge_suite(suite: Suite, method: str, **parameters: float) -> dict[str, Tensor]:
    recipe = make_recipe({"method": method, "parameters": parameters})
    return MergeSession(suite, None, FactorStore()).merge(recipe)


def row_of(state: dict[str, Tensor], name: str, row: int) -> Tensor | None:
    return state[name][row] if row < len(state[name]) else None


@pytest.mark.parametrize("name", [WTE, HEAD])
def test_common_rows_are_merged_and_the_others_come_from_those_that_have_them(
    suite_of: Make, name: str
) -> None:
    suite = suite_of(EXPERTS, vocabulary="common")  # without a base
    average = merge_suite(suite, "average")[name]
    assert average.shape == (8, 4)
    for row in range(8):
        have = [value for e in EXPERTS.values() if (value := row_of(e, name, row)) is not None]
        torch.testing.assert_close(average[row], torch.stack(have).mean(0))


@pytest.mark.parametrize("base_rows", [5, 6, 9])
def test_with_a_base_an_expert_without_a_row_leaves_it_alone(
    suite_of: Make, base_rows: int
) -> None:
    base = member(base_rows, 0)
    suite = suite_of(EXPERTS, base, vocabulary="common")
    found = merge_suite(suite, "task_arithmetic", scale=0.7)[WTE]
    assert found.shape == (max(8, base_rows), 4)
    for row in range(len(found)):
        have = [value for e in EXPERTS.values() if (value := row_of(e, WTE, row)) is not None]
        start = base[WTE][row] if row < base_rows else torch.stack(have).mean(0)
        expected = start + 0.7 * sum((value - start for value in have), torch.zeros(4))
        torch.testing.assert_close(found[row], expected)


@pytest.mark.parametrize("method", ["average", "cart", "ties", "dare_ties", "task_arithmetic"])
def test_a_row_that_one_expert_alone_has_is_its_own(suite_of: Make, method: str) -> None:
    suite = suite_of(EXPERTS, BASE, vocabulary="common")
    torch.testing.assert_close(merge_suite(suite, method)[WTE][7], EXPERTS["b"][WTE][7])


def test_the_bases_rows_are_written_as_they_are(suite_of: Make, tmp_path: Path) -> None:
    suite = suite_of(EXPERTS, BASE, vocabulary="base")
    recipe = make_recipe({"method": "task_arithmetic"})
    file = load_file(merge_to_folder(recipe, suite, tmp_path / "out") / "model.safetensors")
    held = merge_suite(suite, "task_arithmetic")
    assert sorted(file) == sorted(held) == sorted(BASE)
    assert sorted(TensorGroups(suite, None, FactorStore()).dtypes) == sorted(held)
    for name in (WTE, HEAD):
        assert torch.equal(file[name], BASE[name])
        assert torch.equal(held[name], BASE[name])
    assert not torch.equal(file[FC], BASE[FC])
    assert set(preflight(suite).notes) == {
        f"{name} is written as it is in the base (vocabulary: base)" for name in (WTE, HEAD)
    }


def test_what_is_planned_is_what_is_written(suite_of: Make, tmp_path: Path) -> None:
    for rule, rows in (("common", 8), ("base", 6)):
        suite = suite_of(EXPERTS, BASE, vocabulary=rule)
        folder = merge_to_folder(make_recipe({"method": "average"}), suite, tmp_path / rule)
        file = load_file(folder / "model.safetensors")
        assert file[WTE].shape == (rows, 4)
        assert preflight(suite).disk_bytes == sum(t.nbytes for t in file.values())


@pytest.mark.parametrize("base_first", [True, False])
def test_a_longer_vocabulary_opens_in_its_library(tmp_path: Path, base_first: bool) -> None:
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=8)
    states = {}
    for seed, (name, tokens) in enumerate({"base": 20, "a": 20, "b": 23}.items()):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
        if tokens > 20:
            model.resize_token_embeddings(tokens, mean_resizing=False)
        model.save_pretrained(tmp_path / name)
        states[name] = model.state_dict()
    document = {
        "name": "tokens",
        "vocabulary": "common",
        "experts": {name: {"weights": name} for name in "ab"},
        **({"base": "base"} if base_first else {}),
    }
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(document))
    suite = load_suite(tmp_path)
    folder = merge_to_folder(make_recipe({"method": "average"}), suite, tmp_path / "out")
    opened, found = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values())
    wte = opened.state_dict()[WTE]
    assert wte.shape == (23, 8)
    torch.testing.assert_close(wte[20:], states["b"][WTE][20:])
    torch.testing.assert_close(wte[:20], (states["a"][WTE] + states["b"][WTE][:20]) / 2)


def test_by_default_a_merge_is_refused_and_told_what_to_do(suite_of: Make) -> None:
    suite = suite_of(EXPERTS, BASE)
    with pytest.raises(SuiteError, match=r"8 rows.*'vocabulary: common'"):
        check_fits(suite, suite.tasks)
    assert {(d.member, d.parameter, d.kind) for d in preflight(suite).blocking} == {
        (task, name, "vocabulary") for task in ("b", "c") for name in (WTE, HEAD)
    }
    check_fits(suite, ("a",))  # the base has as many rows
    with pytest.raises(SuiteError, match="needs a base"):
        check_fits(suite_of(EXPERTS, vocabulary="base"), ("a", "b"))


def test_a_rule_for_vocabularies_excuses_no_other_shape(suite_of: Make) -> None:
    wide = {**EXPERTS["b"], WTE: torch.ones(8, 5)}
    deep = {**EXPERTS["b"], FC: torch.ones(5, 8)}
    for odd in (wide, deep):
        suite = suite_of({"a": EXPERTS["a"], "odd": odd}, vocabulary="common")
        with pytest.raises(SuiteError, match=r"'odd'.*shape"):
            check_fits(suite, suite.tasks)


def test_the_rule_counts_in_the_digest_only_where_it_is_used(suite_of: Make) -> None:
    recipe = make_recipe({"method": "average"})
    plain, common, base = (
        suite_of(EXPERTS, BASE, **fields)
        for fields in ({}, {"vocabulary": "common"}, {"vocabulary": "base"})
    )
    assert len({recipe.digest(suite) for suite in (plain, common, base)}) == 3
    assert recipe.digest(plain) == recipe.digest(suite_of(EXPERTS, BASE, vocabulary="refuse"))


def test_a_vocabulary_of_several_lengths_is_not_decomposed_even_if_asked(suite_of: Make) -> None:
    suite = suite_of(EXPERTS, BASE, vocabulary="common", decompose=["*wte*"])
    group = next(g for g in TensorGroups(suite, None, FactorStore()).members if g.name == WTE)
    assert not group.decomposed
    assert suite.matrices == (FC,)
    assert not next(row for row in preflight(suite).plan if row.name == WTE).decomposed
    merge_suite(suite, "cart")


def test_heads_of_tasks_with_other_classes_stay_with_their_tasks(
    suite_of: Make, tmp_path: Path
) -> None:
    def with_head(seed: int, classes: int | None) -> dict[str, Tensor]:
        state = {"blocks.0.mlp.fc1.weight": member(6, seed)[FC]}
        return state if classes is None else {**state, "head.weight": torch.ones(classes, 4)}

    suite = suite_of({"a": with_head(1, 3), "b": with_head(2, 5), "c": with_head(3, None)})
    report = preflight(suite)
    assert report.blocking == ()
    assert [(d.member, d.kind) for d in report.differences] == [("b", "head"), ("c", "head")]
    assert [row.name for row in report.plan] == ["blocks.0.mlp.fc1.weight"]
    assert sorted(merge_suite(suite, "average")) == ["blocks.0.mlp.fc1.weight"]
    # A base of its own classes keeps its head; heads that agree are averaged as before.
    suite = suite_of({"a": with_head(1, 3), "b": with_head(2, 5)}, with_head(0, 4))
    folder = merge_to_folder(make_recipe({"method": "average"}), suite, tmp_path / "out")
    assert load_file(folder / "model.safetensors")["head.weight"].shape == (4, 4)
    agreeing = suite_of({"a": with_head(1, 3), "b": with_head(2, 3)})
    assert "head.weight" in merge_suite(agreeing, "average")


def test_the_plan_of_the_output_names_everything_once(suite_of: Make) -> None:
    for rule in ("common", "base"):
        suite = suite_of(EXPERTS, BASE, vocabulary=rule)
        groups = TensorGroups(suite, None, FactorStore())
        where = layout(groups)
        plan = output_plan(make_recipe({"method": "average"}), groups, where)
        assert sorted(each.name for each in plan) == sorted(BASE)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.none() | st.integers(1, 6))
def test_filling_row_by_row(lengths: list[int], base_rows: int | None) -> None:
    experts = [torch.full((n, 2), float(i + 1)) for i, n in enumerate(lengths)]
    base = None if base_rows is None else torch.full((base_rows, 2), -1.0)
    rows = max([*lengths, base_rows or 0])
    filling = filler(experts, base, rows)
    for row in range(rows):
        have = [i + 1 for i, n in enumerate(lengths) if row < n]
        inside = base_rows is not None and row < base_rows
        expected = -1.0 if inside else sum(have) / len(have)
        assert filling[row].tolist() == pytest.approx([expected] * 2)
    for expert in experts:
        whole = complete_rows(expert, filling)
        assert torch.equal(whole[: len(expert)], expert)
        assert torch.equal(whole[len(expert) :], filling[len(expert) :])


def test_longest() -> None:
    assert longest_shape([(5, 3), (7, 3), (6, 3)]) == (7, 3)
    assert longest_shape([(5,), (7,)]) == (7,)
    for shapes in (
        [(5, 3), (5, 3)],
        [(5, 3), (5, 4)],
        [(5, 3), (7, 4)],
        [(), (5,)],
        [(5,), (5, 1)],
    ):
        assert longest_shape(shapes) is None

"""Validation and test images: which splits they come from, that they never overlap."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.data_sources.splits import choose, draw_rows
from merge_core.errors import SuiteError
from tests.analysis.data_sources.files import spec

WHAT = "data of task 'a'"


@pytest.mark.parametrize(
    ("fields", "names", "val", "test", "held_out"),
    [
        ({}, ["train", "val", "test"], "val", "test", False),
        ({}, ["train", "validation", "test"], "validation", "test", False),
        ({}, ["train", "test"], "train", "test", True),
        ({}, ["train", "t10k"], "train", "t10k", True),
        ({}, ["train", "test", "extra"], "train", "test", True),
        ({}, ["train", "val"], "train", "val", True),
        ({}, ["all"], "all", "all", True),
        ({}, ["train"], "train", "train", True),
        ({}, ["test"], "test", "test", True),
        ({"val": "test"}, ["train", "test"], "test", "test", True),
        ({"val": "extra"}, ["train", "test", "extra"], "extra", "test", False),
        ({"val": "b", "test": "a"}, ["a", "b"], "b", "a", False),
        ({"test": "val"}, ["train", "val", "test"], "train", "val", True),
    ],
)
def test_splits_are_taken_as_stated(
    fields: dict[str, Any], names: list[str], val: str, test: str, held_out: bool
) -> None:
    chosen = choose(spec(file="a.npz", **fields), names, WHAT)
    assert (chosen.val, chosen.test, chosen.held_out) == (val, test, held_out)


@pytest.mark.parametrize(
    ("fields", "names", "words"),
    [
        ({}, ["a", "b"], "which split is for testing.*a, b"),
        ({}, [], "which split is for testing.*none"),
        ({"val": "val"}, ["train", "val"], "which split is for testing"),
        ({"val": "dev"}, ["train", "test"], "no split 'dev'; there is train, test"),
        ({"test": "dev"}, ["train", "test"], "no split 'dev'.*Correct 'test'"),
    ],
)
def test_splits_that_are_not_there_are_refused(
    fields: dict[str, Any], names: list[str], words: str
) -> None:
    with pytest.raises(SuiteError, match=rf"Data of task 'a'.*{words}"):
        choose(spec(file="a.npz", **fields), names, WHAT)


@given(
    count=st.integers(2, 300),
    share=st.floats(0.001, 0.999),
    seed=st.integers(0, 2**40),
    limit=st.none() | st.integers(1, 400),
)
def test_a_split_in_two_never_overlaps_and_loses_nothing(
    count: int, share: float, seed: int, limit: int | None
) -> None:
    whole = spec(file="a.npz", val_share=share, seed=seed)
    chosen = choose(whole, ["all"], WHAT)
    val, test = (draw_rows(whole, chosen, for_test, count, WHAT) for for_test in (False, True))
    assert sorted([*val, *test]) == list(range(count))
    assert 0 < len(val) < count
    assert abs(len(val) - share * count) <= 1
    limited = whole.model_copy(update={"limit": limit})
    for part, for_test in ((val, False), (test, True)):
        again = draw_rows(limited, chosen, for_test, count, WHAT)
        assert again.tolist() == part[:limit].tolist()


def test_splits_of_their_own_are_used_whole_and_shuffled_by_the_seed() -> None:
    data = spec(file="a.npz", seed=1)
    chosen = choose(data, ["val", "test"], WHAT)
    orders = [draw_rows(data, chosen, for_test, 50, WHAT).tolist() for for_test in (False, True)]
    for order in orders:
        assert sorted(order) == list(range(50))
        assert order != list(range(50))
    other = draw_rows(data.model_copy(update={"seed": 2}), chosen, True, 50, WHAT).tolist()
    assert other != orders[1]
    carved = choose(data, ["train", "test"], WHAT)
    assert len(draw_rows(data, carved, False, 50, WHAT)) == 5
    assert len(draw_rows(data, carved, True, 50, WHAT)) == 50
    with pytest.raises(SuiteError, match=r"the split 'all' has 1 images"):
        draw_rows(data, choose(data, ["all"], WHAT), True, 1, WHAT)
    with pytest.raises(SuiteError, match=r"the split 'test' has 0 images"):
        draw_rows(data, chosen, True, 0, WHAT)

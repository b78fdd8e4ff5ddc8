"""Sentences of "Interference" on made-up frames, in which fixed sentences would be false."""

from __future__ import annotations

import pandas as pd

from ui.words.interference import (
    describe_centring,
    describe_condition,
    describe_cosines,
    describe_level,
    describe_rank,
)


def pairs(origin: str, values: list[float], name: str) -> pd.DataFrame:
    """All ordered pairs of three tasks; the values are of ab, ac and bc."""
    known = dict(zip((("a", "b"), ("a", "c"), ("b", "c")), values, strict=True))
    rows = [
        (one, other, 1.0 if one == other else known.get((one, other), known.get((other, one))))
        for one in "abc"
        for other in "abc"
    ]
    frame = pd.DataFrame(rows, columns=["first", "second", name])
    return frame.assign(origin=origin, random=0.1)


def test_negative_cosines_are_not_called_positive() -> None:
    centred = pairs("average", [-0.4, -0.5, -0.6], "cosine")
    mixed = describe_cosines([centred, pairs("base", [-0.2, 0.1, 0.3], "cosine")])
    assert "2 of 3 pairs have a positive cosine and 1 not" in mixed
    assert "from -0.200 to 0.300, mean 0.067" in mixed
    negative = describe_cosines([centred, pairs("base", [-0.2, -0.1, -0.3], "cosine")])
    assert "all 3 pairs have a negative cosine" in negative
    positive = describe_cosines([centred, pairs("base", [0.2, 0.1, 0.3], "cosine")])
    assert "all 3 pairs have a positive cosine" in positive
    alone = describe_cosines([centred])
    assert "riginal" not in alone
    assert "= -0.500" in alone
    assert "(here -0.500)" in alone


def test_centring_is_said_to_do_what_it_does() -> None:
    low, high = pairs("average", [0.1] * 3, "overlap"), pairs("base", [0.3] * 3, "overlap")
    assert "(there) centring lowers it: mean 0.100 against 0.300" in describe_centring(
        [low, high], "there"
    )
    assert "centring raises it: mean 0.300 against 0.100" in describe_centring([high, low], "x")
    assert "hardly changes" in describe_centring([low, low], "x")
    assert "no base" in describe_centring([low], "x")


def test_the_level_of_random_directions_is_told() -> None:
    said = describe_level(
        [pairs("average", [0.2] * 3, "overlap"), pairs("base", [0.05] * 3, "overlap")]
    )
    assert "by 0.200 about the average (at random by 0.100)" in said
    assert "by 0.050 about the base (at random by 0.100)" in said


def test_the_rank_is_said_to_do_what_the_curve_does() -> None:
    def curve(first: float, last: float) -> pd.DataFrame:
        return pd.DataFrame({"origin": "average", "share": [1.0, 0.1], "overlap": [last, first]})

    assert "raises the mean overlap of the centred vectors (0.100 to 0.300)" in describe_rank(
        curve(0.1, 0.3)
    )
    assert "lowers" in describe_rank(curve(0.3, 0.1))
    assert "hardly changes" in describe_rank(curve(0.3, 0.301))


def test_what_is_expected_of_centring_is_told_beside_what_it_does() -> None:
    frame = pd.DataFrame({"common": [0.05, 0.3], "ratio": [1.1, 0.6], "needed": 0.125})
    both = describe_condition(frame)
    assert "have 5.0% to 30.0% of their leading directions in common" in both
    assert "12.5% (one in 8 tasks)" in both
    assert "expected to help in 1 of 2 layers, and it lowers interference in 1 of 2 layers." in both
    against = describe_condition(frame.assign(common=0.01))
    assert "cannot be expected to help here, and it lowers interference in 1 of 2" in against
    assert "It can help here, and" in describe_condition(frame.assign(common=0.5))

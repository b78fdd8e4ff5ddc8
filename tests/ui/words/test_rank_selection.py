"""Remarks of "Rank and scale" on made-up picks and points."""

from __future__ import annotations

import math

import pandas as pd

from analysis.rank_selection.evidence.shipped import evidence, kind_of
from ui.words.rank_selection import candidates, describe_evidence, describe_spread


def picks(*rows: tuple[str, float, float]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["proxy", "rank", "scale"])
    return frame.assign(title=frame["proxy"].str.capitalize())


def test_rules_that_spread_are_remarked_on() -> None:
    said = describe_spread(picks(("a", 0.02, 1.0), ("b", 1.0, 8.0), ("c", 0.1, math.nan)))
    assert "The 3 rules do not agree" in said
    assert "ranks from 2 % (A) to 100 % (B)" in said
    assert "λ from 1 (A) to 8 (B)" in said
    only = describe_spread(picks(("a", 0.1, 1.0), ("b", 0.12, 8.0)))
    assert "ranks" not in only
    assert "λ from 1" in only
    assert describe_spread(picks(("a", 0.1, 1.0), ("b", 0.12, 1.2))) == ""
    assert describe_spread(picks(("a", math.nan, 1.0), ("b", math.nan, 1.2))) == ""


def test_candidates_are_the_recommendation_and_others() -> None:
    points = pd.DataFrame(
        {"rank": [0.1, 0.03, 0.02], "scale": [5.0, 2.0, 1.0], "tied": [True, True, False]}
    )
    found = candidates(
        0.1, 5.0, points, picks(("accuracy", 0.1, 5.0), ("x", 0.08, 3.0)), "accuracy"
    )
    assert [each[:2] for each in found] == [(0.1, 5.0), (0.03, 2.0), (0.08, 3.0)]
    assert "fewest directions of the 2 settings" in found[1].why
    alone = candidates(0.1, 5.0, points.iloc[:1], picks(("accuracy", 0.1, 5.0)), "accuracy")
    assert [each[:2] for each in alone] == [(0.1, 5.0)]
    assert len(candidates(0.1, 5.0, points.iloc[:0], picks(("knee", 0.1, 5.0)), "knee")) == 1


def test_the_evidence_says_where_it_is_from() -> None:
    suites = sorted(set(evidence()["suite"]))
    said = describe_evidence(suites[-1], "cart", "CART")
    assert all(f"**{name}**" in said and kind_of(name) in said for name in suites)
    assert "This very suite is among them" in said
    assert "not among them" in describe_evidence("mine", "cart", "CART")
    assert "never measured" in describe_evidence("mine", "unheard_of", "?")

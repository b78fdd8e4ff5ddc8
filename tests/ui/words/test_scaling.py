"""Sentences of "How does it scale?" on made-up frames."""

from __future__ import annotations

import pandas as pd

from ui.words.scaling import describe_sizes, describe_tasks


def frame(rows: list[tuple[str, int, float]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["method", "count", "normalised"])


def test_the_best_at_both_ends_is_named_and_what_it_loses() -> None:
    said = describe_tasks(
        frame([("A", 2, 0.95), ("A", 2, 0.97), ("B", 2, 0.9), ("A", 8, 0.7), ("B", 8, 0.8)])
    )
    assert "With 2 tasks A keeps most (96.0% of the experts, in the mean over 2 subsets)" in said
    assert "with 8 tasks B (80.0%)" in said
    assert "From 2 to 8 tasks B loses 10.0 points" in said


def test_what_gains_or_was_not_there_is_not_said_to_lose() -> None:
    assert "A gains 5.0 points" in describe_tasks(frame([("A", 2, 0.8), ("A", 3, 0.85)]))
    said = describe_tasks(frame([("A", 2, 0.8), ("B", 3, 0.7)]))
    assert "lose" not in said
    assert "Of 4 tasks A keeps most: 80.0%" in describe_tasks(frame([("A", 4, 0.8)]))


def test_the_best_of_each_size_is_named() -> None:
    sizes = frame([("A", 8, 0.8), ("B", 8, 0.7), ("A", 8, 0.85), ("B", 8, 0.9)])
    said = describe_sizes(sizes.assign(parameters=[3e5, 3e5, 1.1e6, 1.1e6]))
    assert "0.3 M parameters: A (80.0%); 1.1 M parameters: B (90.0%)" in said

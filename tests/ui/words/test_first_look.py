"""The first page's sentences, on made-up frames."""

from __future__ import annotations

import pandas as pd

from ui.words.first_look import describe_build_up, describe_flips


def built(part: str, k: int, energy: float, values: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"part": part, "k": k, "energy": energy, "value": values})


def test_a_change_is_measured_by_the_weights_and_by_its_directions() -> None:
    frame = pd.concat(
        [
            built("average", 0, 1.0, [3.0, -4.0]),
            built("change", 1, 0.6, [9.0, 9.0]),
            built("change", 4, 0.85, [9.0, 9.0]),
            built("change", 16, 1.0, [0.3, 0.4]),
            built("sum", 16, 1.0, [0.0, 0.0]),
        ]
    )
    said = describe_build_up(frame, "digits", 3)
    assert "by 10 % of their size" in said
    assert "4 of 16 directions hold 85 % of what digits changes" in said
    assert "the 3 changes add up to nothing" in said


def test_flips_are_counted_over_all_tasks() -> None:
    frame = pd.DataFrame(
        {
            "task": ["a", "a", "b", "b"],
            "kind": ["righted", "spoilt"] * 2,
            "count": [3, 1, 1200, 0],
            "inputs": [10, 10, 2000, 2000],
        }
    )
    assert describe_flips(frame, "CART") == (
        "Of 2,010 test images CART gets 1,203 right that the average gets wrong, and 1 wrong that "
        "the average gets right."
    )

"""What the first page says of a matrix and of images, made from the frames that are drawn."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.figures.style import percent

MOST = 0.8  # of the energy: what counts as most of it


def describe_build_up(frame: pd.DataFrame, task: str, tasks: int) -> str:
    """How large a change is, how few directions hold most of it, and what all of them add up to.

    Args:
        frame: of :func:`analysis.spectral.build_up.build_up`.
        task: whose change it is.
        tasks: how many experts there are.
    """
    change = frame[frame["part"] == "change"]
    energies = change.groupby("k")["energy"].first()
    r = int(energies.index.max())
    sizes = {
        part: float(np.sqrt((cells["value"].astype(float) ** 2).mean()))
        for part, cells in (
            ("average", frame[frame["part"] == "average"]),
            ("change", change[change["k"] == r]),
        )
    }
    few = int(energies.index[energies >= MOST].min())
    moved = f"{sizes['change'] / sizes['average']:.0%}" if sizes["average"] else "all"
    words = f"Fine-tuning moved these weights by {moved.replace('%', ' %')} of their size. "
    words += f"{few} of {r} directions hold {percent(round(float(energies[few]), 2))} of what "
    words += f"{task} changes: few are strong. "
    return words + (
        f"With all directions the {tasks} changes add up to nothing, since they are taken about "
        "their own average; a merge that is more than the average must leave some out."
    )


def describe_flips(frame: pd.DataFrame, after: str, inputs: str = "images") -> str:
    """How many inputs a merge puts right that the average gets wrong, and how many it spoils.

    Args:
        frame: of :func:`analysis.evaluation.flips.flipped_inputs`, the average before.
        after: the title of the other merge.
        inputs: what they are.
    """
    counts = frame.groupby("kind")["count"].sum()
    total = frame[frame["kind"] == "righted"]["inputs"].sum()
    return (
        f"Of {total:,} test {inputs} {after} gets {counts['righted']:,} right that the average "
        f"gets wrong, and {counts['spoilt']:,} wrong that the average gets right."
    )

"""What "Interference" says of its figures, made from the frames that are drawn."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

HARDLY = 0.05  # relative changes below it are called no change


def different(frame: pd.DataFrame) -> pd.DataFrame:
    """The pairs of two different tasks."""
    return frame[frame["first"] != frame["second"]]


def describe_level(frames: Sequence[pd.DataFrame]) -> str:
    """The mean overlap about each origin, beside that of directions turned at random."""
    parts = []
    for frame in frames:
        pairs = different(frame)
        mean, level = pairs["overlap"].mean(), pairs["random"].mean()
        about = "average" if (frame["origin"] == "average").all() else "base"
        parts.append(f"by {mean:.3f} about the {about} (at random by {level:.3f})")
    return f"Two tasks overlap {' and '.join(parts)}, in the mean over pairs."


def describe_centring(pairs: Sequence[pd.DataFrame], where: str) -> str:
    """What centring does to the mean overlap here, as measured.

    Args:
        pairs: about the average, and about the base where there is one.
        where: the layer, or the whole model.
    """
    if len(pairs) < 2:
        return "The suite names no base, so only centred task vectors can be shown."
    centred, original = (different(frame)["overlap"].mean() for frame in pairs)
    verb = "raises" if centred > original else "lowers"
    if abs(centred - original) < HARDLY * original:
        verb = "hardly changes"
    return (
        f"Here ({where}) centring {verb} it: mean {centred:.3f} against {original:.3f}. Centring "
        "takes away what all tasks have in common, and puts a part of every task into all others; "
        "which of the two weighs more depends on how much they have in common."
    )


def describe_rank(curves: pd.DataFrame) -> str:
    """What raising the rank does to the mean overlap of the centred vectors, as measured."""
    centred = curves[curves["origin"] == "average"].sort_values("share")
    low, high = (float(centred["overlap"].iloc[i]) for i in (0, -1))
    verb = "hardly changes"
    if abs(high - low) >= HARDLY * low:
        verb = "raises" if high > low else "lowers"
    return (
        f"Here going from the lowest to the full rank {verb} the mean overlap of the centred "
        f"vectors ({low:.3f} to {high:.3f})."
    )


def describe_cosines(cosines: Sequence[pd.DataFrame]) -> str:
    """What the cosines of whole task vectors are, as measured.

    Args:
        cosines: about the average, and about the base where there is one.
    """
    centred, *rest = map(different, cosines)
    T = cosines[0]["first"].nunique()
    words = (
        "Centred task vectors sum to zero, so the mean of their cosines is −1/(T−1) = "
        f"{-1 / (T - 1):.3f} if all have one norm (here {centred['cosine'].mean():.3f}); only the "
        "pattern around that value carries meaning."
    )
    for original in rest:
        values = original["cosine"]
        span = f"from {values.min():.3f} to {values.max():.3f}, mean {values.mean():.3f}"
        count, negative = len(values) // 2, int((values < 0).sum()) // 2
        if negative == 0:
            said = f"all {count} pairs have a positive cosine"
        elif negative == count:
            said = f"all {count} pairs have a negative cosine"
        else:
            said = f"{count - negative} of {count} pairs have a positive cosine and {negative} not"
        words = f"Of the original task vectors {said} ({span}). {words}"
    return words


def describe_condition(frame: pd.DataFrame) -> str:
    """What was expected of centring in each layer, and what it does.

    Args:
        frame: of :func:`analysis.spectral.centring.centring_frame`.
    """
    count, needed = len(frame), float(frame["needed"].iloc[0])
    above = frame["common"] > frame["needed"]
    falls = frame["ratio"] < 1
    low, high = (f"{value:.1%}" for value in frame["common"].agg(["min", "max"]))
    span = low if low == high else f"{low} to {high}"
    layers = "layers" if count > 1 else "layer"
    told = f"Tasks have {span} of their leading directions in common; more than about {needed:.1%} "
    told += f"(one in {round(1 / needed)} tasks) is needed for centring to help. "
    if above.all() or not above.any():
        said = "It can help here" if above.all() else "So it cannot be expected to help here"
    else:
        said = f"It can be expected to help in {int(above.sum())} of {count} layers"
    measured = f"it lowers interference in {int(falls.sum()) or 'none'} of {count} {layers}"
    return f"{told}{said}, and {measured}."

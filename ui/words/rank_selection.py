"""What "Rank and scale" remarks on a recommendation, made from the frames that are drawn."""

from __future__ import annotations

import math
from typing import NamedTuple

import pandas as pd

from analysis.rank_selection.evidence.shipped import evidence, kind_of
from ui.widgets import share_label

# Rules whose ranks (or scales) differ by more than this factor do not agree.
WIDE = 3.0
MOST = 3


class Candidate(NamedTuple):
    """A setting that is worth a look.

    Attributes:
        rank, scale: NaN where the method has none.
        why: what speaks for it, in a few words.
    """

    rank: float
    scale: float
    why: str


def rank_words(rank: float) -> str:
    """A share of directions, or a number of them, in words."""
    return share_label(rank) if rank <= 1 else f"{rank:.0f}"


def setting_in_words(rank: float, scale: float) -> str:
    """A setting in words; NaN is left out."""
    parts = [] if math.isnan(rank) else [f"rank {rank_words(rank)}"]
    return ", ".join(parts + ([] if math.isnan(scale) else [f"λ = {scale:.3g}"]))


def describe_spread(picks: pd.DataFrame) -> str:
    """Whether the rules agree on the rank and on the scale; empty where they do.

    Args:
        picks: a row per rule, with title, rank and scale (NaN where it gives none).
    """
    said = []
    for column, name in (("rank", "ranks"), ("scale", "λ")):
        known = picks.dropna(subset=[column]).sort_values(column)
        if len(known) < 2 or known[column].iloc[-1] < WIDE * known[column].iloc[0]:
            continue
        words = rank_words if column == "rank" else "{:.3g}".format
        least, most = known.iloc[0], known.iloc[-1]
        said.append(
            f"{name} from {words(least[column])} ({least['title']}) to {words(most[column])} "
            f"({most['title']})"
        )
    if not said:
        return ""
    return (
        f"The {len(picks)} rules do not agree: their picks have {' and '.join(said)}. "
        "Take the recommendation for one candidate among others."
    )


def candidates(
    rank: float, scale: float, points: pd.DataFrame, picks: pd.DataFrame, rule: str
) -> list[Candidate]:
    """The recommendation, and one or two other settings that are worth a look.

    Args:
        rank, scale: recommended.
        points: what was evaluated, with rank, scale and tied; may be empty.
        picks: a row per rule, with proxy, title, rank and scale.
        rule: the proxy that recommends.
    """
    found = [Candidate(rank, scale, "recommended")]
    tied = points[points["tied"].astype(bool)] if len(points) else points
    if len(tied):
        axis = "scale" if tied["rank"].isna().all() else "rank"
        least = tied.sort_values([axis, "scale"]).iloc[0]
        words = "fewest directions" if axis == "rank" else "smallest λ"
        found.append(
            Candidate(
                float(least["rank"]),
                float(least["scale"]),
                f"{words} of the {len(tied)} settings that these inputs do not tell apart",
            )
        )
    others = picks[(picks["proxy"] != rule) & (picks["scale"].notna() | picks["rank"].notna())]
    if len(others):
        middle = others.sort_values(["rank", "scale"]).iloc[len(others) // 2]
        found.append(
            Candidate(
                float(middle["rank"]),
                float(middle["scale"]),
                f"the middle one of the other rules' picks ({middle['title']})",
            )
        )
    unique: dict[str, Candidate] = {}
    for each in found:
        unique.setdefault(setting_in_words(each.rank, each.scale), each)
    return list(unique.values())[:MOST]


def describe_evidence(suite: str, method: str, title: str) -> str:
    """Where the evidence for the rules comes from, and on which kinds of models it rests.

    Args:
        suite: that is looked at.
        method: whose setting is chosen.
        title: of the method.
    """
    table = evidence()
    own = table[table["method"] == method]
    about = own if len(own) else table
    names = list(dict.fromkeys(about["suite"]))
    sets = about[["suite", "subset"]].drop_duplicates().groupby("suite", sort=False).size()
    kinds = "; ".join(
        f"**{name}** ({count} set{'s' if count > 1 else ''}), {kind_of(str(name))}"
        for name, count in sets.items()
    )
    of = title if len(own) else "other methods (this one was never measured)"
    here = (
        "this very suite is among them"
        if suite in names
        else "this suite is not among them, and other models may behave otherwise"
    )
    return f"Evidence: {of} on {sets.sum()} sets of tasks. {kinds}. {here.capitalize()}."

"""Rank and scale from the weights alone: no images, no labels, no forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pandas as pd

from analysis.rank_selection.space import SUMS_OF_TASK_VECTORS, SearchSpace, edge_words
from analysis.rank_selection.weight_response import (
    PROPORTIONAL,
    look_at_responses,
    responses,
    shares_of,
    split_progress,
    whole_model,
)
from analysis.rank_selection.weight_rules import RULES, look_at_rules, nuclear_share, rule_ranks
from analysis.spectral.interference import Side, pair_interference
from analysis.spectral.noise_bounds import as_array
from merge_core.factors.factorise import map_matrices
from merge_core.factors.low_rank import count_directions
from merge_core.methods import get_method
from merge_core.progress import Progress
from merge_core.task_vectors import Origin, TensorGroup, TensorGroups

Row = dict[str, object]

CART_PAPER = "CART, arXiv:2412.12153"
DERIVED = "[derived] in analysis/rank_selection/weight_response.py"

CURVES: dict[str, str] = {
    "reconstruction": "Reconstruction error, R(k)/R(0)",
    "interference_row": "Row-space interference, I(k)/T(T−1)",
    "interference_column": "Column-space interference",
    "energy": "Energy kept, Σσ²",
    "nuclear": "Nuclear norm kept, Σσ",
    "update_norm": "Norm of the merged update, λ = 1",
    "alignment": "Alignment with the experts",
}
"""What is drawn over the rank: name to title."""


@dataclass(frozen=True)
class Proxy:
    """A rule that needs nothing but weights.

    Attributes:
        title: for people.
        why: what the rank (or the scale) that it recommends is, a clause.
        source: paper, or where it is derived.
        pick: from the table of curves and scales over the rank, the row that it recommends; None
            for a rule of :data:`RULES`, which gives a share.
        scale: the column of that table that gives λ.
    """

    title: str
    why: str
    source: str
    pick: Callable[[pd.DataFrame], int] | None = None
    scale: str = "matched"


def _knee(table: pd.DataFrame) -> int:
    """The point of (interference, reconstruction) nearest to (0, 0), both scaled to [0, 1]."""
    both = table[["interference_row", "reconstruction"]]
    span = both.max() - both.min()
    scaled = (both - both.min()) / span.where(span > 0, 1.0)
    return int(np.argmin((scaled**2).sum(axis=1)))


def _balance(table: pd.DataFrame) -> int:
    """The first rank at which less is lost of the task vectors than they interfere."""
    return int(np.argmax(table["reconstruction"] <= table["interference_row"]))


def _peak(name: str) -> Callable[[pd.DataFrame], int]:
    return lambda table: int(np.argmax(table[name].fillna(-np.inf)))


PROXIES: dict[str, Proxy] = {
    "alignment": Proxy(
        "Alignment and strength",
        "at this rank the merged update agrees most in direction with the experts' own on the "
        "inputs that their task vectors point to",
        DERIVED,
        _peak("alignment"),
    ),
    **{name: Proxy(rule.title, rule.why, rule.source) for name, rule in RULES.items()},
    "knee": Proxy(
        "Knee of R against I",
        "the point of the curve of reconstruction error against interference that is nearest to "
        "having neither",
        f"{CART_PAPER}, the trade-off; the knee is ours",
        _knee,
    ),
    "balance": Proxy(
        "R equal to I",
        "from this rank on less is lost of the task vectors than they interfere",
        f"{CART_PAPER}, the trade-off; the crossing is ours",
        _balance,
    ),
    "update_norm": Proxy(
        "Longest update",
        "the merged update Σ SVD_k is longest at this rank",
        "[derived] about the average it is 0 at rank 0 and at full rank",
        _peak("update_norm"),
    ),
    "least_squares": Proxy(
        "Least squares",
        "at this rank and λ the merged update is nearest to the experts' own on the inputs that "
        "their task vectors point to",
        f"WUDI's loss, arXiv:2503.08099, for rank and λ: {DERIVED}",
        _peak("alignment"),
        "least_squares",
    ),
    "equal_norm": Proxy(
        "Equal norm",
        "λ makes the update as long as a task vector is on average",
        "[derived] a norm rule",
        _peak("alignment"),
        "equal_norm",
    ),
    "metagpt": Proxy(
        "MetaGPT",
        "λ is the mean of the tasks' λ_t = ‖τ_t‖²/Σ‖τ‖², which is 1/T",
        "MetaGPT, arXiv:2406.11385",
        _peak("alignment"),
        "one_over_tasks",
    ),
}
"""Proxies by name."""
CONTENDERS: tuple[str, ...] = (
    "alignment",
    "energy_80",
    "energy_90",
    "energy_95",
    "share_8",
    "balance",
    "least_squares",
)
"""What is measured of these on suites whose evaluation takes long."""
NEED_CURVES: tuple[str, ...] = ("knee", "balance")
WITHOUT_RANK: tuple[str, ...] = ("alignment", "least_squares", "equal_norm", "metagpt")


def defined_for(proxy: str, method: str) -> bool:
    """Whether a proxy recommends anything for a method.

    Every proxy takes a method of :data:`PROPORTIONAL`; ranks need a method with a rank, and
    MetaGPT's λ_t is derived for sums of task vectors.

    Args:
        proxy: a name of :data:`PROXIES`.
        method: a method's name.

    Example:
        >>> defined_for("metagpt", "task_arithmetic"), defined_for("metagpt", "cart")
        (True, False)
    """
    if method not in PROPORTIONAL:
        return False
    if proxy == "metagpt":
        return method in SUMS_OF_TASK_VECTORS
    has_rank = any(spec.name == "rank" for spec in get_method(method).specs)
    return has_rank or proxy in WITHOUT_RANK


def proxy_curves(
    groups: TensorGroups, space: SearchSpace, progress: Progress | None = None
) -> pd.DataFrame:
    """What the weights say about every rank.

    Args:
        groups: the suite's parameters.
        space: a method of :data:`PROPORTIONAL` with a rank; its ranks, see :func:`shares_of`.
        progress: told after each matrix of each pass.

    Returns:
        One row per quantity of :data:`CURVES` and rank: proxy, title, rank (share), value.
        Reconstruction error, energy and nuclear norm kept are shares in [0, 1] (the first two of
        all matrices together, the third the mean over matrices and tasks); interference, in
        [0, 1], and alignment, a cosine, are means over matrices; the norm of the update is the
        whole model's, in the unit of the weights. Empty for a method without a rank, or one whose
        update does not grow with λ alone.

    Raises:
        SuiteError: origin "base" without a base.
        Cancelled: by `progress`.

    Source: CART, arXiv:2412.12153 (R and I); the others in their own modules.

    Example:
        >>> from analysis.rank_selection.space import search_space
        >>> suite, tasks = load_suite("vision"), ["digits", "letters", "dots"]
        >>> groups = TensorGroups(suite, tasks, FactorStore())
        >>> groups.members = [g for g in groups.members if g.name == "blocks.0.attn.proj.weight"]
        >>> frame = proxy_curves(groups, search_space("cart", "vision", groups.tasks))
        >>> kept = frame[frame["proxy"] == "energy"]["value"]
        >>> kept.is_monotonic_increasing, round(float(kept.iloc[-1]), 3)
        (True, 1.0)
    """
    columns = ["proxy", "title", "rank", "value"]
    if not space.ranks or space.base.method not in PROPORTIONAL or not _has_matrices(groups):
        return pd.DataFrame(columns=columns)
    measured, spectra, _ = _measure_all(groups, space, progress, with_rules=False)
    table = _whole_model(measured, spectra, groups)
    parts = [
        pd.DataFrame({"proxy": name, "title": title, "rank": table["rank"], "value": table[name]})
        for name, title in CURVES.items()
    ]
    return pd.concat(parts, ignore_index=True)[columns]


def recommend_from_weights(
    groups: TensorGroups,
    space: SearchSpace,
    progress: Progress | None = None,
    only: str | None = None,
) -> pd.DataFrame:
    """The setting that each proxy recommends for the whole model.

    Ranks are shares of min(m, n), limited to the space's where those are shares; scales are
    limited to the space's.

    Args:
        groups: the suite's parameters.
        space: a method and its axes.
        progress: told after each matrix of each pass: one for all proxies.
        only: the proxy that is asked for, with as little work as it takes; all when None.

    Returns:
        One row per proxy that is defined for the method: proxy, title, rank (NaN where the method
        has none), scale, why (a clause), source, at_edge (what is to be said where the setting lies
        at the end of an axis, and what the rule gives beyond it). Empty for a method that no proxy
        is defined for, and for a merge that is its origin at every rank and scale (CART of two
        tasks).

    Raises:
        SuiteError: origin "base" without a base.
        Cancelled: by `progress`.
    """
    found = _recommend(groups, space, progress, by_matrix=False, only=only)
    return found.drop(columns="parameter")


def layer_ranks(
    groups: TensorGroups, space: SearchSpace, progress: Progress | None = None
) -> pd.DataFrame:
    """The setting that each proxy recommends for each matrix by itself.

    Args:
        groups: the suite's parameters.
        space: a method with a rank, and its axes, to which shares and scales are limited.
        progress: told after each matrix of each pass.

    Returns:
        One row per proxy and matrix: proxy, title, parameter, share, rank (directions, by the
        rule of a recipe's shares), scale. Empty where :func:`recommend_from_weights` is, and for a
        method without a rank; a matrix whose update is zero has no row.

    Raises:
        SuiteError: origin "base" without a base.
        Cancelled: by `progress`.
    """
    columns = ["proxy", "title", "parameter", "share", "rank", "scale"]
    if not space.ranks:
        return pd.DataFrame(columns=columns)
    found = _recommend(groups, space, progress, by_matrix=True).rename(columns={"rank": "share"})
    size = {g.name: min(g.info.matrix_shape) for g in groups if g.decomposed}
    counts = [
        count_directions(share, size[name])
        for share, name in zip(found["share"], found["parameter"], strict=True)
    ]
    return found.assign(rank=counts)[columns]


def _recommend(
    groups: TensorGroups,
    space: SearchSpace,
    progress: Progress | None,
    by_matrix: bool,
    only: str | None = None,
) -> pd.DataFrame:
    columns = ["proxy", "title", "parameter", "rank", "scale", "why", "source", "at_edge"]
    method = space.base.method
    names = [name for name in PROXIES if only in (None, name) and defined_for(name, method)]
    if not names or not _has_matrices(groups):
        return pd.DataFrame(columns=columns)
    measured, spectra, rules = _measure(groups, space, progress, names)
    rows = []
    for part in measured["parameter"].unique() if by_matrix else ("",):
        inside = [
            frame if frame is None or not part else frame[frame["parameter"] == part]
            for frame in (measured, spectra, rules)
        ]
        assert inside[0] is not None
        table = _whole_model(inside[0], inside[1], groups)
        if table["matched"].isna().all():
            continue
        shares = {} if inside[2] is None else dict(inside[2].groupby("proxy")["share"].mean())
        for name in names:
            proxy = PROXIES[name]
            chosen = rank = np.nan
            if space.ranks:
                chosen = float(table["rank"][proxy.pick(table)] if proxy.pick else shares[name])
                rank = _clip_to_axis(chosen, _shares_of_axis(space))
            asked = _scale_at(table, rank, proxy.scale)
            scale = _clip_to_axis(asked, space.scales)
            if not np.isnan(scale):
                said = edge_words(space, rank, scale, (chosen, asked))
                rows.append((name, proxy.title, part, rank, scale, proxy.why, proxy.source, said))
    return pd.DataFrame(rows, columns=columns)


def _has_matrices(groups: TensorGroups) -> bool:
    return any(group.decomposed for group in groups.members)


def _shares_of_axis(space: SearchSpace) -> list[float]:
    return [rank for rank in space.ranks if isinstance(rank, float)]


Measured = tuple[pd.DataFrame, pd.DataFrame | None, pd.DataFrame | None]


def _measure(
    groups: TensorGroups, space: SearchSpace, progress: Progress | None, names: Sequence[str]
) -> Measured:
    """Responses, curves and the rules' ranks, as far as these proxies need them."""
    if not space.ranks:
        return responses(groups, space, progress), None, None
    if len(names) > 1 or names[0] in NEED_CURVES:
        return _measure_all(groups, space, progress)
    if names[0] not in RULES:
        return responses(groups, space, progress), None, None
    # The rank is the rule's: the scale needs the responses on either side of it and no others.
    first, second = split_progress(progress, 2)
    rules = rule_ranks(groups, space.base.run(groups.tasks).origin, first)
    share = float(rules.loc[rules["proxy"] == names[0], "share"].mean())
    rank = _clip_to_axis(share, _shares_of_axis(space))
    parts: list[pd.DataFrame] = []
    while wanted := _lacking_around(rank, shares_of(space), parts):
        parts.append(responses(groups, space, second, ranks=wanted))
        second = None if progress is None else Progress(cancel=progress.cancel)
    measured = pd.concat(parts, ignore_index=True)
    return measured.sort_values("rank", kind="stable", ignore_index=True), None, rules


def _lacking_around(
    rank: float, grid: Sequence[float], parts: Sequence[pd.DataFrame]
) -> list[float]:
    """Shares whose responses have yet to be measured to know the scale at a rank.

    The nearest share with a scale is needed on either side, or the rank itself.
    """
    looked: set[float] = set()
    known: set[float] = set()
    if parts:
        table = whole_model(pd.concat(parts, ignore_index=True))
        looked, known = set(table["rank"]), set(table.loc[table["matched"] > 0, "rank"])
    if rank in known:
        return []
    lacking = set()
    for side in ([s for s in reversed(grid) if s <= rank], [s for s in grid if s >= rank]):
        nearest = next((s for s in side if s in known or s not in looked), None)
        if nearest is not None and nearest not in known:
            lacking.add(nearest)
    return sorted(lacking)


def _measure_all(
    groups: TensorGroups, space: SearchSpace, progress: Progress | None, with_rules: bool = True
) -> Measured:
    """All that is measured, in one pass over the matrices."""
    origin = space.base.run(groups.tasks).origin
    respond, rule = look_at_responses(groups.tasks, space), look_at_rules(origin)
    shares = shares_of(space)

    def look(group: TensorGroup) -> tuple[list[Row], pd.DataFrame, list[Row]]:
        return respond(group), _curves(group, origin, shares), rule(group) if with_rules else []

    found, curves, ranks = zip(*map_matrices(look, groups, progress), strict=True)
    return (
        pd.DataFrame(list(chain.from_iterable(found))),
        pd.concat(curves, ignore_index=True),
        pd.DataFrame(list(chain.from_iterable(ranks))) if with_rules else None,
    )


def _whole_model(
    responses: pd.DataFrame, spectra: pd.DataFrame | None, groups: TensorGroups
) -> pd.DataFrame:
    """Responses, scales and, for a method with a rank, every curve: one row per rank."""
    table = whole_model(responses)
    table = table.assign(
        update_norm=np.sqrt(table["update_energy"]), one_over_tasks=1 / len(groups.tasks)
    )
    if spectra is None:
        return table
    mean = spectra.groupby("rank", as_index=False).agg(
        lost=("lost", "sum"),
        whole=("whole", "sum"),
        nuclear=("nuclear", "mean"),
        interference_row=("interference_row", "mean"),
        interference_column=("interference_column", "mean"),
    )
    reconstruction = (mean["lost"] / mean["whole"]).fillna(0.0)
    mean = mean.assign(reconstruction=reconstruction, energy=1 - reconstruction)
    return table.merge(mean.drop(columns=["lost", "whole"]), on="rank")


def _curves(group: TensorGroup, origin: Origin, shares: Sequence[float]) -> pd.DataFrame:
    """One row per share of one matrix: parameter, rank, lost (R), whole (R(0)), nuclear,
    interference_row, interference_column."""
    r = min(group.info.matrix_shape)
    spectra, factors = group.singular_values(origin), group.directions(origin)
    pairs = max(1, len(factors) * (len(factors) - 1))
    at = [count_directions(share, r) - 1 for share in shares]
    # Summed from the small end, so that what little is lost near full rank stays exact.
    squares = np.sum([S.double().numpy() ** 2 for S in spectra], axis=0)
    tail = np.append(squares[::-1].cumsum()[::-1], 0.0)
    values = {
        "parameter": group.name,
        "rank": shares,
        "lost": tail[1:][at],
        "whole": tail[0],
        "nuclear": np.mean([nuclear_share(as_array(S)) for S in spectra], axis=0)[at],
    }
    sides: tuple[Side, Side] = ("row", "column")
    for side in sides:
        between = pair_interference(factors, side, r)
        summed = between.sum(axis=(0, 1)) - np.trace(between)
        values[f"interference_{side}"] = summed[at] / pairs
    return pd.DataFrame(values)


def _scale_at(table: pd.DataFrame, rank: float, column: str) -> float:
    """λ at a rank between those of the table, by log-log interpolation; NaN where there is none.

    A rank of NaN means the only row, of a method without ranks.
    """
    known = table[table[column] > 0]
    if known.empty or np.isnan(rank):
        return float(known[column].iloc[0]) if len(known) else np.nan
    logs = np.interp(np.log(rank), np.log(known["rank"]), np.log(known[column]))
    return float(np.exp(logs))


def _clip_to_axis(value: float, axis: Sequence[float]) -> float:
    """The value inside the range of an axis."""
    return float(np.clip(value, min(axis), max(axis))) if axis else value

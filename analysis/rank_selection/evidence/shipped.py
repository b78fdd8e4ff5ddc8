"""The shipped evidence for the defaults: what each proxy lost, where, and what follows."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pandas as pd

from merge_core.errors import RecipeError
from merge_core.files import digest_of

EVIDENCE = Path(__file__).with_name("regret.csv")
EVIDENCE_IMAGES = Path(__file__).with_name("images.csv")
KINDS: dict[str, str] = {
    "sentences": "a really pre-trained sentence encoder (BERT, 22.7 M parameters), tasks nearly "
    "orthogonal",
    "vision": "a small vision transformer (1.1 M) made for this, with a strong common drift",
    "vision-small": "a smaller vision transformer (0.3 M) made for this, with a strong common "
    "drift",
    "vision-apart": "the smaller vision transformer (0.3 M), tasks without a common drift",
    "transformer": "a small vision transformer (1.1 M) made for this, tasks without a common drift",
    "convolutional": "a small convolutional network made for this, tasks without a common drift",
}
"""What the suites of the evidence are, by name."""
TIED = ["tied_rank_low", "tied_rank_high", "tied_scale_low", "tied_scale_high"]


def evidence() -> pd.DataFrame:
    """The shipped regret table (see :func:`regret_table`), made by ``python -m data.evidence``.

    Example:
        >>> sorted(evidence()["mode"].unique())
        ['default', 'inputs', 'labels', 'weights']
    """
    return _read(EVIDENCE).copy()


@cache
def evidence_digest() -> str:
    """Digest (hex) of the shipped regret table, which decides what each mode recommends.

    Example:
        >>> len(evidence_digest())
        64
    """
    return digest_of(EVIDENCE.read_bytes())


def evidence_images() -> pd.DataFrame:
    """The shipped effect of few inputs (see :func:`regret_by_images`), with the cases' columns.

    Example:
        >>> {"proxy", "images", "mean", "worst"} <= set(evidence_images())
        True
    """
    return _read(EVIDENCE_IMAGES).copy()


def known_evidence(suite: str, subset: str, method: str) -> pd.DataFrame:
    """The rows of one case of the regret table as it is now on disk; empty if there are none.

    Args:
        suite: its name.
        subset: what the set of tasks is called.
        method: its name.

    Example:
        >>> known_evidence("sentences", "no such set", "cart").empty
        True
    """
    table = pd.read_csv(EVIDENCE, dtype={"subset": str})
    same = (table["suite"] == suite) & (table["subset"] == subset) & (table["method"] == method)
    return table[same].reset_index(drop=True)


@cache
def _read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype={"subset": str})


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Regret of each proxy over the cases in which it was measured.

    Args:
        table: of :func:`regret_table`, of one or several cases.

    Returns:
        One row per mode, proxy and search: cases, mean, worst (validation), test_mean,
        test_worst (shares), lost (share of cases in which the pick is worse on the test split
        beyond its interval), images (mean); ascending in worst within a mode.

    Example:
        >>> table = summary(evidence())
        >>> bool((table["mean"] <= table["worst"]).all())
        True
    """
    grouped = table.assign(lost=table["test_low"] > 0).groupby(["mode", "proxy", "search"])
    frame = grouped.agg(
        cases=("regret", "size"),
        mean=("regret", "mean"),
        worst=("regret", "max"),
        test_mean=("test_regret", "mean"),
        test_worst=("test_regret", "max"),
        lost=("lost", "mean"),
        images=("images", "mean"),
    ).reset_index()
    order = ["mode", "worst", "mean", "proxy"]
    return frame.sort_values(order, ignore_index=True)


def recommend_proxy(mode: str, method: str | None = None, table: pd.DataFrame | None = None) -> str:
    """The proxy of a mode with the lowest worst regret, then the lowest mean one.

    What is asked of a recommendation is to be good on every set of tasks. Regret is that of
    validation: the test split has no part in a choice. A proxy counts only if it was measured in
    every case, and in the search that is in use (adaptive where there is one).

    Args:
        mode: ``labels``, ``inputs`` or ``weights``.
        method: only cases of this method count; all when None.
        table: the evidence; :func:`evidence` when None.

    Raises:
        RecipeError: no proxy was measured in all these cases.

    Source: minimax regret, Savage, JASA 46 (1951), 55.

    Example:
        >>> recommend_proxy("labels")
        'accuracy'
    """
    table = evidence() if table is None else table
    if method is not None:
        table = table[table["method"] == method]
    cases = len(table[["suite", "subset", "method"]].drop_duplicates())
    measured = summary(table[(table["mode"] == mode) & (table["search"] != "grid")])
    everywhere = measured[measured["cases"] == cases]
    if everywhere.empty:
        raise RecipeError(
            f"No rule of mode {mode!r} has been measured for {method or 'every method'}; choose "
            "another mode."
        )
    return str(everywhere["proxy"].iloc[0])


def held_out(mode: str, method: str, table: pd.DataFrame | None = None) -> pd.DataFrame:
    """What a mode loses on each suite where its rule is chosen on all other suites.

    A rule chosen on the very cases in which its loss is counted looks better than it is on a
    model that nobody has measured; here no suite has a part in the choice of its own rule.

    Args:
        mode: ``labels``, ``inputs`` or ``weights``.
        method: only cases of this method count.
        table: the evidence; :func:`evidence` when None.

    Returns:
        One row per suite: suite, kind (in words), proxy (chosen on the others), cases, mean,
        worst, test_mean, test_worst (its regret on this suite, shares). A suite is left out where
        the others leave no choice.

    Source: leave-one-group-out cross-validation.

    Example:
        >>> frame = held_out("inputs", "cart")
        >>> bool((frame["mean"] <= frame["worst"]).all())
        True
    """
    table = evidence() if table is None else table
    table = table[table["method"] == method]
    rows = []
    for suite, own in table.groupby("suite", sort=False):
        others = table[table["suite"] != suite]
        measured = own[(own["mode"] == mode) & (own["search"] != "grid")]
        possible = others[(others["mode"] != mode) | others["proxy"].isin(measured["proxy"])]
        try:
            proxy = recommend_proxy(mode, None, possible)
        except RecipeError:
            continue
        lost = summary(measured[measured["proxy"] == proxy]).iloc[0]
        numbers = lost[["cases", "mean", "worst", "test_mean", "test_worst"]].to_dict()
        rows.append({"suite": suite, "kind": kind_of(str(suite)), "proxy": proxy, **numbers})
    columns = ["suite", "kind", "proxy", "cases", "mean", "worst", "test_mean", "test_worst"]
    return pd.DataFrame(rows, columns=columns)


def kind_of(suite: str) -> str:
    """What kind of model and tasks a suite of the evidence has, in words.

    Example:
        >>> kind_of("sentences")
        'a really pre-trained sentence encoder (BERT, 22.7 M parameters), tasks nearly orthogonal'
    """
    return KINDS.get(suite, suite)


def tasks_effect(table: pd.DataFrame) -> pd.DataFrame:
    """The best rank and scale of each case, by number of tasks.

    Args:
        table: of :func:`regret_table`, of several cases.

    Returns:
        One row per case: suite, method, tasks, subset, best_rank, best_scale, best (accuracy),
        tied_rank_low, tied_rank_high, tied_scale_low, tied_scale_high.

    Example:
        >>> frame = tasks_effect(evidence())
        >>> bool((frame["best_rank"].dropna() <= 1).all())
        True
    """
    columns = ["suite", "method", "tasks", "subset", "best_rank", "best_scale", "best"]
    columns += TIED
    rows = table[columns].drop_duplicates()
    return rows.sort_values(["suite", "method", "tasks", "subset"], ignore_index=True)

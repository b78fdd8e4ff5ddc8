"""The part of "Rank and scale" about evidence: what each rule loses, and what more tasks do."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from analysis.figures import rank_evidence as figures
from analysis.rank_selection.evidence.shipped import (
    evidence,
    held_out,
    summary,
    tasks_effect,
)
from analysis.rank_selection.regret import FIXED
from analysis.rank_selection.scores import SCORES
from analysis.rank_selection.weight_proxies import PROXIES
from merge_core.methods import get_method
from ui import charts, shell
from ui.controls import choice, selectbox
from ui.server.once import once

EXPLAINED = charts.HowToRead(
    "**Regret** is what one loses by trusting a rule: accuracy at the best setting of the full "
    "grid minus accuracy at the setting that the rule picks. A mark is one set of tasks, the grey "
    "line their mean; a rule is good where all its marks lie near zero. The best setting is the "
    "one with the highest **validation** accuracy, so on that split regret is never below zero "
    "for settings of the grid and counts luck in the best one's favour; on the **test** split the "
    "same two settings are compared on inputs that chose neither. What a mode recommends is the "
    "rule whose largest validation regret is the smallest, among those measured everywhere.",
    r"\mathrm{regret}(p) = \frac1T \sum_t \mathrm{acc}_t(k^*, \lambda^*) - "
    r"\mathrm{acc}_t(k_p, \lambda_p),\qquad "
    r"(k^*, \lambda^*) = \arg\max \frac1T \sum_t \mathrm{acc}_t^{\mathrm{val}}",
)
SPLITS = {"test_regret": "Test split", "regret": "Validation split"}


@shell.fragment
def evidence_section(method: str) -> None:
    """The regret table of a method as a figure and as a table.

    Args:
        method: shown at first, where it was measured.
    """
    table = evidence()
    measured = list(dict.fromkeys(table["method"]))
    left, right = st.columns(2)
    with left:
        shown = selectbox(
            "Measured for",
            measured,
            "measured",
            rest=method if method in measured else None,
            words=lambda name: get_method(name).title,
        )
    with right:
        split = choice("Regret on the", SPLITS, "regret_on")
    # What was found by evaluating everything stands in the table; drawn is what one would run.
    mine = table[(table["method"] == shown) & (table["search"] != "grid")]
    drawn = mine.assign(title=[title_of(name) for name in mine["proxy"]])
    charts.panel(
        charts.Chart(
            charts.drawn(figures.regret_dots, drawn, "How much does each rule lose?", value=split),
            key="regret",
            alt="Regret of each proxy on each set of tasks",
        ),
        key="evidence",
        how_to_read=EXPLAINED,
        numbers=charts.Numbers(table, "evidence"),
    )
    charts.table(once(regret_of, shown), "regret", key="regret")
    by_kind = once(regret_by_kind, shown)
    if len(by_kind):
        st.markdown(
            "**By kind of model**: what each mode loses on a suite where its rule is chosen on all "
            "other suites, so that the suite had no part in it."
        )
        named = by_kind.assign(proxy=[title_of(name) for name in by_kind["proxy"]])
        charts.table(named, "regret_by_kind", key="regret_by_kind")


def regret_of(method: str) -> pd.DataFrame:
    """What each rule lost with a method, over all sets of tasks."""
    table = evidence()
    return summary(table[table["method"] == method]).assign(method=method)


def regret_by_kind(method: str) -> pd.DataFrame:
    """What each mode loses with a method on each suite, chosen on the others."""
    return pd.concat(
        [held_out(mode, method).assign(mode=mode) for mode in ("weights", "inputs")],
        ignore_index=True,
    )


def title_of(proxy: str) -> str:
    """What a rule of the evidence is called."""
    if proxy in SCORES:
        return SCORES[proxy].title
    if proxy in FIXED:
        rank, scale = FIXED[proxy]
        return f"Always {rank:.0%}, λ = {scale:g}"
    return PROXIES[proxy].title if proxy in PROXIES else "The method's default"


def more_tasks_section(method: str) -> None:
    """The best setting over the number of tasks, from the evidence."""
    frame = tasks_effect(evidence())
    frame = frame[frame["method"] == method]
    if frame.empty:
        return
    suites = ", ".join(dict.fromkeys(frame["suite"]))
    charts.panel(
        charts.Chart(
            charts.drawn(
                figures.best_over_tasks, frame, "What do more tasks do to the best setting?"
            ),
            key="more_tasks",
            alt="Best rank and best scale over the number of tasks",
            caption=f"From the evidence, not from the tasks chosen now: {get_method(method).title} "
            f"on sets of tasks of {suites}; the best of the full grid on the validation split. "
            "Bars span the settings that its inputs do not tell from the best.",
        ),
        numbers=charts.Numbers(frame, "tasks_effect"),
    )

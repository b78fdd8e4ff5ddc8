"""The rule that the evidence supports for what may be looked at, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pandas as pd

from analysis.metrics import ACCURACY, Metric
from analysis.rank_selection.evidence.shipped import (
    evidence,
    held_out,
    recommend_proxy,
    summary,
)
from merge_core.errors import RecipeError
from merge_core.methods import get_method

Mode = Literal["labels", "inputs", "weights"]
NEEDS: dict[Mode, str] = {
    "labels": "labelled validation inputs",
    "inputs": "validation inputs without labels",
    "weights": "the checkpoints alone",
}


def _cases(method: str) -> pd.DataFrame:
    """The evidence of a method; of all methods where it was never measured."""
    table = evidence()
    own = table[table["method"] == method]
    return table if own.empty else own


def choose_rule(mode: Mode, method: str, from_weights: Sequence[str]) -> str:
    """The proxy that the evidence supports; for a method never measured, over all methods.

    Args:
        mode: what may be looked at.
        method: that a setting is chosen for.
        from_weights: proxies that read weights alone and have a pick here.

    Raises:
        RecipeError: no rule of that mode gives this merge a setting.
    """
    cases = _cases(method)
    possible = cases[(cases["mode"] != "weights") | cases["proxy"].isin(from_weights)]
    try:
        return recommend_proxy(mode, None, possible)
    except RecipeError as error:
        raise RecipeError(
            f"No rule gives {get_method(method).title} of these tasks a setting from "
            f"{NEEDS[mode]}; choose another mode."
        ) from error


def language_rule(mode: Mode, metric: str) -> str:
    """The rule for language models, on which the evidence has no cases: what is wanted itself.

    Args:
        mode: ``labels`` or ``inputs``.
        metric: of the suite.

    Returns:
        With labels (the tokens of texts themselves) the metric; without, the divergence from the
        experts, which is what distillation from them minimises.
    """
    return metric if mode == "labels" else "divergence"


def _points(regret: float) -> str:
    """A loss in words; a setting off the grid can be better than the grid's best."""
    return "nothing" if regret < 0.0005 else f"{100 * regret:.1f} points"


def explain(
    mode: Mode,
    exhaustive: bool,
    method: str,
    chosen: pd.Series,
    tied: int,
    metric: Metric = ACCURACY,
) -> str:
    """One sentence or two: the rule, and its regret in the evidence.

    Args:
        mode: what was looked at.
        exhaustive: whether every setting was evaluated on every image.
        method: that a setting was chosen for.
        chosen: proxy and title of the rule.
        tied: how many settings are tied for the best, itself among them.
        metric: of the suite.
    """
    if metric.lower_is_better and mode != "weights":
        return _explain_unmeasured(mode, exhaustive, chosen, tied, metric)
    cases = _cases(method)
    table = summary(cases)
    mine = table[(table["mode"] == mode) & (table["proxy"] == chosen["proxy"])]
    row = mine[(mine["search"] == "grid") == exhaustive].iloc[0]
    where = "" if method in set(cases["method"]) else " of other methods"
    regret = (
        f"lost {_points(row['mean'])} of accuracy against the best setting on average and "
        f"{_points(row['worst'])} at worst, over {row['cases']} sets of tasks{where}"
    )
    if mode == "labels":
        others = {0: "no other one", 1: "1 other one"}.get(tied - 1, f"{tied - 1} others")
        found = (
            "This setting has the highest accuracy on the labelled validation inputs among those "
            f"evaluated on all of them; these inputs do not tell {others} from it"
        )
        if exhaustive:
            return (
                f"{found}. That is the whole grid, which is the reference that the evidence "
                "measures every rule against. Inputs that a setting was chosen on favour it: the "
                "test split has the fairer number."
            )
        return (
            f"{found} (of the settings that it passed over, the search says nothing). In the "
            f"evidence such a search {regret}."
        )
    if metric.lower_is_better:
        regret += ", all of classifiers"
    needs = "inputs without labels" if mode == "inputs" else "nothing but weights"
    return (
        f"{chosen['title']} chose it, the rule that lost least in the evidence of those that need "
        f"{needs}: it {regret}.{_held_out_words(mode, method)}"
    )


def _explain_unmeasured(
    mode: Mode, exhaustive: bool, chosen: pd.Series, tied: int, metric: Metric
) -> str:
    """The same where the evidence, which is of classifiers, has no cases."""
    others = {0: "no other one", 1: "1 other one"}.get(tied - 1, f"{tied - 1} others")
    unknown = "The evidence on rules is of classifiers: what this one loses here is not known."
    if mode == "inputs":
        return f"{chosen['title']} chose it: {chosen['why']}. {unknown}"
    found = (
        f"This setting has the {metric.best_word} {metric.noun} on the validation texts among "
        f"those evaluated on all of them; these texts do not tell {others} from it"
    )
    if exhaustive:
        return f"{found}. Texts that a setting was chosen on favour it: the test split is fairer."
    return f"{found} (of the settings that it passed over, the search says nothing). {unknown}"


def _held_out_words(mode: Mode, method: str) -> str:
    """What is to be expected on a suite that had no part in the choice; empty if unknown."""
    frame = held_out(mode, method, _cases(method))
    if frame.empty:
        return ""
    mean = (frame["mean"] * frame["cases"]).sum() / frame["cases"].sum()
    return (
        f" Where each suite's rule is chosen on the other suites alone, the loss is "
        f"{_points(mean)} on average and {_points(frame['worst'].max())} at worst."
    )

"""Rebuild the evidence for the default proxies: ``python -m data.evidence [SUITE...]``.

Measures every proxy of rank and scale on sets of tasks of these suites (the bundled ones where none
is named), and writes the tables that :mod:`analysis.rank_selection.evidence.shipped` reads. Rows of
other suites stay as they are, so that a suite that is not at hand still counts. What was evaluated
is kept: a run that was stopped goes on where it was. After a change of the rules that read weights,
``--rules`` measures these alone, against the best settings that the tables hold.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from analysis.evaluation.evaluator import Evaluator
from analysis.rank_selection.evidence.shipped import (
    EVIDENCE,
    EVIDENCE_IMAGES,
    known_evidence,
)
from analysis.rank_selection.regret import regret_table, rule_regret
from analysis.rank_selection.space import SearchSpace, search_space
from merge_core.factors.store import FactorStore
from merge_core.files import write_atomically
from merge_core.merging.engine import MergeSession
from merge_core.progress import Progress
from merge_core.suites.bundled import bundled_suites
from merge_core.suites.suite import Suite, load_suite

Grid = Literal["whole", "every second", "some", "few"]

GRIDS: Mapping[Grid, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "some": ((0.02, 0.04, 0.06, 0.08, 0.12, 0.16, 0.36), (0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)),
    "few": ((0.04, 0.08, 0.16, 0.36), (1.5, 3.0, 5.0, 8.0)),
}
"""Ranks and scales where the usual grid, or every second step of it, would take too long."""

EIGHT = ("digits", "letters", "greek", "symbols", "shapes", "lines", "dots", "textures")
_SUBSETS_OF_EIGHT: Mapping[str, tuple[str, ...]] = {
    "8": EIGHT,
    "6a": EIGHT[:6],
    "6b": EIGHT[2:],
    "6c": ("digits", "letters", "shapes", "lines", "dots", "textures"),
    "4a": EIGHT[:4],
    "4b": EIGHT[4:],
    "4c": ("digits", "symbols", "lines", "textures"),
}
SETS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "transformer": _SUBSETS_OF_EIGHT,
    "convolutional": _SUBSETS_OF_EIGHT,
    "vision": {
        "20": ("20",),
        "14": ("14",),
        "8": ("8",),
        "8b": ("pieces", "segments", "matrix", "clocks", "arrows", "loops", "moons", "positions"),
        "4a": EIGHT[:4],
    },
    "vision-small": {"20": ("20",), "14": ("14",), "8": ("8",)},
    "vision-apart": {
        "6": ("digits", "letters", "shapes", "lines", "dots", "textures"),
        "4b": EIGHT[4:],
        "3": EIGHT[4:7],
    },
    "sentences": {
        "8": (
            *("assistant", "banking", "clickbait", "flights"),
            *("grammar", "irony", "mood", "news"),
        ),
        "4a": ("assistant", "clickbait", "grammar", "mood"),
        "4b": ("banking", "flights", "irony", "news"),
    },
}
"""Of each suite, by its name, the sets of tasks (or presets) that are measured, by theirs."""


@dataclass(frozen=True)
class Case:
    """A method on a set of tasks of one suite.

    Attributes:
        subset: a name of the suite's :data:`SETS`.
        method: its name.
        grid: the settings compared: those that the page offers, every second of each axis, or
            one of :data:`GRIDS` (whose scales are for methods with a rank: others take every
            second).
        brief: measure those rules alone that a mode could recommend, for suites on which an
            evaluation takes long.
    """

    subset: str
    method: str
    grid: Grid = "whole"
    brief: bool = False

    def space(self, suite: Suite) -> SearchSpace:
        """The settings compared.

        Raises:
            SuiteError: the suite has not these tasks.
        """
        tasks = suite.select(SETS[suite.name][self.subset])
        whole = search_space(self.method, str(suite.path), tasks)
        if self.grid == "whole":
            return whole
        if self.grid in GRIDS and whole.ranks:
            return SearchSpace(whole.base, *GRIDS[self.grid])
        return SearchSpace(whole.base, whole.ranks[1::2], whole.scales[1::2])


def _cart_and_sum(subsets: Sequence[str], grid: Grid, brief: bool = False) -> tuple[Case, ...]:
    methods = ("cart", "task_arithmetic")
    return tuple(Case(subset, method, grid, brief) for method in methods for subset in subsets)


CASES: Mapping[str, tuple[Case, ...]] = {
    "transformer": (
        Case("8", "cart"),
        *(Case(subset, "cart", "every second") for subset in SETS["transformer"] if subset != "8"),
        *(Case(subset, "task_arithmetic") for subset in SETS["transformer"]),
        *(Case(subset, method) for method in ("tsv_m", "iso_c") for subset in ("8", "6a", "4a")),
        *(Case(subset, "low_rank_task_arithmetic", "every second") for subset in ("8", "4a")),
    ),
    "convolutional": (
        *(Case(subset, "cart", "every second") for subset in ("8", "6a", "4a")),
        *(Case(subset, "task_arithmetic") for subset in ("8", "6a", "4a")),
    ),
    "vision": (
        *_cart_and_sum(("8", "14", "20", "8b", "4a"), "some"),
        *(Case("8", method, "some") for method in ("tsv_m", "iso_c")),
    ),
    "vision-small": _cart_and_sum(("8", "14", "20"), "some"),
    "vision-apart": _cart_and_sum(("6", "4b", "3"), "some"),
    "sentences": _cart_and_sum(("8", "4a", "4b"), "few", brief=True),
}
"""What is measured on each suite, by its name."""


def measure(
    reference: str, cases: Sequence[Case], progress: Progress | None = None
) -> Iterator[tuple[Case, pd.DataFrame, pd.DataFrame]]:
    """The tables of :func:`analysis.rank_selection.regret.regret_table`, case after case.

    Args:
        reference: of a suite, as in recipes; its name is one of :data:`SETS`.
        cases: what is measured.
        progress: reports settings, and cancels.

    Raises:
        MergeScopeError: the suite cannot be evaluated or has not these tasks.
        Cancelled: by `progress`.
    """
    suite: Suite = load_suite(reference)
    evaluator, factors = Evaluator(suite), FactorStore()
    for case in cases:
        space = case.space(suite)
        session = MergeSession(suite, space.base.tasks, factors)
        yield (
            case,
            *regret_table(
                case.subset, space, session, evaluator, brief=case.brief, progress=progress
            ),
        )


def rebuild(references: Sequence[str], progress: Progress | None = None) -> None:
    """Measure these suites and write both tables, in which rows of other suites stay.

    Written after each case, so that what was measured counts.

    Raises:
        MergeScopeError: a suite cannot be evaluated or has not these tasks.
        Cancelled: by `progress`; the tables hold what was measured before.
    """
    for reference in references:
        name = load_suite(reference).name
        for case, table, images in measure(reference, CASES[name], progress):
            _replace_case(EVIDENCE, table)
            _replace_case(EVIDENCE_IMAGES, images)
            row = table[table["search"] == "grid"].set_index("proxy").loc["agreement"]
            sys.stdout.write(
                f"\r{name}, {case.method}, {case.subset}: best {row.best:.3f} at rank "
                f"{row.best_rank:g}, scale {row.best_scale:g}; agreement loses {row.regret:.3f}\n"
            )


def remeasure_rules(references: Sequence[str], progress: Progress | None = None) -> None:
    """Measure again what the rules that read weights lose, where the best setting is known.

    Cases that were never measured are passed over.

    Raises:
        MergeScopeError: a suite cannot be evaluated or has not these tasks.
        Cancelled: by `progress`; the table holds what was measured before.
    """
    for reference in references:
        suite = load_suite(reference)
        evaluator, factors = Evaluator(suite), FactorStore()
        for case in CASES[suite.name]:
            known = known_evidence(suite.name, case.subset, case.method)
            if known.empty:
                continue
            space = case.space(suite)
            session = MergeSession(suite, space.base.tasks, factors)
            found = rule_regret(known, space, session, evaluator, case.brief, progress)
            rest = known[~known["mode"].isin(["default", "weights"])]
            _replace_case(EVIDENCE, pd.concat([found, rest], ignore_index=True))
            lost = found[found["mode"] == "weights"].set_index("proxy")["regret"]
            sys.stdout.write(
                f"\r{suite.name}, {case.method}, {case.subset}: {lost.idxmin()} loses least, "
                f"{lost.min():.3f}\n"
            )


def _replace_case(path: Path, rows: pd.DataFrame) -> None:
    """Write a table in which these rows stand for those of their case."""
    key = ["suite", "subset", "method"]
    before = pd.read_csv(path, dtype={"subset": str}) if path.exists() else rows.iloc[:0]
    same = (before[key] == rows[key].iloc[0]).all(axis=1)
    parts = [part for part in (before[~same], rows) if len(part)]
    text = pd.concat(parts, ignore_index=True).to_csv(index=False, float_format="%.5g")
    write_atomically(path, text.encode())


def _show(started: float, done: int, total: int, label: str) -> None:
    sys.stdout.write(f"\r{time.monotonic() - started:6.0f} s  {done}/{total} {label:60.60}")
    sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", help="names or suite.yaml; the bundled ones if none")
    parser.add_argument("--rules", action="store_true", help="only the rules that read weights")
    given = parser.parse_args()
    begun = time.monotonic()
    work = remeasure_rules if given.rules else rebuild
    work(given.suites or list(bundled_suites()), Progress(lambda *what: _show(begun, *what)))

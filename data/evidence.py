"""Rebuild the evidence for the default proxies: ``python -m data.evidence [SUITE...]``.

Measures every proxy of rank and scale on sets of tasks of the bundled suite, and of any further
suite with the same tasks, and writes the tables that :mod:`analysis.rank_selection.regret` reads.
What was evaluated is kept: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from analysis.evaluation.evaluator import Evaluator
from analysis.rank_selection.regret import EVIDENCE, EVIDENCE_IMAGES, regret_table
from analysis.rank_selection.space import SearchSpace, search_space
from merge_core.factors.store import FactorStore
from merge_core.files import write_atomically
from merge_core.merging.engine import MergeSession
from merge_core.progress import Progress
from merge_core.suites.bundled import BUNDLED
from merge_core.suites.suite import Suite, load_suite

SUBSETS: dict[str, tuple[str, ...] | None] = {
    "8": None,
    "6a": ("digits", "letters", "greek", "symbols", "shapes", "lines"),
    "6b": ("greek", "symbols", "shapes", "lines", "dots", "textures"),
    "6c": ("digits", "letters", "shapes", "lines", "dots", "textures"),
    "4a": ("digits", "letters", "greek", "symbols"),
    "4b": ("shapes", "lines", "dots", "textures"),
    "4c": ("digits", "symbols", "lines", "textures"),
}
FEW = ("8", "6a", "4a")


@dataclass(frozen=True)
class Case:
    """A method on a set of tasks of one suite.

    Attributes:
        subset: a name of :data:`SUBSETS`.
        method: its name.
        coarse: take every second rank and scale only.
    """

    subset: str
    method: str
    coarse: bool = False

    def space(self, suite: str) -> SearchSpace:
        """The settings compared."""
        whole = search_space(self.method, suite, SUBSETS[self.subset])
        if not self.coarse:
            return whole
        return SearchSpace(whole.base, whole.ranks[1::2], whole.scales[1::2])


CASES: tuple[Case, ...] = (
    Case("8", "cart"),
    *(Case(subset, "cart", coarse=True) for subset in SUBSETS if subset != "8"),
    *(Case(subset, "task_arithmetic") for subset in SUBSETS),
    *(Case(subset, method) for method in ("tsv_m", "iso_c") for subset in FEW),
    *(Case(subset, "low_rank_task_arithmetic", coarse=True) for subset in ("8", "4a")),
)
# Of suites that are not bundled.
FURTHER: tuple[Case, ...] = (
    *(Case(subset, "cart", coarse=True) for subset in FEW),
    *(Case(subset, "task_arithmetic") for subset in FEW),
)


def measure(
    reference: str, cases: Sequence[Case], progress: Progress | None = None
) -> Iterator[tuple[Case, pd.DataFrame, pd.DataFrame]]:
    """The tables of :func:`analysis.rank_selection.regret.regret_table`, case after case.

    Raises:
        MergeScopeError: the suite cannot be evaluated or has not these tasks.
        Cancelled: by `progress`.
    """
    suite: Suite = load_suite(reference)
    evaluator, factors = Evaluator(suite), FactorStore()
    for case in cases:
        space = case.space(reference)
        session = MergeSession(suite, space.base.tasks, factors)
        yield case, *regret_table(case.subset, space, session, evaluator, progress=progress)


def rebuild(suites: Sequence[str], progress: Progress | None = None) -> None:
    """Measure the bundled suite and these further ones, and write both tables.

    Raises:
        MergeScopeError: a suite cannot be evaluated or has not these tasks.
        Cancelled: by `progress`; the tables stay as they were.
    """
    plans = [(BUNDLED, CASES), *((each, FURTHER) for each in suites)]
    tables, few = [], []
    for reference, cases in plans:
        for case, table, images in measure(reference, cases, progress):
            tables.append(table)
            few.append(images)
            row = table[table["search"] == "grid"].set_index("proxy").loc["agreement"]
            sys.stdout.write(
                f"\r{reference}, {case.method}, {case.subset}: best {row.best:.3f} at rank "
                f"{row.best_rank:g}, scale {row.best_scale:g}; agreement loses {row.regret:.3f}\n"
            )
    for path, parts in ((EVIDENCE, tables), (EVIDENCE_IMAGES, few)):
        text = pd.concat(parts, ignore_index=True).to_csv(index=False, float_format="%.5g")
        write_atomically(path, text.encode())


def _show(started: float, done: int, total: int, label: str) -> None:
    sys.stdout.write(f"\r{time.monotonic() - started:6.0f} s  {done}/{total} {label:60.60}")
    sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", help="suite.yaml of further suites")
    begun = time.monotonic()
    rebuild(parser.parse_args().suites, Progress(lambda *what: _show(begun, *what)))

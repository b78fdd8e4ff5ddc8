"""Predictions that a suite ships, so that the dashboard's default views need no forward pass.

Run ``python -m data.precompute`` after the bundled suites were rebuilt. Predictions are known by
the content of weights and data, so stale ones are never used, only useless.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from analysis.comparison.first_result import first_recipes, first_result
from analysis.evaluation.evaluator import Evaluator
from analysis.outputs.prediction_store import SHIPPED_NAME, PredictionStore
from analysis.rank_selection.adaptive import adaptive_search
from analysis.rank_selection.rule import NEEDS
from analysis.rank_selection.select import SelectionOptions, select_rank
from analysis.rank_selection.space import search_space
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import make_recipe
from merge_core.methods import methods
from merge_core.progress import Progress
from merge_core.suites.bundled import bundled_suites
from merge_core.suites.suite import load_suite

# Of these the page "Rank and scale" shows rank and scale without being asked, in every mode.
SELECTED = ("cart", "low_rank_task_arithmetic", "task_arithmetic")


def precompute(reference: str) -> Path:
    """Evaluate what the default views show, and write it beside the suite.

    Of a suite with presets these are the views of the first one; of the others it is the first
    result alone.

    Args:
        reference: the name of a bundled suite, or a suite.yaml whose folder may be written.

    Returns:
        The path of the store.

    Raises:
        MergeScopeError: the suite cannot be evaluated.
    """
    suite = load_suite(reference)
    target = suite.root / SHIPPED_NAME
    with tempfile.TemporaryDirectory(dir=suite.root) as folder:
        predictions = PredictionStore(Path(folder) / SHIPPED_NAME)
        evaluator, factors = Evaluator(suite, predictions), FactorStore()
        presets = [suite.select([name]) for name in suite.spec.presets] or [suite.tasks]
        for position, tasks in enumerate(presets):
            session = MergeSession(suite, tasks, factors)
            if position == 0:
                _run_views(reference, session, evaluator)
            else:
                for method in ("cart", "task_arithmetic"):
                    adaptive_search(search_space(method, reference, tasks), session, evaluator)
            evaluator.experts(tasks)
            if suite.base is not None:
                evaluator.checkpoint(suite.base, tasks)
            # Only the settings chosen on the validation split are looked at on the test split.
            first_result(first_recipes(reference, session, evaluator), session, evaluator)
        predictions.path.replace(target)
    return target


def _run_views(reference: str, session: MergeSession, evaluator: Evaluator) -> None:
    """Every method at its defaults, and the searches of the page on rank and scale."""
    suite, tasks = session.suite, session.groups.tasks
    usable = [
        m.name
        for m in methods().values()
        if (suite.base is not None or not m.needs_base()) and m.tasks is None and not m.learns
    ]
    for name in usable:
        recipe = make_recipe({"suite": reference, "tasks": tasks, "method": name})
        evaluator.recipe(recipe, session)
        for mode in NEEDS if name in SELECTED else ():
            space = search_space(name, reference, tasks)
            shown = _progress(f"{name}, {mode}")
            options = SelectionOptions(mode, every_proxy=True)
            select_rank(space, session, evaluator, options, progress=shown)
        if name == "cart":  # the full map, which takes minutes
            space = search_space(name, reference, tasks)
            shown = _progress(f"{name}, full grid")
            options = SelectionOptions("labels", full_grid=True)
            select_rank(space, session, evaluator, options, progress=shown)


def _progress(title: str) -> Progress:
    def show(done: int, total: int, label: str) -> None:
        end = "\n" if done == total else ""
        sys.stderr.write(f"\r\x1b[2K{title}: {done}/{total} {label}{end}")
        sys.stderr.flush()

    return Progress(show)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", default=list(bundled_suites()))
    for each in parser.parse_args().suites:
        sys.stdout.write(f"{precompute(each)}\n")

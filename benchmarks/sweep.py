"""How fast settings are evaluated, and how few forward passes a good one takes.

Run ``python -m benchmarks.sweep``. The first part compares evaluating new settings with the model's
own forward passes of the same images; the second runs the adaptive search with several seeds and,
once, every setting. Ratios hold across machines, seconds do not.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from analysis.evaluation import Evaluator
from analysis.predictions import PredictionStore
from analysis.rank_selection.adaptive import Search, adaptive_search, exhaustive_search
from analysis.rank_selection.space import SearchSpace, search_space
from merge_core.engine import MergeSession
from merge_core.factors import FactorStore
from merge_core.suite import Suite, load_suite

SEEDS = 5


def speeds(suite: Suite, space: SearchSpace, folder: Path, points: int) -> tuple[float, float]:
    """Images per second of evaluating settings, and of forward passes alone, taken in turn.

    In the order of a sweep, so that most settings share their predecessor's rank.
    """
    evaluator = Evaluator(suite, PredictionStore(folder / "speeds.sqlite"))
    session = MergeSession(suite, None, FactorStore())
    model = evaluator.backbone.model
    images = torch.cat([evaluator.inputs(t, "val", None)[0] for t in suite.tasks])
    swept, alone = [], []
    recipes = space.recipes()
    model.load_state_dict(session.merge(recipes[0]))
    with torch.inference_mode():
        for part in images.split(250):
            model(part)
    evaluator.recipe(recipes[0], session)
    for recipe in recipes[1 : points + 1]:
        start = time.perf_counter()
        with torch.inference_mode():
            for part in images.split(250):
                model(part)
        middle = time.perf_counter()
        evaluator.recipe(recipe, session)
        swept.append(time.perf_counter() - middle)
        alone.append(middle - start)
    return len(images) / statistics.median(swept), len(images) / statistics.median(alone)


def searched(suite: Suite, space: SearchSpace, folder: Path, seed: int) -> tuple[Search, float]:
    """An adaptive search that knows nothing, and its seconds."""
    evaluator = Evaluator(suite, PredictionStore(folder / f"seed{seed}.sqlite"))
    session = MergeSession(suite, None, FactorStore())
    start = time.perf_counter()
    search = adaptive_search(space, session, evaluator, seed=seed)
    return search, time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--method", default="cart")
    parser.add_argument("--points", type=int, default=40, help="settings of the first part")
    parser.add_argument(
        "--exhaustive",
        type=Path,
        help="where predictions of all settings are kept (minutes); without it, no gap is printed",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    suite = load_suite("demo")
    space = search_space(options.method, "demo")
    print(f"torch {torch.__version__}, {options.threads} threads, {space.size} settings")
    with tempfile.TemporaryDirectory() as name:
        swept, alone = speeds(suite, space, Path(name), options.points)
        print(f"{'sweep':28s} {swept:9.0f} images/s")
        print(f"{'forward passes alone':28s} {alone:9.0f} images/s")
        print(f"{'overhead':28s} {alone / swept - 1:9.1%}")
        whole = None
        if options.exhaustive:
            evaluator = Evaluator(suite, PredictionStore(options.exhaustive))
            session = MergeSession(suite, None, FactorStore())
            whole = exhaustive_search(space, session, evaluator).points
        for seed in range(SEEDS):
            search, seconds = searched(suite, space, Path(name), seed)
            line = (
                f"{f'adaptive search, seed {seed}':28s} {search.forward_images:9d} images, "
                f"1/{search.grid_images / search.forward_images:.1f} of all, {seconds:5.1f} s"
            )
            if whole is not None:
                here = whole[(whole["rank"] == search.rank) & (whole["scale"] == search.scale)]
                gap = 100 * (whole["score"].max() - here["score"].iloc[0])
                line += f", {gap:.2f} points below the best"
            print(line)


if __name__ == "__main__":
    main()

"""The bundled suite: one more setting, many settings, and the search for a good one."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from analysis.evaluation.evaluator import Evaluator
from analysis.outputs.prediction_store import PredictionStore
from analysis.rank_selection.adaptive import adaptive_search, exhaustive_search
from analysis.rank_selection.space import search_space
from benchmarks.measure import Laboratory
from benchmarks.record import Sheet
from merge_core.factors.low_rank import as_matrix, count_directions
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import Recipe, make_recipe
from merge_core.suites.suite import Suite, load_suite
from merge_core.task_vectors import TensorGroup

RANKS = (0.02, 0.04, 0.08, 0.12, 0.16, 0.24, 0.32, 0.5, 0.7)
BATCH = 250


def eight_tasks() -> Suite:
    """The bundled suite of the first eight tasks."""
    return load_suite("vision").restrict(["8"])


def cart(rank: float, scale: float) -> Recipe:
    """A CART recipe on the bundled suite."""
    return make_recipe({"method": "cart", "parameters": {"rank": rank, "scale": scale}})


def time_calls(work: Callable[[], object], repeats: int) -> float:
    """Median seconds of `repeats` calls, after one that is not counted."""
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def authors_route(group: TensorGroup, rank: float, scale: float) -> torch.Tensor:
    """CART of one parameter with an SVD of every matrix as stored, again for every setting."""
    if not group.decomposed:
        return group.average
    k = count_directions(rank, min(as_matrix(group.average).shape))
    update = torch.zeros_like(as_matrix(group.average))
    for centred in group.task_vectors("average"):
        U, S, Vh = torch.linalg.svd(as_matrix(centred), full_matrices=False)
        update += (U[:, :k] * S[:k]) @ Vh[:k]
    return group.average + scale * update.reshape(group.average.shape)


def one_more_setting(repeats: int) -> dict[str, float]:
    """Seconds per merge: at a new rank, a new scale, averaged, without factors: a job."""
    with tempfile.TemporaryDirectory() as folder:
        session = MergeSession(eight_tasks(), None, FactorStore(Path(folder)))
        session.merge(cart(RANKS[0], 1.0))
        ranks, scales = iter(RANKS * 100), iter(range(1, 1000))
        groups = list(session.groups)
        return {
            "new rank": time_calls(lambda: session.merge(cart(next(ranks), 2.0)), 9 * repeats),
            "new scale": time_calls(
                lambda: session.merge(cart(0.16, 0.01 * next(scales))), 9 * repeats
            ),
            "average": time_calls(
                lambda: session.merge(make_recipe({"method": "average"})), 9 * repeats
            ),
            "again": time_calls(
                lambda: [authors_route(group, 0.16, 2.0) for group in groups], repeats
            ),
        }


def many_settings(points: int) -> dict[str, float]:
    """Images per second of evaluating settings and of forward passes alone, in turn: a job.

    In the order of a sweep, so that most settings share their predecessor's rank.
    """
    suite, space = eight_tasks(), search_space("cart", "vision")
    with tempfile.TemporaryDirectory() as folder:
        evaluator = Evaluator(suite, PredictionStore(Path(folder) / "predictions.sqlite"))
        session = MergeSession(suite, None, FactorStore(Path(folder)))
        model = evaluator.outputs.network.module
        images = torch.cat([evaluator.outputs.inputs(t, "val", None)[0] for t in suite.tasks])

        @torch.inference_mode()
        def forward() -> None:
            for part in images.split(BATCH):
                model(part)

        recipes = space.recipes()
        model.load_state_dict(session.merge(recipes[0]))
        forward()
        evaluator.recipe(recipes[0], session)
        swept, alone = [], []
        for recipe in recipes[1 : points + 1]:
            start = time.perf_counter()
            forward()
            middle = time.perf_counter()
            evaluator.recipe(recipe, session)
            swept.append(time.perf_counter() - middle)
            alone.append(middle - start)
    return {
        "sweep": len(images) / statistics.median(swept),
        "alone": len(images) / statistics.median(alone),
    }


def search(seeds: int, step: int) -> list[dict[str, float]]:
    """The adaptive search with nothing stored, against all settings: a job.

    Args:
        seeds: how many searches.
        step: stride of the ranks and scales that are taken.
    """
    suite, space = eight_tasks(), search_space("cart", "vision")
    space = replace(space, ranks=space.ranks[::step], scales=space.scales[::step])
    session = MergeSession(suite, None, FactorStore())
    whole = exhaustive_search(space, session, Evaluator(suite)).points
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            store = PredictionStore(Path(folder) / f"{seed}.sqlite")
            start = time.perf_counter()
            result = adaptive_search(space, session, Evaluator(suite, store), seed=seed)
            seconds = time.perf_counter() - start
            here = whole[(whole["rank"] == result.rank) & (whole["scale"] == result.scale)]
            found.append(
                {
                    "seconds": seconds,
                    "share": result.forward_images / result.grid_images,
                    "gap": 100 * float(whole["score"].max() - here["score"].iloc[0]),
                }
            )
    return found


def bundled(laboratory: Laboratory, sheet: Sheet) -> None:
    """Merging, sweeping and searching on the bundled suite."""
    quick = laboratory.quick
    laboratory.fresh_cache()
    merges = laboratory.run(
        "benchmarks.parts.bundled:one_more_setting", {"repeats": 1 if quick else 5}
    ).answer
    names = {
        "new rank": "CART at a new rank, factors stored",
        "new scale": "CART at a new scale",
        "average": "plain average",
        "again": "CART with an SVD of every matrix again",
    }
    for key, name in names.items():
        sheet.add(name, 1000 * merges[key], "ms", "lower")
    sheet.speedup("a new rank against the SVDs again", merges["again"] / merges["new rank"])
    rates = laboratory.run(
        "benchmarks.parts.bundled:many_settings", {"points": 3 if quick else 20}
    ).answer
    sheet.add("evaluating settings", rates["sweep"], "images/s", "higher")
    sheet.add("forward passes alone", rates["alone"], "images/s", "higher")
    overhead = 100 * (rates["alone"] / rates["sweep"] - 1)
    sheet.add("overhead of a setting", overhead, "%", "lower")
    searches = laboratory.run(
        "benchmarks.parts.bundled:search",
        {"seeds": 1, "step": 7} if quick else {"seeds": 3, "step": 1},
    ).answer
    sheet.seconds("adaptive search, nothing stored", [one["seconds"] for one in searches])
    share = 100 * max(one["share"] for one in searches)
    sheet.add("its forward passes, of all settings'", share, "%", "lower")
    gap = max(one["gap"] for one in searches)
    note = f"largest of {len(searches)} seeds"
    sheet.add("its distance from the best of all settings", gap, "points", "lower", note=note)

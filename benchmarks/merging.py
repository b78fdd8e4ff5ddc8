"""How long one more setting takes on the bundled suite, and what keeping factors saves.

Run ``python -m benchmarks.merging``. Ratios hold across machines, milliseconds do not.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from analysis.evaluation import Evaluator
from analysis.predictions import PredictionStore
from merge_core.engine import MergeSession
from merge_core.factors import FactorStore
from merge_core.linalg import as_matrix, decompose, directions
from merge_core.recipe import Recipe, make_recipe
from merge_core.suite import Suite, load_suite
from merge_core.task_vectors import ParameterGroup

RANKS = (0.02, 0.04, 0.08, 0.12, 0.16, 0.24, 0.32, 0.5, 0.7)


def timed(work: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, after one that is not counted."""
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return seconds


def cart(rank: float, scale: float) -> Recipe:
    """A CART recipe on the bundled suite."""
    return make_recipe({"method": "cart", "parameters": {"rank": rank, "scale": scale}})


def authors_route(group: ParameterGroup, rank: float, scale: float) -> torch.Tensor:
    """CART of one parameter with an SVD of every matrix as stored, again for every setting."""
    if not group.decomposed:
        return group.average
    k = directions(rank, min(as_matrix(group.average).shape))
    update = torch.zeros_like(as_matrix(group.average))
    for centred in group.task_vectors("average"):
        U, S, Vh = torch.linalg.svd(as_matrix(centred), full_matrices=False)
        update += (U[:, :k] * S[:k]) @ Vh[:k]
    return group.average + scale * update.reshape(group.average.shape)


def merge_times(suite: Suite, folder: Path) -> dict[str, float]:
    """Milliseconds per merge: a new rank, a new scale, and without stored factors."""
    session = MergeSession(suite, None, FactorStore(folder))
    session.merge(cart(RANKS[0], 1.0))
    new_rank = []
    for rank in RANKS * 3:
        recipe = cart(rank, 2.0)
        start = time.perf_counter()
        session.merge(recipe)
        new_rank.append(time.perf_counter() - start)
    scales = iter(range(1, 1000))
    new_scale = timed(lambda: session.merge(cart(0.16, 0.01 * next(scales))), 20)
    groups = list(session.groups)
    again = timed(lambda: [authors_route(group, 0.16, 2.0) for group in groups], 2)
    average = timed(lambda: session.merge(make_recipe({"method": "average"})), 20)
    return {
        "new rank": 1000 * statistics.median(new_rank),
        "slowest new rank": 1000 * max(new_rank),
        "new scale": 1000 * statistics.median(new_scale),
        "plain average": 1000 * statistics.median(average),
        "SVD of every matrix again": 1000 * statistics.median(again),
    }


def decomposition_times(suite: Suite) -> dict[str, float]:
    """Milliseconds to decompose one expert's matrices, by each route, in float64 and float32."""
    session = MergeSession(suite, None, FactorStore(Path(tempfile.mkdtemp())))
    matrices = [
        as_matrix(group.task_vectors("average")[0]) for group in session.groups if group.decomposed
    ]
    routes: dict[str, Callable[[torch.Tensor], object]] = {
        "Gram, float64": lambda A: decompose(A, "gram"),
        "LAPACK SVD, float64": lambda A: decompose(A, "svd"),
        "LAPACK SVD, float32": lambda A: torch.linalg.svd(A, full_matrices=False),
    }
    return {
        name: 1000 * statistics.median(timed(lambda r=route: [r(A) for A in matrices], 5))  # type: ignore[misc]
        for name, route in routes.items()
    }


def evaluation_times(suite: Suite, folder: Path) -> dict[str, float]:
    """Seconds to evaluate a new merge on all tasks, and the model's own forward time."""
    evaluator = Evaluator(suite, PredictionStore(folder / "predictions.sqlite"))
    session = MergeSession(suite, None, FactorStore(folder))
    settings = iter(range(1, 1000))

    def fresh() -> None:
        evaluator.recipe(cart(0.16, 1 + 0.001 * next(settings)), session)

    whole = timed(fresh, 7)
    weights = session.merge(cart(0.16, 1.0))
    evaluator.backbone.model.load_state_dict(weights)
    images = torch.cat([evaluator.inputs(t, "val", None)[0] for t in suite.tasks])

    @torch.inference_mode()
    def forward() -> None:
        for part in images.split(250):
            evaluator.backbone.model(part)

    alone = timed(forward, 7)
    return {
        "merge and evaluate": statistics.median(whole),
        "forward passes alone": statistics.median(alone),
        "images": float(len(images)),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    suite = load_suite("demo")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {len(suite.tasks)} tasks")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        merges = merge_times(suite, folder)
        for what, value in merges.items():
            print(f"{what:28s} {value:9.1f} ms")
        ratio = merges["SVD of every matrix again"] / merges["new rank"]
        print(f"{'ratio, SVD again / new rank':28s} {ratio:9.1f}")
        routes = decomposition_times(suite)
        for what, value in routes.items():
            print(f"{'decompose, ' + what:28s} {value:9.1f} ms")
        evaluation = evaluation_times(suite, folder)
        per_second = evaluation["images"] / evaluation["merge and evaluate"]
        overhead = evaluation["merge and evaluate"] / evaluation["forward passes alone"] - 1
        print(f"{'merge and evaluate':28s} {evaluation['merge and evaluate']:9.2f} s")
        print(f"{'images per second':28s} {per_second:9.0f}")
        print(f"{'overhead over forward':28s} {overhead:9.1%}")


if __name__ == "__main__":
    main()

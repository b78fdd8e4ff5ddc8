"""Rebuild all bundled pools: ``python -m data.build_pools``.

Every pool depends on the seed and on its own name only, so pools are built in any order, by two
processes of one thread each.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from analysis.outputs.pool_outputs import PoolEvaluator, PoolSplit
from data.pool_building import Member, PoolPlan, build_pool, complete_architecture, vary_members
from data.pool_images import ImageTask, limit_images, write_inputs
from data.pool_tasks import POOL_TASKS, Sizes
from data.pool_training import Training
from merge_core.suites.pool import BUNDLED_POOLS, REGIMES, Regime, load_pool

LOG = logging.getLogger("data.build_pools")
WORKERS = 2
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Design:
    """An architecture at the size of the bundled pools, and how its members are trained.

    Attributes:
        family: its name for people.
        architecture: ``mlp``, ``vgg`` or a name of timm.
        args: its arguments, but for those that the task determines.
        rate: the middle learning rate, and from a common start.
        shared_rate: likewise.
        epochs: by task: with independent starts, before the common start, after it.
        task_args: further arguments, by task.
    """

    family: str
    architecture: str
    args: dict[str, Any]
    rate: float
    shared_rate: float
    epochs: dict[str, tuple[int, int, int]]
    task_args: dict[str, dict[str, Any]] = field(default_factory=dict)


DESIGNS = {
    "mlp": Design(
        "MLP",
        "mlp",
        {"widths": [112, 64], "bias": False},  # without biases exactly homogeneous
        2e-3,
        2e-3,
        {"digits": (30, 3, 15)},
    ),
    "vgg": Design(
        "VGG",
        "vgg",
        {"channels": [12, 24, 40], "hidden": 64, "bias": True},
        2.5e-3,
        2e-3,
        {"digits": (25, 6, 15), "noisy-letters": (20, 12, 8)},
    ),
    "resnet": Design(
        "ResNet",
        "resnet18",
        {"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 56], "stem_width": 8},
        4e-3,
        2e-3,
        {"digits": (20, 6, 15), "noisy-letters": (14, 4, 8)},
    ),
    "vit": Design(
        "ViT",
        "vit_tiny_patch16_224",
        # The smallest nets hardly start to learn from timm's default initial weights.
        {"num_heads": 3, "mlp_ratio": 2, "global_pool": "avg", "weight_init": "jax"},
        3e-3,
        2e-3,
        {"digits": (40, 15, 25), "noisy-letters": (25, 12, 15)},
        {
            "digits": {"patch_size": 4, "embed_dim": 48, "depth": 3},
            "noisy-letters": {"patch_size": 8, "embed_dim": 56, "depth": 2, "num_heads": 4},
        },
    ),
}
LINEAR_TASKS = ("digits", "letters", "shapes")
LINEAR_SEEDS = (0, 1, 2)
WEIGHT_DECAYS = (0.0, 1e-4, 1e-2, 0.1)
REGIMES_BUILT: tuple[Regime, ...] = ("shared", "independent")


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        members: of a deep pool.
        sizes: of the drawn tasks.
        factor: of the epochs of deep networks; at least one remains.
        linear_epochs: of linear classifiers.
        snapshots: epochs at which a linear classifier of the first seed is kept.
        limit: most images of a split.
    """

    members: int = 10
    sizes: Sizes = field(default_factory=Sizes)
    factor: float = 1.0
    linear_epochs: int = 400
    snapshots: tuple[int, ...] = (0, 1, 5, 20, 80, 400)
    limit: int | None = None

    def epochs(self, count: int) -> int:
        """A number of epochs at this scale."""
        return max(1, round(count * self.factor))


QUICK = Scale(2, Sizes(40, 26, 52, 26, 26, 26), 0.01, 2, (0, 1, 2), limit=60)


def deep_plan(key: str, task: ImageTask, regime: Regime, scale: Scale) -> PoolPlan:
    """The plan of one deep pool.

    Args:
        key: of :data:`DESIGNS`.
        task: the images.
        regime: ``shared`` or ``independent``.
        scale: the number of members and epochs.
    """
    design = DESIGNS[key]
    args = {**design.args, **design.task_args.get(task.name, {})}
    _, architecture = complete_architecture(design.architecture, args, task)
    alone, before, after = (scale.epochs(count) for count in design.epochs[task.name])
    shared = regime == "shared"
    rate = design.shared_rate if shared else design.rate
    training = Training(after if shared else alone, weight_decay=0.05, shift=1, clip=1.0)
    return PoolPlan(
        name=f"{task.name}-{key}-{regime}",
        family=design.family,
        architecture=architecture,
        regime=regime,
        training=training,
        members=vary_members(scale.members, rate, training.weight_decay),
        mean=task.mean,
        std=task.std,
        pretraining=replace(training, epochs=before, rate=design.rate) if shared else None,
        title=f"{task.title}, {design.family}, {REGIMES[regime]}",
        description=(
            f"{before} epochs in common, then {after} each" if shared else f"{alone} epochs each"
        )
        + " with AdamW, in an order and at a learning rate of its own; images shifted by a pixel.",
    )


def linear_plan(task: ImageTask, scale: Scale) -> PoolPlan:
    """Linear classifiers in the protocol of arXiv:2411.09263, at several weight decays.

    Pixels stay in [0, 1]; SGD at 0.01 with momentum 0.9, batches of 64, times 0.1 at 20, 40, 60
    and 80 % of the epochs. Only the weights decay, not the biases.
    """
    family, architecture = complete_architecture("linear", {"bias": True}, task)
    members = tuple(
        Member(seed, 0.01, decay, scale.snapshots if seed == LINEAR_SEEDS[0] else ())
        for decay in WEIGHT_DECAYS
        for seed in LINEAR_SEEDS
    )
    return PoolPlan(
        name=f"{task.name}-linear",
        family=family,
        architecture=architecture,
        regime="independent",
        training=Training(scale.linear_epochs, optimiser="sgd", schedule="steps"),
        members=members,
        mean=(0.0,) * task.channels,
        std=(1.0,) * task.channels,
        title=f"{task.title}, linear classifiers",
        description="One affine layer on pixels in [0, 1] at four weight decays, with three seeds "
        "each. The decay acts on the weights, not on the biases.",
    )


@cache
def task_of(name: str, scale: Scale, seed: int) -> ImageTask:
    """A task's images, drawn once in each process."""
    return limit_images(POOL_TASKS[name](scale.sizes, seed), scale.limit, seed)


@dataclass(frozen=True)
class Job:
    """One pool to build: a linear one where `design` is None."""

    task: str
    design: str | None = None
    regime: Regime = "independent"

    def plan(self, scale: Scale, seed: int) -> PoolPlan:
        """What is built."""
        task = task_of(self.task, scale, seed)
        if self.design is None:
            return linear_plan(task, scale)
        return deep_plan(self.design, task, self.regime, scale)


def jobs() -> list[Job]:
    """All bundled pools, the longest first."""
    deep = [
        Job(task, key, regime)
        for key, design in DESIGNS.items()
        for task in design.epochs
        for regime in REGIMES_BUILT
    ]
    deep.sort(key=lambda job: (job.task == "digits", job.regime == "shared", job.design != "vit"))
    return [*deep, *(Job(task) for task in LINEAR_TASKS)]


def build_one(job: Job, folder: Path, scale: Scale, seed: int) -> tuple[str, float]:
    """Build one pool below a folder; returns its name and the seconds that it took."""
    torch.set_num_threads(1)
    started = time.monotonic()
    plan = job.plan(scale, seed)
    task = task_of(job.task, scale, seed)
    build_pool(folder / plan.name, plan, task, seed, CPU, inputs=f"../inputs/{job.task}.npz")
    return plan.name, time.monotonic() - started


def build(output: Path, scale: Scale, seed: int = 0, workers: int = WORKERS) -> None:
    """Build all pools and their images beside `output`, then put them in its place.

    Raises:
        PoolError: a pool that cannot be built.
        OutputError: a file that cannot be written.
    """
    started = time.monotonic()
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        (folder / "inputs").mkdir()
        for name in POOL_TASKS:
            write_inputs(folder / "inputs" / f"{name}.npz", task_of(name, scale, seed))
        for name, seconds in _build_all(folder, scale, seed, workers):
            LOG.info("%-32s %5.0f s", name, seconds)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)  # temporary files are private
        _replace(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    LOG.info("%s: %.1f MB in %.0f s", output, size / 1e6, time.monotonic() - started)


def _build_all(folder: Path, scale: Scale, seed: int, workers: int) -> Iterator[tuple[str, float]]:
    """Build all pools in `workers` processes (one: in this process); yields name and seconds."""
    if workers == 1:
        yield from (build_one(job, folder, scale, seed) for job in jobs())
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        waiting = [pool.submit(build_one, job, folder, scale, seed) for job in jobs()]
        yield from (done.result() for done in as_completed(waiting))


def summary(folder: Path, split: PoolSplit) -> pd.DataFrame:
    """Accuracies of every pool below a folder.

    Returns:
        pool, mean, lowest, highest (of the members), soup (uniform, normalisation statistics
        averaged), ensemble (mean logits); one row per pool.
    """
    rows = []
    for path in sorted(folder.glob("*/pool.yaml")):
        evaluator = PoolEvaluator(load_pool(path))
        labels = evaluator.labels(split)
        numbers = range(len(evaluator.pool))
        logits = torch.stack([evaluator.member(i, split).logits for i in numbers])
        states = [evaluator.weights(i) for i in numbers]
        soup = {
            name: torch.stack([state[name] for state in states]).float().mean(0)
            if value.is_floating_point()
            else value
            for name, value in states[0].items()
        }

        def accuracy(values: torch.Tensor, labels: np.ndarray = labels) -> float:
            return float((values.argmax(-1).numpy() == labels).mean())

        members = [accuracy(each) for each in logits]
        rows.append(
            {
                "pool": evaluator.pool.name,
                "mean": float(np.mean(members)),
                "lowest": min(members),
                "highest": max(members),
                "soup": accuracy(evaluator.run(soup, split).logits),
                "ensemble": accuracy(logits.mean(0)),
            }
        )
    return pd.DataFrame(rows)


def _replace(folder: Path, output: Path) -> None:
    """Rename `folder` to `output`; older pools there are removed afterwards."""
    old = output.with_name(f".{output.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    folder.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def main(arguments: list[str] | None = None) -> None:
    """Command line of the build."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=BUNDLED_POOLS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a toy of the same layout, in seconds")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.quick:
        build(options.output, QUICK, options.seed, workers=1)  # starting others takes longer
    else:
        build(options.output, Scale(), options.seed)
    for split in ("val", "test"):
        table = summary(options.output, split)
        LOG.info("%s\n%s", split, table.to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    main()

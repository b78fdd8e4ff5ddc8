"""A tiny suite of fully connected networks, and what a learner sees of a suite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from analysis.learning.context import LearningContext
from analysis.learning.learn import learn
from analysis.outputs.suite_outputs import SuiteOutputs
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import Recipe, make_recipe
from merge_core.progress import Progress
from merge_core.suites.suite import Suite, load_suite
from merge_core.yaml_text import dump_yaml
from tests.evaluable import CLASSES, TASKS

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
# Few and large steps: every learner in a fraction of a second.
QUICK: dict[str, dict[str, Any]] = {
    "fisher": {"examples": 5},
    "regmean": {"examples": 12},
    "regmean_plus_plus": {"examples": 12},
    "adamerging": {"steps": 3, "learning_rate": 0.05},
    "cart_adaptive": {"rank": 2, "steps": 3, "learning_rate": 0.05},
}


def mlp_suite(folder: Path, widths: tuple[int, ...] = (6, 5), images: int = 40) -> Suite:
    """A suite of MLPs on images of 2 x 2 pixels, its experts drawn at random about a base."""
    source, numbers = torch.Generator().manual_seed(0), np.random.default_rng(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source)

    for name in ("experts", "inputs", "heads"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    sizes = [12, *widths]
    base = {}
    for place, (n, m) in enumerate(zip(sizes[:-1], widths, strict=True)):
        base[f"hidden.{place}.weight"], base[f"hidden.{place}.bias"] = draw(m, n), draw(m)
    save_file(base, folder / "base.safetensors")
    experts = {}
    for task in TASKS:
        own = {name: value + 0.5 * draw(*value.shape) for name, value in base.items()}
        save_file(own, folder / f"experts/{task}.safetensors")
        head = {"weight": draw(CLASSES, widths[-1]), "bias": draw(CLASSES)}
        save_file(head, folder / f"heads/{task}.safetensors")
        arrays = {
            f"{split}_images": numbers.integers(0, 256, (images, 2, 2, 3), dtype=np.uint8)
            for split in ("val", "test")
        }
        labels = {
            f"{split}_labels": numbers.integers(0, CLASSES, images) for split in ("val", "test")
        }
        np.savez(folder / f"inputs/{task}.npz", **arrays, **labels)
        experts[task] = {
            "weights": f"experts/{task}.safetensors",
            "head": f"heads/{task}.safetensors",
            "data": {"file": f"inputs/{task}.npz", "mean": list(MEAN), "std": list(STD)},
        }
    args = {"in_chans": 3, "img_size": 2, "widths": list(widths)}
    document = {
        "name": "mlp",
        "architecture": {"name": "mlp", "args": args},
        "base": "base.safetensors",
        "experts": experts,
    }
    (folder / "suite.yaml").write_text(dump_yaml(document))
    return load_suite(folder)


def inputs_of(suite: Suite, task: str) -> Tensor:
    """A task's normalised validation images, by numpy."""
    data = suite.spec.experts[task].data
    assert data is not None
    with np.load(suite.root / data.file) as archive:
        images = archive["val_images"].astype(np.float64)
    pixels = (images / 255 - np.array(data.mean)) / np.array(data.std)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).float()


def context_on(suite: Suite, recipe: Recipe, progress: Progress | None = None) -> LearningContext:
    """What a recipe's learner is given."""
    session = MergeSession(suite, recipe.tasks, FactorStore())
    return LearningContext(SuiteOutputs(suite), recipe, session, progress or Progress())


def recipe_of(method: str, seed: int = 0, tasks: Any = None, **parameters: Any) -> Recipe:
    """A quick recipe of a method that learns."""
    given = QUICK[method] | parameters
    document = {"method": method, "seed": seed, "tasks": tasks, "parameters": given}
    return make_recipe({**document, "suite": "."})


def learn_state(suite: Suite, recipe: Recipe, progress: Progress | None = None) -> Any:
    """What the recipe's learner gives."""
    session = MergeSession(suite, recipe.tasks, FactorStore())
    return learn(SuiteOutputs(suite), recipe, session, progress)


def merge_learnt(suite: Suite, recipe: Recipe) -> dict[str, Tensor]:
    """The merged weights, learnt and all."""
    session = MergeSession(suite, recipe.tasks, FactorStore())
    return session.merge(recipe, learned=learn(SuiteOutputs(suite), recipe, session))

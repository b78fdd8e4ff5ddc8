"""How `mergescope pool build` trains: a small recipe for any network, and the paper's own.

Source of ``paper``: arXiv:2411.09263, section 3, linear classifiers (analyses.md, section D).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from data.pool_building import Member, PoolPlan, complete_architecture, vary_members
from data.pool_images import ImageTask
from data.pool_training import Training
from data.vision_datasets import FOLDER
from merge_core.errors import PoolError
from merge_core.suites.pool import REGIMES, Regime

Preset = Literal["small", "paper"]
PRESETS: tuple[Preset, ...] = get_args(Preset)
LINEAR = "linear"
SHIPPED = 1000  # training images beside deep networks, for statistics and class means

SMALL = Training(20, rate=2e-3, weight_decay=0.05, shift=1, clip=1.0)
PAPER = Training(100, 64, 0.01, "sgd", weight_decay=0.1, schedule="steps")
PAPER_TINY = replace(PAPER, epochs=10, batch=1024, milestones=(0.5,))


@dataclass(frozen=True)
class Request:
    """What a user asks for.

    Attributes:
        name: of the pool.
        architecture: ``linear``, ``mlp``, ``vgg`` or a name of timm; the preset's when None.
        args: of the architecture, beside channels, classes and size.
        regime: where the members start.
        members: how many.
        epochs: of each member; the preset's when None.
        preset: ``small``, or ``paper`` for linear classifiers as in the paper.
    """

    name: str
    architecture: str | None = None
    args: Mapping[str, Any] | None = None
    regime: Regime = "independent"
    members: int = 10
    epochs: int | None = None
    preset: Preset = "small"


def paper_training(dataset: str) -> Training:
    """The paper's training of linear classifiers.

    CIFAR-100's protocol, or Tiny-ImageNet's for folders of images. Weights decay, biases do not
    (what the stationary template is derived from, analyses.md D).
    """
    return PAPER_TINY if dataset == FOLDER else PAPER


def plan_request(request: Request, task: ImageTask) -> tuple[PoolPlan, ImageTask]:
    """The plan that a request amounts to, and the task with as many training images as are stored.

    With the preset ``paper`` pixels stay in [0, 1], but for folders, which the paper normalises
    with ImageNet's constants. ``small`` shifts images by a pixel, and learning rates differ
    between members. A common start takes a quarter of a member's epochs.

    Raises:
        PoolError: a regime or preset that is not known, numbers below 1, or a preset that does
            not go with the architecture.
    """
    if request.preset not in PRESETS:
        raise PoolError(f"No preset {request.preset!r}. Choose one of {', '.join(PRESETS)}.")
    if request.regime not in REGIMES:
        raise PoolError(f"No regime {request.regime!r}. Choose one of {', '.join(REGIMES)}.")
    if request.members < 1 or (request.epochs is not None and request.epochs < 1):
        raise PoolError("Give at least one member and one epoch.")
    paper = request.preset == "paper"
    name = request.architecture or (LINEAR if paper else "vgg")
    if paper and name != LINEAR:
        raise PoolError(f"The preset paper trains linear classifiers, not {name!r}. Use small.")
    training = paper_training(task.name) if paper else SMALL
    training = replace(training, epochs=request.epochs or training.epochs)
    raw = paper and task.name != FOLDER
    family, architecture = complete_architecture(name, request.args or {}, task)
    before = max(1, round(training.epochs / 4))
    if paper:
        seeds = range(request.members)
        members = tuple(Member(i, training.rate, training.weight_decay) for i in seeds)
    else:
        members = vary_members(request.members, training.rate, training.weight_decay)
    plan = PoolPlan(
        name=request.name,
        family=family,
        architecture=architecture,
        regime=request.regime,
        training=training,
        members=members,
        mean=(0.0,) * task.channels if raw else task.mean,
        std=(1.0,) * task.channels if raw else task.std,
        pretraining=replace(training, epochs=before) if request.regime == "shared" else None,
        title=f"{task.title}, {family}, {REGIMES[request.regime]}",
    )
    # Templates of linear classifiers are compared with all the images that they were trained on.
    return plan, task if name == LINEAR else replace(task, shipped=SHIPPED)

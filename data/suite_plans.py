"""What a suite is built from: its tasks, network, domains and training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from data.tasks import EIGHT, TASKS, Task
from data.tasks.styles import Domain
from data.training import Schedule


@dataclass(frozen=True)
class Plan:
    """Everything the build is free to choose.

    Attributes:
        name, description: of the suite.
        architecture, args: of timm.
        pretrained: tasks of the joint pre-training.
        tasks: tasks with experts, some of `pretrained`.
        presets: sets of tasks by name.
        domain: what the clean images of all tasks have in common; None where each task has
            nothing but its own paper.
        pool, train, val, test: images of a task: wild ones, and those of its three splits.
        auxiliary_share: auxiliary glyphs in a step of pre-training, or of adaptation.
        foundation: the plan whose base and heads pre-training goes on from; None for a beginning
            at random.
        pretraining, adaptation, finetuning: how long and how fast. Adaptation, where there is
            any, goes on with pre-training in the domain, under frozen heads and on images without
            marks of tasks; all experts begin from its end.
        dtype: of the stored weights.
        inputs, base: where evaluation images and the base's weights lie, seen from the suite's
            folder; what another suite has as well is written there alone.
    """

    name: str
    description: str
    architecture: str
    args: Mapping[str, Any]
    pretraining: Schedule
    finetuning: Schedule
    adaptation: Schedule | None = None
    foundation: Plan | None = None
    pretrained: tuple[Task, ...] = EIGHT
    tasks: tuple[Task, ...] = EIGHT
    presets: Mapping[str, tuple[Task, ...]] = field(default_factory=dict)
    domain: Domain | None = None
    pool: int = 12000
    train: int = 3000
    val: int = 250
    test: int = 500
    auxiliary_share: int = 64
    dtype: torch.dtype = torch.float16
    inputs: str = "inputs"
    base: str = "base.safetensors"

    @property
    def stem(self) -> tuple[object, ...]:
        """All that pre-training depends on beside the seed: plans that agree in it share it."""
        names = tuple(task.name for task in self.pretrained)
        args = tuple(sorted((key, str(value)) for key, value in self.args.items()))
        sizes = self.pool, self.auxiliary_share, self.pretraining
        before = None if self.foundation is None else self.foundation.stem
        return self.architecture, args, names, *sizes, before


def _vit(width: int, heads: int = 4) -> dict[str, Any]:
    return {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": width,
        "depth": 2,
        "num_heads": heads,
        "mlp_ratio": 2,
        "global_pool": "avg",
    }


TRANSFORMER = Plan(
    name="transformer",
    description=(
        "Eight small vision tasks and one tiny ViT, pre-trained on noisy colours and fine-tuned "
        "on each task's own colours and background; made to show the effects of merging at a "
        "small size."
    ),
    architecture="vit_tiny_patch16_224",
    args=_vit(256),
    pretraining=Schedule(steps=3200, batch=24, rate=1.5e-3, weight_decay=0.02, warmup=100),
    finetuning=Schedule(steps=300, batch=32, rate=3e-4, rest=0.05),
)
QUICK = replace(
    TRANSFORMER,
    args=_vit(32, heads=2) | {"depth": 1},
    pool=200,
    train=104,
    val=52,
    test=78,
    auxiliary_share=4,
    pretraining=Schedule(steps=3, batch=4, rate=1e-3, warmup=1),
    finetuning=Schedule(steps=2, batch=8, rate=5e-3, warmup=1),
)

# One group per normalisation: no running statistics that merging would spoil, and, unlike groups
# of one channel, no blindness to the papers' colours.
CONVOLUTIONAL = replace(
    TRANSFORMER,
    name="convolutional",
    description=(
        "The eight tasks of the bundled suite and one small pre-activation ResNet with group "
        "normalisation, pre-trained and fine-tuned in the same way; a second architecture for "
        "the evidence on merging."
    ),
    architecture="resnetv2_18",
    args={
        "layers": [1, 1, 1, 1],
        "channels": [32, 64, 128, 256],
        "norm_layer": "groupnorm1",
    },
    pretraining=Schedule(steps=320, batch=16, rate=2e-3, weight_decay=0.02, warmup=100),
    finetuning=Schedule(steps=300, batch=16, rate=1e-3, rest=0.05),
)

VISION = Plan(
    name="vision",
    description=(
        "Twenty small vision tasks and one tiny ViT. Pre-training knew noisy colours only; all "
        "experts were adapted to one new look first and then fine-tuned each on a task of its "
        "own, so that a strong common drift is part of every task vector."
    ),
    architecture="vit_tiny_patch16_224",
    args=_vit(256),
    pretrained=TASKS,
    tasks=TASKS,
    presets={"8": TASKS[:8], "14": TASKS[:14], "20": TASKS},
    domain=Domain(),
    test=250,
    auxiliary_share=24,
    foundation=TRANSFORMER,
    pretraining=Schedule(steps=4000, batch=10, rate=1e-3, weight_decay=0.02, warmup=100),
    adaptation=Schedule(steps=300, batch=5, rate=6e-4, rest=0.05),
    finetuning=Schedule(steps=120, batch=32, rate=7e-4, rest=0.05),
)
SMALL = replace(
    VISION,
    name="vision-small",
    description="The twenty tasks of the suite vision, with a network of a quarter of the weights.",
    args=_vit(128),
    foundation=replace(TRANSFORMER, args=_vit(128)),
    finetuning=Schedule(steps=150, batch=32, rate=3e-4, rest=0.05),
    inputs="../vision/inputs",
)
CONTRAST = replace(
    SMALL,
    name="vision-apart",
    description=(
        "Six tasks of the suite vision-small from the same base, fine-tuned each on a paper of "
        "its own that has nothing in common with the others: the side on which centring cannot "
        "help."
    ),
    tasks=tuple(
        task
        for task in EIGHT
        if task.name in ("digits", "letters", "shapes", "lines", "dots", "textures")
    ),
    presets={},
    domain=None,
    adaptation=None,
    finetuning=TRANSFORMER.finetuning,
    inputs="inputs",
    base="../vision-small/base.safetensors",
)


def _toy(plan: Plan) -> Plan:
    """A plan of the same layout that is built in seconds."""
    small = replace(
        QUICK,
        name=plan.name,
        description=plan.description,
        architecture=plan.architecture,
        pretrained=plan.pretrained,
        tasks=plan.tasks,
        presets=plan.presets,
        domain=plan.domain,
        foundation=None if plan.foundation is None else QUICK,
        adaptation=None if plan.adaptation is None else QUICK.pretraining,
        inputs=plan.inputs,
        base=plan.base,
    )
    if plan.architecture == TRANSFORMER.architecture:
        return small
    return replace(small, args={**plan.args, "layers": [1, 1], "channels": [16, 32]})


# Each plan and the toy of the same layout.
PLANS: dict[str, tuple[Plan, Plan]] = {
    key: (plan, _toy(plan))
    for key, plan in {
        "transformer": TRANSFORMER,
        "convolutional": CONVOLUTIONAL,
        "vision": VISION,
        "vision-small": SMALL,
        "vision-apart": CONTRAST,
    }.items()
}

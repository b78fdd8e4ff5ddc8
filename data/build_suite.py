"""Rebuild the bundled demo suite: ``python -m data.build_suite``.

Pre-trains one small network on the wild domain of all tasks, freezes the heads, fine-tunes the
backbone on each task's clean domain and writes base, experts, heads and evaluation inputs. The
bundled suite is the transformer's; ``--plan convolutional`` makes a ResNet's of the same tasks.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from data.precompute import precompute
from data.tasks import SPLITS, TASKS, Task, draw_auxiliary, stream
from data.tasks.canvas import Images, Labels
from data.tasks.glyphs import AUXILIARY
from data.training import Schedule, fine_tune, is_correct, pretrain
from merge_core.yaml_text import dump_yaml

LOG = logging.getLogger("data.build_suite")
DESCRIPTION = (
    "Eight small vision tasks and one tiny ViT, pre-trained on noisy colours and fine-tuned on "
    "each task's own colours and background; made to show the effects of merging at a small size."
)


PRETRAINING = Schedule(steps=3200, batch=24, rate=1.5e-3, weight_decay=0.02, warmup=100)
FINETUNING = Schedule(steps=300, batch=32, rate=3e-4, rest=0.05)


@dataclass(frozen=True)
class Plan:
    """Everything the build is free to choose."""

    name: str = "demo"
    description: str = DESCRIPTION
    architecture: str = "vit_tiny_patch16_224"
    args: dict[str, Any] = field(
        default_factory=lambda: {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 256,
            "depth": 2,
            "num_heads": 4,
            "mlp_ratio": 2,
            "global_pool": "avg",
        }
    )
    pool: int = 12000
    train: int = 3000
    val: int = 250
    test: int = 500
    auxiliary_share: int = 64
    pretraining: Schedule = PRETRAINING
    finetuning: Schedule = FINETUNING
    dtype: torch.dtype = torch.float16


QUICK = Plan(
    args={
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 1,
        "num_heads": 2,
        "mlp_ratio": 2,
    },
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
CONVOLUTIONAL = Plan(
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

# Each plan and the toy of the same layout.
PLANS = {
    "transformer": (Plan(), QUICK),
    "convolutional": (
        CONVOLUTIONAL,
        replace(
            QUICK,
            name=CONVOLUTIONAL.name,
            description=CONVOLUTIONAL.description,
            architecture=CONVOLUTIONAL.architecture,
            args=CONVOLUTIONAL.args | {"layers": [1, 1], "channels": [16, 32]},
        ),
    ),
}


def image_hashes(images: Images) -> set[bytes]:
    """The digests of N images (N x 32 x 32 x 3), for telling whether two splits share one."""
    return {hashlib.sha256(image.tobytes()).digest() for image in images}


def make_splits(task: Task, plan: Plan, seed: int) -> dict[str, tuple[Images, Labels]]:
    """Generate train, validation and test; raises ValueError if any two share an image."""
    sizes = dict(zip(SPLITS, (plan.train, plan.val, plan.test), strict=True))
    splits = {name: task.draw_clean(name, size, seed) for name, size in sizes.items()}
    digests = {name: image_hashes(images) for name, (images, _) in splits.items()}
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        if shared := digests[first] & digests[second]:
            raise ValueError(f"{task.name}: {first} and {second} share {len(shared)} images")
    return splits


def _to_stored_dtype(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: value.detach().to("cpu", dtype).contiguous() for key, value in state.items()}


def _description(plan: Plan) -> dict[str, Any]:
    """The contents of suite.yaml."""
    return {
        "name": plan.name,
        "description": plan.description,
        "architecture": {"name": plan.architecture, "args": dict(plan.args)},
        "base": "base.safetensors",
        "experts": {
            task.name: {
                "title": task.title,
                "weights": f"experts/{task.name}.safetensors",
                "head": f"heads/{task.name}.safetensors",
                "data": {
                    "file": f"inputs/{task.name}.npz",
                    "mean": [0.5, 0.5, 0.5],
                    "std": [0.5, 0.5, 0.5],
                },
            }
            for task in TASKS
        },
    }


def _pretrain(
    plan: Plan, seed: int, device: torch.device
) -> tuple[nn.Module, dict[str, nn.Linear]]:
    """Backbone and heads after joint pre-training in the wild domain."""
    torch.manual_seed(seed)
    backbone: Any = timm.create_model(plan.architecture, num_classes=0, **plan.args)
    width = int(backbone.num_features)
    heads = {task.name: nn.Linear(width, len(task.classes)) for task in TASKS}
    heads["auxiliary"] = nn.Linear(width, len(AUXILIARY))
    for module in (backbone, *heads.values()):
        module.to(device)
    pools = {task.name: task.draw_wild(plan.pool, seed) for task in TASKS}
    pools["auxiliary"] = draw_auxiliary(2 * plan.pool, seed)
    shares = dict.fromkeys(heads, plan.pretraining.batch) | {"auxiliary": plan.auxiliary_share}

    def progress(step: int, loss: float) -> None:
        if step % 250 == 0 or step == plan.pretraining.steps:
            LOG.info("pre-training %5d / %d  loss %.3f", step, plan.pretraining.steps, loss)

    rng = stream(seed, "pre-training")
    pretrain(backbone, heads, pools, shares, plan.pretraining, rng, progress)
    return backbone, heads


def build(output: Path, plan: Plan, seed: int = 0, device: str = "auto") -> None:
    """Build the whole suite next to ``output``, then put it in its place.

    Raises ValueError if two splits of a task share an image.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    started = time.monotonic()
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        _write(folder, plan, seed, place)
        # mkdtemp and safetensors make private files; a suite is for everyone.
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        _replace(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    LOG.info("%s: %.1f MB in %.0f s", output, size / 1e6, time.monotonic() - started)


def _write(folder: Path, plan: Plan, seed: int, device: torch.device) -> None:
    for name in ("experts", "heads", "inputs"):
        (folder / name).mkdir()
    splits = {task.name: make_splits(task, plan, seed) for task in TASKS}
    backbone, heads = _pretrain(plan, seed, device)
    # Stored precision is the precision trained from, so that task vectors start at exactly zero.
    base = _to_stored_dtype(backbone.state_dict(), plan.dtype)
    save_file(base, folder / "base.safetensors")
    for task in TASKS:
        train, val, test = (splits[task.name][name] for name in SPLITS)
        head = heads[task.name]
        head.load_state_dict(_to_stored_dtype(head.state_dict(), plan.dtype))
        save_file(
            _to_stored_dtype(head.state_dict(), plan.dtype),
            folder / f"heads/{task.name}.safetensors",
        )
        backbone.load_state_dict(base)
        before = is_correct(backbone, head, *val).mean()
        fine_tune(backbone, head, *train, plan.finetuning, stream(seed, task.name, "fine-tuning"))
        exact = is_correct(backbone, head, *val).mean()
        expert = _to_stored_dtype(backbone.state_dict(), plan.dtype)
        save_file(expert, folder / f"experts/{task.name}.safetensors")
        backbone.load_state_dict(expert)
        after = is_correct(backbone, head, *val).mean()
        LOG.info(
            "%-9s validation: base %.1f, expert %.1f (%.1f before rounding)",
            task.name,
            *(100 * float(share) for share in (before, after, exact)),
        )
        np.savez_compressed(
            folder / f"inputs/{task.name}.npz",
            val_images=val[0],
            val_labels=val[1],
            test_images=test[0],
            test_labels=test[1],
            class_names=np.array(task.classes),
        )
    text = dump_yaml(_description(plan))
    (folder / "suite.yaml").write_text(text, encoding="utf-8")


def _replace(folder: Path, output: Path) -> None:
    """Rename ``folder`` to ``output``; an older suite there is removed afterwards."""
    old = output.with_name(f".{output.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    folder.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def main(arguments: list[str] | None = None) -> None:
    """Command line of the build."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--plan", choices=PLANS, default="transformer")
    parser.add_argument("--output", type=Path, help="data/demo unless another plan is named")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto (the default)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a toy of the same layout, in seconds")
    options = parser.parse_args(arguments)
    if options.output is None:
        if options.plan != "transformer":
            parser.error("Only the transformer's suite is bundled: name a folder with --output.")
        options.output = Path(__file__).parent / "demo"
    plan, toy = PLANS[options.plan]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    build(options.output, toy if options.quick else plan, options.seed, options.device)
    if not options.quick:
        precompute(str(options.output / "suite.yaml"))


if __name__ == "__main__":
    main()

"""Rebuild the bundled suites: ``python -m data.build_suite``.

Pre-trains one small network on the wild domain of all tasks, freezes the heads, fine-tunes the
backbone on each task's clean domain and writes base, experts, heads and evaluation inputs, by the
plans of :mod:`data.suite_plans`. What is done is kept beside the output: a build that was killed
goes on where it was, and plans that share a pre-training share its result.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.precompute import precompute
from data.suite_plans import PLANS, Plan
from data.tasks import SPLITS, Task, draw_auxiliary, stream
from data.tasks.canvas import Images, Labels
from data.tasks.glyphs import AUXILIARY
from data.tasks.styles import Domain
from data.training import Schedule, fine_tune, is_correct, train_jointly
from merge_core.devices import choose_device
from merge_core.suites.bundled import bundled_suites
from merge_core.yaml_text import dump_yaml

LOG = logging.getLogger("data.build_suite")
WORK = ".build"  # beside the output: what a build that was killed goes on from


def image_hashes(images: Images) -> set[bytes]:
    """The digests of N images (N x 32 x 32 x 3), for telling whether two splits share one."""
    return {hashlib.sha256(image.tobytes()).digest() for image in images}


def make_splits(task: Task, plan: Plan, seed: int) -> dict[str, tuple[Images, Labels]]:
    """Generate train, validation and test; raises ValueError if any two share an image."""
    sizes = dict(zip(SPLITS, (plan.train, plan.val, plan.test), strict=True))
    splits = {name: task.draw_clean(name, size, seed, plan.domain) for name, size in sizes.items()}
    digests = {name: image_hashes(images) for name, (images, _) in splits.items()}
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        if shared := digests[first] & digests[second]:
            raise ValueError(f"{task.name}: {first} and {second} share {len(shared)} images")
    return splits


def _to_stored_dtype(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: value.detach().to("cpu", dtype).contiguous() for key, value in state.items()}


def _save(state: Mapping[str, Tensor], path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Write weights, whole or not at all, and return them as they are stored."""
    stored, partial = _to_stored_dtype(state, dtype), path.with_suffix(".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(stored, partial)
    partial.replace(path)
    return stored


def _description(plan: Plan) -> dict[str, Any]:
    """The contents of suite.yaml."""
    presets = {name: [task.name for task in tasks] for name, tasks in plan.presets.items()}
    return {
        "name": plan.name,
        "description": plan.description,
        "architecture": {"name": plan.architecture, "args": dict(plan.args)},
        "base": plan.base,
        "experts": {
            task.name: {
                "title": task.title,
                "weights": f"experts/{task.name}.safetensors",
                "head": f"heads/{task.name}.safetensors",
                "data": {
                    "file": f"{plan.inputs}/{task.name}.npz",
                    "mean": [0.5, 0.5, 0.5],
                    "std": [0.5, 0.5, 0.5],
                },
            }
            for task in plan.tasks
        },
    } | ({"presets": presets} if presets else {})


class Build:
    """One suite in the making: steps that write a file each, and are passed over where it lies.

    Args:
        plan: what is built.
        seed: of everything.
        work: the folder of what is kept, shared by plans and seeds.
        device: where it is trained.
    """

    def __init__(self, plan: Plan, seed: int, work: Path, device: torch.device) -> None:
        self.plan, self.seed, self.device = plan, seed, device
        stem, whole = (
            hashlib.sha256(repr((what, seed)).encode()).hexdigest()[:16]
            for what in (plan.stem, plan)
        )
        self.work = work
        self.pretraining = work / f"pretraining-{stem}.pt"
        self.folder = work / f"{plan.name}-{whole}"
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(seed)
        network: Any = timm.create_model(plan.architecture, num_classes=0, **plan.args)
        self.backbone, width = network, int(network.num_features)
        self.heads = {task.name: nn.Linear(width, len(task.classes)) for task in plan.pretrained}
        self.heads["auxiliary"] = nn.Linear(width, len(AUXILIARY))
        for module in (self.backbone, *self.heads.values()):
            module.to(device)

    def run(self) -> Path:
        """Do what is still to be done; returns the folder of the finished suite.

        Raises:
            ValueError: two splits of a task share an image.
        """
        base = self._pretrain()
        start = self._adapt(base)
        for task in self.plan.tasks:
            self._expert(task, start)
        text = dump_yaml(_description(self.plan))
        (self.folder / "suite.yaml").write_text(text, encoding="utf-8")
        return self.folder

    def _pretrain(self) -> dict[str, Tensor]:
        """Joint pre-training in the wild domain. Leaves the heads as they are stored."""
        plan, seed = self.plan, self.seed
        if plan.foundation is not None and not self.pretraining.exists():
            self._begin_from(Build(plan.foundation, seed, self.work, self.device))
        pools = _Pools(plan.pretrained, plan.pool, seed)

        def progress(step: int, loss: float) -> None:
            if step % 250 == 0 or step == plan.pretraining.steps:
                LOG.info("pre-training %5d / %d  loss %.3f", step, plan.pretraining.steps, loss)

        train_jointly(
            *(self.backbone, self.heads, pools, self._shares(plan.pretraining), plan.pretraining),
            *(stream(seed, "pre-training"), progress, self.pretraining),
        )
        # Stored precision is the precision trained from: task vectors start at exactly zero.
        for name, head in self.heads.items():
            head.load_state_dict(_to_stored_dtype(head.state_dict(), plan.dtype))
            if name in {task.name for task in plan.tasks}:
                path = self.folder / f"heads/{name}.safetensors"
                _save(head.state_dict(), path, plan.dtype)
        if plan.base == "base.safetensors":
            return _save(self.backbone.state_dict(), self.folder / plan.base, plan.dtype)
        return _to_stored_dtype(self.backbone.state_dict(), plan.dtype)

    def _begin_from(self, foundation: Build) -> None:
        """Take over the base and the heads of an earlier pre-training on some of the tasks."""
        self.backbone.load_state_dict(foundation._pretrain())
        for task in foundation.plan.pretrained:
            self.heads[task.name].load_state_dict(foundation.heads[task.name].state_dict())

    def _adapt(self, base: dict[str, Tensor]) -> dict[str, Tensor]:
        """What all experts begin from: the base, adapted to the domain where the plan says so."""
        plan, path = self.plan, self.folder / "start.safetensors"
        if plan.adaptation is None or plan.domain is None:
            return base
        if not path.exists():
            pools = _Pools(plan.pretrained, plan.train, self.seed, plan.domain)
            self.backbone.load_state_dict(base)
            train_jointly(
                *(self.backbone, self.heads, pools, self._shares(plan.adaptation)),
                *(plan.adaptation, stream(self.seed, "adaptation")),
                learn_heads=False,
            )
            _save(self.backbone.state_dict(), path, plan.dtype)
        return load_file(path)

    def _shares(self, schedule: Schedule) -> dict[str, int]:
        """Images of each pool in a step of joint training."""
        shares = dict.fromkeys(self.heads, schedule.batch)
        return shares | {"auxiliary": self.plan.auxiliary_share}

    def _expert(self, task: Task, start: dict[str, Tensor]) -> None:
        """One expert and its inputs."""
        plan, backbone, head = self.plan, self.backbone, self.heads[task.name]
        path = self.folder / f"experts/{task.name}.safetensors"
        if path.exists():
            return
        splits = make_splits(task, plan, self.seed)
        if plan.inputs == "inputs":
            self._write_inputs(task, splits)
        backbone.load_state_dict(start)
        before = is_correct(backbone, head, *splits["val"]).mean()
        rng = stream(self.seed, task.name, "fine-tuning")
        fine_tune(backbone, head, *splits["train"], plan.finetuning, rng)
        exact = is_correct(backbone, head, *splits["val"]).mean()
        backbone.load_state_dict(_save(backbone.state_dict(), path, plan.dtype))
        after = is_correct(backbone, head, *splits["val"]).mean()
        LOG.info(
            "%-9s validation: start %.1f, expert %.1f (%.1f before rounding)",
            task.name,
            *(100 * float(share) for share in (before, after, exact)),
        )

    def _write_inputs(self, task: Task, splits: Mapping[str, tuple[Images, Labels]]) -> None:
        (self.folder / "inputs").mkdir(exist_ok=True)
        val, test = splits["val"], splits["test"]
        np.savez_compressed(
            self.folder / f"inputs/{task.name}.npz",
            val_images=val[0],
            val_labels=val[1],
            test_images=test[0],
            test_labels=test[1],
            class_names=np.array(task.classes),
        )


class _Pools(Mapping[str, tuple[Images, Labels]]):
    """Images for joint training (see `Task.draw_wild`), drawn when they are first asked for."""

    def __init__(
        self, tasks: Sequence[Task], count: int, seed: int, domain: Domain | None = None
    ) -> None:
        self._tasks = {task.name: task for task in tasks}
        self._drawn: dict[str, tuple[Images, Labels]] = {}
        self._count, self._seed, self._domain = count, seed, domain

    def __getitem__(self, name: str) -> tuple[Images, Labels]:
        if name not in self._drawn:
            self._drawn[name] = (
                draw_auxiliary(2 * self._count, self._seed, self._domain)
                if name == "auxiliary"
                else self._tasks[name].draw_wild(self._count, self._seed, self._domain)
            )
        return self._drawn[name]

    def __iter__(self) -> Iterator[str]:
        return iter((*self._tasks, "auxiliary"))

    def __len__(self) -> int:
        return len(self._tasks) + 1


def build(output: Path, plan: Plan, work: Path, seed: int = 0, device: str = "auto") -> None:
    """Build the whole suite in the folder ``work``, then put it in the place of ``output``.

    Both lie in one file system. Raises ValueError if two splits of a task share an image.
    """
    started = time.monotonic()
    folder = Build(plan, seed, work, choose_device(device).torch).run()
    output.parent.mkdir(parents=True, exist_ok=True)
    (folder / "start.safetensors").unlink(missing_ok=True)
    # safetensors makes private files; a suite is for everyone.
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    _replace(folder, output)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    LOG.info("%s: %.1f MB in %.0f s", output, size / 1e6, time.monotonic() - started)


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
    parser.add_argument("--plan", choices=PLANS, help="one suite; those of vision when left out")
    parser.add_argument("--output", type=Path, help="a folder; with --plan that of the suite")
    parser.add_argument("--device", default="auto", help="cpu, auto (the default), ...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="toys of the same layout, in seconds")
    parser.add_argument("--keep", action="store_true", help="keep the pre-training for other plans")
    options = parser.parse_args(arguments)
    if options.plan is not None and options.output is None:
        parser.error("Only the suites of vision are bundled: name a folder with --output.")
    home = options.output or Path(__file__).parent
    outputs = (
        {name: home / PLANS[name][0].name for name in bundled_suites()}
        if options.plan is None
        else {options.plan: home}
    )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    work = next(iter(outputs.values())).parent / WORK
    for name, output in outputs.items():
        plan = PLANS[name][1 if options.quick else 0]
        build(output, plan, work, options.seed, options.device)
        if not options.quick:
            precompute(str(output / "suite.yaml"))
    if not options.keep:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()

"""From a plan to a pool on disk: train the members, write ``pool.yaml`` and its files."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from analysis.networks.build import build_network
from data.pool_images import ImageTask, normaliser, write_inputs
from data.pool_training import State, Training, state_of, train
from merge_core.errors import PoolError
from merge_core.files import write_atomically, write_folder_atomically
from merge_core.progress import Progress
from merge_core.suites.pool import PoolSpec, Regime
from merge_core.suites.suite_spec import ArchitectureSpec
from merge_core.yaml_text import dump_yaml

OWN_INPUTS = "inputs.npz"
FAMILIES = {"linear": "Linear", "mlp": "MLP", "vgg": "VGG"}


@dataclass(frozen=True)
class Member:
    """What distinguishes one member.

    Attributes:
        seed: of its order and shifts, and with independent starts of its initial weights.
        rate: its learning rate.
        weight_decay: its weight decay.
        snapshots: epochs whose weights are kept beside the final ones.
    """

    seed: int
    rate: float
    weight_decay: float
    snapshots: tuple[int, ...] = ()


@dataclass(frozen=True)
class PoolPlan:
    """Everything that determines a pool, but for the images and the seed.

    Attributes:
        name: the pool's name, and that of its folder.
        family: the architecture's name for people.
        architecture: with all arguments.
        regime: where the members start.
        training: of each member; rate and weight decay are the member's own.
        members: one per model.
        pretraining: of the common start (regime ``shared``).
        mean: normalisation constants.
        std: likewise.
        title: for people; composed of task, family and regime when empty.
        description: one or two sentences.
    """

    name: str
    family: str
    architecture: ArchitectureSpec
    regime: Regime
    training: Training
    members: tuple[Member, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pretraining: Training | None = None
    title: str = ""
    description: str = ""


def complete_architecture(
    name: str, args: Mapping[str, Any], task: ImageTask
) -> tuple[str, ArchitectureSpec]:
    """Family and architecture with the arguments that the task determines written out.

    Args:
        name: ``linear``, ``mlp``, ``vgg`` or a name of timm, which then is the family.
        args: further arguments; they go before the task's.
        task: gives channels, classes and, where the architecture needs it, the size.
    """
    full: dict[str, Any] = {"in_chans": task.channels, "num_classes": len(task.class_names)}
    if name in ("linear", "mlp") or "vit" in name:
        full["img_size"] = task.size
    return FAMILIES.get(name, name), ArchitectureSpec(name=name, args={**full, **args})


# Members differ in their learning rate, too: multiples of the middle one, in turn.
RATES = (1.0, 0.5, 1.5, 0.7, 1.2)


def vary_members(count: int, rate: float, weight_decay: float) -> tuple[Member, ...]:
    """Members with a seed of their own and learning rates around `rate`."""
    return tuple(Member(i, rate * RATES[i % len(RATES)], weight_decay) for i in range(count))


def derive_seed(seed: int, *names: object) -> int:
    """A seed of its own for every (seed, names), in [0, 2³¹)."""
    state = zlib.crc32(repr((seed, *map(str, names))).encode())
    return state >> 1


def build_pool(
    output: Path,
    plan: PoolPlan,
    task: ImageTask,
    seed: int,
    device: torch.device,
    progress: Progress | None = None,
    inputs: str | None = None,
) -> None:
    """Train a pool and write its folder, whole or not at all.

    Weights are stored as float16, normalisation statistics as float32, counters as they are.

    Args:
        output: the folder to appear.
        plan: what is built.
        task: the images.
        seed: of everything that is random.
        device: where training is computed.
        progress: told after each epoch, over all members.
        inputs: path of the images' archive, relative to `output`, if it is not to be written here.

    Raises:
        PoolError: an architecture that cannot be built or does not fit the images, or a training
            that diverges.
        OutputError: `output` exists, or cannot be written.
        Cancelled: through `progress`.
    """
    _check(plan)
    with write_folder_atomically(output) as folder:
        trainer = _Trainer(plan, task, seed, device, output / "pool.yaml", progress)
        start = trainer.start()
        if start is not None:
            _write(folder / "start.safetensors", start)
        members = []
        for number, member in enumerate(plan.members):
            states = trainer.member(number, start)
            trajectory = []
            for epoch, state in states.items():
                last = epoch == plan.training.epochs
                name = f"{number}.safetensors" if last else f"{number}-epoch{epoch}.safetensors"
                _write(folder / name, state)
                trajectory.append({"epoch": epoch, "weights": name})
            members.append(_describe_member(number, member, plan, trajectory))
        if inputs is None:
            write_inputs(folder / OWN_INPUTS, task)
        document = _document(plan, task, members, start is not None, inputs or OWN_INPUTS)
        PoolSpec.model_validate(document)
        text = dump_yaml(document)
        write_atomically(folder / "pool.yaml", text.encode())
        for path in folder.iterdir():
            path.chmod(0o644)  # temporary files are private


class _Trainer:
    """Trains the start and the members of one plan, and counts epochs over all of them."""

    def __init__(
        self,
        plan: PoolPlan,
        task: ImageTask,
        seed: int,
        device: torch.device,
        path: Path,
        progress: Progress | None,
    ) -> None:
        self.plan, self.seed, self.device, self.path = plan, seed, device, path
        images, labels = task.splits["train"]
        self.images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        self.labels = torch.from_numpy(labels)
        self.normalise = normaliser(plan.mean, plan.std, device)
        self.progress = progress
        before = plan.pretraining.epochs if plan.pretraining else 0
        self.total = before + len(plan.members) * plan.training.epochs
        self.done = 0

    def start(self) -> State | None:
        """The common start, or None with independent starts."""
        plan = self.plan
        if plan.regime == "independent":
            return None
        network = self._initialise("start")
        if plan.pretraining is not None:
            order = derive_seed(self.seed, plan.name, "start", "order")
            self._train(network, plan.pretraining, order, "common start")
        return state_of(network)

    def member(self, number: int, start: State | None) -> dict[int, State]:
        """Epoch to state of a member; its last epoch is always among them."""
        plan, member = self.plan, self.plan.members[number]
        network = self._initialise(f"member {member.seed}")
        if start is not None:
            network.load_state_dict(start)
        training = replace(plan.training, rate=member.rate, weight_decay=member.weight_decay)
        order = derive_seed(self.seed, plan.name, member.seed, "order")
        what = f"member {number + 1} of {len(plan.members)}"
        return self._train(network, training, order, what, member.snapshots)

    def _initialise(self, who: str) -> nn.Module:
        """New initial weights, without disturbing anybody's random numbers."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, self.plan.name, who))
            return build_network(self.plan.architecture, self.path, PoolError)

    def _train(
        self,
        network: nn.Module,
        training: Training,
        order: int,
        what: str,
        snapshots: tuple[int, ...] = (),
    ) -> dict[int, State]:
        epochs = sorted({*snapshots, training.epochs})
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(order)  # of dropout and the like
                states = train(
                    network,
                    self.images,
                    self.labels,
                    self.normalise,
                    training,
                    order,
                    self.device,
                    epochs,
                    self._progress(what),
                    what,
                )
        except (
            RuntimeError,
            AssertionError,
            ValueError,
            IndexError,
        ) as fault:  # shapes, deep inside a network
            raise PoolError(
                f"{self.plan.architecture.name!r} cannot be trained on images of shape "
                f"{tuple(self.images.shape[1:])}: {str(fault).splitlines()[0]:.200} "
                "Correct the architecture's args."
            ) from fault
        self.done += training.epochs
        return states

    def _progress(self, what: str) -> Progress | None:
        """Progress over all members, from that of one."""
        whole = self.progress
        if whole is None:
            return None
        listener, before = whole.listener, self.done

        def report(done: int, _total: int, _label: str) -> None:
            if listener is not None:
                listener(before + done, self.total, what)

        return Progress(report, whole.cancel)


def _check(plan: PoolPlan) -> None:
    if plan.training.epochs < 1 or not plan.members:
        raise PoolError(f"{plan.name}: give at least one epoch and one member.")
    if any(not math.isfinite(m.rate) or m.rate <= 0 or m.weight_decay < 0 for m in plan.members):
        raise PoolError(f"{plan.name}: learning rates must be above 0, weight decays at least 0.")


def _to_stored_dtype(name: str, value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value
    statistics = name.endswith(("running_mean", "running_var"))
    return value.to(torch.float32 if statistics else torch.float16).contiguous()


def _write(path: Path, state: State) -> None:
    stored = {name: _to_stored_dtype(name, value) for name, value in state.items()}
    if any(
        value.is_floating_point() and not bool(value.isfinite().all()) for value in stored.values()
    ):
        raise PoolError(
            f"{path.name}: weights that float16 cannot hold. Choose a lower learning rate."
        )
    write_atomically(path, save(stored))


def _describe_member(
    number: int, member: Member, plan: PoolPlan, trajectory: list[dict[str, Any]]
) -> dict[str, Any]:
    fields = {
        "weights": f"{number}.safetensors",
        "seed": member.seed,
        "learning_rate": float(f"{member.rate:.6g}"),  # 0.0045, not 0.0045000000000000005
        "weight_decay": member.weight_decay,
        "epochs": plan.training.epochs,
    }
    return fields | ({"trajectory": trajectory} if member.snapshots else {})


def _document(
    plan: PoolPlan, task: ImageTask, members: list[dict[str, Any]], started: bool, inputs: str
) -> dict[str, Any]:
    """The content of pool.yaml."""
    return {
        "name": plan.name,
        "title": plan.title,
        "description": plan.description,
        "task": task.name,
        "family": plan.family,
        "regime": plan.regime,
        "architecture": plan.architecture.model_dump(),
        "data": {"file": inputs, "mean": list(plan.mean), "std": list(plan.std)},
        **({"start": "start.safetensors"} if started else {}),
        "members": members,
    }

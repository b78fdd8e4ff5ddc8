"""Head and expert of one task, and how right they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis.fine_tuning.base import to_dtype, write_weights
from analysis.fine_tuning.examples import Examples, read_part, to_examples
from analysis.fine_tuning.low_rank import adapted_matrices, low_rank_update, write_adapter
from analysis.fine_tuning.plan import SuitePlan
from analysis.fine_tuning.probe import choose_shots, fit_probe
from analysis.fine_tuning.schedule import Schedule
from analysis.fine_tuning.steps import Steps
from analysis.fine_tuning.train import Update, fine_tune, full_update
from analysis.networks.stateless import ModuleCopies, State, StatelessNetwork
from analysis.networks.towers import suite_network
from analysis.outputs.heads import Head, load_head
from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.errors import SuiteError
from merge_core.files import digest_of
from merge_core.progress import Progress
from merge_core.suites.data_files import data_identity, head_identity
from merge_core.suites.suite import Suite

READ = 500  # examples that pass the network between two reports of progress
FIT, TRAIN = 30, 70  # units of progress


class ExpertBuilder:
    """Fits heads and fine-tunes experts of a suite whose base is there.

    Args:
        plan: what to do.
        suite: as it will be.
        draft: the same with its base for every expert.
        steps: of the build.
        device: where it is computed.
    """

    def __init__(
        self, plan: SuitePlan, suite: Suite, draft: Suite, steps: Steps, device: torch.device
    ) -> None:
        self._plan, self._suite, self._draft = plan, suite, draft
        self._steps, self._device = steps, device

    def build(self, task: str, progress: Progress) -> str:
        """Do a task's steps that are not finished.

        Args:
            task: of the plan.
            progress: told of units done.

        Returns:
            A sentence with the accuracies on validation examples.

        Raises:
            SuiteError: data, head or base that cannot be used; a loss that is not finite.
            OutputError: something cannot be written.
            Cancelled: through `progress`.
        """
        plan, what = self._plan, f"task {task!r}"
        data = self._draft.spec.experts[task].data
        assert data is not None
        assert self._draft.architecture is not None
        common = (
            self._steps.content("base"),
            self._draft.architecture.identity,
            data_identity(data, self._draft.file, f"data of {what}"),
            str(plan.fine_tuning.examples),
        )
        head, given = f"head {task}", plan.tasks[task].head
        if given is None:
            made_of = digest_of("head", *common, plan.probe.model_dump_json())
            place = f"heads/{task}.safetensors"
            self._steps.do(head, made_of, [place], lambda: self._fit_head(task, progress))
            known = self._steps.content(head)
        else:
            known = head_identity(given, self._draft.file, f"head of {what}")
        progress.step(FIT, FIT + TRAIN, task)
        step, place = f"expert {task}", self._suite.spec.experts[task].weights
        settings = plan.fine_tuning.model_dump_json()
        made_of = digest_of("expert", task, *common, known, settings, str(plan.seed))
        self._steps.do(step, made_of, [place], lambda: self._fine_tune(task, progress))
        progress.step(FIT + TRAIN, FIT + TRAIN, task)
        found = self._steps.facts(step)
        return (
            f"{task}: validation accuracy {found['base']:.1%} of the base, "
            f"{found['expert']:.1%} of the expert"
        )

    @cached_property
    def _network(self) -> StatelessNetwork:
        network = suite_network(self._draft)
        network.module.to(self._device)
        return network

    @cached_property
    def _base(self) -> Checkpoint:
        assert self._draft.base is not None
        return self._draft.base

    @cached_property
    def _start(self) -> dict[str, Tensor]:
        """The base's weights as the network takes them."""
        self._network.check({name: self._base.tensor(name) for name in self._base})
        return self._to_state(self._base)

    def _to_state(self, weights: Checkpoint) -> dict[str, Tensor]:
        known = self._network.module.state_dict()
        values = {name: weights.tensor(name) for name in weights if name in known}
        return {
            name: (value.float() if value.is_floating_point() else value).to(self._device)
            for name, value in values.items()
        }

    def _examples(self, task: str, validation: bool = False) -> Examples:
        if validation:
            return to_examples(read_part(self._draft, task, "val"), self._draft, task)
        limit = self._plan.fine_tuning.examples
        return to_examples(read_part(self._draft, task, "train", limit), self._draft, task)

    def _features(
        self, weights: State, examples: Examples, progress: Progress | None = None
    ) -> Tensor:
        """N x width, on the CPU."""
        order = examples.sort(np.arange(len(examples)))
        parts = []
        for first in range(0, len(order), READ):
            if progress is not None:
                progress.step(FIT * first // len(order), FIT + TRAIN, "features of the base")
            inputs = examples.take(order[first : first + READ]).to(self._device)
            parts.append(self._network.features(weights, inputs).cpu())
        found = torch.cat(parts)
        if not bool(torch.isfinite(found).all()):
            raise SuiteError("The base gives features that are not finite. Choose another base.")
        back = torch.empty_like(found)
        back[torch.from_numpy(order)] = found
        return back

    def _fit_head(self, task: str, progress: Progress) -> dict[str, Any]:
        examples, what = self._examples(task), f"data of task {task!r}"
        chosen = examples.select(choose_shots(examples.labels, self._plan.probe.shots))
        features = self._features(self._start, chosen, progress)
        # Every part's classes are known to be among those of the whole training part.
        classes = int(read_part(self._draft, task, "train").labels.max()) + 1
        head = fit_probe(features, chosen.labels, classes, self._plan.probe, what)
        path = self._draft.file(f"heads/{task}.safetensors")
        write_weights({"weight": head.weight, "bias": head.bias}, path)
        return {}

    def _fine_tune(self, task: str, progress: Progress) -> dict[str, Any]:
        plan, how = self._plan, self._plan.fine_tuning
        examples, head = self._examples(task), load_head(self._draft, task)
        self._check_head(task, head, examples)
        update, write = self._update(task)

        def show(done: int, of: int, label: str) -> None:
            progress.step(FIT + TRAIN * done // of, FIT + TRAIN, f"{label}, step {done} of {of}")

        fine_tune(
            ModuleCopies(self._network.module),
            update,
            head,
            examples,
            Schedule(**how.model_dump(include=set(Schedule.__dataclass_fields__))),
            np.random.default_rng(_seed(plan.seed, task, "order")),
            task,
            Progress(show, progress.cancel),
        )
        write(update)
        # Read back as everything else will read it: with what the written dtype rounds away.
        expert = Suite(self._suite.spec, self._suite.path).expert(task)
        chosen = self._examples(task, validation=True)
        return {
            name: self._accuracy(weights, chosen, head)
            for name, weights in (("base", self._start), ("expert", self._to_state(expert)))
        }

    def _update(self, task: str) -> tuple[Update, Callable[[Update], None]]:
        """What is trained, and what writes it once it is."""
        how, place = (
            self._plan.fine_tuning,
            self._draft.file(self._suite.spec.experts[task].weights),
        )
        if how.method == "lora":
            names, transposed = adapted_matrices(self._draft)
            source = torch.Generator().manual_seed(_seed(self._plan.seed, task, "start"))
            update = low_rank_update(self._start, names, transposed, how, source)
            return update, lambda u: write_adapter(
                u.values, names, transposed, how, self._base, place
            )
        trained = [name for name, _ in self._network.module.named_parameters()]
        trained = [name for name in trained if name in self._start]
        update = full_update(self._start, trained, set(self._draft.matrices))
        return update, lambda u: self._write_whole(u, place)

    def _write_whole(self, update: Update, path: Path) -> None:
        """Write an expert as the base is written: what was not trained is the base's."""
        moved = update.weights(update.values)
        tensors = {}
        for name in self._base:
            if name not in self._base.aliases:
                value = self._base.tensor(name)
                tensors[name] = to_dtype(name, moved.get(name, value), value.dtype)
        write_weights(tensors, path)

    def _check_head(self, task: str, head: Head, examples: Examples) -> None:
        """Refuse a head that was given and does not fit.

        Raises:
            SuiteError: it takes another width, or has fewer classes than there are labels.
        """
        inputs = examples.take(np.arange(1)).to(self._device)
        width = self._network.features(self._start, inputs).shape[1]
        if head.width != width:
            raise SuiteError(
                f"The head of task {task!r} takes features of width {head.width}, and the base "
                f"gives {width}. Give another head, or leave it out: one is fitted then."
            )
        if int(examples.labels.max()) >= len(head.weight):
            raise SuiteError(
                f"The head of task {task!r} has {len(head.weight)} classes, and its data have "
                f"class {int(examples.labels.max())}. Give another head, or leave it out: one is "
                "fitted then."
            )

    def _accuracy(self, weights: State, examples: Examples, head: Head) -> float:
        logits = head.logits(self._features(weights, examples))
        return float((logits.argmax(dim=1).numpy() == examples.labels).mean())


def _seed(seed: int, *names: str) -> int:
    """A seed of its own for each purpose, so that no task depends on the others."""
    return int(digest_of(str(seed), *names)[:15], 16)

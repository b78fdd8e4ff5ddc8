"""What a learner is given: networks, weights and unlabelled images of one suite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from analysis.networks.stateless import ModuleCopies, State, StatelessNetwork
from analysis.networks.towers import suite_network
from analysis.outputs.inputs import Split
from analysis.outputs.suite_outputs import SuiteOutputs
from merge_core.devices import current_device
from merge_core.errors import SuiteError
from merge_core.files import digest_of
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import Recipe
from merge_core.progress import Progress

SPLIT: Split = "val"
BATCH = 50


class LearningContext:
    """One recipe's learning on the validation images of its tasks, whose labels it never sees.

    Args:
        outputs: gives images and heads.
        recipe: what is learnt for.
        session: its members.
        progress: told between units of work.

    Attributes:
        device: where networks run: images and the weights of networks lie there.
    """

    def __init__(
        self, outputs: SuiteOutputs, recipe: Recipe, session: MergeSession, progress: Progress
    ) -> None:
        self._outputs = outputs
        self.recipe = recipe
        self.groups = session.groups
        self.tasks = session.groups.tasks
        self.suite = session.suite
        self.progress = progress
        self.device = current_device()

    @cached_property
    def _stateless(self) -> StatelessNetwork:
        # Of its own: hooks and gradients stay out of the networks that others use.
        return suite_network(self.suite)

    @property
    def network(self) -> nn.Module:
        """The suite's network without classifier, in evaluation mode."""
        module: nn.Module = self._stateless.module
        return module

    @cached_property
    def copies(self) -> ModuleCopies:
        """The network, for threads that run it side by side."""
        return ModuleCopies(self.network, self._stateless.fixed)

    @cached_property
    def names(self) -> frozenset[str]:
        """Parameters and buffers of the network."""
        return frozenset(self.network.state_dict())

    def expert(self, task: str) -> dict[str, Tensor]:
        """The weights of an expert that the network takes, floating ones in float32.

        Raises:
            MergeScopeError: unreadable or unfit weights.
        """
        checkpoint = self.suite.expert(task)
        return self.check_fit(
            {n: checkpoint.tensor(n) for n in checkpoint if n in self.names}, [task]
        )

    def check_fit(self, weights: State, tasks: Sequence[str]) -> dict[str, Tensor]:
        """Weights as the network takes them, once one image of each task has passed it.

        Raises:
            SuiteError: weights, images or heads that do not fit the architecture.
        """
        state = {
            name: self.device.send(value.float() if value.is_floating_point() else value)
            for name, value in weights.items()
            if name in self.names
        }
        for task in tasks:
            head = self._outputs.head(task)
            image = self._outputs.pixels(task, SPLIT, np.arange(1))
            width = self._stateless.features(state, image).shape[1]
            if width != head.width:
                raise SuiteError(
                    f"The head of task {task!r} takes features of width {head.width}, "
                    f"but the architecture gives {width}. Correct the head or the architecture."
                )
        return state

    def features(self, weights: State, images: Tensor) -> Tensor:
        """Features (N x width) under the weights, differentiable in them; on the CPU."""
        features: Tensor = self.copies.call(weights, images, self.device)
        return self.device.fetch(features)

    def log_probabilities(self, weights: State, images: Tensor, task: str) -> Tensor:
        """Logarithms of the predicted probabilities, N x classes, differentiable in the weights.

        Raises:
            SuiteError: they are not finite.
        """
        logits = self._outputs.head(task).logits(self.features(weights, images))
        if not bool(torch.isfinite(logits).all()):
            raise SuiteError(
                f"The model gives non-finite outputs on task {task!r}; choose a smaller scale or "
                "learning rate."
            )
        return logits.log_softmax(dim=1)

    def images(self, task: str, most: int) -> Tensor:
        """Normalised validation images, N x 3 x H x W: all, or `most` of them by the seed."""
        count = self._count(task)
        order = torch.arange(count)
        if count > most:
            order = torch.randperm(count, generator=self._source(task))[:most]
        return self._pixels(task, order)

    def batches(self, task: str, size: int) -> Iterator[Tensor]:
        """Validation images without end, shuffled by the seed anew in every pass.

        Args:
            task: whose images.
            size: images of a batch; what is left at the end of a pass is not used in it, and all
                images are one batch where there are fewer.
        """
        count, source = self._count(task), self._source(task)
        whole = max(count // size, 1) * size
        while True:
            order = torch.randperm(count, generator=source)
            for part in order[:whole].split(size):
                yield self._pixels(task, part)

    def _pixels(self, task: str, numbers: Tensor) -> Tensor:
        return self.device.send(self._outputs.pixels(task, SPLIT, numbers.numpy()))

    def _count(self, task: str) -> int:
        return len(self._outputs.raw_inputs(task, SPLIT).labels)

    def _source(self, task: str) -> torch.Generator:
        # By the task's name: the other tasks and their order do not count.
        seed = int(digest_of("learning", str(self.recipe.seed), task)[:15], 16)
        return torch.Generator().manual_seed(seed)

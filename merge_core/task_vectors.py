"""Task vectors about either origin, one parameter at a time.

τ_t = θ_t − θ_0 about the base, C_t = θ_t − θ_avg about the average of the chosen experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor

from merge_core.checkpoint import Checkpoint
from merge_core.errors import SuiteError
from merge_core.factors import FactorStore
from merge_core.files import digest_of
from merge_core.linalg import Factors, as_matrix, sum_of_truncations
from merge_core.suite import Suite

Origin = Literal["base", "average"]


class ParameterGroup:
    """One parameter across all chosen experts: what a merge method sees.

    Everything is read or computed on first use and in float32, or float64 where the weights
    are stored so.

    Args:
        suite: the suite.
        tasks: chosen tasks, in the suite's order.
        name: the parameter.
        store: where factors are kept.
    """

    def __init__(self, suite: Suite, tasks: Sequence[str], name: str, store: FactorStore) -> None:
        self.name = name
        self.tasks = tuple(tasks)
        self.info = suite.expert(self.tasks[0]).info(name)
        self.decomposed = suite.treatment(name, self.tasks[0]).decomposed
        self._suite = suite
        self._store = store
        self._sums: dict[Origin, tuple[int, Tensor]] = {}

    @cached_property
    def experts(self) -> Tensor:
        """T x shape: the parameter of each expert.

        Raises:
            SuiteError: the experts' shapes differ.
            CheckpointError: unreadable, or NaN or infinite entries.
        """
        parts = [self._read(self._suite.expert(task), f"expert {task!r}") for task in self.tasks]
        return torch.stack(parts)

    @cached_property
    def base(self) -> Tensor:
        """shape: the parameter of the base.

        Raises:
            SuiteError: the suite names no base, or its shape differs.
        """
        if self._suite.base is None:
            raise SuiteError(
                f"The suite {self._suite.name!r} names no base, which this needs. "
                "Add 'base:' to suite.yaml, or take a method or origin about the average."
            )
        return self._read(self._suite.base, "base")

    @cached_property
    def average(self) -> Tensor:
        """shape: θ_avg = (1/T) Σ θ_t."""
        return self.experts.mean(dim=0)

    @property
    def buffer(self) -> Tensor:
        """An integer parameter as it is in the base, else in the first expert."""
        return self.experts[0] if self._suite.base is None else self.base

    def origin(self, origin: Origin) -> Tensor:
        """shape: the base or the average."""
        return self.base if origin == "base" else self.average

    def task_vectors(self, origin: Origin) -> Tensor:
        """T x shape: θ_t − origin."""
        return self.experts - self.origin(origin)

    def factors(self, origin: Origin) -> list[Factors]:
        """Factors of each task vector as a matrix (out x in), float32, in the tasks' order."""
        members = [self._suite.expert(task) for task in self.tasks]
        if origin == "base":
            if self._suite.base is None:
                _ = self.base  # raises, saying what is missing
            assert self._suite.base is not None
            about = self._suite.base.digest
        else:
            about = digest_of("average", *sorted(member.digest for member in members))
        about_tensor: list[Tensor] = []  # made once, and only if something is decomposed

        def matrix(i: int) -> Tensor:
            if not about_tensor:
                exact = self.base.double() if origin == "base" else self.experts.double().mean(0)
                about_tensor.append(exact)
            return as_matrix(self.experts[i].double() - about_tensor[0])

        return [
            self._store.get(member.digest, about, self.name, partial(matrix, i))
            for i, member in enumerate(members)
        ]

    def sum_of_truncations(self, origin: Origin, k: int) -> Tensor:
        """shape: Σ_t SVD_k(task vector t), kept until another k is asked for."""
        held = self._sums.get(origin)
        if held is None or held[0] != k:
            if origin == "average":
                # Σ_t C_t = 0 exactly; the sum of rounded differences is not.
                total = torch.zeros_like(as_matrix(self.average))
            else:
                total = as_matrix(self.experts.sum(dim=0) - len(self.tasks) * self.base)
            update = sum_of_truncations(self.factors(origin), k, total)
            held = (k, update.reshape(self.average.shape).to(self.average.dtype))
            # Several threads may merge at once: each returns the sum that it asked for.
            self._sums[origin] = held
        return held[1]

    def release(self) -> None:
        """Forget what was read; it is read again when asked for."""
        for name in ("experts", "base", "average"):
            self.__dict__.pop(name, None)
        self._sums.clear()

    def _read(self, checkpoint: Checkpoint, who: str) -> Tensor:
        value = checkpoint.tensor(self.name)
        if tuple(value.shape) != self.info.shape:
            raise SuiteError(
                f"Suite {self._suite.name!r}: parameter {self.name!r} has shape "
                f"{tuple(value.shape)} in the {who} ({checkpoint.path}) but {self.info.shape} in "
                f"the expert {self.tasks[0]!r}. All members must come from one architecture."
            )
        if not value.dtype.is_floating_point:
            return value
        return value if value.dtype == torch.float64 else value.float()


class Groups:
    """All parameters that the members of a suite share, one :class:`ParameterGroup` each.

    Iterating holds one parameter in memory at a time, unless `keep` asks to hold them all
    (worth it for a small model that is merged again and again). Whoever takes `members` instead
    releases each.

    Args:
        suite: the suite.
        tasks: chosen tasks (all when None).
        store: where factors are kept.
        keep: hold what was read.

    Raises:
        SuiteError: unknown tasks.
    """

    def __init__(
        self, suite: Suite, tasks: Sequence[str] | None, store: FactorStore, keep: bool = False
    ) -> None:
        self.suite = suite
        self.tasks = suite.select(tasks)
        self.store = store
        self.keep = keep
        names = suite.shared(self.tasks)
        self.members = [ParameterGroup(suite, self.tasks, name, store) for name in names]

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[ParameterGroup]:
        for group in self.members:
            yield group
            if not self.keep:
                group.release()

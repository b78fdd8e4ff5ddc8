"""Task vectors about either origin, one parameter at a time.

τ_t = θ_t − θ_0 about the base, C_t = θ_t − θ_avg about the average of the chosen experts. The
stored numbers are taken as exact: C_t is about the mean before it is rounded to a weight, so that
Σ_t C_t = 0 and, of two experts, C_1 = −C_2.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from functools import partial, reduce
from typing import Any, Literal

import torch
from torch import Tensor

from merge_core.checkpoints.checkpoint import Checkpoint, is_finite
from merge_core.checkpoints.vocabulary import complete_rows, filler
from merge_core.devices import CPU, Device, compute
from merge_core.errors import SuiteError
from merge_core.factors.low_rank import (
    ROWS,
    Directions,
    Truncations,
    as_matrix,
    decompose_product,
    resolution,
    sum_of_truncations,
)
from merge_core.factors.store import TOLERANCE, FactorStore, TaskMatrix
from merge_core.files import digest_of
from merge_core.lazy import lazy
from merge_core.means import PIECE, centre, mean, mean_offset
from merge_core.suites.manifest import BASE
from merge_core.suites.suite import Suite

Origin = Literal["base", "average"]
# Entries of each member that are sent to an accelerator at a time.
SENT = 1 << 24


class TensorGroup:
    """One parameter across all chosen experts: what a merge method sees.

    Everything is read or computed on first use and in float32, or float64 where the weights
    are stored so.

    Args:
        suite: the suite.
        tasks: chosen tasks, in the suite's order.
        name: the parameter.
        store: where factors are kept.

    Raises:
        SuiteError: the members do not have it in common, or not in one shape.

    Attributes:
        info: shape and dtype, of what is merged.
        decomposed: whether spectral methods decompose it.
        stored_transposed: whether it is stored as in x out, so that the matrices and factors of
            this class are the transposes of a linear layer's.
    """

    def __init__(self, suite: Suite, tasks: Sequence[str], name: str, store: FactorStore) -> None:
        self.name = name
        self.tasks = tuple(tasks)
        manifest = suite.manifest(self.tasks)
        if name not in manifest.infos:
            raise SuiteError(f"Suite {suite.name!r}: {manifest.why_not_merged(name)}")
        self.info = manifest.infos[name]
        self._givers = manifest.buffers.get(name, ())
        self._lengths_differ = name in manifest.completed
        # Factors are kept by the members' content, which does not tell how long a vocabulary is.
        self.decomposed = suite.treatment(name, self.tasks).decomposed
        self.stored_transposed = suite.is_stored_transposed(name, self.tasks[0])
        self._suite = suite
        self._store = store
        self._sums: dict[Origin, tuple[int, Tensor]] = {}
        self._spectra: dict[Origin, list[Tensor]] = {}
        self._truncations: dict[Origin, list[Truncations]] = {}
        self._directions: dict[Origin, tuple[int | None, list[Directions]]] = {}

    @lazy
    def members(self) -> list[Tensor]:
        """The parameter of each expert, where float32 in the pages of the file itself.

        Raises:
            SuiteError: the experts' shapes differ.
            CheckpointError: unreadable, or NaN or infinite entries.
        """
        if self.is_buffer:
            return [self.buffer] * len(self.tasks)
        members = [self._with_all_rows(member) for member in self._parts]
        if members[0].dtype.is_floating_point:
            # One pass for both: what is not finite in a member is not finite in the average.
            self.average = mean(members)
            if not is_finite(self.average):
                for task, member in zip(self.tasks, members, strict=True):
                    self._suite.expert(task).check_finite(self.name, member)
        return members

    @lazy
    def experts(self) -> Tensor:
        """T x shape: the parameter of each expert, in one copy.

        Raises:
            SuiteError: the experts' shapes differ.
            CheckpointError: unreadable, or NaN or infinite entries.
        """
        stacked = torch.stack(self.members)
        self.members = list(stacked.unbind())  # not held twice where they had to be converted
        return stacked

    @lazy
    def base(self) -> Tensor:
        """shape: the parameter of the base; of a buffer the one value that all are given.

        Raises:
            SuiteError: the suite names no base, or its shape differs.
        """
        if self.is_buffer:
            return self.buffer
        if self._suite.base is None:
            raise SuiteError(
                f"The suite {self._suite.name!r} names no base, which this needs. "
                "Add 'base:' to suite.yaml, or take a method or origin about the average."
            )
        base = self._with_all_rows(self._read_unchecked(self._suite.base, "base"))
        self._suite.base.check_finite(self.name, base)
        return base

    @lazy
    def average(self) -> Tensor:
        """shape: θ_avg = (1/T) Σ θ_t."""
        members = self.members
        made: Tensor | None = self.__dict__.get("average")  # while they were read
        return mean(members) if made is None else made

    @lazy
    def _rest(self) -> Tensor:
        """shape: the mean of the experts less the average as it is rounded."""
        flat, mean = [member.reshape(-1) for member in self.members], self.average.reshape(-1)

        def work(device: Device) -> Tensor:
            rest = torch.empty_like(mean)
            size = SENT if device.accelerates else PIECE
            for start in range(0, len(rest), size):
                part = slice(start, start + size)
                pieces = [device.send(member[part]) for member in flat]
                off = (pieces[0].double() - device.send(mean[part])) + mean_offset(pieces)
                rest[part] = device.fetch(off)
            return rest

        rest = work(CPU) if len(mean) < SENT else compute(work, exact=True)
        return rest.reshape(self.info.shape)

    @property
    def is_buffer(self) -> bool:
        """Whether it is copied rather than merged: integers, or a constant of the architecture."""
        return bool(self._givers)

    @lazy
    def buffer(self) -> Tensor:
        """shape: the base's value; where it has none, the one that most experts have.

        Raises:
            CheckpointError: unreadable.
        """
        found: dict[bytes, list[Tensor]] = {}
        for who in sorted(self._givers):
            giver = self._suite.base if who == BASE else self._suite.expert(who)
            assert giver is not None
            value = giver.read_unchecked(self.name)
            content = value.reshape(-1).view(torch.uint8).numpy().tobytes()
            found.setdefault(content, []).append(value)
        # Of values that as many have, the first in the alphabet's, whatever the experts' order.
        value = max(found.values(), key=len)[0]
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value

    def origin(self, origin: Origin) -> Tensor:
        """shape: the base or the average."""
        return self.base if origin == "base" else self.average

    def widest_dtype(self, origin: Origin | None) -> torch.dtype:
        """The widest dtype of the experts and, where there is one, of their origin."""
        found = {member.dtype for member in self.members}
        if origin is not None:
            found.add(self.origin(origin).dtype)
        return reduce(torch.promote_types, found)

    def task_vectors(self, origin: Origin) -> Tensor:
        """T x shape: θ_t − origin."""
        if origin == "base":
            return self.experts - self.base
        vectors = torch.empty_like(self.experts, memory_format=torch.contiguous_format)
        flat = vectors.reshape(len(self.tasks), -1)
        for part, centred in self.blocks(origin, PIECE):
            flat[:, part] = centred
        return vectors

    def blocks(
        self,
        origin: Origin | None,
        size: int,
        stride: int = 1,
        first: int = 0,
        dtype: torch.dtype | None = None,
        task: int | None = None,
    ) -> Iterator[tuple[slice, Tensor]]:
        """The task vectors, or the experts, in blocks, so that no copy of all of them is made.

        Args:
            origin: what the task vectors are taken about; None for the experts themselves.
            size: entries of a block, at most.
            stride: of the entries that are taken.
            first: the first of them.
            dtype: in which differences from the base are taken and given; the widest of all when
                None. About the average they are in float64.
            task: the place of a task whose vector alone is wanted; all when None.

        Yields:
            The place of a block among the parameter's entries, and the block, T x n (1 x n of one
            task).
        """
        about = self.base.reshape(-1) if origin == "base" else None
        dtype = torch.float64 if origin == "average" else dtype or self.widest_dtype(origin)
        chosen = slice(None) if task is None else slice(task, task + 1)
        needed = self.members if origin == "average" else self.members[chosen]
        flat = [member.reshape(-1) for member in needed]
        for start in range(first, self.info.numel, size * stride):
            part = slice(start, min(start + size * stride, self.info.numel), stride)
            block = torch.stack([member[part] for member in flat]).to(dtype)
            if about is not None:
                block.sub_(about[part])
            yield part, centre(block)[chosen] if origin == "average" else block

    def singular_values(self, origin: Origin) -> list[Tensor]:
        """All r singular values of each task vector as a matrix, float32, in the tasks' order.

        Raises:
            SuiteError: origin "base" without a base.
        """
        known = self._spectra.get(origin)
        if known is None:
            known = [self._values(origin, index) for index in range(len(self.tasks))]
            self._spectra[origin] = known
        return known

    def truncations(self, origin: Origin, k: int | Sequence[int]) -> list[Truncations]:
        """What gives SVD_k of each task vector as a matrix (out x in), in the tasks' order.

        Args:
            origin: what the task vectors are taken about.
            k: how many directions of each must be within reach; of all, or one number a task.

        Raises:
            SuiteError: origin "base" without a base.
        """
        ranks = [k] * len(self.tasks) if isinstance(k, int) else list(k)
        known = self._truncations.get(origin)
        if known is None or max(map(Truncations.error, known, ranks)) > TOLERANCE:
            known = [self._truncation(origin, index, rank) for index, rank in enumerate(ranks)]
            self._truncations[origin] = known
        return known

    def directions(self, origin: Origin, k: int | None = None) -> list[Directions]:
        """Leading directions of each task vector as a matrix (out x in), in the tasks' order.

        Args:
            origin: what the task vectors are taken about.
            k: how many at most; all when None.

        Returns:
            Float32. A task has fewer where its stored numbers do not resolve more (see
            :func:`merge_core.factors.low_rank.resolution`).

        Raises:
            SuiteError: origin "base" without a base.
        """
        known = self._directions.get(origin)
        if known is None or known[0] not in (None, k):
            found = [self._task_directions(origin, index, k) for index in range(len(self.tasks))]
            known = self._directions[origin] = (k, found)
        return known[1] if k is None else [each.head(k) for each in known[1]]

    def _values(self, origin: Origin, index: int) -> Tensor:
        product = self._product(origin, index)
        if product is None:
            return self._store.singular_values(self._matrix(origin, index))
        r = min(self.info.matrix_shape)
        return decompose_product(*product).pad(r).S.float()

    def _truncation(self, origin: Origin, index: int, k: int) -> Truncations:
        product = self._product(origin, index)
        if product is None:
            return self._store.truncations(self._matrix(origin, index), k)
        found = decompose_product(*product)
        m, n = self.info.matrix_shape
        left, right = product if m > n else (product[1].T, product[0].T)
        vectors = (found.V if m > n else found.U).T.float()
        none = torch.zeros(len(vectors))
        return Truncations(vectors, none, (m, n), lambda part: (left[part] @ right).float(), True)

    def _task_directions(self, origin: Origin, index: int, k: int | None) -> Directions:
        product = self._product(origin, index)
        if product is None:
            return self._store.directions(self._matrix(origin, index), k)
        found = decompose_product(*product)
        found = found if k is None else found.head(k)
        return Directions(found.U.float(), found.S.float(), found.V.float())

    def _product(self, origin: Origin, index: int) -> tuple[Tensor, Tensor] | None:
        """A task vector of an adapter as a product of thin matrices, m x q and q x n."""
        if origin == "average":
            return self._centred_product(index)
        if self._suite.base is None:
            _ = self.base  # raises, saying what is missing
        return self._suite.expert(self.tasks[index]).low_rank(self.name)

    def _matrix(self, origin: Origin, index: int) -> TaskMatrix:
        """What the store needs to know of a task vector."""
        member = self._suite.expert(self.tasks[index])
        if origin == "base":
            assert self._suite.base is not None
            about = self._suite.base.digest
        else:
            members = [self._suite.expert(task) for task in self.tasks]
            about = digest_of("exact average", *sorted(each.digest for each in members))
        stored = member.info(self.name).dtype.torch
        return TaskMatrix(
            (member.digest, about, self.name),
            self.info.matrix_shape,
            torch.promote_types(torch.float32, stored),
            partial(self._tall_rows, origin, index),
            lambda: resolution(as_matrix(self.members[index]), stored),
            lambda dtype, device: self._tall_rows(origin, index, dtype, slice(None), device),
        )

    def _centred_product(self, index: int) -> tuple[Tensor, Tensor] | None:
        """C_t of adapters of one base as a product of thin matrices, left m x q and right q x n.

        C_t = τ_t − (1/T) Σ_s τ_s has the rank of all updates together at most; None where that is
        not less than min(m, n), or an expert is no adapter here.
        """
        pairs = [self._suite.expert(task).low_rank(self.name) for task in self.tasks]
        known = [pair for pair in pairs if pair is not None]
        width = sum(right.shape[0] for _, right in known)
        if len(known) < len(pairs) or width >= min(self.info.matrix_shape):
            return None
        shares = [float(s == index) - 1 / len(known) for s in range(len(known))]
        left = torch.cat([w * L for w, (L, _) in zip(shares, known, strict=True)], dim=1)
        return left, torch.cat([R for _, R in known])

    def _tall_rows(
        self, origin: Origin, index: int, dtype: torch.dtype, part: slice, device: Device = CPU
    ) -> Tensor:
        """Rows of a task vector as a matrix, of its transpose where that is the taller.

        Float64 for such weights; on a device that has float64.
        """
        wide = operator.le(*self.info.matrix_shape)

        def rows(tensor: Tensor, part: slice, dtype: torch.dtype) -> Tensor:
            matrix = as_matrix(tensor)
            return device.send((matrix.T if wide else matrix)[part]).to(dtype)

        member, exact = self.members[index], torch.float64
        dtype = torch.promote_types(dtype, member.dtype)
        if origin == "base":
            return rows(member, part, dtype) - rows(self.base, part, dtype)
        start, stop, _ = part.indices(max(self.info.matrix_shape))
        size = SENT if device.accelerates else ROWS
        result = device.send(torch.empty(stop - start, min(self.info.matrix_shape), dtype=dtype))
        for row in range(start, stop, size):
            few = slice(row, min(row + size, stop))
            # Near numbers are subtracted, which is exact; the second term is what rounding the
            # mean to a weight left.
            centred = rows(member, few, exact) - rows(self.average, few, exact)
            result[row - start : few.stop - start] = centred - rows(self._rest, few, exact)
        return result

    def sum_of_truncations(self, origin: Origin, k: int) -> Tensor:
        """shape: Σ_t SVD_k(task vector t), kept until another k is asked for."""
        held = self._sums.get(origin)
        if held is None or held[0] != k:

            def total() -> Tensor:
                # Σ_t C_t = 0 exactly; the sum of rounded differences is not.
                if origin == "average":
                    return torch.zeros(1)
                return as_matrix(sum(self.members) - len(self.tasks) * self.base)

            update = sum_of_truncations(self.truncations(origin, k), k, total)
            held = (k, update.reshape(self.info.shape).to(self.members[0].dtype))
            # Several threads may merge at once: each returns the sum that it asked for.
            self._sums[origin] = held
        return held[1]

    def release(self) -> None:
        """Forget what was read; it is read again when asked for."""
        for name in ("members", "experts", "base", "average", "buffer", "_rest", "_filler"):
            self.__dict__.pop(name, None)
        for known in (self._sums, self._spectra, self._truncations, self._directions):
            known.clear()

    @property
    def _parts(self) -> list[Tensor]:
        """Each expert's own rows, not yet looked at."""
        experts = [(self._suite.expert(task), f"expert {task!r}") for task in self.tasks]
        return [self._read_unchecked(*expert) for expert in experts]

    @lazy
    def _filler(self) -> Tensor:
        base = self._suite.base
        own = None if base is None else self._read_unchecked(base, "base")
        return filler(self._parts, own, self.info.shape[0])

    def _with_all_rows(self, value: Tensor) -> Tensor:
        """A member's tensor, with the rows of a vocabulary that it lacks."""
        return complete_rows(value, self._filler) if self._lengths_differ else value

    def _read_unchecked(self, checkpoint: Checkpoint, who: str) -> Tensor:
        value = checkpoint.read_unchecked(self.name)
        if tuple(value.shape) != self.info.shape and not self._lengths_differ:
            raise SuiteError(
                f"Suite {self._suite.name!r}: parameter {self.name!r} has shape "
                f"{tuple(value.shape)} in the {who} ({checkpoint.path}) but {self.info.shape} in "
                "others. All members must come from one architecture."
            )
        if not value.dtype.is_floating_point:
            return value
        return value if value.dtype == torch.float64 else value.float()


class TensorGroups:
    """All parameters that the members of a suite share, one :class:`TensorGroup` each.

    Iterating holds one parameter in memory at a time, unless `keep` asks to hold them all
    (worth it for a small model that is merged again and again). Whoever takes `members` instead
    releases each.

    Args:
        suite: the suite.
        tasks: chosen tasks (all when None).
        store: where factors are kept.
        keep: hold what was read.

    Attributes:
        members: the parameters, each tensor under one name.
        manifest: what the merge consists of, and under which names it is written.
        measured: what methods measured over all of it, by method and setting (see
            :func:`merge_core.merging.engine.prepare`).

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
        self.manifest = suite.manifest(self.tasks)
        names = self.manifest.names
        self.members = [TensorGroup(suite, self.tasks, name, store) for name in names]
        self.measured: dict[tuple[Any, ...], Any] = {}

    def __len__(self) -> int:
        return len(self.members)

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype in which the input stores each tensor of a merge, by its name there."""
        found = {
            name: group.info.dtype.torch
            for group in self.members
            for name in (group.name, *self.manifest.also_written.get(group.name, ()))
        }
        if self.suite.base is not None:
            for name in self.manifest.kept:
                found[name] = self.suite.base.info(name).dtype.torch
        return found

    def __iter__(self) -> Iterator[TensorGroup]:
        for group in self.members:
            yield group
            if not self.keep:
                group.release()

"""Pre-flight: what fits, what differs, and what a merge will take, from headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from fnmatch import fnmatchcase

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.lora import AdaptedCheckpoint
from merge_core.checkpoints.parameter_roles import describe
from merge_core.checkpoints.shards import TensorInfo
from merge_core.checkpoints.tied import declares_tied
from merge_core.errors import CheckpointError
from merge_core.suites.estimates import Job, Part, usual_workers
from merge_core.suites.manifest import Difference, Manifest, summarise
from merge_core.suites.suite import Suite

NO_JOB = Job()


@dataclass(frozen=True)
class MemberFit:
    """How one member fits the others.

    Attributes:
        member: a task, or ``base``.
        fits: whether it can be merged with them.
        differences: in words, such as ``2 missing, 1 dtype``, or why it cannot be read; empty
            where there are none.
    """

    member: str
    fits: bool
    differences: str


@dataclass(frozen=True)
class ParameterPlan:
    """How one parameter will be treated by spectral methods.

    Attributes:
        name, shape, dtype: of the output.
        role: what it is in the network.
        decomposed: whether spectral methods decompose it.
        reason: why, in words.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    decomposed: bool
    reason: str


@dataclass(frozen=True)
class Preflight:
    """The report.

    Attributes:
        differences: of all members, those that cannot be read first.
        plan: one row per merged parameter.
        notes: further findings in sentences: tied tensors, patterns that match nothing.
        unsafe_globals: names that pickled files would import, sorted; none is imported.
        job: what a merge costs (see :mod:`merge_core.suites.estimates`).
    """

    differences: tuple[Difference, ...]
    plan: tuple[ParameterPlan, ...] = ()
    notes: tuple[str, ...] = ()
    unsafe_globals: tuple[str, ...] = ()
    job: Job = NO_JOB

    @property
    def memory_bytes(self) -> int:
        """Estimated peak anonymous memory of a merge by a spectral method such as CART.

        Imports, and all threads, are included; it is streamed as `mergescope merge` does.
        """
        return max(self.job.spectral_bytes, self.entrywise_bytes)

    @property
    def entrywise_bytes(self) -> int:
        """The same for methods that are entrywise or need only inner products."""
        return self.job.entrywise_bytes

    @property
    def factor_bytes(self) -> int:
        """What a spectral method stores in the cache, so that another setting is quick."""
        return self.job.factor_bytes

    @property
    def disk_bytes(self) -> int:
        """Size of the merged file."""
        return self.job.written_bytes

    @property
    def blocking(self) -> tuple[Difference, ...]:
        """The differences that make a merge impossible."""
        return tuple(d for d in self.differences if d.blocking)

    def fit(self, member: str) -> MemberFit:
        """How a member (a task, or ``base``) fits the others."""
        own = [difference for difference in self.differences if difference.member == member]
        kinds = Counter(difference.kind for difference in own if difference.parameter)
        unread = [difference.detail for difference in own if not difference.parameter]
        return MemberFit(
            member,
            not any(difference.blocking for difference in own),
            ", ".join([*unread, *(f"{count} {kind}" for kind, count in kinds.items())]),
        )


def preflight(suite: Suite, tasks: Sequence[str] | None = None) -> Preflight:
    """Compare the headers of all members.

    Tensors are read only where two names may be one tensor (:func:`.tied.ties`).

    Args:
        suite: the suite.
        tasks: which experts (all when None).

    Raises:
        SuiteError: unknown tasks.

    Example:
        >>> found = preflight(load_suite("vision"), ["digits", "dots"])
        >>> found.blocking, sum(row.decomposed for row in found.plan)
        ((), 8)
    """
    suite, chosen, differences = _drop_unreadable(suite, suite.select(tasks))
    if not chosen:
        return Preflight(tuple(differences))
    manifest = suite.manifest(chosen)
    members = suite.members(chosen)
    plan = tuple(_plan(suite, chosen))
    return Preflight(
        (*differences, *manifest.differences),
        plan,
        tuple(_notes(suite, chosen)),
        tuple(sorted(set().union(*(member.unsafe_globals for member in members)))),
        _job(suite, chosen, plan),
    )


def _drop_unreadable(
    suite: Suite, tasks: Sequence[str]
) -> tuple[Suite, tuple[str, ...], list[Difference]]:
    """The suite without members that cannot be read, the other tasks, and what is wrong."""
    problems = []
    chosen = []
    for task in tasks:
        try:
            suite.expert(task)
            chosen.append(task)
        except CheckpointError as error:
            problems.append(Difference(task, "", "unreadable", str(error), True))
    try:
        _ = suite.base
    except CheckpointError as error:
        problems.append(Difference("base", "", "unreadable", str(error), True))
        suite = copy(suite)
        suite.base = None
    return suite, tuple(chosen), problems


def _plan(suite: Suite, tasks: tuple[str, ...]) -> Iterator[ParameterPlan]:
    manifest = suite.manifest(tasks)
    for name, info in manifest.infos.items():
        rule, kind = suite.treatment(name, tasks), describe(name, info).kind
        reason = rule.reason
        if suite.is_stored_transposed(name, tasks[0]):
            reason += ", stored in x out"
        yield ParameterPlan(name, info.shape, info.dtype.name, kind, rule.decomposed, reason)


def _adapter_notes(suite: Suite, tasks: tuple[str, ...]) -> Iterator[str]:
    adapted = False
    for task in tasks:
        expert = suite.expert(task)
        if isinstance(expert, AdaptedCheckpoint):
            adapted = True
            yield f"{task} is the base with a {expert.summary}"
    base = suite.base
    if adapted and base is not None and any(base.info(n).dtype.itemsize < 4 for n in base):
        yield (
            "experts that are adapters are merged and written in float32: the base's own precision "
            "would round their updates away ('dtype:' of a recipe writes another)"
        )


def _notes(suite: Suite, tasks: tuple[str, ...]) -> Iterator[str]:
    yield from suite.notes(tasks)
    yield from _adapter_notes(suite, tasks)
    yield from _prefix_notes(suite, tasks)
    manifest = suite.manifest(tasks)
    for name, others in manifest.also_written.items():
        yield f"{name} is also {', '.join(others)}: merged once, written under each name"
    if declares_tied(manifest.reference) and not (
        manifest.also_written or manifest.keeps_head_apart
    ):
        yield "config.json ties the head to the embedding, which is kept once: merged once"
    for name in manifest.kept:
        yield f"{name} is written as it is in the base (vocabulary: base)"
    known = {*manifest.names, *(each.parameter for each in manifest.differences)}
    for field in ("decompose", "average"):
        for pattern in getattr(suite.spec, field):
            if not any(fnmatchcase(name, pattern) for name in known):
                yield f"{pattern!r} under {field!r} in suite.yaml matches no parameter"


def merge_notes(suite: Suite, tasks: Sequence[str]) -> Iterator[str]:
    """What a merge settles by itself where members differ, in sentences.

    Args:
        suite: the suite.
        tasks: chosen experts.

    Raises:
        CheckpointError: a member is missing or unreadable.

    Example:
        >>> list(merge_notes(load_suite("vision"), ("digits", "dots")))
        []
    """
    yield from _prefix_notes(suite, tasks)
    differences = suite.manifest(tasks).differences
    if not any(each.blocking for each in differences):
        yield from summarise(differences)


def _prefix_notes(suite: Suite, tasks: Sequence[str]) -> Iterator[str]:
    for member, prefix in suite.prefixes.items():
        if member == "base" or member in tasks:
            yield f"the names of {member} lack {prefix!r}, which others have: read as with it"


def _job(suite: Suite, tasks: tuple[str, ...], plan: Sequence[ParameterPlan]) -> Job:
    members = suite.members(tasks)
    manifest = suite.manifest(tasks)
    infos = dict(manifest.infos)
    # Of an adapter little more is read than its base, which is a member.
    whole = [member for member in members if not isinstance(member, AdaptedCheckpoint)]
    return Job(
        tuple(_part(infos[row.name], row, members[: len(tasks)]) for row in plan),
        len(tasks),
        sum(member.nbytes for member in whole),
        _disk_bytes(suite, manifest),
        usual_workers(),
    )


def _part(info: TensorInfo, row: ParameterPlan, experts: Sequence[Checkpoint]) -> Part:
    """A parameter's share in the cost."""
    adapters = [expert for expert in experts if isinstance(expert, AdaptedCheckpoint)]
    computed = max(4, info.dtype.itemsize) if info.is_floating else info.dtype.itemsize
    as_stored = computed == info.dtype.itemsize and not adapters
    held = [expert for expert in experts if row.name in expert]  # but for some buffers, all
    pages = as_stored and all(expert.info(row.name).shape == info.shape for expert in held)
    sides = info.matrix_shape if row.decomposed else None
    thin = None
    if sides is not None and len(adapters) == len(experts):
        updates = [adapter.updates.get(row.name) for adapter in adapters]
        thin = sum(update.rank for update in updates if update is not None)
    small = thin is not None and sides is not None and thin < min(sides)
    return Part(info.numel, computed, sides, not pages, thin if small else None)


def _disk_bytes(suite: Suite, manifest: Manifest) -> int:
    """Bytes of all tensors of the output: what only the base has is written as well."""
    total = sum(
        info.nbytes * (1 + len(manifest.also_written.get(name, ())))
        for name, info in manifest.infos.items()
    )
    if suite.base is not None:
        total += sum(suite.base.info(name).nbytes for name in manifest.copied)
    return total

"""Pre-flight: what fits, what differs, and what a merge will take, from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from fnmatch import fnmatchcase

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.lora import AdaptedCheckpoint
from merge_core.checkpoints.members import longest_vocabulary
from merge_core.checkpoints.parameter_roles import describe
from merge_core.checkpoints.shards import TensorInfo
from merge_core.checkpoints.tied import declares_tied, ties
from merge_core.checkpoints.vocabulary import longest_shape
from merge_core.errors import CheckpointError
from merge_core.suites.estimates import Job, Part, usual_workers
from merge_core.suites.suite import Suite

OWN_HEAD = "left out of the merge: each task keeps its own"
VOCABULARY_RULES = {
    "refuse": "'vocabulary: common' or 'vocabulary: base' in suite.yaml says what to do",
    "base": "written as it is in the base",
    "common": "merged row by row at the length of the longest",
}
NO_JOB = Job()


@dataclass(frozen=True)
class Difference:
    """One way in which a member departs from the first expert.

    Attributes:
        member: a task, or ``base``.
        parameter: its name; empty for a member that cannot be read.
        kind: unreadable, missing, extra, head, tied, vocabulary, shape or dtype.
        detail: in words.
        blocking: whether a merge is refused.
    """

    member: str
    parameter: str
    kind: str
    detail: str
    blocking: bool = False


@dataclass(frozen=True)
class MemberFit:
    """How one member fits the first expert.

    Attributes:
        member: a task, or ``base``.
        fits: whether it can be merged with the first expert.
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
        """How a member (a task, or ``base``) fits the first expert."""
        own = [difference for difference in self.differences if difference.member == member]
        kinds = Counter(difference.kind for difference in own if difference.parameter)
        unread = [difference.detail for difference in own if not difference.parameter]
        return MemberFit(
            member,
            not any(difference.blocking for difference in own),
            ", ".join([*unread, *(f"{count} {kind}" for kind, count in kinds.items())]),
        )


def preflight(suite: Suite, tasks: Sequence[str] | None = None) -> Preflight:
    """Compare the headers of all members; no tensor is read.

    Args:
        suite: the suite.
        tasks: which experts (all when None).

    Raises:
        SuiteError: unknown tasks.

    Example:
        >>> found = preflight(load_suite("demo"), ["digits", "dots"])
        >>> found.blocking, sum(row.decomposed for row in found.plan)
        ((), 8)
    """
    suite, chosen, differences = _drop_unreadable(suite, suite.select(tasks))
    if not chosen:
        return Preflight(tuple(differences))
    first = suite.expert(chosen[0])
    others = [(task, suite.expert(task)) for task in chosen[1:]]
    if suite.base is not None:
        others.append(("base", suite.base))
    for who, member in others:
        differences += _differences(suite, who, member, chosen[0], first)
    bad = {difference.parameter for difference in differences if difference.blocking}
    plan = [row for row in _plan(suite, chosen) if row.name not in bad]
    unsafe_globals = set(first.unsafe_globals).union(
        *(member.unsafe_globals for _, member in others)
    )
    return Preflight(
        tuple(differences),
        tuple(plan),
        tuple(_notes(suite, chosen)),
        tuple(sorted(unsafe_globals)),
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


def _differences(
    suite: Suite, who: str, member: Checkpoint, reference: str, first: Checkpoint
) -> Iterator[Difference]:
    """How a member departs from the first expert."""
    tied = {name: names for each in (first, member) for names in ties(each) for name in names}
    for name in first:
        there = first.info(name)
        role = describe(name, there)
        if name not in member:
            other_name = next((n for n in tied.get(name, ()) if n in member), None)
            if other_name is not None:
                yield Difference(who, name, "tied", f"kept once here, as {other_name}")
            elif role.kind == "head":
                yield Difference(who, name, "head", f"absent, {reference} has one; {OWN_HEAD}")
            else:
                yield Difference(who, name, "missing", f"present in {reference}", True)
            continue
        here = member.info(name)
        shapes = f"{here.shape}, {reference} has {there.shape}"
        if here.shape == there.shape:
            if here.dtype != there.dtype and not _is_base_of(member, first):
                detail = f"{_dtype(here)}, {reference} has {_dtype(there)}"
                yield Difference(who, name, "dtype", detail)
        elif role.kind == "head":
            yield Difference(who, name, "head", f"{shapes}; {OWN_HEAD}")
        elif role.is_vocabulary and longest_shape([here.shape, there.shape]) is not None:
            yield _vocabulary(suite, who, name, here, f"{reference} has {there.shape[0]:,}")
        else:
            yield Difference(who, name, "shape", shapes, True)
    for name in member:
        if name not in first:
            other_name = next((n for n in tied.get(name, ()) if n in first), None)
            if other_name is not None:
                yield Difference(who, name, "tied", f"kept once in {reference}, as {other_name}")
            elif who == "base":
                yield Difference(who, name, "extra", f"not in {reference}; written as it is here")
            else:
                yield Difference(who, name, "extra", f"not in {reference}; left out of the merge")


def _vocabulary(suite: Suite, who: str, name: str, here: TensorInfo, there: str) -> Difference:
    rule = suite.spec.vocabulary
    blocking = rule == "refuse" or (rule == "base" and suite.base is None)
    what = VOCABULARY_RULES[rule]
    if rule == "base" and suite.base is None:
        what = "'vocabulary: base' needs a base"
    detail = f"{here.shape[0]:,} rows, {there}; {what}"
    return Difference(who, name, "vocabulary", detail, blocking)


def _plan(suite: Suite, tasks: tuple[str, ...]) -> Iterator[ParameterPlan]:
    first = suite.expert(tasks[0])
    for name in suite.merged_names(tasks):
        info, rule = _info(suite, name, tasks), suite.treatment(name, tasks[0])
        lengths_differ = info.shape != first.info(name).shape
        kind = describe(name, first.info(name)).kind
        reason = rule.reason
        if suite.is_stored_transposed(name, tasks[0]):
            reason += ", stored in x out"
        # See TensorGroup: a vocabulary of several lengths is not decomposed.
        decomposed = rule.decomposed and not lengths_differ
        yield ParameterPlan(name, info.shape, _dtype(info), kind, decomposed, reason)


def _info(suite: Suite, name: str, tasks: tuple[str, ...]) -> TensorInfo:
    """Shape and dtype of a merged parameter."""
    longest_one = None
    if suite.spec.vocabulary == "common":
        longest_one = longest_vocabulary(name, suite.members(tasks))
    return longest_one or suite.expert(tasks[0]).info(name)


def _is_base_of(member: Checkpoint, adapted: Checkpoint) -> bool:
    """Whether an expert is an adapter over a member, so that its dtype is the reader's choice."""
    return isinstance(adapted, AdaptedCheckpoint) and adapted.base is member


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
    for name, others in suite.tied_names(tasks).items():
        yield f"{name} is also {', '.join(others)}: merged once, written under each name"
    reference = suite.expert(tasks[0]) if suite.base is None else suite.base
    if declares_tied(reference) and not suite.tied_names(tasks):
        yield "config.json ties the head to the embedding, which is kept once: merged once"
    for name in suite.kept_names(tasks):
        yield f"{name} is written as it is in the base (vocabulary: base)"
    for field in ("decompose", "average"):
        for pattern in getattr(suite.spec, field):
            if not any(fnmatchcase(name, pattern) for name in suite.merged_names(tasks)):
                yield f"{pattern!r} under {field!r} in suite.yaml matches no parameter"


def _job(suite: Suite, tasks: tuple[str, ...], plan: Sequence[ParameterPlan]) -> Job:
    members = suite.members(tasks)
    infos = {row.name: _info(suite, row.name, tasks) for row in plan}
    # Of an adapter little more is read than its base, which is a member.
    whole = [member for member in members if not isinstance(member, AdaptedCheckpoint)]
    return Job(
        tuple(_part(infos[row.name], row, members[: len(tasks)]) for row in plan),
        len(tasks),
        sum(member.nbytes for member in whole),
        _disk_bytes(suite, tasks, infos),
        usual_workers(),
    )


def _part(info: TensorInfo, row: ParameterPlan, experts: Sequence[Checkpoint]) -> Part:
    """A parameter's share in the cost."""
    adapters = [expert for expert in experts if isinstance(expert, AdaptedCheckpoint)]
    computed = max(4, info.dtype.itemsize) if info.is_floating else info.dtype.itemsize
    as_stored = computed == info.dtype.itemsize and not adapters
    pages = as_stored and all(expert.info(row.name).shape == info.shape for expert in experts)
    sides = info.matrix_shape if row.decomposed else None
    thin = None
    if sides is not None and len(adapters) == len(experts):
        updates = [adapter.updates.get(row.name) for adapter in adapters]
        thin = sum(update.rank for update in updates if update is not None)
    small = thin is not None and sides is not None and thin < min(sides)
    return Part(info.numel, computed, sides, not pages, thin if small else None)


def _disk_bytes(suite: Suite, tasks: tuple[str, ...], infos: dict[str, TensorInfo]) -> int:
    """Bytes of all tensors of the output: what only the base has is written as well."""
    tied_names = suite.tied_names(tasks)
    total = sum(info.nbytes * (1 + len(tied_names.get(name, ()))) for name, info in infos.items())
    if suite.base is not None:
        written = set(infos).union(*tied_names.values())
        total += sum(suite.base.info(n).nbytes for n in suite.base if n not in written)
    return total


def _dtype(info: TensorInfo) -> str:
    return info.dtype.name

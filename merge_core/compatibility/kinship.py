"""Is this a fine-tune of that base? Told from a sample of the weights.

A fine-tune stays near its base: ‖θ_t − θ_0‖/‖θ_0‖ is small and cos(θ_t, θ_0) is near 1. The weights
of two networks that were trained from different random starts are orthogonal but for chance: for n
independent entries their cosine has mean 0 and standard deviation 1/√n, and at equal norms
‖θ_t − θ_0‖/‖θ_0‖ = √2. The same holds for one network in another order of its neurons. Only weight
matrices are looked at: norms are near 1 in every network, and would make strangers look akin.

Of two experts, the cosine of θ_t − θ_0 and θ_s − θ_0 tells whether they share a later start than
the base: for independent updates it is near 0, and above 1/2 they are nearer to each other than to
the base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.lora import AdaptedCheckpoint
from merge_core.compatibility.findings import BASE, name_members
from merge_core.suites.suite import Suite

MOST_MATRICES = 16
MOST_ENTRIES = 1 << 16  # of each matrix
MOST_COMPARED = 2 << 30  # bytes of a model that is compared as a whole
FAR = 0.5
STRANGE = 0.1
ORTHOGONAL = 0.9
DEVIATIONS = 4
NEARER = 0.9


@dataclass(frozen=True)
class Kinship:
    """How one expert stands to the base and to the other experts.

    Attributes:
        member: its task.
        verdict: ``fine-tune``, ``far``, ``stranger``, or ``no difference`` on the
            sample; without a base ``related``, or ``stranger`` to all others.
        distance: ‖θ_t − θ_0‖/‖θ_0‖ on the sample; about the mean of all experts without a base.
        cosine: cos(θ_t, θ_0); with the nearest other expert without a base.
        nearest: the other expert whose update is most like its own; empty if there is none.
        update_cosine: cos(θ_t − θ_0, θ_s − θ_0) with that one; NaN if there is none.
    """

    member: str
    verdict: str
    distance: float
    cosine: float
    nearest: str
    update_cosine: float


@dataclass(frozen=True)
class Kinships:
    """The experts of a suite, and what is doubtful about them.

    Attributes:
        rows: one for each expert.
        entries: how many weights of each were read.
        matrices: of how many matrices.
        has_base: whether they were held against a base.
        warnings: what to doubt, in sentences; independent of the order of the experts.
    """

    rows: tuple[Kinship, ...]
    entries: int
    matrices: int
    has_base: bool
    warnings: tuple[str, ...]

    @property
    def deviation(self) -> float:
        """Standard deviation of the cosine of two independent networks on such a sample."""
        return 1 / math.sqrt(self.entries)


@dataclass(frozen=True)
class _Sample:
    """Inner products on the sample; the base is the last member where there is one.

    Attributes:
        members: names.
        gram: ⟨θ_i, θ_j⟩, k x k.
        updates: ⟨θ_i − o, θ_j − o⟩ about the base or the mean of all.
        same: pairs of members without any difference on the sample.
        entries, matrices: of the sample.
    """

    members: tuple[str, ...]
    gram: list[list[float]]
    updates: list[list[float]]
    same: frozenset[tuple[str, str]]
    entries: int
    matrices: int

    def cosine(self, i: int, j: int, about_origin: bool = False) -> float:
        """cos(θ_i, θ_j), or that of the updates; NaN where one of them is zero."""
        of = self.updates if about_origin else self.gram
        norms = math.sqrt(of[i][i] * of[j][j])
        return of[i][j] / norms if norms > 0 else math.nan

    def distance(self, i: int, j: int) -> float:
        """‖θ_i − θ_j‖."""
        squared = self.updates[i][i] + self.updates[j][j] - 2 * self.updates[i][j]
        return math.sqrt(max(0.0, squared))


def measure_kinship(suite: Suite, tasks: Sequence[str] | None = None) -> Kinships | None:
    """Hold experts against their base and against each other, on a sample of their weights.

    At most :data:`MOST_ENTRIES` entries are read of each of :data:`MOST_MATRICES` matrices, spread
    over the depth of the network.

    Args:
        suite: the suite; its members must fit together.
        tasks: chosen experts (all when None).

    Returns:
        None where there is nothing to compare: one expert without a base, no weight matrix, or
        members whose weights are not here.

    Raises:
        SuiteError: unknown tasks.
        CheckpointError: a tensor cannot be read.

    Example:
        >>> found = measure_kinship(load_suite("vision"), ["digits", "dots"])
        >>> [row.verdict for row in found.rows], found.warnings
        (['fine-tune', 'fine-tune'], ())
    """
    chosen = suite.select(tasks)
    members = suite.members(chosen)
    names = (*chosen, BASE) if suite.base is not None else tuple(chosen)
    if len(members) < 2 or not all(member.files for member in members):
        return None
    sample = _take_sample(names, members, _choose_matrices(suite, chosen, members))
    if sample is None:
        return None
    rows = tuple(
        _row(sample, i, len(chosen), isinstance(members[i], AdaptedCheckpoint))
        for i in range(len(chosen))
    )
    warnings = _warn(sample, rows, members)
    return Kinships(rows, sample.entries, sample.matrices, BASE in names, tuple(warnings))


def _choose_matrices(
    suite: Suite, tasks: tuple[str, ...], members: Sequence[Checkpoint]
) -> list[str]:
    """Weight matrices of equal shapes in all members, evenly over their order in the network."""
    names = [
        name
        for name in suite.manifest(tasks).names
        if suite.treatment(name, tasks).decomposed
        and len({member.info(name).shape for member in members}) == 1
        and members[0].info(name).numel
        and all(member.info(name).is_floating for member in members)
    ]
    # Adapters leave most of their base as it is.
    changed = [n for n in names if any(member.may_differ(n) for member in members[: len(tasks)])]
    names = changed or names
    count = min(MOST_MATRICES, len(names))
    return [names[(2 * i + 1) * len(names) // (2 * count)] for i in range(count)]


def _take_sample(
    names: tuple[str, ...], members: Sequence[Checkpoint], matrices: Sequence[str]
) -> _Sample | None:
    if not matrices:
        return None
    k, entries = len(members), 0
    gram, updates = np.zeros((k, k)), np.zeros((k, k))
    differ = np.zeros((k, k), dtype=bool)
    for name in matrices:
        rows = np.stack([_read_rows(member, name) for member in members])
        origin = rows[-1] if names[-1] == BASE else rows.mean(axis=0)
        about = rows - origin
        gram += rows @ rows.T
        updates += about @ about.T
        entries += rows.shape[1]
        for i in range(k):
            for j in range(i):
                differ[i, j] |= not np.array_equal(rows[i], rows[j])
    same = frozenset((names[j], names[i]) for i in range(k) for j in range(i) if not differ[i, j])
    return _Sample(names, gram.tolist(), updates.tolist(), same, entries, len(matrices))


def _read_rows(member: Checkpoint, name: str) -> np.ndarray:
    """Rows of a matrix, evenly over it, as one vector in float64."""
    rows, wide = member.info(name).matrix_shape
    count = max(1, min(rows, MOST_ENTRIES // wide))
    return member.rows(name, np.arange(count) * rows // count).ravel()[:MOST_ENTRIES]


def _row(sample: _Sample, i: int, experts: int, is_adapter: bool) -> Kinship:
    """How the expert of that place stands to the others."""
    member, names = sample.members[i], sample.members
    others = [j for j in range(experts) if j != i]
    with_base = names[-1] == BASE
    limit = max(STRANGE, DEVIATIONS / math.sqrt(sample.entries))
    if with_base:
        origin = math.sqrt(sample.gram[-1][-1])
        distance = math.sqrt(sample.updates[i][i]) / origin if origin else math.inf
        cosine = sample.cosine(i, len(names) - 1)
        verdict = _verdict(distance, cosine, limit)
        if verdict == "stranger" and is_adapter:  # which holds no other network, only an update
            verdict = "far"
        if (member, BASE) in sample.same:
            verdict = "no difference"
    else:
        mean = math.sqrt(sum(map(sum, sample.gram))) / len(names)
        distance = math.sqrt(sample.updates[i][i]) / mean if mean else math.inf
        cosine = max((sample.cosine(i, j) for j in others), default=math.nan)
        verdict = "related" if cosine > limit else "stranger"
    nearest, update_cosine = "", math.nan
    for j in sorted(others, key=lambda j: names[j]):
        value = sample.cosine(i, j, about_origin=True)
        if not math.isnan(value) and not value <= update_cosine:
            nearest, update_cosine = names[j], value
    return Kinship(member, verdict, distance, cosine, nearest, update_cosine)


def _verdict(distance: float, cosine: float, limit: float) -> str:
    """A verdict from ‖θ_t − θ_0‖/‖θ_0‖ and cos(θ_t, θ_0).

    Below `limit` the cosine is what independent networks have; a distance above 1/2 leaves less
    than what fine-tunes have in common with their base (cos below 0.87 at equal norms).
    """
    if math.isnan(cosine) or (cosine < limit and distance > ORTHOGONAL):
        return "stranger"
    return "far" if distance > FAR else "fine-tune"


def _warn(sample: _Sample, rows: Sequence[Kinship], members: Sequence[Checkpoint]) -> list[str]:
    """What to doubt, in sentences."""
    by_name = {name: i for i, name in enumerate(sample.members)}
    with_base = BASE in by_name
    said = []
    strangers = sorted(row.member for row in rows if row.verdict == "stranger")
    related = _are_related(sample, strangers, by_name)
    if with_base and len(strangers) > 1 and len(strangers) == len(rows) and related:
        said.append(
            "the base is a stranger to all experts, which are akin to each other: they were "
            "fine-tuned from another base"
        )
    elif strangers:
        many = len(strangers) > 1
        if with_base:
            is_what = f"{'are no fine-tunes' if many else 'is no fine-tune'} of the base"
        else:
            is_what = f"{'are' if many else 'is'} not akin to any other expert"
        said.append(
            f"{name_members(strangers)} {is_what}: weight by weight they have as little in common "
            "as two networks of different random starts"
        )
    said += _warn_of_copies(sample, members, by_name)
    said += _warn_of_centre(sample, rows)
    return said


def _are_related(sample: _Sample, members: Sequence[str], by_name: dict[str, int]) -> bool:
    """Whether each of these has much in common with each other."""
    return all(
        sample.cosine(by_name[a], by_name[b]) > FAR for a in members for b in members if a < b
    )


def _warn_of_copies(
    sample: _Sample, members: Sequence[Checkpoint], by_name: dict[str, int]
) -> list[str]:
    """Members that are one model; the whole of them is read where the sample does not differ."""
    said = []
    for pair in sorted(tuple(sorted(pair)) for pair in sample.same):
        one, other = (members[by_name[name]] for name in pair)
        if any(isinstance(each, AdaptedCheckpoint) for each in (one, other)):
            continue  # most of it is the base's by construction
        named = " and ".join(sorted(pair, key=lambda name: name != BASE))
        if max(one.nbytes, other.nbytes) > MOST_COMPARED:
            said.append(f"{named} do not differ in the {sample.entries:,} weights looked at")
        elif _are_copies(one, other):
            said.append(f"{named} are the same weights")
    return said


def _are_copies(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether all tensors of two models are equal, bit by bit."""
    import torch

    return set(one) == set(other) and all(
        one.info(name) == other.info(name)
        and torch.equal(one.read_unchecked(name), other.read_unchecked(name))
        for name in one
    )


def _warn_of_centre(sample: _Sample, rows: Sequence[Kinship]) -> list[str]:
    """Whether another member than the base lies in the middle of the experts."""
    if sample.members[-1] != BASE or len(rows) < 3:
        return []
    base = len(rows)

    def is_nearer(i: int, j: int) -> bool:
        return sample.distance(i, j) < NEARER * sample.distance(base, j)

    for i in sorted(range(base), key=lambda i: sample.members[i]):
        others = [j for j in range(base) if j != i]
        if not all(is_nearer(i, j) for j in others):
            continue
        if all(is_nearer(a, b) for a in range(base) for b in range(base) if a != b):
            return [
                "the experts are nearer to one another than to the base: they share a later start "
                "than this base"
            ]
        return [
            f"{sample.members[i]} is nearer to every other expert than the base is: perhaps it is "
            "their base"
        ]
    return []

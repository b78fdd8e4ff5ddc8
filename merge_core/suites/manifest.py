"""The manifest of a suite: which tensors a merge has, and how each member departs from it.

All members decide together, whatever their order. The base says which tensors there are; without
one, most experts do. A weight that some members lack stops the merge; integer and constant buffers
are copied; what belongs to a task is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.dtypes import DTYPES, Dtype
from merge_core.checkpoints.lora import AdaptedCheckpoint
from merge_core.checkpoints.parameter_roles import (
    NO_MATRIX,
    VOCABULARY,
    Role,
    block_of,
    describe,
    layer_of,
)
from merge_core.checkpoints.shards import TensorInfo
from merge_core.checkpoints.tied import tied_tensors
from merge_core.checkpoints.vocabulary import longest_shape

BASE = "the base"  # which no task can be called
OWN_HEAD = "left out of the merge: each task keeps its own"
VOCABULARY_RULES = {
    "refuse": "'vocabulary: common' or 'vocabulary: base' in suite.yaml says what to do",
    "base": "written as it is in the base",
    "common": "merged row by row at the length of the longest",
}
# Kinds that a backbone may have without them being known to belong to it.
UNKNOWN = ("weight matrix", "bias", NO_MATRIX, "not a layer's weight")


@dataclass(frozen=True)
class Difference:
    """One way in which a member departs from what the suite's members have.

    Attributes:
        member: a task, or ``base``.
        parameter: its name; empty for a member that cannot be read.
        kind: unreadable, missing, extra, head, tied, vocabulary, shape, dtype, packed or buffer.
        detail: in words.
        blocking: whether a merge is refused.
    """

    member: str
    parameter: str
    kind: str
    detail: str
    blocking: bool = False


@dataclass(frozen=True)
class Manifest:
    """What a merge of some members consists of.

    Attributes:
        reference: the member whose files' names and layout the output has: the base; without
            one, the first in the alphabet of the experts that have a config.json beside them, or
            of all.
        infos: shape and dtype in the output of each merged parameter, by name, sorted. Each
            tensor has one name here.
        buffers: by name those that are copied: from which members, the most common of their
            values.
        also_written: by merged name the further names of a tied tensor in the output.
        kept: parameters that the output copies from the base (``vocabulary: base``).
        copied: all that it copies from the base: `kept`, and what only the base has.
        completed: embeddings and language heads of several lengths (``vocabulary: common``).
        differences: of all members, in their order.
    """

    reference: Checkpoint
    infos: Mapping[str, TensorInfo]
    buffers: Mapping[str, tuple[str, ...]]
    also_written: Mapping[str, tuple[str, ...]]
    kept: tuple[str, ...]
    copied: tuple[str, ...]
    completed: frozenset[str]
    differences: tuple[Difference, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the merged parameters."""
        return tuple(self.infos)

    def why_not_merged(self, name: str) -> str:
        """A sentence on a parameter that is not merged.

        Args:
            name: not among `infos`.
        """
        own = [each for each in self.differences if each.parameter == name]
        said = "; ".join(f"in {each.member!r} {each.kind}, {each.detail}" for each in own)
        why = said or "no member has it under this name"
        return f"parameter {name!r} is not merged: {why}. All members must have it in one shape."

    @property
    def keeps_head_apart(self) -> bool:
        """Whether the output has a language head that is not its embedding."""
        kinds = {describe(name, info).kind for name, info in self.infos.items() if info.shape[1:]}
        return kinds.issuperset(VOCABULARY)


@dataclass
class _Draft:
    """What is found, name by name."""

    experts: Mapping[str, Checkpoint]
    base: Checkpoint | None
    vocabulary: str
    differences: list[Difference]
    infos: dict[str, TensorInfo]
    buffers: dict[str, tuple[str, ...]]
    kept: list[str]
    completed: set[str]

    @property
    def members(self) -> dict[str, Checkpoint]:
        return {**self.experts, **({} if self.base is None else {BASE: self.base})}

    def say(self, member: str, name: str, kind: str, detail: str, blocking: bool = False) -> None:
        self.differences.append(Difference(member, name, kind, detail, blocking))


def make_manifest(
    experts: Mapping[str, Checkpoint], base: Checkpoint | None, vocabulary: str = "refuse"
) -> Manifest:
    """Compare the headers of all members.

    Weights are read where two names may be one tensor (:func:`.tied.ties`), nothing else.

    Args:
        experts: by task, with common names and aliases.
        base: what they were fine-tuned from.
        vocabulary: the suite's rule for lengths that differ.

    Raises:
        CheckpointError: unreadable.
    """
    draft = _Draft(experts, base, vocabulary, [], {}, {}, [], set())
    reference = base if base is not None else _reference(experts)
    members = draft.members
    tied = tied_tensors(reference, list(members.values()))
    left_out = {name for tie in tied for name in tie.names if name != tie.merged}
    for name in sorted(set().union(*members.values()) - left_out):
        holders = {who: model.info(name) for who, model in members.items() if name in model}
        _examine(draft, name, holders)
    _tell_ties(draft)
    order = {who: place for place, who in enumerate(members)}
    differences = sorted(draft.differences, key=lambda d: (order[d.member], d.parameter))
    also = {t.merged: t.also_written for t in tied if t.merged in draft.infos and t.also_written}
    kept = [n for t in tied if t.merged in draft.kept for n in t.also_written] + draft.kept
    written = {*draft.infos, *reference.aliases}.union(*also.values())
    return Manifest(
        reference,
        draft.infos,
        draft.buffers,
        also,
        tuple(sorted(kept)),
        () if base is None else tuple(name for name in base if name not in written),
        frozenset(draft.completed),
        tuple(replace(d, member="base") if d.member == BASE else d for d in differences),
    )


def _reference(experts: Mapping[str, Checkpoint]) -> Checkpoint:
    """The expert whose layout the output has where there is no base."""

    def place(task: str) -> tuple[bool, str]:
        files = experts[task].files
        return not (files and (files[0].parent / "config.json").is_file()), task

    return experts[min(experts, key=place)]


def _examine(draft: _Draft, name: str, holders: Mapping[str, TensorInfo]) -> None:
    """Decide about one name."""
    typical = _typical(holders)
    role = describe(name, typical)
    if _is_buffer(name, role, holders):
        _examine_buffer(draft, name, holders)
    elif integers := {who: i for who, i in holders.items() if not i.is_floating}:
        for who, info in integers.items():
            detail = f"{info.dtype.name}, not real numbers: packed or quantised weights"
            draft.say(who, name, "packed", detail, True)
    else:
        everywhere = _examine_presence(draft, name, role, holders)
        _examine_shapes(draft, name, role, holders, everywhere)


def _typical(holders: Mapping[str, TensorInfo]) -> TensorInfo:
    """The header that most members have; of several the base's, or the first in the alphabet."""
    counts = Counter(holders[who] for who in sorted(holders))
    return max(counts, key=lambda info: (counts[info], holders.get(BASE) == info))


def _is_buffer(name: str, role: Role, holders: Mapping[str, TensorInfo]) -> bool:
    """Whether a name is a buffer: constant by its name, or of integers and no layer's weight."""
    integers = [info for info in holders.values() if not info.is_floating]
    match layer_of(name)[1]:
        case "":
            return role.is_constant or bool(integers)
        case "bias" if role.is_constant:
            return True
        case "bias":  # GPT-2's causal mask, and the like
            shapes = {info.shape[:2] for info in holders.values() if len(info.shape) == 4}
            return shapes == {(1, 1)} or len(integers) == len(holders)
    return len(integers) == len(holders) and all(len(info.shape) < 2 for info in integers)


def _examine_buffer(draft: _Draft, name: str, holders: Mapping[str, TensorInfo]) -> None:
    """Take a buffer from the base, or from the experts, integers before floating ones."""
    exact = {who: info for who, info in holders.items() if not info.is_floating} or dict(holders)
    if BASE in exact:
        givers: tuple[str, ...] = (BASE,)
    else:
        shape = _typical(exact)
        givers = tuple(who for who, info in exact.items() if info == shape)
    source = "the base" if givers == (BASE,) else "most experts"
    members = draft.members
    written = BASE in givers or 2 * len(holders) > len(members) or BASE in holders
    what = f"copied from {source}" if written else "left out"
    info = exact[givers[0]]
    for who in members:
        if who not in holders:
            draft.say(who, name, "buffer", f"absent; {what}")
        elif holders[who] != info:
            here = holders[who]
            detail = f"{here.dtype.name} {here.shape}, not {info.dtype.name} {info.shape}; {what}"
            draft.say(who, name, "buffer", detail)
    if written:
        draft.infos[name], draft.buffers[name] = info, givers


def _examine_presence(
    draft: _Draft, name: str, role: Role, holders: Mapping[str, TensorInfo]
) -> bool:
    """Say who lacks a tensor or adds it; whether all members have it."""
    lacking = [who for who in draft.members if who not in holders]
    if not lacking:
        return True
    having = [who for who in draft.experts if who in holders]
    if not having:
        draft.say(BASE, name, "extra", "not in the experts; written as it is here")
        return False
    others = _listed(having if BASE not in holders else [BASE, *having])
    in_backbone = bool(block_of(name)) or role.kind not in UNKNOWN
    # Without a base most experts decide; where as many lack it, nobody can say that it is extra.
    few = 2 * len(having) < len(draft.experts)
    added = BASE in lacking or (draft.base is None and few)
    if _is_task_part(name, role):
        for who in lacking if not added or len(having) == len(draft.experts) else having:
            what = "absent" if who in lacking else f"not in {_listed(lacking)}"
            draft.say(who, name, "head", f"{what}; {OWN_HEAD}")
    elif added and len(having) < len(draft.experts):
        what = "so the networks differ" if in_backbone else "left out of the merge"
        for who in having:
            draft.say(who, name, "extra", f"not in {_listed(lacking)}; {what}", in_backbone)
    else:
        for who in lacking:
            draft.say(who, name, "missing", f"present in {others}", True)
    return False


def _examine_shapes(
    draft: _Draft, name: str, role: Role, holders: Mapping[str, TensorInfo], everywhere: bool
) -> None:
    """Say whose shape or dtype departs; a tensor that all have in one shape is merged."""
    typical = _typical(holders)
    longest = longest_shape([info.shape for info in holders.values()])
    lengths_differ = role.is_vocabulary and longest is not None
    before = len(draft.differences)
    for who, here in holders.items():
        if here.shape == typical.shape:
            _tell_dtype(draft, who, name, here, typical)
        elif role.kind == "head":
            draft.say(who, name, "head", f"{here.shape}, others {typical.shape}; {OWN_HEAD}")
        elif lengths_differ:
            _tell_vocabulary(draft, who, name, here, typical)
        else:
            draft.say(who, name, "shape", f"{here.shape}, others have {typical.shape}", True)
    blocking = any(d.blocking for d in draft.differences[before:])
    shapes = {info.shape for info in holders.values()}
    if blocking or not everywhere or (len(shapes) > 1 and not lengths_differ):
        return
    if lengths_differ and draft.vocabulary == "base":
        draft.kept.append(name)
        return
    if lengths_differ:
        draft.completed.add(name)
    dtypes = [info.dtype for who, info in holders.items() if who != BASE]
    draft.infos[name] = TensorInfo(longest or typical.shape, _widest(dtypes))


def _tell_dtype(draft: _Draft, who: str, name: str, here: TensorInfo, typical: TensorInfo) -> None:
    if here.dtype == typical.dtype:
        return
    # An adapter's dtype is the reader's choice, not its base's.
    adapters = [m for m in draft.experts.values() if isinstance(m, AdaptedCheckpoint)]
    if adapters and (who == BASE or isinstance(draft.experts[who], AdaptedCheckpoint)):
        return
    draft.say(who, name, "dtype", f"{here.dtype.name}, others have {typical.dtype.name}")


def _tell_vocabulary(
    draft: _Draft, who: str, name: str, here: TensorInfo, typical: TensorInfo
) -> None:
    rule = draft.vocabulary
    blocking = rule == "refuse" or (rule == "base" and draft.base is None)
    what = VOCABULARY_RULES[rule]
    if rule == "base" and draft.base is None:
        what = "'vocabulary: base' needs a base"
    detail = f"{here.shape[0]:,} rows, others have {typical.shape[0]:,}; {what}"
    draft.say(who, name, "vocabulary", detail, blocking)


def _tell_ties(draft: _Draft) -> None:
    """Say which members keep one tensor where others keep two."""
    for who, model in draft.members.items():
        for alias in sorted(model.aliases):
            own = next(n for names in model.ties if alias in names for n in names if n != alias)
            apart = ", and merged apart as it is in others" if alias in draft.infos else ""
            draft.say(who, alias, "tied", f"kept once here, as {own}{apart}")


def _is_task_part(name: str, role: Role) -> bool:
    """Whether a tensor belongs to a task: a head, a pooler, an encoder's language head."""
    if role.kind in ("head", "pooler"):
        return True
    words = name.split(".")
    encoder = "cls" in words[:2] or "vocab_projector" in words or words[-2:] == ["lm_head", "bias"]
    return role.kind == "language head" and (encoder or "lm_head.decoder" in name)


def _widest(dtypes: Sequence[Dtype]) -> Dtype:
    """The narrowest dtype that holds the entries of all."""
    if len(set(dtypes)) == 1 or not all(dtype.is_floating_point for dtype in dtypes):
        return dtypes[0]
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    alike = {dtype for dtype in dtypes if dtype.itemsize == widest.itemsize}
    return widest if len(alike) == 1 and widest.itemsize > 1 else DTYPES["float32"]


def _listed(names: Sequence[str]) -> str:
    """Some names in words."""
    shown = ["the base" if name == BASE else name for name in names[:3]]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(shown) + more


def summarise(differences: Sequence[Difference]) -> Iterator[str]:
    """Sentences on what a merge settles by itself: buffers, ties, dtypes, what is left out.

    Args:
        differences: of a manifest.
    """
    settled = ("buffer", "tied", "dtype", "extra")
    rows = [d for d in differences if not d.blocking and d.kind in settled]
    groups: dict[tuple[str, str, str], list[str]] = {}
    for d in rows:
        groups.setdefault((d.kind, d.member, d.detail), []).append(d.parameter)
    for (kind, member, detail), names in groups.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        written = "; written in the widest of them" if kind == "dtype" else ""
        yield f"{member}: {names[0]}{more}: {detail}{written}"

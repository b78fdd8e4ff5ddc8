"""A suite as a record describes it: names, shapes and digests, but no weights and no inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.dtypes import DTYPES
from merge_core.checkpoints.header_checks import check_tensors
from merge_core.checkpoints.shards import PlainShard, TensorInfo
from merge_core.errors import CheckpointError, SuiteError
from merge_core.places import is_place, name_without_place
from merge_core.strict_model import StrictModel
from merge_core.suites.data_spec import MetricName
from merge_core.suites.manifest import Manifest
from merge_core.suites.suite import Suite
from merge_core.suites.suite_spec import ArchitectureSpec, ExpertSpec, SuiteSpec, TaskName

if TYPE_CHECKING:
    from torch import Tensor

MOST_TASKS = 1000
MOST_SIZE = 1 << 40
PLACE = "recorded"  # where suite.yaml would name a file

Text = Annotated[str, Field(max_length=10_000)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=0, le=MOST_SIZE)]


def _check_dtype(name: str) -> str:
    if name not in DTYPES:
        raise ValueError("this is no dtype of a tensor")
    return name


# Dtype and shape of each tensor, by name.
Layout = dict[
    Annotated[str, Field(max_length=500)],
    tuple[Annotated[str, AfterValidator(_check_dtype)], list[Size]],
]


class MemberCard(StrictModel):
    """A member of a suite: what its weights are known by.

    Attributes:
        digest: of its content.
        layout: the number of its headers among the card's.
        source: its name on the hub and its commit, if it is there.
    """

    digest: Digest
    layout: int = Field(ge=0)
    source: Annotated[str, Field(max_length=500)] | None = None


class TaskCard(MemberCard):
    """An expert: its title, and the digest of its task's data, head and architecture."""

    title: Text | None = None
    data: Digest | None = None


class SuiteCard(StrictModel):
    """What a record says of its suite.

    Attributes:
        format: of cards.
        made_with: the version of MergeScope.
        name, description, architecture, decompose, average, vocabulary: of its ``suite.yaml``.
        tasks: the experts, in the suite's order.
        base: the base, if it has one.
        layouts: the different headers of members.
        merged: the parameters that a merge of all experts has.
        buffers: which of them are copied, and from whom.
        completed: which of them are embeddings of several lengths.
        lacks: why no accuracy was recorded; None if they were.
        measured_by: what was measured; None for accuracies.
    """

    format: Literal["record-1"] = "record-1"
    made_with: Annotated[str, Field(max_length=40)] = ""
    name: Annotated[str, Field(min_length=1, max_length=200)]
    description: Text = ""
    architecture: ArchitectureSpec | None = None
    tasks: dict[TaskName, TaskCard] = Field(min_length=1, max_length=MOST_TASKS)
    base: MemberCard | None = None
    layouts: list[Layout]
    merged: Layout
    buffers: dict[str, list[Text]] = Field(default_factory=dict)
    completed: list[str] = Field(default_factory=list)
    decompose: list[Text] = Field(default_factory=list)
    average: list[Text] = Field(default_factory=list)
    vocabulary: Literal["refuse", "base", "common"] = "refuse"
    lacks: Text | None = None
    measured_by: Literal["cross_entropy"] | None = None


def suite_card(suite: Suite, measured: bool) -> SuiteCard:
    """What a record says of a suite; nothing of it names a place on this machine.

    Args:
        suite: the suite; its members are read for their digests.
        measured: whether accuracies are recorded.

    Raises:
        SuiteError, CheckpointError: a member is missing or unreadable.

    Example:
        >>> card = suite_card(load_suite("vision"), measured=True)
        >>> card.name, list(card.tasks)[:2], len(card.layouts)
        ('vision', ['digits', 'letters'], 1)
    """
    spec, manifest, network = suite.spec, suite.manifest(suite.tasks), suite.architecture
    layouts: list[Any] = []

    def number(member: Checkpoint) -> int:
        layout = _layout({name: member.info(name) for name in member})
        if layout not in layouts:
            layouts.append(layout)
        return layouts.index(layout)

    tasks = {
        task: TaskCard(
            digest=suite.expert(task).digest,
            layout=number(suite.expert(task)),
            source=suite.source(task),
            title=spec.experts[task].title,
            data=suite.data_digest(task) if measured else None,
        )
        for task in suite.tasks
    }
    base = suite.base
    return SuiteCard(
        made_with=version("mergescope"),
        name=name_without_place(spec.name),
        description=spec.description,
        architecture=None if network is None else _without_places(network),
        tasks=tasks,
        base=None
        if base is None
        else MemberCard(digest=base.digest, layout=number(base), source=suite.source(None)),
        layouts=layouts,
        merged=_layout(manifest.infos),
        buffers={name: list(givers) for name, givers in manifest.buffers.items()},
        completed=sorted(manifest.completed),
        decompose=spec.decompose,
        average=spec.average,
        vocabulary=spec.vocabulary,
        lacks=None if measured else suite.why_not_evaluated or "no accuracy was recorded",
        measured_by="cross_entropy" if suite.measured_by == "cross_entropy" else None,
    )


def _layout(infos: Mapping[str, TensorInfo]) -> Any:
    return {name: (info.dtype.name, list(info.shape)) for name, info in infos.items()}


def _without_places(architecture: ArchitectureSpec) -> ArchitectureSpec:
    """The architecture without arguments that name a place on this machine."""
    kept = {
        name: value
        for name, value in architecture.args.items()
        if not (isinstance(value, str) and is_place(value))
    }
    return architecture.model_copy(update={"args": kept})


def _infos(layout: Layout) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(tuple(shape), DTYPES[dtype]) for name, (dtype, shape) in layout.items()
    }


class _RecordedShard(PlainShard):
    """The header of weights that are not here."""

    def __init__(self, infos: dict[str, TensorInfo]) -> None:
        self.infos = infos

    def tensor(self, name: str) -> Tensor:
        raise CheckpointError(
            f"A record holds no weights, so tensor {name!r} cannot be read. Open the suite itself."
        )


class RecordedMember(Checkpoint):
    """A member of which only the headers and the digest are known.

    Args:
        infos: its tensors' shapes and dtypes, by name.
        digest: of its content.
        label: what it is called in messages.

    Raises:
        CheckpointError: no model has such tensors.
    """

    def __init__(self, infos: dict[str, TensorInfo], digest: str, label: str) -> None:
        self.path = Path(label)
        self.files = ()
        self.metadata = {}
        self._stamps = {}
        shard = _RecordedShard(infos)
        self._own(dict.fromkeys(infos, shard), label)
        self.digest = digest


class RecordedSuite(Suite):
    """A suite known by its card alone: it answers what headers and digests can answer.

    Args:
        card: what a record says of it.
        path: of the record.

    Raises:
        SuiteError, CheckpointError: the card describes no suite.
    """

    def __init__(self, card: SuiteCard, path: Path) -> None:
        members = [*card.tasks.values(), *([card.base] if card.base else [])]
        if any(member.layout >= len(card.layouts) for member in members):
            raise SuiteError(f"{path}: its card names headers that it does not hold.")
        for layout in (card.merged, *card.layouts):
            check_tensors(path, ((name, tuple(shape)) for name, (_, shape) in layout.items()))
        super().__init__(_spec(card), path)
        self.card = card

    @cached_property
    def prefixes(self) -> dict[str, str]:
        """None: members are recorded under the names that all share."""
        return {}

    @cached_property
    def _members(self) -> dict[str | None, Checkpoint]:
        infos = [_infos(layout) for layout in self.card.layouts]
        cards: list[tuple[str | None, MemberCard]] = [*self.card.tasks.items()]
        if self.card.base is not None:
            cards.append((None, self.card.base))
        return {
            task: RecordedMember(infos[card.layout], card.digest, task or "base")
            for task, card in cards
        }

    @cached_property
    def architecture(self) -> ArchitectureSpec | None:
        """The network, as it was recorded."""
        return self.card.architecture

    @property
    def measured_by(self) -> MetricName:
        """What was measured when it was recorded."""
        return self.card.measured_by or "accuracy"

    def source(self, task: str | None) -> str | None:
        """The hub's name of a member at its commit, as it was recorded."""
        member = self.card.base if task is None else self.card.tasks[task]
        return None if member is None else member.source

    @property
    def why_not_evaluated(self) -> str | None:
        """What the suite that was recorded lacked for evaluation."""
        return self.card.lacks

    def manifest(self, tasks: Sequence[str]) -> Manifest:
        """What a merge of all recorded experts has."""
        return Manifest(
            reference=self.expert(tasks[0]),
            infos=dict(sorted(_infos(self.card.merged).items())),
            buffers={name: tuple(givers) for name, givers in self.card.buffers.items()},
            also_written={},
            kept=(),
            copied=(),
            completed=frozenset(self.card.completed),
            differences=(),
        )

    def data_digest(self, task: str) -> str:
        """Digest of a task's data, head and architecture, as it was recorded.

        Raises:
            SuiteError: none was.
        """
        digest = self.card.tasks[task].data
        if digest is None:
            raise SuiteError(f"Task {task!r} was not evaluated when the record was made.")
        return digest


def _spec(card: SuiteCard) -> SuiteSpec:
    """The suite's description, in which files are named by what they are: recorded."""
    return SuiteSpec(
        name=card.name,
        description=card.description,
        architecture=card.architecture,
        base=None if card.base is None else PLACE,
        experts={t: ExpertSpec(weights=PLACE, title=each.title) for t, each in card.tasks.items()},
        decompose=card.decompose,
        average=card.average,
        vocabulary=card.vocabulary,
    )

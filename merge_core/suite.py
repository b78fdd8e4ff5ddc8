"""A suite: experts fine-tuned from one base, with heads, architecture and evaluation data.

A suite is a file, ``suite.yaml``, whose paths are relative to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from merge_core.checkpoint import Checkpoint
from merge_core.errors import CheckpointError, SuiteError, explain_validation
from merge_core.files import digest_of, file_digest, read_yaml
from merge_core.parameters import Treatment, treatment

BUNDLED = "demo"
BUNDLED_PATH = Path(__file__).resolve().parent.parent / "data" / "demo" / "suite.yaml"

# Task names stand in links and in lists separated by commas.
TaskName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.+-]+$", max_length=80)]
Positive = Annotated[float, Field(gt=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ArchitectureSpec(_Strict):
    """A timm model name and the arguments that `timm.create_model` takes."""

    name: str
    args: dict[str, Any] = {}


class DataSpec(_Strict):
    """Evaluation images of one task: a numpy archive and its normalisation constants."""

    file: str
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[Positive, Positive, Positive] = (0.5, 0.5, 0.5)


class ExpertSpec(_Strict):
    """One expert: weights, and where known its head and evaluation data."""

    weights: str
    title: str | None = None
    head: str | None = None
    data: DataSpec | None = None


class SuiteSpec(_Strict):
    """The content of ``suite.yaml``."""

    name: str = Field(min_length=1)
    description: str = ""
    architecture: ArchitectureSpec | None = None
    base: str | None = None
    experts: dict[TaskName, ExpertSpec] = Field(min_length=1)
    decompose: list[str] = []
    average: list[str] = []


class Suite:
    """A loaded suite; checkpoints open on first use and are read lazily.

    Args:
        spec: the validated content of ``suite.yaml``.
        path: where that file lies.
    """

    def __init__(self, spec: SuiteSpec, path: Path) -> None:
        self.spec = spec
        self.path = path
        self.root = path.parent
        self._experts: dict[str, Checkpoint] = {}

    def __repr__(self) -> str:
        return f"Suite({self.spec.name!r}, {len(self.tasks)} tasks)"

    @property
    def name(self) -> str:
        """The suite's name."""
        return self.spec.name

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names in the order of the file."""
        return tuple(self.spec.experts)

    def title(self, task: str) -> str:
        """A task's title for people."""
        return self.spec.experts[task].title or task

    def select(self, tasks: Sequence[str] | None) -> tuple[str, ...]:
        """The named tasks in the suite's own order (all when None), so that order never matters.

        Raises:
            SuiteError: an unknown task, or none at all.
        """
        if tasks is None:
            return self.tasks
        unknown = [task for task in tasks if task not in self.spec.experts]
        if unknown:
            raise SuiteError(
                f"The suite {self.name!r} has no task {unknown[0]!r}. "
                f"Its tasks: {', '.join(self.tasks)}."
            )
        if not tasks:
            raise SuiteError("Choose at least one task.")
        return tuple(task for task in self.tasks if task in tasks)

    def expert(self, task: str) -> Checkpoint:
        """The expert's checkpoint.

        Raises:
            CheckpointError: its file is missing or unreadable.
        """
        if task not in self._experts:
            self._experts[task] = self._open(self.spec.experts[task].weights, f"expert {task!r}")
        return self._experts[task]

    @cached_property
    def base(self) -> Checkpoint | None:
        """The base's checkpoint, or None where the suite names none."""
        return None if self.spec.base is None else self._open(self.spec.base, "base")

    def file(self, relative: str) -> Path:
        """A path of the suite file, made absolute."""
        return (self.root / Path(relative).expanduser()).resolve()

    @property
    def can_evaluate(self) -> bool:
        """Whether an architecture, and a head and data for every task, are named."""
        return self.why_not_evaluated is None

    @property
    def why_not_evaluated(self) -> str | None:
        """What the suite lacks for evaluation, in words; None if nothing."""
        if self.spec.architecture is None:
            return "the suite names no architecture"
        for what in ("head", "data"):
            without = [t for t, spec in self.spec.experts.items() if getattr(spec, what) is None]
            if without:
                return f"no {what} is given for {', '.join(without)}"
        return None

    def treatment(self, parameter: str, task: str | None = None) -> Treatment:
        """Whether spectral methods decompose a parameter or average it, and why.

        Args:
            parameter: its name.
            task: whose header to read (the first expert's when None).
        """
        info = self.expert(task or self.tasks[0]).info(parameter)
        return treatment(parameter, info, self.spec.decompose, self.spec.average)

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names common to all experts (and the base), in the first expert's order."""
        return self.shared(self.tasks)

    def shared(self, tasks: Sequence[str]) -> tuple[str, ...]:
        """Names common to the chosen experts (and the base), in the first one's order."""
        first, *members = [self.expert(task) for task in tasks]
        if self.base is not None:
            members.append(self.base)
        return tuple(name for name in first if all(name in m for m in members))

    @cached_property
    def matrices(self) -> tuple[str, ...]:
        """Names of the parameters that spectral methods decompose."""
        return tuple(name for name in self.parameters if self.treatment(name).decomposed)

    def members_digest(self, tasks: Sequence[str], with_base: bool) -> str:
        """Digest (hex) of the content of the chosen experts, and of the base where it counts."""
        parts = [self.expert(task).digest for task in tasks]
        if with_base and self.base is not None:
            parts.append("base:" + self.base.digest)
        return digest_of(*parts)

    def data_digest(self, task: str) -> str:
        """Digest (hex) of a task's evaluation data, normalisation, head and the architecture.

        Raises:
            SuiteError: the task has no head or data, or their files are missing.
        """
        spec = self.spec.experts[task]
        if spec.data is None or spec.head is None or self.spec.architecture is None:
            raise SuiteError(f"Task {task!r} cannot be evaluated: {self.why_not_evaluated}.")
        parts = [
            repr(spec.data.mean),
            repr(spec.data.std),
            self.spec.architecture.model_dump_json(),
        ]
        for relative in (spec.data.file, spec.head):
            path = self.file(relative)
            if not path.is_file():
                raise SuiteError(
                    f"{path} (task {task!r} of {self.path}) does not exist. "
                    "Correct the path in suite.yaml, or leave the field out."
                )
            parts.append(file_digest(path))
        return digest_of(*parts)

    def _open(self, relative: str, what: str) -> Checkpoint:
        try:
            return Checkpoint(self.file(relative))
        except CheckpointError as error:
            raise CheckpointError(f"Suite {self.name!r}, {what}: {error}") from error


def load_suite(reference: str | Path) -> Suite:
    """Read a ``suite.yaml``; nothing of the checkpoints is opened yet.

    Args:
        reference: path of the file or of its folder, or ``"demo"`` for the bundled suite.

    Raises:
        SuiteError: missing file, not YAML, unknown or missing fields.
    """
    document, path = read_yaml(
        BUNDLED_PATH if str(reference) == BUNDLED else Path(reference),
        "suite.yaml",
        SuiteError,
        f"{BUNDLED!r} for the bundled suite",
    )
    try:
        spec = SuiteSpec.model_validate(document)
    except ValidationError as error:
        raise SuiteError(f"{path}: {explain_validation(error)}") from error
    return Suite(spec, path.resolve())

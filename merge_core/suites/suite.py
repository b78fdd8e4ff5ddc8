"""A suite: experts fine-tuned from one base, with heads, architecture and evaluation data.

A suite is a file, ``suite.yaml``, whose paths are relative to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

from pydantic import ValidationError

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.lora import AdaptedCheckpoint, is_adapter, is_stored_transposed
from merge_core.checkpoints.members import are_own_heads, longest_vocabulary, names_in_all
from merge_core.checkpoints.parameter_roles import Treatment, treatment
from merge_core.checkpoints.parameter_roles import describe as describe_parameter
from merge_core.checkpoints.tied import tied_names
from merge_core.errors import CheckpointError, HubError, SuiteError, explain_validation
from merge_core.files import digest_of, path_below, read_yaml
from merge_core.hub.files import is_hub_id
from merge_core.hub.models import cache_path, require_cached, resolve_revision
from merge_core.suites.data_files import data_identity, head_identity
from merge_core.suites.mergekit import explain_mergekit
from merge_core.suites.suite_spec import SuiteSpec
from merge_core.work_sizes import HASHED_AT_ONCE

BUNDLED = "demo"
BUNDLED_PATH = Path(__file__).resolve().parents[2] / "data" / "demo" / "suite.yaml"


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
        """The named tasks in the suite's order (all when None), in whatever order they are named.

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
        if self.spec.base is None:
            return None
        return self._open(self.spec.base, "base").with_prefix(self.spec.base_prefix)

    def file(self, relative: str) -> Path:
        """A path of the suite file, made absolute; of a name on the hub, its place in the cache.

        Raises:
            SuiteError: what is written cannot be a path.
        """
        if is_hub_id(relative):
            return cache_path(relative)
        return path_below(self.root, relative, SuiteError)

    def source(self, task: str | None) -> str | None:
        """The hub's name of an expert (of the base for None) at its commit; None for a file."""
        weights = self.spec.base if task is None else self.spec.experts[task].weights
        return resolve_revision(weights) if weights is not None and is_hub_id(weights) else None

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

    def is_stored_transposed(self, parameter: str, task: str | None = None) -> bool:
        """Whether a weight is stored in x out, as GPT-2's are, told from its name and its bias.

        Args:
            parameter: its name.
            task: whose header to read (the first expert's when None).
        """
        expert = self.expert(task or self.tasks[0])
        if not describe_parameter(parameter, expert.info(parameter)).stored_transposed:
            return False
        return is_stored_transposed(expert, parameter) is not False

    def members(self, tasks: Sequence[str]) -> list[Checkpoint]:
        """The chosen experts, and the base where there is one."""
        experts = [self.expert(task) for task in tasks]
        return experts if self.base is None else [*experts, self.base]

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names common to all experts (and the base), in the first expert's order."""
        return self.merged_names(self.tasks)

    def merged_names(self, tasks: Sequence[str]) -> tuple[str, ...]:
        """Names of the parameters that are merged of the chosen experts, in the first one's order.

        That is what they all have, and the base, each tensor under one name, without heads whose
        shapes differ and what is kept as it is in the base (``vocabulary: base``).
        """
        members = self.members(tasks)
        left_out = {name for names in self.tied_names(tasks).values() for name in names}
        left_out.update(self.kept_names(tasks))
        names = (name for name in names_in_all(members) if name not in left_out)
        return tuple(name for name in names if not are_own_heads(name, members))

    def kept_names(self, tasks: Sequence[str]) -> tuple[str, ...]:
        """Names of the parameters that the output copies from the base (``vocabulary: base``).

        Args:
            tasks: chosen experts.
        """
        if self.spec.vocabulary != "base" or self.base is None:
            return ()
        members = self.members(tasks)
        return tuple(n for n in names_in_all(members) if longest_vocabulary(n, members) is not None)

    def tied_names(self, tasks: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Further names under which the output keeps tensors (:mod:`merge_core.checkpoints.tied`).

        Args:
            tasks: chosen experts.

        Returns:
            By the name that is merged, the names that the base's files (the first expert's where
            there is no base) keep it under besides.
        """
        members = self.members(tasks)
        return tied_names(members[0] if self.base is None else self.base, members)

    @cached_property
    def matrices(self) -> tuple[str, ...]:
        """Names of the parameters that spectral methods decompose."""
        members = self.members(self.tasks)
        names = (name for name in self.parameters if self.treatment(name).decomposed)
        return tuple(name for name in names if longest_vocabulary(name, members) is None)

    def members_digest(self, tasks: Sequence[str], with_base: bool) -> str:
        """Digest (hex) of the content of the chosen experts, and of the base where it counts."""
        experts = [self.expert(task) for task in tasks]
        unknown = [expert for expert in experts if "digest" not in vars(expert)]
        if len(unknown) > 1:
            # Several files at once keep the disk and the cores busy.
            with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
                list(pool.map(lambda expert: expert.digest, unknown))
        parts = [expert.digest for expert in experts]
        if with_base and self.base is not None:
            parts.append("base:" + self.base.digest)
        return digest_of(*parts)

    def data_digest(self, task: str) -> str:
        """Digest (hex) of a task's evaluation data, normalisation, head and the architecture.

        Raises:
            SuiteError: the task has no head or data, or their files are missing.
            HubError: a head, tower or tokenizer on the hub is not downloaded.
        """
        spec = self.spec.experts[task]
        if spec.data is None or spec.head is None or self.spec.architecture is None:
            raise SuiteError(f"Task {task!r} cannot be evaluated: {self.why_not_evaluated}.")
        parts = [
            *map(repr, spec.data.constants),
            self.spec.architecture.identity,
        ]
        parts += [
            data_identity(spec.data, self.file, f"data of task {task!r} of {self.path}"),
            head_identity(spec.head, self.file, f"head of task {task!r} of {self.path}"),
        ]
        if self.spec.architecture.library == "transformers" and self.base is not None:
            parts.append(self.base.digest)  # its projection stands in for what experts lack
        return digest_of(*parts)

    def _open(self, relative: str, what: str) -> Checkpoint:
        try:
            path = require_cached(relative) if is_hub_id(relative) else self.file(relative)
        except HubError as error:
            raise HubError(f"Suite {self.name!r}, {what}: {error}") from error
        base = self._base_of_adapter(path, what) if is_adapter(path) and what != "base" else None
        try:
            return Checkpoint(path) if base is None else AdaptedCheckpoint(path, base)
        except CheckpointError as error:
            raise CheckpointError(f"Suite {self.name!r}, {what}: {error}") from error

    def _base_of_adapter(self, path: Path, what: str) -> Checkpoint:
        """The checkpoint that an adapter is applied to.

        Raises:
            CheckpointError: the suite names no base.
        """
        if self.base is None:
            raise CheckpointError(
                f"Suite {self.name!r}, {what}: {path} is an adapter, which is no model without "
                "its base. Add 'base:' to suite.yaml: the model that it was trained on."
            )
        return self.base


def load_suite(reference: str | Path) -> Suite:
    """Read a ``suite.yaml``; nothing of the checkpoints is opened yet.

    Args:
        reference: path of the file or of its folder, or ``"demo"`` for the bundled suite.

    Raises:
        SuiteError: missing file, not YAML, unknown or missing fields.

    Example:
        >>> suite = load_suite("demo")
        >>> suite.tasks[:3], len(suite.expert("digits"))
        (('digits', 'letters', 'greek'), 30)
    """
    document, path = read_yaml(
        BUNDLED_PATH if str(reference) == BUNDLED else Path(reference),
        "suite.yaml",
        SuiteError,
        f"{BUNDLED!r} for the bundled suite",
    )
    if foreign := explain_mergekit(document):
        raise SuiteError(f"{path} is {foreign}")
    try:
        spec = SuiteSpec.model_validate(document)
    except ValidationError as error:
        raise SuiteError(f"{path}: {explain_validation(error)}") from error
    return Suite(spec, path.resolve())

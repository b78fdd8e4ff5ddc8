"""A suite: experts fine-tuned from one base, with heads, architecture and evaluation data.

A suite is a file, ``suite.yaml``, whose paths are relative to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from pydantic import ValidationError

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.lora import AdaptedCheckpoint, is_adapter, is_stored_transposed
from merge_core.checkpoints.naming import add_prefix, align_names
from merge_core.checkpoints.parameter_roles import Treatment, treatment
from merge_core.checkpoints.parameter_roles import describe as describe_parameter
from merge_core.checkpoints.tied import with_aliases
from merge_core.errors import (
    CheckpointError,
    HubError,
    MergeScopeError,
    SuiteError,
    explain_validation,
)
from merge_core.files import digest_of, path_below, read_yaml
from merge_core.hub.files import is_hub_id
from merge_core.hub.models import cache_path, require_cached, resolve_revision
from merge_core.suites.architectures import tell_language_model
from merge_core.suites.bundled import RECORD_SUFFIX, bundled_suites
from merge_core.suites.data_files import data_identity, head_identity
from merge_core.suites.data_spec import DataSpec, MetricName
from merge_core.suites.manifest import Manifest, make_manifest
from merge_core.suites.mergekit import explain_mergekit
from merge_core.suites.suite_spec import ArchitectureSpec, SuiteSpec
from merge_core.suites.told import (
    complete_data,
    describe_language_model,
    describe_network,
    holds_classifier,
    tell_architecture,
)
from merge_core.work_sizes import HASHED_AT_ONCE


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
        self._manifests: dict[tuple[str, ...], Manifest] = {}
        self._own_heads: dict[str, bool] = {}
        self._data: dict[str, DataSpec] = {}

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

        A preset's name stands for its tasks.

        Raises:
            SuiteError: an unknown task, or none at all.
        """
        if tasks is None:
            return self.tasks
        presets = self.spec.presets
        named = [task for name in tasks for task in presets.get(name, (name,))]
        unknown = [task for task in named if task not in self.spec.experts]
        if unknown:
            also = f" Its presets: {', '.join(presets)}." if presets else ""
            raise SuiteError(
                f"The suite {self.name!r} has no task {unknown[0]!r}. "
                f"Its tasks: {', '.join(self.tasks)}.{also}"
            )
        if not named:
            raise SuiteError("Choose at least one task.")
        return tuple(task for task in self.tasks if task in named)

    def restrict(self, tasks: Sequence[str] | None) -> Suite:
        """The suite of these tasks alone (or of a preset's), in its own order.

        Raises:
            SuiteError: an unknown task, or none at all.
        """
        experts = {task: self.spec.experts[task] for task in self.select(tasks)}
        return Suite(self.spec.model_copy(update={"experts": experts, "presets": {}}), self.path)

    def expert(self, task: str) -> Checkpoint:
        """The expert's checkpoint, under names that all members share.

        Raises:
            CheckpointError: its file is missing or unreadable.
            HubError: it is not downloaded.
        """
        found = self._members.get(task)
        # What could not be opened says why when it is opened again.
        return self._open_expert(task, self.base) if found is None else found

    @cached_property
    def base(self) -> Checkpoint | None:
        """The base's checkpoint, or None where the suite names none.

        Raises:
            CheckpointError: its file is missing or unreadable.
            HubError: it is not downloaded.
        """
        if self.spec.base is None:
            return None
        found = self._members.get(None)
        return self._open(self.spec.base, "base") if found is None else found

    @cached_property
    def prefixes(self) -> dict[str, str]:
        """By member (``base``, or a task) the prefix that its names lack to be those of others.

        The suite's `base_prefix` is not among them.
        """
        _ = self._members
        return self._prefixes

    @cached_property
    def _members(self) -> dict[str | None, Checkpoint]:
        """What can be opened, the base as None, under names that all share."""
        models: dict[str | None, Checkpoint] = {}
        adapters: list[str] = []
        with suppress(MergeScopeError):  # told when it is asked for
            if self.spec.base is not None:
                models[None] = self._open(self.spec.base, "base")
        for task in self.tasks:
            with suppress(MergeScopeError):
                if self._is_adapter(self.spec.experts[task].weights):
                    adapters.append(task)
                else:
                    models[task] = self._open_expert(task, None)
        models = self._align(models)
        adapted = self._adapt(adapters, models.get(None))
        if len(models) + len(adapted) > 1:
            models = with_aliases(models, list(adapted.values()))
        return models | self._adapt(adapters, models.get(None))

    def _align(self, models: dict[str | None, Checkpoint]) -> dict[str | None, Checkpoint]:
        """Whole models with the prefixes that they lack."""
        given = self.spec.base_prefix
        if given and None in models:
            base = models[None]
            models = {**models, None: base.renamed({name: given + name for name in base})}
        prefixes = align_names(models)
        if given:
            prefixes.pop(None, None)
        self._prefixes = {task or "base": prefix for task, prefix in prefixes.items()}
        return {
            key: add_prefix(model, prefixes[key], {k: m for k, m in models.items() if k != key})
            if key in prefixes
            else model
            for key, model in models.items()
        }

    def _adapt(self, tasks: Sequence[str], base: Checkpoint | None) -> dict[str | None, Checkpoint]:
        """Adapters over the base, those that can be opened."""
        found: dict[str | None, Checkpoint] = {}
        for task in tasks:
            with suppress(MergeScopeError):
                found[task] = self._open_expert(task, base)
        return found

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

    @cached_property
    def architecture(self) -> ArchitectureSpec | None:
        """The network that suite.yaml names, else the one of the files beside base or experts.

        How vectors are pooled and normalised, where suite.yaml does not say it, is told by the
        files of sentence-transformers beside the base; but classifiers within the experts'
        checkpoints take what they were trained on.
        """
        if self.speaks:
            return self.spec.architecture or tell_language_model(self._opened())
        own = any(map(self.has_own_head, self.tasks))
        return tell_architecture(self.spec.architecture, self._opened(), own)

    def _opened(self) -> Iterator[Checkpoint]:
        """The base and the experts, those that can be opened."""
        for task in (None, *self.tasks):
            with suppress(MergeScopeError):
                member = self.base if task is None else self.expert(task)
                if member is not None:
                    yield member

    def has_own_head(self, task: str) -> bool:
        """Whether suite.yaml names no head of a task, and its expert's checkpoint holds one."""
        if self.spec.experts[task].head is not None:
            return False
        if task not in self._own_heads:
            self._own_heads[task] = False
            with suppress(MergeScopeError):
                self._own_heads[task] = holds_classifier(self.expert(task))
        return self._own_heads[task]

    def data(self, task: str) -> DataSpec | None:
        """A task's data, with what suite.yaml leaves out and the files beside members tell.

        These are the tokenizer of texts, which is the base's, and the transform of images for
        models of transformers.
        """
        given = self.spec.experts[task].data
        if given is not None and task not in self._data:
            self._data[task] = complete_data(
                given, self.architecture, self.spec.base, self._opened()
            )
        return self._data.get(task)

    @property
    def speaks(self) -> bool:
        """Whether its models are evaluated as language models, by what they say of texts."""
        return any(data.kind == "language" for data in self._known_data())

    @property
    def measured_by(self) -> MetricName:
        """What its models are measured by: the column of frames about them."""
        texts = any(d.kind == "language" and d.choices_column is None for d in self._known_data())
        return "cross_entropy" if texts else "accuracy"

    def _known_data(self) -> list[DataSpec]:
        """The data of its tasks, as suite.yaml gives them."""
        return [each.data for each in self.spec.experts.values() if each.data is not None]

    @property
    def inputs(self) -> str:
        """What the data of its tasks are: ``images``, ``texts`` and so on; ``inputs`` for several
        kinds or none."""
        kinds = {spec.data.inputs for spec in self.spec.experts.values() if spec.data is not None}
        return kinds.pop() if len(kinds) == 1 else "inputs"

    @property
    def network_in_words(self) -> str | None:
        """What the network is, by whose word, and what its features are; None for none."""
        if self.architecture is None:
            return None
        if self.speaks:
            return describe_language_model(self.architecture, self.spec.architecture is not None)
        own = [task for task in self.tasks if self.has_own_head(task)]
        return describe_network(self.architecture, self.spec.architecture is not None, own)

    @property
    def can_evaluate(self) -> bool:
        """Whether an architecture, and a head and data for every task, are known."""
        return self.why_not_evaluated is None

    @property
    def why_not_evaluated(self) -> str | None:
        """What the suite lacks for evaluation, in words; None if nothing."""
        if self.architecture is None:
            return "the suite names no architecture"
        if len({each.measured_by for each in self._known_data()}) > 1:
            return (
                "its tasks are measured in several ways (texts by cross-entropy, questions with "
                "choices by likelihood, others by classifiers), of which there is no mean; make a "
                "suite of each"
            )
        experts = self.spec.experts.items()
        headless = [task for task, spec in experts if spec.head is None and not self.speaks]
        lacking = {
            "head": [task for task in headless if not self.has_own_head(task)],
            "data": [task for task, spec in experts if spec.data is None],
        }
        for what, without in lacking.items():
            if without:
                return f"no {what} is given for {', '.join(without)}"
        return None

    def treatment(self, parameter: str, tasks: Sequence[str] | None = None) -> Treatment:
        """Whether spectral methods decompose a merged parameter or average it, and why.

        Buffers, and vocabularies of several lengths, are never decomposed.

        Args:
            parameter: its name.
            tasks: chosen experts (all when None).
        """
        manifest = self.manifest(tasks or self.tasks)
        info = manifest.infos[parameter]
        if parameter in manifest.buffers:
            return Treatment(False, "buffer, kept as it is")
        found = treatment(parameter, info, self.spec.decompose, self.spec.average)
        lengths_differ = parameter in manifest.completed
        return replace(found, decomposed=found.decomposed and not lengths_differ)

    def is_stored_transposed(self, parameter: str, task: str | None = None) -> bool:
        """Whether a weight is stored in x out, as GPT-2's are, told from its name and its bias.

        Args:
            parameter: its name.
            task: whose header to read (the first expert's when None).
        """
        expert = self.expert(task or self.tasks[0])
        if parameter not in expert:  # a buffer
            return False
        if not describe_parameter(parameter, expert.info(parameter)).stored_transposed:
            return False
        return is_stored_transposed(expert, parameter) is not False

    def members(self, tasks: Sequence[str]) -> list[Checkpoint]:
        """The chosen experts, and the base where there is one."""
        experts = [self.expert(task) for task in tasks]
        return experts if self.base is None else [*experts, self.base]

    def manifest(self, tasks: Sequence[str]) -> Manifest:
        """Which tensors a merge of the chosen experts has, and how the members depart from it.

        Args:
            tasks: chosen experts.

        Raises:
            CheckpointError: a member is missing or unreadable.
        """
        key = tuple(tasks)
        if key not in self._manifests:
            experts = {task: self.expert(task) for task in key}
            self._manifests[key] = make_manifest(experts, self.base, self.spec.vocabulary)
        return self._manifests[key]

    def notes(self, tasks: Sequence[str] | None = None) -> tuple[str, ...]:
        """What was chosen where a member's file leaves a choice, in sentences that name it.

        Args:
            tasks: chosen experts (all when None).
        """
        members = [(task, self.expert(task)) for task in self.select(tasks)]
        if self.base is not None:
            members.append(("base", self.base))
        return tuple(f"{who}: {note}" for who, member in members for note in member.notes)

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that a merge of all experts has, sorted."""
        return self.manifest(self.tasks).names

    @cached_property
    def matrices(self) -> tuple[str, ...]:
        """Names of the parameters that spectral methods decompose."""
        return tuple(name for name in self.parameters if self.treatment(name).decomposed)

    def members_digest(self, tasks: Sequence[str], with_base: bool) -> str:
        """Digest (hex) of the content of the chosen experts, and of the base where it counts."""
        base = self.base if with_base else None
        self.take_digests(tasks, with_base)
        parts = [self.expert(task).digest for task in tasks]
        if base is not None:
            parts.append("base:" + base.digest)
        return digest_of(*parts)

    def take_digests(self, tasks: Sequence[str], with_base: bool) -> None:
        """Take the digests of the chosen experts, and of the base where it counts, side by side.

        Several files at once keep the disk and the cores busy; whoever asks for the digest of one
        of them later has it.

        Raises:
            SuiteError, CheckpointError: one is missing or unreadable.
        """
        members = [self.expert(task) for task in tasks]
        if with_base and self.base is not None:
            members.append(self.base)
        unknown = [member for member in members if "digest" not in vars(member)]
        if len(unknown) > 1:
            with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
                list(pool.map(lambda member: member.digest, unknown))

    def data_digest(self, task: str) -> str:
        """Digest (hex) of a task's evaluation data, normalisation, head and the architecture.

        Raises:
            SuiteError: the task has no head or data, or their files are missing.
            HubError: a head, tower or tokenizer on the hub is not downloaded.
        """
        spec = self.spec.experts[task]
        headless = spec.head is None and not self.speaks and not self.has_own_head(task)
        data = self.data(task)
        if data is None or headless or self.architecture is None:
            raise SuiteError(f"Task {task!r} cannot be evaluated: {self.why_not_evaluated}.")
        given = data_identity(data, self.file, f"data of task {task!r} of {self.path}")
        if data.kind == "language":
            return digest_of("language", self.architecture.identity, given)
        parts = [
            *map(repr, data.constants),
            self.architecture.identity,
            given,
            digest_of("own head", self.expert(task).digest)
            if spec.head is None
            else head_identity(spec.head, self.file, f"head of task {task!r} of {self.path}"),
        ]
        if self.architecture.library == "transformers" and self.base is not None:
            parts.append(self.base.digest)  # its projection stands in for what experts lack
        return digest_of(*parts)

    def _path(self, relative: str, what: str) -> Path:
        try:
            return require_cached(relative) if is_hub_id(relative) else self.file(relative)
        except HubError as error:
            raise HubError(f"Suite {self.name!r}, {what}: {error}") from error

    def _is_adapter(self, relative: str) -> bool:
        return is_adapter(self._path(relative, "expert"))

    def _open(self, relative: str, what: str) -> Checkpoint:
        """A whole model."""
        path = self._path(relative, what)
        try:
            return Checkpoint(path)
        except CheckpointError as error:
            raise CheckpointError(f"Suite {self.name!r}, {what}: {error}") from error

    def _open_expert(self, task: str, base: Checkpoint | None) -> Checkpoint:
        """An expert; an adapter over the base."""
        weights, what = self.spec.experts[task].weights, f"expert {task!r}"
        if not self._is_adapter(weights):
            return self._open(weights, what)
        path = self._path(weights, what)
        if base is None:
            raise CheckpointError(
                f"Suite {self.name!r}, {what}: {path} is an adapter, which is no model without "
                "its base. Add 'base:' to suite.yaml: the model that it was trained on."
            )
        try:
            return AdaptedCheckpoint(path, base)
        except CheckpointError as error:
            raise CheckpointError(f"Suite {self.name!r}, {what}: {error}") from error


def load_suite(reference: str | Path) -> Suite:
    """Read a ``suite.yaml``; nothing of the checkpoints is opened yet.

    Args:
        reference: path of the file or of its folder, or the name of a bundled suite
            (:func:`merge_core.suites.bundled.bundled_suites`).

    Raises:
        SuiteError: missing file, not YAML, unknown or missing fields.

    Example:
        >>> suite = load_suite("vision")
        >>> suite.tasks[:3], len(suite.expert("digits"))
        (('digits', 'letters', 'greek'), 30)
    """
    if str(reference).endswith(RECORD_SUFFIX):
        raise SuiteError(
            f"{reference} is a record, which holds no weights. Open it with 'mergescope app'; for "
            "anything else give the suite itself."
        )
    document, path = read_yaml(
        bundled_suites().get(str(reference), Path(reference)),
        "suite.yaml",
        SuiteError,
        f"the name of a bundled suite ({', '.join(bundled_suites())})",
    )
    if foreign := explain_mergekit(document):
        raise SuiteError(f"{path} is {foreign}")
    try:
        spec = SuiteSpec.model_validate(document)
    except ValidationError as error:
        raise SuiteError(f"{path}: {explain_validation(error)}") from error
    return Suite(spec, path.resolve())

"""What a recipe was written for, known by content: so that it can be published and run elsewhere.

A published recipe names its suite, not where that lies on somebody's machine. Where it lies on
this one is remembered in the cache folder, beside no output.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from merge_core.errors import OutputError, RecipeError, SuiteError
from merge_core.files import cache_dir, digest_of, path_below, write_atomically
from merge_core.hub.files import is_hub_id
from merge_core.places import name_without_place
from merge_core.strict_model import StrictModel
from merge_core.suites.bundled import RECORD_SUFFIX, bundled_name, bundled_suites
from merge_core.suites.suite import Suite, load_suite
from merge_core.suites.suite_spec import ExpertSpec, SuiteSpec
from merge_core.yaml_text import dump_yaml

SHOWN_DIGITS = 12


class Rules(StrictModel):
    """What a suite says of its parameters (see :class:`merge_core.suites.suite_spec.SuiteSpec`)."""

    decompose: list[str] = Field(default_factory=list)
    average: list[str] = Field(default_factory=list)
    vocabulary: Literal["refuse", "base", "common"] = "refuse"
    base_prefix: str = ""

    @classmethod
    def of(cls, suite: Suite) -> Rules:
        """The rules of a suite."""
        return cls.model_validate({name: getattr(suite.spec, name) for name in cls.model_fields})


class Inputs(StrictModel):
    """The members that a recipe was written for.

    Attributes:
        experts: digest of each expert, in the suite's order.
        base: digest of the base, where the suite has one.
        data: digest of each task's data and head, for methods that learn from them.
        sources: of each expert that is on the hub, its name there and its commit.
        base_source: the same of the base.
        rules: what the suite says of its parameters.
    """

    experts: dict[str, str] = Field(min_length=1)
    base: str | None = None
    data: dict[str, str] = Field(default_factory=dict)
    sources: dict[str, str] = Field(default_factory=dict)
    base_source: str | None = None
    rules: Rules = Field(default_factory=Rules)

    @classmethod
    def of(cls, suite: Suite, tasks: Sequence[str], with_data: bool = False) -> Inputs:
        """The chosen members of a suite, as they are now.

        Raises:
            SuiteError, CheckpointError: one is missing or unreadable.
        """
        suite.take_digests(tasks, with_base=True)
        sources = {task: suite.source(task) for task in tasks}
        return cls(
            experts={task: suite.expert(task).digest for task in tasks},
            base=None if suite.base is None else suite.base.digest,
            data={task: suite.data_digest(task) for task in tasks} if with_data else {},
            sources={task: name for task, name in sources.items() if name is not None},
            base_source=suite.source(None),
            rules=Rules.of(suite),
        )

    def differences(self, suite: Suite) -> list[str]:
        """Reasons why a suite does not hold these members; empty if it does.

        Raises:
            CheckpointError, SuiteError: a member is missing or unreadable.
        """
        gone = [task for task in self.experts if task not in suite.tasks]
        if gone:
            return [f"expert {task!r}: not in the suite now" for task in gone]
        found = [
            _difference(f"expert {task!r}", digest, suite.expert(task).digest)
            for task, digest in self.experts.items()
        ]
        found.append(_difference("base", self.base, suite.base.digest if suite.base else None))
        found += [
            _difference(f"data of task {task!r}", digest, suite.data_digest(task))
            for task, digest in self.data.items()
        ]
        return [each for each in found if each]

    def check(self, suite: Suite) -> None:
        """Refuse a suite with other members or other rules.

        Raises:
            RecipeError: it differs; the message says in what.
            CheckpointError, SuiteError: a member is missing or unreadable.
        """
        found = self.differences(suite)
        if not found and self.rules != Rules.of(suite):
            found = [RULES_DIFFER]
        if found:
            raise RecipeError(
                f"The inputs in {suite.path} are not those that this recipe was written for: "
                f"{'; '.join(found)}. Name the suite that holds them with --suite, or remove "
                "'inputs:' from the recipe to run it on others."
            )

    @property
    def hub_suite(self) -> SuiteSpec | None:
        """A suite of the members on the hub, where all of them are there."""
        if set(self.sources) != set(self.experts) or (self.base and not self.base_source):
            return None
        names = [*self.sources.values(), *([self.base_source] if self.base_source else [])]
        if not all(map(is_hub_id, names)):
            return None
        with suppress(ValidationError):  # a recipe of a stranger may hold anything
            experts = {task: ExpertSpec(weights=self.sources[task]) for task in self.experts}
            rules = self.rules.model_dump()
            return SuiteSpec(name="from the hub", base=self.base_source, experts=experts, **rules)
        return None

    @property
    def place(self) -> Path:
        """The file that remembers where a suite of these members lies on this machine."""
        parts = [f"{task}={digest}" for task, digest in self.experts.items()]
        parts += [f"base={self.base}", self.rules.model_dump_json()]
        return cache_dir() / "suites" / digest_of("place-1", *parts)

    def remember(self, suite: Suite) -> None:
        """Remember on this machine, for :func:`find_suite`, where a suite of these members lies."""
        if suite.path.is_file() and suite.path.suffix != RECORD_SUFFIX:
            with suppress(OSError, OutputError):  # a convenience: an output is complete without it
                write_atomically(self.place, str(suite.path).encode())

    @property
    def remembered(self) -> Path | None:
        """Where a suite of these members lay when it was last merged here."""
        with suppress(OSError, ValueError):
            return Path(self.place.read_text(encoding="utf-8"))
        return None


RULES_DIFFER = "'decompose', 'average' or 'vocabulary' of suite.yaml: not as at that time"


def name_suite(suite: Suite) -> str:
    """How what is published names a suite: as it is bundled, or by its own name.

    Example:
        >>> name_suite(load_suite("vision"))
        'vision'
    """
    return bundled_name(suite.path) or name_without_place(suite.name)


def find_suite(
    name: str, inputs: Inputs, reference: str | None = None, folder: Path | None = None
) -> Suite:
    """The suite of a published recipe, or of a merged model: whether it holds is checked later.

    Looked for where `reference` says; else at `name` as a path from `folder`; else where it lay
    when it was merged on this machine; else its members are taken from the hub's cache.

    Args:
        name: of the suite, as in the recipe.
        inputs: its members.
        reference: path of the suite, where it is given.
        folder: of the recipe's file.

    Raises:
        SuiteError: found nowhere, or not readable.
        OutputError: the cache folder cannot be written, for members on the hub.

    Example:
        >>> inputs = Inputs.of(load_suite("vision"), ["digits", "dots"])
        >>> find_suite("vision", inputs).tasks[:2], list(inputs.experts)
        (('digits', 'letters'), ['digits', 'dots'])
    """
    if reference is not None:
        return load_suite(reference)
    if folder is not None and name not in bundled_suites():
        beside = path_below(folder, name, RecipeError)
        if beside.exists():
            return load_suite(beside)
    place = inputs.remembered
    if place is not None:
        try:
            return load_suite(place)
        except SuiteError as error:
            if inputs.hub_suite is None:
                raise SuiteError(
                    f"{error} If the suite has moved, say where it is with --suite."
                ) from error
    if name in bundled_suites():
        return load_suite(name)
    spec = inputs.hub_suite
    if spec is None:
        shown = ", ".join(inputs.experts)
        raise SuiteError(
            f"This was merged from the suite {name!r:.80} (experts {shown:.200}), and where that "
            "lies on this machine is not known. Say where its suite.yaml is with --suite, or write "
            "its path as 'suite:' in the recipe."
        )
    # A file, which other processes and machines can open as well.
    path = inputs.place.with_suffix(".yaml")
    document = spec.model_copy(update={"name": name}).model_dump(mode="json", exclude_defaults=True)
    write_atomically(path, dump_yaml(document).encode())
    return load_suite(path)


def _difference(what: str, then: str | None, now: str | None) -> str:
    if then == now:
        return ""
    was, is_ = (digest[:SHOWN_DIGITS] if digest else "none" for digest in (then, now))
    return f"{what}: digest was {was}, is {is_}"

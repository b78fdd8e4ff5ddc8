"""What models that were found may be in a suite: expert, base, head; their names; the draft."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.naming import missing_prefix
from merge_core.errors import SuiteError
from merge_core.opening.download import SuiteByHeaders
from merge_core.opening.draft import (
    LONGEST,
    Layout,
    base_candidates,
    draft,
    name_architecture,
    task_name,
    task_names,
)
from merge_core.suites.suite import Suite
from merge_core.suites.suite_spec import SuiteSpec, TaskName

Kind = Literal["model", "adapter", "head"]
Role = Literal["expert", "base", "head", "left out"]

ORDER: tuple[Role, ...] = ("base", "expert", "head", "left out")
SHOWN_REASONS = 8
HEAD_WORDS = re.compile(r"(^|[-_.])(head|heads|classifier)([-_.]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class FoundModel:
    """A model that was found, and what is suggested for it.

    Attributes:
        reference: its absolute path, or its hub id.
        label: what its name says, such as ``Cars`` of ``Cars/finetuned.pt``.
        long_label: its name with its folder's, where the name alone is not unique.
        shown: the reference as people know it (relative to the place where it was found).
        kind: ``model``, ``adapter`` or ``head`` (a bare classifier).
        checkpoint: its headers; None where they cannot be read, or only with a base.
        nbytes: size in bytes.
        download: bytes of it that a download would fetch.
        task: suggested task name.
        role: suggested role.
        note: why it is left out, or what to know.
        refused: whether it may take part in no role: its files lie where they may not.
    """

    reference: str
    label: str
    long_label: str
    shown: str
    kind: Kind = "model"
    checkpoint: Checkpoint | None = field(default=None, repr=False, compare=False)
    nbytes: int = 0
    download: int = 0
    task: str = ""
    role: Role = "expert"
    note: str = ""
    refused: bool = False

    @cached_property
    def layout(self) -> Layout:
        """Shape of each parameter by name; empty where it is not known."""
        known = self.checkpoint
        return {} if known is None else {name: known.info(name).shape for name in known}


def open_by_headers(spec: SuiteSpec, path: Path, found: Sequence[FoundModel]) -> Suite:
    """A suite of models that were found: known by their headers, also on the hub.

    Args:
        spec: the suite.
        path: where its file will lie.
        found: its members, and perhaps others.

    Example:
        >>> found = (FoundModel("/models/cars", "cars", "cars", "cars", task="cars"),)
        >>> open_by_headers(draft_suite(found, "mine"), Path("/models/suite.yaml"), found).tasks
        ('cars',)
    """
    known = {each.reference: each.checkpoint for each in found if each.checkpoint is not None}
    return SuiteByHeaders(spec, path, known)


def suggest_roles(found: Sequence[FoundModel]) -> tuple[FoundModel, ...]:
    """Task names and roles for what was found and read, sorted by role.

    What shares fewer than half of its parameters, by name (but for a prefix) and shape, with the
    largest group of models is left out; so are further models that look like a base.
    """
    models = [i for i, f in enumerate(found) if f.kind != "head" and f.role == "expert"]
    result = list(found)
    for i, note in _misfits([found[i] for i in models]):
        result[models[i]] = replace(result[models[i]], role="left out", note=note)
    models = [i for i in models if result[i].role == "expert"]
    for index, i in enumerate(base_candidates([found[i].label for i in models])):
        role: Role = "base" if index == 0 else "left out"
        note = "" if index == 0 else "another model that looks like the base"
        result[models[i]] = replace(result[models[i]], role=role, note=note)
    experts = [i for i in models if result[i].role == "expert"]
    labels = [result[i].label for i in experts]
    if len(set(labels)) < len(labels):  # the same file name in several folders: both tell
        labels = [result[i].long_label for i in experts]
    for i, name in zip(experts, task_names(labels), strict=True):
        result[i] = replace(result[i], task=name)
    for i, each in enumerate(result):
        if not each.task:
            result[i] = replace(each, task=task_name(each.label))
        if each.kind == "head" and each.role == "expert":
            result[i] = replace(result[i], role="head")
    return tuple(sorted(result, key=lambda each: ORDER.index(each.role)))


def _misfits(models: Sequence[FoundModel]) -> Iterator[tuple[int, str]]:
    """Which models belong to another network than most of them, and why."""
    read = [(i, model) for i, model in enumerate(models) if model.layout]

    def overlap(a: Layout, b: Layout) -> int:
        return sum(b.get(name) == shape for name, shape in a.items())

    def are_related(one: FoundModel, other: FoundModel) -> bool:
        longest = max(len(one.layout), len(other.layout))
        if 2 * overlap(one.layout, other.layout) >= longest:
            return True
        pair = one.checkpoint, other.checkpoint
        if pair[0] is None or pair[1] is None:
            return False
        # A backbone saved alone lacks a prefix that it has under a head.
        return bool(missing_prefix(pair[0], pair[1]) or missing_prefix(pair[1], pair[0]))

    if not read:
        return
    _, most = max(read, key=lambda item: sum(are_related(item[1], m) for _, m in read))
    for i, model in read:
        if not are_related(model, most):
            yield (
                i,
                f"another network: {overlap(model.layout, most.layout)} of its {len(model.layout)} "
                f"parameters are as in {most.shown}",
            )


def with_base(found: Sequence[FoundModel], base: str | None) -> tuple[FoundModel, ...]:
    """The models with another base, or none; the former base is left out.

    Args:
        found: models.
        base: reference of one of them.

    Example:
        >>> found = [FoundModel(f"/models/{name}", name, name, name) for name in ("cars", "start")]
        >>> [each.role for each in with_base(found, "/models/start")]
        ['expert', 'base']
    """

    def role(each: FoundModel) -> Role:
        if each.reference == base:
            return "base"
        return "left out" if each.role == "base" else each.role

    return tuple(replace(each, role=role(each)) for each in found)


def with_tasks(found: Sequence[FoundModel], named: Mapping[str, str]) -> tuple[FoundModel, ...]:
    """The models with the task names that users gave in place of the suggested ones.

    Args:
        found: models.
        named: reference of an expert by task name.

    Raises:
        SuiteError: another expert has that name.

    Example:
        >>> found = [FoundModel("/models/a", "a", "a", "a", task="a", role="left out")]
        >>> [(each.task, each.role) for each in with_tasks(found, {"cars": "/models/a"})]
        [('cars', 'expert')]
    """
    names = {reference: task for task, reference in named.items()}
    result = tuple(
        replace(each, task=names[each.reference], role="expert")
        if each.reference in names
        else each
        for each in found
    )
    tasks = [each.task for each in result if each.role == "expert"]
    if twice := [task for task in named if tasks.count(task) > 1]:
        raise SuiteError(f"Two experts are called {twice[0]!r}. Give each a name of its own.")
    return result


def draft_suite(
    found: Sequence[FoundModel], name: str, preset: SuiteSpec | None = None
) -> SuiteSpec:
    """The suite of the models by their roles, with heads and architecture where they are known.

    Args:
        found: models with roles and task names.
        name: the suite's name.
        preset: the suite that they come from, whose heads, data and architecture they keep.

    Raises:
        SuiteError: no expert, or none that can be read, and why; a name that is not allowed.

    Example:
        >>> names = ("cars", "dtd")
        >>> found = [FoundModel(f"/models/{name}", name, name, name, task=name) for name in names]
        >>> list(draft_suite(with_base(found, "/models/dtd"), "mine").experts)
        ['cars']
    """
    experts = {each.task: each for each in found if each.role == "expert"}
    base = next((each for each in found if each.role == "base"), None)
    if not experts and (told := _reasons(found)):
        raise SuiteError(f"None of these can be an expert: {told}.")
    if preset is not None:
        of = {expert.weights: expert for expert in preset.experts.values()}
        kept = {task: of[each.reference] for task, each in experts.items()}
        reference = None if base is None else base.reference
        return preset.model_copy(update={"name": name, "base": reference, "experts": kept})
    members = [*experts.values(), *([base] if base else [])]
    return draft(
        {task: each.reference for task, each in experts.items()},
        None if base is None else base.reference,
        name,
        name_architecture([m.layout for m in members], [m.checkpoint for m in members]),
        heads_for(found, list(experts)),
    )


def _reasons(found: Sequence[FoundModel]) -> str:
    """Why models are left out, each in words."""
    said = [f"{each.shown}: {each.note.rstrip('.')}" for each in found if each.note]
    more = [f"and {len(said) - SHOWN_REASONS} more"] if len(said) > SHOWN_REASONS else []
    return "; ".join([*said[:SHOWN_REASONS], *more])


def apply_preset(found: Sequence[FoundModel], preset: SuiteSpec) -> tuple[FoundModel, ...]:
    """The models of a preset with the names and roles that it gives them.

    Example:
        >>> preset = draft({"cars": "hf://org/vit-cars"}, base="hf://org/vit")
        >>> names = ("vit", "vit-cars")
        >>> found = [FoundModel(f"hf://org/{name}", name, name, name) for name in names]
        >>> [(each.task, each.role) for each in apply_preset(found, preset)]
        [('', 'base'), ('cars', 'expert')]
    """
    tasks = {expert.weights: task for task, expert in preset.experts.items()}
    return tuple(
        replace(each, task=tasks[each.reference], role="expert")
        if each.reference in tasks
        else replace(each, role="base")
        for each in found
    )


def mistakes(found: Sequence[FoundModel]) -> list[str]:
    """Reasons, in words, why models with these roles and names do not make a suite.

    Example:
        >>> mistakes([FoundModel("/models/a", "a", "a", "a", task="a", role="base")])
        ['Choose at least one model as an expert.']
    """
    experts = [each for each in found if each.role == "expert"]
    bases = [each for each in found if each.role == "base"]
    valid = TypeAdapter(TaskName)
    wrong = []
    for each in experts:
        try:
            valid.validate_python(each.task)
        except ValidationError:
            wrong.append(each.task)
    said = []
    if not experts:
        said.append("Choose at least one model as an expert.")
    if wrong:
        said.append(
            f"Task names have letters, digits and . _ + - (at most {LONGEST}); not so: "
            f"{', '.join(map(repr, wrong))}."
        )
    if twice := [task for task, count in Counter(e.task for e in experts).items() if count > 1]:
        said.append(f"Each task needs a name of its own; twice there: {', '.join(twice)}.")
    if refused := [each for each in found if each.refused and each.role != "left out"]:
        said.append(f"{refused[0].shown} must be left out: {refused[0].note}")
    if len(bases) > 1:
        said.append(f"There is one base at most; chosen are {', '.join(b.shown for b in bases)}.")
    if not bases and any(each.kind == "adapter" for each in experts):
        said.append("Adapters need the base that they were trained on. Choose it.")
    return said


def heads_for(found: Sequence[FoundModel], tasks: Sequence[str]) -> dict[str, str]:
    """Classifiers that belong to tasks by name: ``head_Cars.pt`` or ``heads/cars.safetensors``.

    Returns:
        Reference of the head by task; tasks without one are absent.
    """

    def fold(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", HEAD_WORDS.sub("-", text).lower())

    known = {fold(each.label): each.reference for each in found if each.role == "head"}
    return {task: known[fold(task)] for task in tasks if fold(task) in known}

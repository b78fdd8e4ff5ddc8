"""How a merge method is declared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from torch import Tensor

from merge_core.progress import Progress
from merge_core.strict_model import StrictModel
from merge_core.task_vectors import Origin, TensorGroup, TensorGroups


def _check_rank(value: Any) -> float | int:
    given = value
    if isinstance(value, str):
        try:
            value = int(value) if value.strip().isdigit() else float(value)
        except ValueError:
            value = None
    share = isinstance(value, float) and 0 < value <= 1
    count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not (share or count):
        raise ValueError(
            "a rank is a share in (0, 1] written with a point (0.08), "
            f"or a whole number of directions of at least 1; got {given!r:.60}"
        )
    return value


Rank = Annotated[float | int, BeforeValidator(_check_rank)]
"""A share of min(m, n) when a float in (0, 1], a number of directions when an integer ≥ 1."""


class MethodParameters(StrictModel):
    """Base of every method's parameters: unknown fields are refused, values never change."""

    model_config = ConfigDict(allow_inf_nan=False)


def parameter(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    typical: str = "",
    show: tuple[float, float] | None = None,
    later: bool = False,
) -> Any:
    """Declare one parameter of a method.

    Args:
        default: its default value.
        help: one line: what it does and what raising it does.
        minimum: smallest allowed value.
        maximum: largest allowed value.
        typical: values in use, for people.
        show: range that a slider offers, where the allowed one is wider.
        later: added to a method that was in use: at its default it is left out of digests, so
            that predictions made before are still known.
    """
    extra: dict[str, Any] = {"typical": typical, "later": later}
    if show is not None:
        extra["show"] = list(show)
    return Field(default=default, ge=minimum, le=maximum, description=help, json_schema_extra=extra)


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter's declaration, read back for widgets, tables and the command line.

    Attributes:
        kind: ``rank``, ``number``, ``integer`` or ``choice``.
        choices: of a ``choice``.
        low, high: range that a slider offers (of a number or an integer).
    """

    name: str
    kind: Literal["rank", "number", "integer", "choice"]
    default: Any
    help: str
    typical: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 1.0


def digest_values(parameters: MethodParameters) -> dict[str, Any]:
    """The values that a digest is made of: all but later parameters at their default."""
    values = parameters.model_dump()
    for name, info in type(parameters).model_fields.items():
        extra = info.json_schema_extra
        if isinstance(extra, dict) and extra.get("later") and values[name] == info.default:
            del values[name]
    return values


def _spec(name: str, info: FieldInfo) -> ParameterSpec:
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    default = None if info.default is PydanticUndefined else info.default
    common = (name, info.description or "", str(extra.get("typical", "")))
    bounds = {type(m).__name__: m for m in info.metadata}
    if any(isinstance(m, BeforeValidator) and m.func is _check_rank for m in info.metadata):
        return ParameterSpec(name, "rank", default, common[1], common[2])
    options = get_args(info.annotation)
    if options and all(isinstance(option, str) for option in options):
        return ParameterSpec(name, "choice", default, common[1], common[2], choices=options)
    low = getattr(bounds.get("Ge"), "ge", 0.0)
    high = getattr(bounds.get("Le"), "le", 1.0)
    shown: Any = extra.get("show", (low, high))
    kind: Literal["number", "integer"] = "integer" if info.annotation is int else "number"
    return ParameterSpec(
        name, kind, default, common[1], common[2], low=float(shown[0]), high=float(shown[1])
    )


def _no_warnings(tasks: int, parameters: Any, run: Run | None = None) -> list[str]:
    return []


def _never(parameters: Any) -> bool:
    return False


@dataclass(frozen=True)
class Run:
    """What a recipe says besides a method's parameters, as the method sees it.

    Attributes:
        origin: the point that task vectors are taken about.
        weights: one factor per task, in the tasks' order; empty where all are 1.
        seed: of random numbers.
        state: what the method's `prepare` returned.
    """

    origin: Origin = "base"
    weights: tuple[float, ...] = ()
    seed: int = 0
    state: Any = None

    def apply_weights(self, stacked: Tensor) -> Tensor:
        """T x shape, each task multiplied by its weight (the very tensor where all are 1)."""
        if not self.weights:
            return stacked
        values = torch.tensor(self.weights, dtype=stacked.dtype)
        return stacked * values.reshape(-1, *[1] * (stacked.ndim - 1))

    @property
    def cancels(self) -> bool:
        """Whether the task vectors under their weights sum to zero: about the average, alike."""
        return self.origin == "average" and len(set(self.weights)) <= 1

    def task_vectors(self, group: TensorGroup) -> Tensor:
        """T x shape: the task vectors about the run's origin under the recipe's weights."""
        return self.apply_weights(group.task_vectors(self.origin))


@dataclass(frozen=True)
class Method:
    """A merge rule with its declaration.

    Attributes:
        name: as written in recipes.
        title: for people.
        order: order in lists.
        summary: one or two sentences.
        formula: LaTeX.
        source: paper and equation.
        parameters: the pydantic model of its parameters.
        merge: from one parameter's group, the checked parameters and the run, the merged tensor
            (shape of one expert). None where the task must be known at inference.
        merge_for: instead of `merge`, one model per task: the same with the task's place.
        storage: with `merge_for`, the bytes that one parameter takes for all tasks together, in
            the method's compact form with two-byte numbers.
        origins: the points about which it can take task vectors, the usual one first; empty for
            a method that takes none.
        weighted: whether per-task weights of a recipe mean something to it.
        draws: what it draws at random, by the recipe's seed, in words; empty where nothing.
        tasks: the number of experts that it merges, where that is fixed.
        learns: what has to be computed from the suite's data before the merge, as
            :data:`analysis.learning.learn.LEARNERS` names it; it becomes the run's state.
        data: which of the suite's data that takes.
        gradients: whether it differentiates the model.
        averaged: which parameters it only averages, in words.
        deviations: where it differs from the paper or the authors' code, in words.
        prepare: a pass over the whole model before merging, for methods that need one. What it
            gives must not depend on a parameter `scale`: settings that differ there share it.
        isotropic: whether all singular values of its update are equal, so that single directions
            of it mean nothing.
        revisions: by origin, the number of times that its results were corrected; it enters the
            digests of recipes, so that what was stored before is not shown.
        warnings: what a user should know, of the number of tasks, the parameters (None where they
            are not chosen yet) and the run.
    """

    name: str
    title: str
    order: int
    summary: str
    formula: str
    source: str
    parameters: type[MethodParameters]
    merge: Callable[[TensorGroup, Any, Run], Tensor] | None = None
    merge_for: Callable[[TensorGroup, Any, Run, int], Tensor] | None = None
    storage: Callable[[TensorGroup, Any, Run], int] | None = None
    origins: tuple[Origin, ...] = ()
    weighted: bool = False
    draws: str = ""
    tasks: int | None = None
    learns: str | None = None
    data: Literal["none", "inputs", "labels"] = "none"
    gradients: bool = False
    averaged: str = "nothing"
    deviations: str = "none known"
    prepare: Callable[[TensorGroups, Any, Run, Progress], Any] | None = None
    isotropic: bool = False
    revisions: Mapping[Origin, int] = field(default_factory=dict)
    warnings: Callable[..., list[str]] = field(default=_no_warnings)

    @property
    def specs(self) -> tuple[ParameterSpec, ...]:
        """The declared parameters in order."""
        return tuple(_spec(name, f) for name, f in self.parameters.model_fields.items())

    @property
    def indexed(self) -> bool:
        """Whether it gives one model per task, so that the task must be known at inference."""
        return self.merge_for is not None

    @property
    def needs(self) -> tuple[str, ...]:
        """What it takes besides the experts' weights, in words (about its usual origin)."""
        found = ["the base"] if self.needs_base() else []
        if self.data != "none":
            found.append("labelled data" if self.data == "labels" else "unlabelled data")
        if self.gradients:
            found.append("gradients")
        if self.indexed:
            found.append("the task at inference")
        return tuple(found)

    def needs_base(self, origin: Origin | None = None) -> bool:
        """Whether θ_0 is needed with task vectors about `origin` (its usual one when None)."""
        return bool(self.origins) and (origin or self.origins[0]) == "base"


@dataclass(frozen=True)
class Postprocessor:
    """A rule that changes a merged update, whatever method made it.

    Attributes:
        name, title, order, summary, formula, source, parameters: as in :class:`Method`.
        apply: from one weight matrix's group, the update (shape of one expert, about the run's
            origin), the checked parameters and the run, the new update. What is not a weight
            matrix passes unchanged.
        deviations: where it differs from the paper or the authors' code, in words.
        along_directions: whether it treats each singular direction of the update by itself, which
            needs distinct singular values.
        isotropic: whether, with these parameters, it makes singular values equal.
    """

    name: str
    title: str
    order: int
    summary: str
    formula: str
    source: str
    parameters: type[MethodParameters]
    apply: Callable[[TensorGroup, Tensor, Any, Run], Tensor]
    deviations: str = "none known"
    along_directions: bool = False
    isotropic: Callable[[Any], bool] = field(default=_never)

    @property
    def specs(self) -> tuple[ParameterSpec, ...]:
        """The declared parameters in order."""
        return tuple(_spec(name, f) for name, f in self.parameters.model_fields.items())


def warn_unmoved(title: str, why: str) -> str:
    """What is said where the exact answer of a method is the average itself."""
    return (
        f"{title} about the average gives the weight average here: {why}. Take the base as origin "
        "if something is to be added."
    )

"""The plan of a suite: a base, tasks with data, heads, and how the experts are fine-tuned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from merge_core.devices import AUTO, is_device_name
from merge_core.errors import SuiteError, explain_validation
from merge_core.files import path_below, read_yaml
from merge_core.hub.files import is_hub_id
from merge_core.strict_model import StrictModel
from merge_core.suites.data_spec import DataSpec, Head
from merge_core.suites.suite_spec import ArchitectureSpec, TaskName

SHIPPED = Path(__file__).resolve().parents[2] / "data" / "plans"
# Stands for the name of each task in what the plan says once for all of them.
TASK = "{task}"
# Where the base lies in the suite's folder, with its tokenizer.
BASE = "base"
PACKAGE = "package:"
Dtype = Literal["float32", "float16", "bfloat16"]
Count = Annotated[int, Field(ge=1, le=10_000_000)]


def _check_device(name: str) -> str:
    if not is_device_name(name):
        raise ValueError(f"{name!r:.60} is no device; leave it out, or give cpu")
    return name


class ProbeSpec(StrictModel):
    """How a linear classifier is fitted to the base's features of a task's training examples.

    Attributes:
        kind: logistic regression, or ridge regression on classes as +1 and -1.
        penalty: of the squared weights, for features whose variance is 1 on average: ``alpha`` of
            scikit-learn's ``RidgeClassifier``, ``1 / C`` of its ``LogisticRegression``.
        normalize: whether features are divided by their norm first.
        shots: examples of each class at most, the first in the data's order; all if left out. Few
            leave fine-tuning more to do, as heads made of class names do.
    """

    kind: Literal["logistic", "ridge"] = "logistic"
    penalty: float = Field(default=1.0, gt=0, le=1e12)
    normalize: bool = False
    shots: Count | None = None


class FineTuningSpec(StrictModel):
    """How an expert is fine-tuned: AdamW under a frozen head, without dropout.

    Attributes:
        method: ``full`` trains every parameter, ``lora`` a product of two thin matrices beside
            each weight matrix.
        steps: of the optimiser.
        batch: examples in a step.
        rate: the learning rate at its highest: a linear rise over `warmup` steps, then a cosine
            to zero.
        rest: the factor of the rate for all that is no weight matrix; 0 leaves it as it is.
        weight_decay: decoupled.
        warmup: steps.
        clip: most norm of a step's gradient.
        rank: of LoRA.
        alpha: of LoRA, whose update is alpha / rank times the product; twice the rank if left out.
        examples: of each task at most, drawn by the data's seed; all if left out.
    """

    method: Literal["full", "lora"] = "full"
    steps: Count = 100
    batch: Count = 32
    rate: float = Field(default=5e-5, gt=0, le=10)
    rest: float = Field(default=1.0, ge=0, le=10)
    weight_decay: float = Field(default=0.0, ge=0, le=10)
    warmup: int = Field(default=10, ge=0)
    clip: float = Field(default=1.0, gt=0)
    rank: int = Field(default=8, ge=1, le=4096)
    alpha: float | None = Field(default=None, gt=0)
    examples: Count | None = None

    @model_validator(mode="after")
    def _check_method(self) -> FineTuningSpec:
        if self.method != "lora" and self.model_fields_set & {"rank", "alpha"}:
            raise ValueError("rank and alpha are those of LoRA; add 'method: lora'")
        if self.method == "lora" and "rest" in self.model_fields_set:
            raise ValueError("LoRA trains weight matrices alone; leave 'rest' out")
        return self


class TaskPlan(StrictModel):
    """One task: its data, and a head where it has one already."""

    title: str | None = None
    data: DataSpec
    head: Head | None = None


class SuitePlan(StrictModel):
    """The content of a plan's file.

    Attributes:
        name: of the suite.
        description: for people; made from the plan if left out.
        base: a folder or file, a hub id, or ``package:NAME``, an installed package that holds
            one model.
        architecture: as in ``suite.yaml``; told by the base's own files if left out.
        tasks: by name. What `data` and `head` say is said for all of them: ``{task}`` in it is
            the task's name, and a task's own fields count more.
        probe: how heads are fitted where none is given.
        fine_tuning: of each expert.
        seed: of the order of the examples and of LoRA's start.
        device: ``auto`` takes what is chosen for the whole process, a GPU where there is one.
        dtype: of the weights that are written; the base's own if left out.
    """

    name: str = Field(min_length=1)
    description: str | None = None
    base: str = Field(min_length=1)
    architecture: ArchitectureSpec | None = None
    tasks: dict[TaskName, TaskPlan] = Field(min_length=1)
    probe: ProbeSpec = ProbeSpec()
    fine_tuning: FineTuningSpec = FineTuningSpec()
    seed: int = Field(default=0, ge=0)
    device: Annotated[str, AfterValidator(_check_device)] = AUTO
    dtype: Dtype | None = None

    @model_validator(mode="before")
    @classmethod
    def _spread(cls, document: Any) -> Any:
        """Say for each task what the plan says for all."""
        if not isinstance(document, Mapping):
            return document
        fields = dict(document)
        common = {name: fields.pop(name) for name in ("data", "head") if name in fields}
        tasks = fields.get("tasks")
        if isinstance(tasks, list) and all(isinstance(task, str) for task in tasks):
            if len(set(tasks)) < len(tasks):
                raise ValueError("tasks: one is named twice")
            tasks = dict.fromkeys(tasks)
        if isinstance(tasks, Mapping):
            fields["tasks"] = {name: _complete(name, own, common) for name, own in tasks.items()}
        return fields


def _complete(task: Any, own: Any, common: Mapping[str, Any]) -> Any:
    """A task's fields, with those that all have."""
    own = {} if own is None else own
    if not isinstance(own, Mapping):
        return own
    found = dict(own)
    for name, value in common.items():
        value = _fill_in(value, str(task))
        mine = found.get(name)
        if isinstance(value, Mapping) and isinstance(mine, Mapping | None):
            found[name] = {**value, **(mine or {})}
        elif mine is None:
            found[name] = value
    data = found.get("data")
    if isinstance(data, Mapping) and data.get("kind") == "text" and "tokenizer" not in data:
        found["data"] = {**data, "tokenizer": BASE}
    return found


def _fill_in(value: Any, task: str) -> Any:
    """A value with the task's name where it stands for it."""
    if isinstance(value, str):
        return value.replace(TASK, task)
    if value == {"task": None}:  # how YAML reads it without quotes
        return task
    if isinstance(value, Mapping):
        return {key: _fill_in(item, task) for key, item in value.items()}
    return [_fill_in(item, task) for item in value] if isinstance(value, list) else value


def load_plan(
    reference: str | Path, data: Path | None = None, instead: Mapping[str, str | None] | None = None
) -> SuitePlan:
    """Read a plan; all paths in it are absolute then.

    Args:
        reference: its file, or the name of a plan that comes with MergeScope.
        data: the folder below which relative paths of data lie; that of the plan if None.
        instead: fields in place of the plan's own, where not None; a base is relative to the
            working folder.

    Raises:
        SuiteError: missing, not YAML, unknown or missing fields.

    Example:
        >>> plan = load_plan("sentences", data=Path("/data"))
        >>> plan.tasks["news"].data.path, plan.fine_tuning.method
        ('/data/news', 'full')
    """
    shipped = SHIPPED / f"{reference}.yaml"
    is_name = str(reference).isidentifier()  # ./sentences is a folder
    names = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.yaml")))
    document, path = read_yaml(
        shipped if is_name and shipped.is_file() else Path(reference),
        "plan.yaml",
        SuiteError,
        f"the name of a plan that comes with MergeScope ({names})",
    )
    given = {name: value for name, value in (instead or {}).items() if value is not None}
    try:
        plan = SuitePlan.model_validate({**document, **given})
    except ValidationError as error:
        raise SuiteError(f"{path}: {explain_validation(error)}") from error
    root = path.resolve().parent
    below = root if data is None else path_below(Path(), str(data), SuiteError)
    tasks = {name: _with_places(task, below, root) for name, task in plan.tasks.items()}
    start = Path() if "base" in given else root
    return plan.model_copy(update={"tasks": tasks, "base": _place_base(plan.base, start)})


def _place_base(base: str, root: Path) -> str:
    if is_hub_id(base) or base.startswith(PACKAGE):
        return base
    return str(path_below(root, base, SuiteError))


def _with_places(task: TaskPlan, data: Path, root: Path) -> TaskPlan:
    """A task whose paths are absolute: of its data below one folder, of others another."""

    def place(text: str | None, below: Path) -> str | None:
        if text is None or is_hub_id(text):
            return text
        return str(path_below(below, text, SuiteError))

    spec = task.data
    changes: dict[str, Any] = {
        name: place(getattr(spec, name), data)
        for name in ("file", "path")
        if getattr(spec, name) is not None
    }
    if isinstance(spec.classes, str):
        changes["classes"] = place(spec.classes, data)
    if spec.tokenizer is not None and spec.tokenizer != BASE:
        changes["tokenizer"] = place(spec.tokenizer, root)
    head = task.head
    if isinstance(head, str):
        head = place(head, root)
    elif head is not None and head.file is not None:
        head = _changed(head, file=place(head.file, root))
    elif head is not None and head.zero_shot is not None:
        made = head.zero_shot
        named = {
            name: place(value, root)
            for name in ("classes", "templates", "text_tower")
            if isinstance(value := getattr(made, name), str)
        }
        head = _changed(head, zero_shot=_changed(made, **named))
    return _changed(task, data=_changed(spec, **changes), head=head)


def _changed(model: Any, **fields: Any) -> Any:
    return model.model_copy(update=fields)

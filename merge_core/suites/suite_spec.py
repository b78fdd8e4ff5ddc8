"""The content of ``suite.yaml``."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from merge_core.errors import HubError
from merge_core.hub.files import HubId, is_hub_id
from merge_core.strict_model import StrictModel
from merge_core.suites.data_spec import DataSpec, Head, paths_of

# Task names stand in links and in lists separated by commas.
TaskName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.+-]+$", max_length=80)]


def _check_hub_name(weights: str) -> str:
    """Refuse a malformed name on the hub before anything is opened."""
    if is_hub_id(weights):
        try:
            HubId.parse(weights)
        except HubError as error:
            raise ValueError(str(error)) from error
    return weights


# A path, or a name on the hub.
Weights = Annotated[str, AfterValidator(_check_hub_name)]


# What a classifier is given of the vectors of an input's tokens or patches.
Pooling = Literal["first", "last", "mean", "patches", "first_and_patches", "pooler"]


class ArchitectureSpec(StrictModel):
    """A network of timm, open_clip or transformers by its name there, and its arguments.

    ``open_clip`` gives the visual tower of that configuration; ``transformers`` takes a type of
    model as in ``config.json`` and the arguments of its configuration.

    Attributes:
        name: in its library.
        args: of its configuration; the library's defaults hold for the rest.
        library: that builds it.
        pooling: of models of transformers: the vector of the ``first`` token, of the ``last``, the
            ``mean`` over all tokens that are no padding, over all ``patches`` but not the class
            token, both (``first_and_patches``), or what the model's own ``pooler`` makes of them.
            Where it is not named: what sentence-transformers' files beside the base say, else
            what the library's own classifier of this type takes.
        normalize: of models of transformers: whether features are divided by their norm. Where it
            is not named: what sentence-transformers' files beside the base say, else not.
    """

    name: str
    args: dict[str, Any] = Field(default_factory=dict)
    library: Literal["timm", "open_clip", "transformers"] = "timm"
    pooling: Pooling | None = None
    normalize: bool | None = None

    @model_validator(mode="after")
    def _check_library(self) -> ArchitectureSpec:
        for field in ("pooling", "normalize"):
            if getattr(self, field) is not None and self.library != "transformers":
                raise ValueError(
                    f"{field!r} is of architectures of transformers; {self.library} pools by the "
                    "network's own arguments (timm: global_pool)"
                )
        return self

    @property
    def identity(self) -> str:
        """JSON by which outputs are kept; what timm builds is known by name and arguments alone."""
        left_out = {"library"} if self.library == "timm" else set()
        left_out |= {field for field in ("pooling", "normalize") if not getattr(self, field)}
        return self.model_dump_json(exclude=left_out)


class ExpertSpec(StrictModel):
    """One expert: weights, and where known its head and evaluation data."""

    weights: Weights
    title: str | None = None
    head: Head | None = None
    data: DataSpec | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """The paths that it names, as written."""
        return (self.weights, *paths_of(self.data, self.head))


class SuiteSpec(StrictModel):
    """The content of ``suite.yaml``.

    Attributes:
        name: of the suite.
        description: for people.
        architecture: the network that the weights belong to, for evaluation.
        base: what the experts were fine-tuned from.
        experts: by task.
        presets: sets of tasks by name, the first of which is offered first. A name stands wherever
            tasks are named, for all of its tasks.
        decompose, average: patterns of parameters' names, whatever the table of parameters says.
        vocabulary: what becomes of embeddings and language heads whose numbers of rows differ.
            Rows are matched by their number. ``refuse`` does not merge; ``base`` writes the
            base's unmerged; ``common`` merges them at the length of the longest member, where a
            member that lacks a row is given the base's, or the mean of the experts that have it.
    """

    name: str = Field(min_length=1)
    description: str = ""
    architecture: ArchitectureSpec | None = None
    base: Weights | None = None
    base_prefix: str = ""  # of the experts' names, which the base's lack
    experts: dict[TaskName, ExpertSpec] = Field(min_length=1)
    presets: dict[TaskName, Annotated[list[TaskName], Field(min_length=1)]] = Field(
        default_factory=dict
    )
    decompose: list[str] = Field(default_factory=list)
    average: list[str] = Field(default_factory=list)
    vocabulary: Literal["refuse", "base", "common"] = "refuse"

    @model_validator(mode="after")
    def _check_presets(self) -> Self:
        """A preset names tasks of the suite, and is not called as one of them."""
        for name, tasks in self.presets.items():
            if name in self.experts:
                raise ValueError(f"the preset {name!r} is called as a task is; choose another name")
            if unknown := [task for task in tasks if task not in self.experts]:
                raise ValueError(f"the preset {name!r} names {unknown[0]!r}, which is no task here")
        return self

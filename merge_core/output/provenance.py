"""What a merged file says of itself, so that the same merge can be run again."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.errors import CheckpointError, RecipeError, explain_validation
from merge_core.factors.decomposition import Route
from merge_core.merging.recipe import Recipe, make_recipe
from merge_core.strict_model import StrictModel
from merge_core.suites.suite import Suite

HEADER_KEY = "mergescope"
SHOWN_DIGITS = 12


class Provenance(StrictModel):
    """Recipe, content of all inputs, and versions.

    Attributes:
        recipe: what was done.
        digest: the recipe's digest with these inputs.
        inputs: digest of each merged expert, in the suite's order.
        base: digest of the base, where the suite has one: integer buffers come from it.
        data: digest of each task's data and head, for methods that learn from them.
        sources: of each expert that came from the hub, its name there and its commit.
        base_source: the same of the base.
        decomposition: how matrices were decomposed.
        versions: of MergeScope, torch and Python.
        task: whose model the file is, of a method that gives one per task.
    """

    recipe: Recipe
    digest: str
    inputs: dict[str, str] = Field(min_length=1)
    base: str | None = None
    data: dict[str, str] = Field(default_factory=dict)
    sources: dict[str, str] = Field(default_factory=dict)
    base_source: str | None = None
    decomposition: Route = "gram"
    versions: dict[str, str]
    task: str | None = None

    def to_header(self) -> str:
        """The record as JSON, for a safetensors header."""
        document = self.model_dump(mode="json", exclude_none=True)
        for field in ("data", "sources"):
            if not document[field]:
                del document[field]
        return json.dumps(document)


def versions() -> dict[str, str]:
    """Versions of MergeScope, torch and Python.

    Example:
        >>> sorted(versions())
        ['mergescope', 'python', 'torch']
    """
    return {
        "mergescope": metadata.version("mergescope"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def provenance(recipe: Recipe, suite: Suite, route: Route = "gram") -> Provenance:
    """Recipe, digests of the inputs and versions of a merge.

    Args:
        recipe: what is done.
        suite: the suite that it names.
        route: how matrices are decomposed (see :class:`merge_core.factors.store.FactorStore`).

    Raises:
        SuiteError, CheckpointError: an input is missing or unreadable.

    Example:
        >>> about = provenance(make_recipe({"method": "average"}), load_suite("demo"))
        >>> len(about.inputs), about.recipe.method
        (8, 'average')
    """
    tasks = suite.select(recipe.tasks)
    learns = recipe.declaration.learns is not None
    sources = {task: suite.source(task) for task in tasks}
    return Provenance(
        recipe=recipe,
        digest=recipe.digest(suite),
        inputs={task: suite.expert(task).digest for task in tasks},
        base=None if suite.base is None else suite.base.digest,
        data={task: suite.data_digest(task) for task in tasks} if learns else {},
        sources={task: name for task, name in sources.items() if name is not None},
        base_source=suite.source(None),
        decomposition=route,
        versions=versions(),
    )


def read_provenance(path: Path) -> Provenance:
    """Read back what a merged model says of itself.

    Args:
        path: a safetensors file, a shard index, a folder holding either, or a folder of such
            folders (one per task).

    Raises:
        CheckpointError: not readable, or not a model that MergeScope merged.
        RecipeError: its recipe names what this version does not know.

    Example:
        >>> from merge_core.output.model_folder import merge_to_folder
        >>> recipe = make_recipe({"method": "average", "tasks": ("digits", "dots")})
        >>> folder = merge_to_folder(recipe, load_suite("demo"), Path("merged"))
        >>> read_provenance(folder).recipe == recipe
        True
    """
    where = path
    if path.is_dir():
        below = sorted(path.glob("*/model*.safetensors"))
        if below and not any(path.glob("*.safetensors")):
            where = below[0].parent
    # Every shard carries the header; an index has none.
    header = Checkpoint(Checkpoint(where).files[0]).metadata.get(HEADER_KEY)
    if header is None:
        raise CheckpointError(
            f"{path} does not say how it was made: no recipe is in its header. Give a model that "
            "MergeScope merged, or a recipe's YAML file."
        )
    try:
        document: Any = json.loads(header)
        return Provenance.model_validate(document)
    except ValidationError as error:
        raise CheckpointError(
            f"{path}: the note on how it was made cannot be read: {explain_validation(error)}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: the note on how it was made is not JSON. Copy the file again, or give the "
            "recipe's YAML file."
        ) from error


def differences(about: Provenance, suite: Suite) -> list[str]:
    """Reasons why a suite, as it is now, would not give the same merge; empty if it would.

    Raises:
        CheckpointError, SuiteError: an input is missing or unreadable.

    Example:
        >>> suite = load_suite("demo")
        >>> about = provenance(make_recipe({"method": "average"}), suite)
        >>> differences(about, suite)
        []
        >>> differences(about.model_copy(update={"base": "0" * 64}), suite)
        ['base: digest was 000000000000, is ...']
    """
    gone = [task for task in about.inputs if task not in suite.tasks]
    if gone:
        return [f"expert {task!r}: not in the suite now" for task in gone]
    found = [
        _difference(f"expert {task!r}", digest, suite.expert(task).digest)
        for task, digest in about.inputs.items()
    ]
    found.append(_difference("base", about.base, suite.base.digest if suite.base else None))
    found += [
        _difference(f"data of task {task!r}", digest, suite.data_digest(task))
        for task, digest in about.data.items()
    ]
    known = [each for each in found if each]
    order = suite.select(tuple(about.inputs))
    if not known and order != tuple(about.inputs):
        return [f"order of experts: was {', '.join(about.inputs)}, is {', '.join(order)}"]
    if not known and _with_tasks(about).digest(suite) != about.digest:
        return ["'decompose', 'average' or 'vocabulary' of suite.yaml: not as at that time"]
    return known


def rebuild_recipe(about: Provenance, suite: Suite, reference: str) -> Recipe:
    """The recipe that gives the merged model again.

    Args:
        about: what the model says of itself.
        suite: where its inputs lie now; experts that joined since are left out.
        reference: how the recipe names that suite.

    Raises:
        RecipeError: the inputs differ; the message says which.
        CheckpointError, SuiteError: an input is missing or unreadable.

    Example:
        >>> suite, recipe = load_suite("demo"), make_recipe({"method": "average"})
        >>> rebuild_recipe(provenance(recipe, suite), suite, "demo") == recipe
        True
    """
    found = differences(about, suite)
    if found:
        raise RecipeError(
            f"The inputs in {suite.path} are not those that this model was merged from: "
            f"{'; '.join(found)}. Put them back, or name the suite that holds them with --suite."
        )
    joined = about.recipe.tasks is None and suite.tasks != tuple(about.inputs)
    recipe = _with_tasks(about) if joined else about.recipe
    return make_recipe({**recipe.model_dump(), "suite": reference})


def _with_tasks(about: Provenance) -> Recipe:
    """The recipe with its tasks named, whatever else the suite holds."""
    return about.recipe.model_copy(update={"tasks": tuple(about.inputs)})


def _difference(what: str, then: str | None, now: str | None) -> str:
    if then == now:
        return ""
    was, is_ = (digest[:SHOWN_DIGITS] if digest else "none" for digest in (then, now))
    return f"{what}: digest was {was}, is {is_}"

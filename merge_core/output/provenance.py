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
from merge_core.checkpoints.shards import open_shard
from merge_core.errors import CheckpointError, RecipeError, explain_validation
from merge_core.factors.decomposition import Route
from merge_core.merging.inputs import RULES_DIFFER, Inputs, Rules, name_suite
from merge_core.merging.recipe import Recipe, make_recipe
from merge_core.strict_model import StrictModel
from merge_core.suites.suite import Suite

HEADER_KEY = "mergescope"


class Provenance(StrictModel):
    """Recipe, content of all inputs, and versions.

    Attributes:
        recipe: what was done; it names the suite, and no place on a machine.
        digest: the recipe's digest with these inputs.
        inputs: digest of each merged expert, in the suite's order.
        base: digest of the base, where the suite has one: integer buffers come from it.
        data: digest of each task's data and head, for methods that learn from them.
        sources: of each expert that came from the hub, its name there and its commit.
        base_source: the same of the base.
        rules: what the suite says of its parameters.
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
    rules: Rules = Field(default_factory=Rules)
    decomposition: Route = "gram"
    versions: dict[str, str]
    task: str | None = None

    def to_header(self) -> str:
        """The record as JSON, for a safetensors header."""
        document = self.model_dump(mode="json", exclude_none=True)
        for field in ("data", "sources"):
            if not document[field]:
                del document[field]
        if self.rules == Rules():
            del document["rules"]
        return json.dumps(document)

    @property
    def members(self) -> Inputs:
        """The merged members, by content and by their names on the hub."""
        return Inputs(
            experts=self.inputs,
            base=self.base,
            data=self.data,
            sources=self.sources,
            base_source=self.base_source,
            rules=self.rules,
        )


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
        >>> about = provenance(make_recipe({"method": "average"}), load_suite("vision"))
        >>> len(about.inputs), about.recipe.method
        (20, 'average')
    """
    learns = recipe.declaration.learns is not None
    members = Inputs.of(suite, suite.select(recipe.tasks), with_data=learns)
    return Provenance(
        recipe=recipe.model_copy(update={"suite": name_suite(suite), "inputs": None}),
        digest=recipe.digest(suite),
        inputs=members.experts,
        base=members.base,
        data=members.data,
        sources=members.sources,
        base_source=members.base_source,
        rules=members.rules,
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
        >>> folder = merge_to_folder(recipe, load_suite("vision"), Path("merged"))
        >>> read_provenance(folder).recipe == recipe
        True
    """
    where = path
    if path.is_dir():
        below = sorted(path.glob("*/*.safetensors"))
        if below and not any(path.glob("*.safetensors")):
            where = below[0].parent
    # Every shard carries the header; an index has none.
    is_shard = where.suffix == ".safetensors" and where.is_file()
    shard = open_shard(where if is_shard else Checkpoint(where).files[0])
    header = getattr(shard, "metadata", {}).get(HEADER_KEY)
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
        >>> suite = load_suite("vision")
        >>> about = provenance(make_recipe({"method": "average"}), suite)
        >>> differences(about, suite)
        []
        >>> differences(about.model_copy(update={"base": "0" * 64}), suite)
        ['base: digest was 000000000000, is ...']
    """
    known = about.members.differences(suite)
    order = () if known else suite.select(tuple(about.inputs))
    if not known and order != tuple(about.inputs):
        return [f"order of experts: was {', '.join(about.inputs)}, is {', '.join(order)}"]
    if not known and _with_tasks(about).digest(suite) != about.digest:
        return [RULES_DIFFER]
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
        >>> suite, recipe = load_suite("vision"), make_recipe({"method": "average"})
        >>> rebuild_recipe(provenance(recipe, suite), suite, "vision") == recipe
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

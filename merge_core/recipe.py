"""A recipe: suite, tasks, method, parameters, seed and dtype, as YAML and as a link alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl, quote, urlencode

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from merge_core.errors import RecipeError, explain_validation
from merge_core.files import digest_of
from merge_core.methods import get_method
from merge_core.methods.declaration import Method, MethodParameters
from merge_core.suite import BUNDLED, Suite, load_suite

Dtype = Literal["input", "float32", "float16", "bfloat16", "float64"]


class Recipe(BaseModel):
    """Everything that determines a merge.

    Attributes:
        suite: path of a suite.yaml, or ``demo``.
        tasks: chosen tasks (all when None); their order does not matter.
        method: name of a method.
        parameters: its parameters; defaults are filled in.
        seed: for methods that draw random numbers.
        dtype: of the output; ``input`` keeps each parameter's own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    suite: str = BUNDLED
    tasks: tuple[str, ...] | None = None
    method: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    seed: int = Field(default=0, ge=0)
    dtype: Dtype = "input"

    @model_validator(mode="before")
    @classmethod
    def _fill_parameters(cls, data: Any) -> Any:
        """Check the parameters against the method's declaration and fill in its defaults."""
        if not isinstance(data, dict) or not isinstance(data.get("method"), str):
            return data
        given = data.get("parameters") or {}
        if not isinstance(given, dict):
            raise ValueError("parameters must be a mapping of names to values")
        method = get_method(data["method"])
        unknown = [name for name in given if name not in method.parameters.model_fields]
        if unknown:
            known = ", ".join(method.parameters.model_fields) or "none"
            raise RecipeError(
                f"The method {method.name!r} has no parameter {unknown[0]!r}; it has: {known}."
            )
        try:
            checked = method.parameters.model_validate(given)
        except ValidationError as error:
            raise RecipeError(f"Method {method.name!r}: {explain_validation(error)}.") from error
        return {**data, "parameters": checked.model_dump()}

    @property
    def declaration(self) -> Method:
        """The method."""
        return get_method(self.method)

    @property
    def checked_parameters(self) -> MethodParameters:
        """The parameters as the method's own model."""
        return self.declaration.parameters.model_validate(self.parameters)

    def to_yaml(self) -> str:
        """The recipe as YAML; :func:`recipe_from_yaml` gives an equal recipe back."""
        document = self.model_dump(exclude_none=True)
        if self.tasks is not None:
            document["tasks"] = list(self.tasks)
        return yaml.safe_dump(
            document, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
        )

    def to_query(self) -> str:
        """The recipe as a link's query; :func:`recipe_from_query` gives an equal one back."""
        pairs = [("suite", self.suite)]
        if self.tasks is not None:
            pairs.append(("tasks", ",".join(self.tasks)))
        pairs.append(("method", self.method))
        pairs += [(name, str(value)) for name, value in self.parameters.items()]
        pairs += [("seed", str(self.seed)), ("dtype", self.dtype)]
        return urlencode(pairs, quote_via=quote, safe=",/")

    def digest(self, suite: Suite) -> str:
        """Digest (hex) of what determines the merged weights: content of the inputs included.

        Args:
            suite: the loaded suite that `self.suite` names.

        Raises:
            SuiteError: unknown tasks.
            CheckpointError: a member cannot be read.
        """
        return digest_of(
            "recipe-1",
            # The base counts for every method: integer buffers are taken from it.
            suite.members_digest(suite.select(self.tasks), with_base=True),
            json.dumps([suite.spec.decompose, suite.spec.average]),
            self.method,
            json.dumps(self.parameters, sort_keys=True),
            str(self.seed),
            self.dtype,
        )

    def with_parameters(self, **changes: Any) -> Recipe:
        """The same recipe with some parameters changed (and checked)."""
        document = self.model_dump()
        document["parameters"] = {**self.parameters, **changes}
        return make_recipe(document)


def make_recipe(document: Any, where: str = "The recipe") -> Recipe:
    """Check a recipe's fields.

    Args:
        document: a mapping of the fields.
        where: what to call it in errors.

    Raises:
        RecipeError: unknown or missing fields, unknown method, parameters out of range.
    """
    if not isinstance(document, dict):
        raise RecipeError(f"{where} must hold fields such as method and parameters.")
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise RecipeError(f"{where}: {explain_validation(error)}.") from error


def recipe_from_yaml(text: str, where: str = "The recipe") -> Recipe:
    """Read a recipe from YAML.

    Raises:
        RecipeError: not YAML, or not a recipe.
    """
    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: month 13
        first = str(error).replace("\n", " ")
        raise RecipeError(f"{where} is not valid YAML: {first:.200}") from error
    return make_recipe(document, where)


def recipe_from_query(query: str) -> Recipe:
    """Read a recipe from a link's query (a leading ``?`` is allowed).

    Raises:
        RecipeError: not a recipe.
    """
    fields = dict(parse_qsl(query.removeprefix("?"), keep_blank_values=True))
    document: dict[str, Any] = {
        name: fields.pop(name) for name in ("suite", "method", "dtype") if name in fields
    }
    if "tasks" in fields:
        document["tasks"] = tuple(fields.pop("tasks").split(","))
    if "seed" in fields:
        document["seed"] = fields.pop("seed")
    return make_recipe({**document, "parameters": fields}, "The link")


def load_recipe(path: str | Path) -> tuple[Recipe, Suite]:
    """Read a recipe file and the suite it names (relative to the file).

    Raises:
        RecipeError: missing or wrong recipe.
        SuiteError: missing or wrong suite, or tasks that it does not have.
    """
    path = Path(path)
    try:
        path = path.expanduser()
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~someone without a home
        told = "not a text file" if isinstance(error, ValueError) else str(error)
        reason = getattr(error, "strerror", None) or told
        raise RecipeError(
            f"{path} cannot be read ({reason}). Give a recipe's YAML file."
        ) from error
    recipe = recipe_from_yaml(text, str(path))
    suite = load_suite(
        BUNDLED if recipe.suite == BUNDLED else path.parent / Path(recipe.suite).expanduser()
    )
    suite.select(recipe.tasks)
    return recipe, suite

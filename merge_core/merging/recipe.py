"""A recipe: suite, tasks, method, parameters, seed and dtype, as YAML and as a link alike."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, quote, urlencode

import yaml
from pydantic import Field, StringConstraints, ValidationError, model_validator

from merge_core.errors import RecipeError, explain_validation
from merge_core.files import digest_of, path_below
from merge_core.input_files import expand_path
from merge_core.merging.inputs import Inputs, find_suite, name_suite
from merge_core.methods import get_method, get_postprocessor
from merge_core.methods.declaration import (
    Method,
    MethodParameters,
    Postprocessor,
    Run,
    digest_values,
)
from merge_core.strict_model import StrictModel
from merge_core.suites.bundled import BUNDLED, bundled_name, bundled_suites
from merge_core.suites.mergekit import explain_mergekit
from merge_core.suites.suite import Suite, load_suite
from merge_core.task_vectors import Origin
from merge_core.yaml_text import dump_yaml, load_yaml, read_text_file

LATER_FIELDS = ("origin", "weights", "overrides", "then")
# As in YAML: without control characters.
Text = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x08\x0b-\x1f\x7f-\x9f]*$")]
Dtype = Literal["input", "float32", "float16", "bfloat16", "float64"]


class Override(StrictModel):
    """Other parameter values for some of the model's parameters.

    Attributes:
        match: names of parameters, with ``*`` and ``?`` (``blocks.0.*``); the last match counts.
        parameters: the values that differ there.
    """

    match: Text = Field(min_length=1)
    parameters: dict[str, Any] = Field(min_length=1)


class Step(StrictModel):
    """A post-processor of the merged update, with its parameters."""

    method: str
    parameters: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _fill_parameters(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("method"), str):
            return data
        post = get_postprocessor(data["method"])
        checked = check_parameters(post, data.get("parameters") or {})
        return {**data, "parameters": checked.model_dump()}


class Recipe(StrictModel):
    """Everything that determines a merge.

    Attributes:
        suite: path of a suite.yaml, or ``vision``; of a published recipe, the suite's name.
        tasks: chosen tasks (all when None); their order does not matter.
        method: name of a method.
        parameters: its parameters; defaults are filled in.
        origin: what task vectors are taken about (the method's usual point when None).
        weights: a factor for each task's vector, 1 for tasks that are not named.
        overrides: other parameter values for some of the model's parameters.
        then: post-processors of the merged update, in order.
        seed: for methods that draw random numbers.
        dtype: of the output; ``input`` keeps each parameter's own.
        inputs: of a published recipe, the members that it was written for.
    """

    suite: Text = BUNDLED
    tasks: tuple[str, ...] | None = None
    method: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    origin: Origin | None = None
    weights: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(default_factory=dict)
    overrides: tuple[Override, ...] = ()
    then: tuple[Step, ...] = ()
    seed: int = Field(default=0, ge=0)
    dtype: Dtype = "input"
    inputs: Inputs | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_parameters(cls, data: Any) -> Any:
        """Check the parameters against the method's declaration and fill in its defaults."""
        if not isinstance(data, dict) or not isinstance(data.get("method"), str):
            return data
        method = get_method(data["method"])
        given = data.get("parameters") or {}
        checked = check_parameters(method, given)
        return {**data, "parameters": checked.model_dump()}

    @model_validator(mode="after")
    def _check_options(self) -> Recipe:
        """Refuse what the method cannot take."""
        method = self.declaration
        if self.origin is not None and self.origin not in method.origins:
            known = " or ".join(method.origins) or "none: it takes no task vectors"
            raise RecipeError(
                f"The method {method.name!r} takes no task vectors about the {self.origin}; "
                f"its origins: {known}."
            )
        if self.weights and not method.weighted:
            raise RecipeError(
                f"The method {method.name!r} has no per-task weights. Leave 'weights' out, or "
                "scale its result."
            )
        if self.tasks is not None and (unknown := set(self.weights) - set(self.tasks)):
            raise RecipeError(f"weights: the recipe does not merge {min(unknown)!r}.")
        for override in self.overrides:
            check_parameters(method, self.parameters | override.parameters)
        return self

    @property
    def declaration(self) -> Method:
        """The method."""
        return get_method(self.method)

    @property
    def checked_parameters(self) -> MethodParameters:
        """The parameters as the method's own model."""
        return check_parameters(self.declaration, self.parameters)

    def parameters_of(self, name: str) -> MethodParameters:
        """The method's parameters for one of the model's parameters: the last override counts."""
        for override in reversed(self.overrides):
            if fnmatchcase(name, override.match):
                return check_parameters(self.declaration, self.parameters | override.parameters)
        return self.checked_parameters

    @property
    def needs_base(self) -> bool:
        """Whether the base is needed: by the method, or by a post-processor of its update."""
        return self.declaration.needs_base(self.origin)

    def run(self, tasks: Sequence[str]) -> Run:
        """What the method sees of the recipe besides its parameters.

        Args:
            tasks: the chosen tasks, in the suite's order.
        """
        origins = self.declaration.origins
        factors = tuple(self.weights.get(task, 1.0) for task in tasks)
        return Run(
            origin=self.origin or (origins[0] if origins else "average"),
            weights=() if set(factors) == {1.0} else factors,
            seed=self.seed,
        )

    def warnings(self, tasks: Sequence[str]) -> list[str]:
        """What a user should know before merging, in sentences: of the method, and of the chain.

        Args:
            tasks: the chosen tasks.

        Example:
            >>> recipe = make_recipe({"method": "iso_c", "then": [{"method": "svc"}]})
            >>> [text.split(":")[0] for text in recipe.warnings(["digits", "dots"])]
            ['SVC after Iso-C is not determined']
        """
        method = self.declaration
        found = method.warnings(len(tasks), self.checked_parameters, self.run(tasks))
        leveller = method.title if method.isotropic else None
        for step in self.then:
            post = get_postprocessor(step.method)
            if post.along_directions and leveller is not None:
                found.append(
                    f"{post.title} after {leveller} is not determined: {leveller} makes singular "
                    f"values equal, and {post.title} treats singular directions one by one, which "
                    "then depend on rounding. Another machine, or a scale changed by a millionth, "
                    "can move the update by a quarter. Leave one of the two out for a merge that "
                    "can be repeated."
                )
            if post.along_directions:
                leveller = None  # the values differ again
            elif post.isotropic(check_parameters(post, step.parameters)):
                leveller = post.title
        return found

    def to_yaml(self) -> str:
        """The recipe as YAML; :func:`recipe_from_yaml` gives an equal recipe back."""
        document = self.model_dump(mode="json", exclude_none=True)
        for field in ("weights", "overrides", "then"):  # what is not used is not written
            if not document[field]:
                del document[field]
        if self.inputs is not None:
            document["inputs"] = self.inputs.model_dump(mode="json", exclude_defaults=True)
        return dump_yaml(document, flow=None, width=100)

    def to_query(self) -> str:
        """The recipe as a link's query; :func:`recipe_from_query` gives an equal one back."""
        pairs = [("suite", self.suite)]
        if self.tasks is not None:
            pairs.append(("tasks", ",".join(self.tasks)))
        pairs.append(("method", self.method))
        pairs += [(name, str(value)) for name, value in self.parameters.items()]
        for name in ("weights", "overrides", "then"):
            if value := self.model_dump(mode="json")[name]:
                pairs.append((name, json.dumps(value, separators=(",", ":"))))
        if self.origin is not None:
            pairs.append(("origin", self.origin))
        pairs += [("seed", str(self.seed)), ("dtype", self.dtype)]
        return urlencode(pairs, quote_via=quote, safe=",/")

    def publish(self, suite: Suite) -> Recipe:
        """The recipe as anybody may read it, who can run it with the same suite.

        It names the suite, and its members by content and by their names on the hub, but no place
        on this machine. Where the suite lies is remembered here (:func:`.inputs.find_suite`).

        Raises:
            SuiteError, CheckpointError: a member is missing or unreadable.
        """
        name = name_suite(suite)
        if bundled_name(suite.path):
            return self.model_copy(update={"suite": name, "inputs": None})
        learns = self.declaration.learns is not None
        inputs = Inputs.of(suite, suite.select(self.tasks), with_data=learns)
        inputs.remember(suite)
        return self.model_copy(update={"suite": name, "inputs": inputs})

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
            json.dumps(_rules_of_suite(suite)),
            self.method,
            json.dumps(digest_values(self.checked_parameters), sort_keys=True),
            str(self.seed),
            self.dtype,
            # Added later: recipes without them keep the digests that their predictions are under.
            *(json.dumps(part, sort_keys=True) for part in self._later() if part),
            *self._revision(),
        )

    def _revision(self) -> list[str]:
        """Of the method's results about this origin; nothing where they never changed."""
        revision = self.declaration.revisions.get(self.run(()).origin)
        return [] if revision is None else [f"revision {revision}"]

    def _later(self) -> list[Any]:
        document = self.model_dump(mode="json")
        return [{name: document[name]} for name in LATER_FIELDS if document[name]]

    def with_parameters(self, **changes: Any) -> Recipe:
        """The same recipe with some parameters changed (and checked)."""
        document = self.model_dump()
        document["parameters"] = {**self.parameters, **changes}
        return make_recipe(document)


def _rules_of_suite(suite: Suite) -> list[Any]:
    """A suite's rules for its parameters, for digests; unused rules are left out."""
    spec = suite.spec
    rule = [] if spec.vocabulary == "refuse" else [spec.vocabulary]
    return [spec.decompose, spec.average, *rule]


def check_parameters(method: Method | Postprocessor, given: Any) -> MethodParameters:
    """Parameters as a method's own model, defaults filled in.

    Raises:
        RecipeError: not a mapping, an unknown name, or a value out of range.

    Example:
        >>> check_parameters(get_method("cart"), {"rank": 16})
        CartParameters(rank=16, scale=...)
    """
    if not isinstance(given, dict):
        raise RecipeError(
            f"Method {method.name!r}: parameters must be a mapping of names to values."
        )
    unknown = [name for name in given if name not in method.parameters.model_fields]
    if unknown:
        known = ", ".join(method.parameters.model_fields) or "none"
        raise RecipeError(
            f"The method {method.name!r} has no parameter {unknown[0]!r}; it has: {known}."
        )
    try:
        return method.parameters.model_validate(given)
    except ValidationError as error:
        raise RecipeError(f"Method {method.name!r}: {explain_validation(error)}.") from error


def make_recipe(document: Any, where: str = "The recipe") -> Recipe:
    """Check a recipe's fields.

    Args:
        document: a mapping of the fields.
        where: what to call it in errors.

    Raises:
        RecipeError: unknown or missing fields, unknown method, parameters out of range.

    Example:
        >>> recipe = make_recipe({"method": "task_arithmetic", "parameters": {"scale": 0.4}})
        >>> recipe.suite, recipe.parameters
        ('vision', {'scale': 0.4})
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

    Example:
        >>> recipe = recipe_from_yaml("{method: cart, parameters: {rank: 0.12}}")
        >>> recipe_from_yaml(recipe.to_yaml()) == recipe
        True
    """
    try:
        document = load_yaml(text)
    except yaml.YAMLError as error:
        first = str(error).replace("\n", " ")
        raise RecipeError(f"{where} is not valid YAML: {first:.200}") from error
    if foreign := explain_mergekit(document):
        raise RecipeError(f"{where} is {foreign}")
    return make_recipe(document, where)


def recipe_from_query(query: str) -> Recipe:
    """Read a recipe from a link's query (a leading ``?`` is allowed).

    Raises:
        RecipeError: not a recipe.

    Example:
        >>> recipe = recipe_from_query("?suite=vision&tasks=digits,dots&method=cart&rank=16")
        >>> recipe.tasks, recipe.parameters["rank"]
        (('digits', 'dots'), 16)
    """
    fields = dict(parse_qsl(query.removeprefix("?"), keep_blank_values=True))
    document: dict[str, Any] = {
        name: fields.pop(name)
        for name in ("suite", "method", "dtype", "seed", "origin")
        if name in fields
    }
    if "tasks" in fields:
        document["tasks"] = tuple(fields.pop("tasks").split(","))
    for name in ("weights", "overrides", "then"):
        try:
            if name in fields:
                document[name] = json.loads(fields.pop(name))
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"The link: {name} is not JSON ({error}).") from error
    return make_recipe({**document, "parameters": fields}, "The link")


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe file; the suite that it names is not opened.

    Raises:
        RecipeError: missing or wrong recipe.

    Example:
        >>> _ = Path("recipe.yaml").write_text("method: average")
        >>> read_recipe("recipe.yaml").method
        'average'
    """
    path = expand_path(path, RecipeError)
    try:
        text = read_text_file(path)
    except (OSError, ValueError) as error:
        told = "not a text file" if isinstance(error, ValueError) else str(error)
        reason = getattr(error, "strerror", None) or told
        raise RecipeError(
            f"{path} cannot be read ({reason}). Give a recipe's YAML file."
        ) from error
    return recipe_from_yaml(text, str(path))


def load_recipe(path: str | Path, reference: str | None = None) -> tuple[Recipe, Suite]:
    """Read a recipe file and the suite it names (relative to the file).

    Args:
        path: of the recipe.
        reference: where the suite of a published recipe lies.

    Returns:
        The recipe, and its suite. A published one is given as the recipe of that suite.

    Raises:
        RecipeError: missing or wrong recipe, or a suite other than it was written for.
        SuiteError: missing or wrong suite, or tasks that it does not have.

    Example:
        >>> _ = Path("recipe.yaml").write_text("{suite: vision, method: average}")
        >>> recipe, suite = load_recipe("recipe.yaml")
        >>> recipe.method, len(suite.tasks)
        ('average', 20)
    """
    recipe = read_recipe(path)
    folder, inputs = expand_path(path, RecipeError).parent, recipe.inputs
    if inputs is not None:
        suite = find_suite(recipe.suite, inputs, reference, folder)
        inputs.check(suite)
        joined = recipe.tasks is None and set(suite.tasks) != set(inputs.experts)
        tasks = tuple(inputs.experts) if joined else recipe.tasks
        return recipe.model_copy(update={"inputs": None, "tasks": tasks}), suite
    if reference is not None:
        raise RecipeError(
            "--suite goes with a merged model, or with the recipe that lies beside one. This "
            "recipe names its own: edit 'suite:'."
        )
    suite = load_suite(
        recipe.suite
        if recipe.suite in bundled_suites()
        else path_below(folder, recipe.suite, RecipeError)
    )
    suite.select(recipe.tasks)
    return recipe, suite

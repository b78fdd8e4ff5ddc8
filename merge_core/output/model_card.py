"""The README.md of a merged model, with metadata that the Hugging Face Hub reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from merge_core.hub.files import HubId
from merge_core.merging.recipe import Recipe
from merge_core.output.provenance import Provenance
from merge_core.suites.suite import Suite


@dataclass(frozen=True)
class Result:
    """How well a merged model does on one task.

    Attributes:
        task: the task.
        split: of its data.
        accuracy: share of examples (0 to 1) that are right.
        low: lower end of the 95 % interval.
        high: upper end.
        examples: how many there were.
        kind: the hub's name for this sort of task.
    """

    task: str
    split: str
    accuracy: float
    low: float
    high: float
    examples: int
    kind: str = "image-classification"


def model_card(
    recipe: Recipe, suite: Suite, about: Provenance, results: Sequence[Result] = ()
) -> str:
    """The README.md of a merged model: method, recipe, inputs and, where known, accuracies.

    Args:
        recipe: what was done.
        suite: the suite that it names.
        about: digests of the inputs, and where on the hub they are from.
        results: accuracies of the merged model, one a task.

    Returns:
        Markdown after a block of YAML, whose ``model-index`` and ``base_model`` the hub shows.
        Source: https://huggingface.co/docs/hub/model-cards.

    Example:
        >>> from merge_core.output.provenance import provenance
        >>> suite, recipe = load_suite("demo"), make_recipe({"method": "average"})
        >>> card = model_card(recipe, suite, provenance(recipe, suite))
        >>> next(line for line in card.splitlines() if line.startswith("# "))
        '# Weight average of 8 experts of demo'
    """
    method = recipe.declaration
    tasks = suite.select(recipe.tasks)
    title = f"{method.title} of {len(tasks)} experts of {suite.name}"
    members = [(name, digest, about.sources.get(name)) for name, digest in about.inputs.items()]
    if about.base is not None:
        members.append(("(base)", about.base, about.base_source))
    columns = ["member", "digest of its content (SHA-256 of its files' BLAKE3)"]
    rows = [[name, f"`{digest}`"] for name, digest, _ in members]
    if any(source for *_, source in members):
        columns.append("from")
        rows = [
            [*row, f"`{source}`" if source else ""]
            for row, (*_, source) in zip(rows, members, strict=True)
        ]
    return (
        f"---\n{_metadata(suite, about, title, results)}\n---\n\n"
        f"# {title}\n\n"
        f"{method.summary}\n\n$$ {method.formula} $$\n\nSource: {method.source}\n\n"
        f"{_accuracies(suite, results)}"
        f"## Recipe\n\n```yaml\n{about.recipe.to_yaml()}```\n\n"
        "Run it again with `mergescope merge recipe.yaml --output FOLDER`.\n\n"
        f"## Inputs\n\n{_table(columns, rows)}\n"
        f"Made with MergeScope {metadata.version('mergescope')}, torch {torch.__version__}. "
        "Classification heads are not part of a merge: each task keeps its own.\n"
    )


def _metadata(suite: Suite, about: Provenance, title: str, results: Sequence[Result]) -> str:
    """The YAML block: tags, the models merged as far as the hub has them, and accuracies."""
    from huggingface_hub import EvalResult, ModelCardData

    sources = [*about.sources.values(), *([about.base_source] if about.base_source else [])]
    repositories = list(dict.fromkeys(HubId.parse(source).repo for source in sources))
    relation: dict[str, Any] = {"base_model_relation": "merge"} if repositories else {}
    measured = [
        EvalResult(
            task_type=result.kind,
            dataset_type=result.task,
            dataset_name=suite.title(result.task),
            dataset_split=result.split,
            metric_type="accuracy",
            metric_value=round(result.accuracy, 4),
        )
        for result in results
    ]
    return ModelCardData(
        base_model=repositories or None,
        library_name=suite.spec.architecture.library if suite.spec.architecture else None,
        model_name=title,
        eval_results=measured or None,
        tags=["merge", "mergescope", about.recipe.method],
        **relation,
    ).to_yaml()


def _accuracies(suite: Suite, results: Sequence[Result]) -> str:
    if not results:
        return ""
    rows = [
        [
            suite.title(result.task),
            f"{result.accuracy:.1%}",
            f"{result.low:.1%} to {result.high:.1%}",
            f"{result.examples:,} ({result.split})",
        ]
        for result in results
    ]
    table = _table(["task", "accuracy", "95 % interval", "examples"], rows)
    return f"## Accuracy\n\n{table}\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; bars inside a cell are escaped."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )

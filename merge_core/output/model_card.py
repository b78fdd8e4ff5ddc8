"""The README.md of a merged model, with metadata that the Hugging Face Hub reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from merge_core.hub.files import HubId
from merge_core.merging.recipe import Recipe
from merge_core.output.card_facts import BASE, CardFacts, card_facts
from merge_core.output.provenance import Provenance
from merge_core.suites.bundled import bundled_suites
from merge_core.suites.data_spec import MetricName
from merge_core.suites.suite import Suite

# Underscores within a word mean nothing.
MARKS = re.compile(r"[\\`*{}\[\]<>!|~$&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
SHOWN_HEADS = 4


# Title and form of each metric.
WRITTEN: dict[MetricName, tuple[str, str]] = {
    "accuracy": ("Accuracy", ".1%"),
    "cross_entropy": ("Cross-entropy (nats per token; lower is better)", ".3f"),
}


@dataclass(frozen=True)
class Result:
    """How well a merged model does on one task.

    Attributes:
        task: the task.
        split: of its data.
        value: share of examples (0 to 1) that are right, or another metric.
        low: lower end of the 95 % interval.
        high: upper end.
        examples: how many there were.
        kind: the hub's name for this sort of task.
        metric: what was measured.
    """

    task: str
    split: str
    value: float
    low: float
    high: float
    examples: int
    kind: str = "image-classification"
    metric: MetricName = "accuracy"


def model_card(
    recipe: Recipe,
    suite: Suite,
    about: Provenance,
    results: Sequence[Result] = (),
    adapter: str | None = None,
) -> str:
    """The README.md of a merged model: method, recipe, inputs and, where known, accuracies.

    Args:
        recipe: what was done.
        suite: the suite that it names.
        about: digests of the inputs, and where on the hub they are from.
        results: accuracies of the merged model, one a task.
        adapter: what an adapter of the base holds of the merge; None for a whole model.

    Returns:
        Markdown after a block of YAML, whose ``model-index`` and ``base_model`` the hub shows.
        Texts of the suite stand in it as texts, whatever marks they hold.
        Source: https://huggingface.co/docs/hub/model-cards.

    Example:
        >>> from merge_core.output.provenance import provenance
        >>> suite, recipe = load_suite("vision"), make_recipe({"method": "average"})
        >>> card = model_card(recipe, suite, provenance(recipe, suite))
        >>> next(line for line in card.splitlines() if line.startswith("# "))
        '# Weight average of 20 experts of vision'
    """
    method = recipe.declaration
    tasks = suite.select(recipe.tasks)
    facts = card_facts(suite, tasks)
    title = f"{method.title} of {len(tasks)} experts of {about.recipe.suite}"
    metadata = _metadata(suite, about, title, results, facts, is_adapter=adapter is not None)
    return (
        f"---\n{metadata}\n---\n\n"
        f"# {escape_markdown(title)}\n\n"
        f"{method.summary}\n\n$$ {method.formula} $$\n\nSource: {method.source}\n\n"
        f"{_accuracies(suite, results)}"
        f"## Recipe\n\n{_recipe(about)}"
        f"## Inputs\n\n{_inputs(about)}\n{_notes(suite, tasks, facts)}"
        f"Made with MergeScope {version('mergescope')}, torch {torch.__version__}.\n"
        + ("" if adapter is None else _adapter(adapter))
    )


def _metadata(
    suite: Suite,
    about: Provenance,
    title: str,
    results: Sequence[Result],
    facts: CardFacts,
    is_adapter: bool,
) -> str:
    """The YAML block: tags, licence, library, the models merged as far as the hub has them."""
    from huggingface_hub import EvalResult, ModelCardData

    experts = [] if is_adapter else list(about.sources.values())
    sources = [*experts, *([about.base_source] if about.base_source else [])]
    repositories = list(dict.fromkeys(HubId.parse(source).repo for source in sources))
    more: dict[str, Any] = {name: facts.licence[name] for name in facts.licence}
    if repositories:
        more["base_model_relation"] = "adapter" if is_adapter else "merge"
    measured = [
        EvalResult(
            task_type=result.kind,
            dataset_type=result.task,
            dataset_name=suite.title(result.task),
            dataset_split=result.split,
            metric_type=result.metric,
            metric_value=round(result.value, 4),
        )
        for result in results
    ]
    return ModelCardData(
        base_model=repositories or None,
        library_name="peft" if is_adapter else facts.library,
        pipeline_tag=facts.pipeline_tag,
        model_name=title,
        eval_results=measured or None,
        tags=["merge", "mergescope", about.recipe.method, *(["lora"] if is_adapter else [])],
        **more,
    ).to_yaml()


def _recipe(about: Provenance) -> str:
    """The recipe in a fence that nothing in it closes, and how to run it."""
    text = about.recipe.to_yaml()
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    run = "mergescope merge recipe.yaml --output FOLDER"
    where = ""
    if about.recipe.suite not in bundled_suites():
        run += " --suite SUITE"
        where = ", where SUITE is a suite.yaml of the inputs below"
    return f"{fence}yaml\n{text}{fence}\n\nRun it again with `{run}`{where}.\n\n"


def _inputs(about: Provenance) -> str:
    """The table of members, by content and by name on the hub."""
    members = [(name, digest, about.sources.get(name)) for name, digest in about.inputs.items()]
    if about.base is not None:
        members.append((BASE, about.base, about.base_source))
    columns = ["member", "digest of its content (SHA-256 of its files' BLAKE3)"]
    rows = [[escape_markdown(name), f"`{digest}`"] for name, digest, _ in members]
    if any(source for *_, source in members):
        columns.append("from")
        rows = [
            [*row, f"`{source}`" if source else ""]
            for row, (*_, source) in zip(rows, members, strict=True)
        ]
    return _table(columns, rows)


def _notes(suite: Suite, tasks: Sequence[str], facts: CardFacts) -> str:
    """What is to be known of the merge: licences that differ, and heads that it does not hold."""
    notes = []
    if facts.licences:
        stated = ", ".join(f"{escape_markdown(n)}: {text}" for n, text in facts.licences.items())
        notes.append(f"The members state different licences ({stated}): see what they ask for.")
    if facts.heads:
        shown = ", ".join(f"`{name}`" for name in facts.heads[:SHOWN_HEADS] if "`" not in name)
        more = ", …" if len(facts.heads) > SHOWN_HEADS else ""
        notes.append(f"Heads are not part of this merge ({shown}{more}): each task keeps its own.")
    elif all(suite.spec.experts[task].head is not None for task in tasks):
        notes.append("Heads, which the suite names apart, are not part of this merge.")
    if facts.modules:
        notes.append(
            f"Modules with weights of their own ({', '.join(facts.modules)}) are not part of this "
            "merge: copy their weights from a member before opening it."
        )
    return "".join(f"{note}\n\n" for note in notes)


def _adapter(text: str) -> str:
    return (
        f"\n## Adapter\n\nA LoRA adapter of the base: {escape_markdown(text)}\n\n"
        "Load it with `peft.PeftModel.from_pretrained(base_model, FOLDER)`.\n"
    )


def escape_markdown(text: str) -> str:
    r"""A text in which no mark has a meaning, in one line.

    Example:
        >>> escape_markdown("a*b [c](d)"), escape_markdown("<img>")
        ('a\\*b \\[c\\](d)', '\\<img\\>')
    """
    return MARKS.sub(r"\\\g<0>", " ".join(text.split()))


def _accuracies(suite: Suite, results: Sequence[Result]) -> str:
    if not results:
        return ""
    title, form = WRITTEN[results[0].metric]
    rows = [
        [
            escape_markdown(suite.title(result.task)),
            format(result.value, form),
            f"{format(result.low, form)} to {format(result.high, form)}",
            f"{result.examples:,} ({result.split})",
        ]
        for result in results
    ]
    table = _table(["task", title.lower(), "95 % interval", "examples"], rows)
    return f"## {title}\n\n{table}\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; texts in its cells are escaped before."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)

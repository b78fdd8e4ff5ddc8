"""Files of mergekit, which are neither a suite nor a recipe: known by their fields, and explained.

Source: https://github.com/arcee-ai/mergekit (merges, and mixtures of experts).
"""

from __future__ import annotations

from typing import Any

# What the methods are called here that it has as well.
NAMES = {
    "linear": "average",
    "slerp": "slerp",
    "karcher": "karcher",
    "task_arithmetic": "task_arithmetic",
    "ties": "ties",
    "dare_ties": "dare_ties",
    "dare_linear": "dare_task_arithmetic",
    "model_stock": "model_stock",
}


def explain_mergekit(document: Any) -> str | None:
    """What to do with a file in mergekit's format, in words; None of any other document.

    Args:
        document: what the file holds.
    """
    if not isinstance(document, dict) or not _is_of_mergekit(document):
        return None
    theirs = document.get("merge_method")
    known = NAMES.get(theirs) if isinstance(theirs, str) else None
    told = f" (merge_method: {' '.join(theirs.split()):.40})" if isinstance(theirs, str) else ""
    if known is not None:
        method = f"'method: {known}' ('mergescope methods {known}' shows its parameters)"
    else:
        method = "a 'method:' of 'mergescope methods'"
    return (
        f"a file of mergekit{told}, whose format is not read here. Put its models into a "
        "suite.yaml ('base: hf://org/name' and 'experts: {name: {weights: hf://org/name}}', or "
        "paths) and its method into a recipe.yaml: 'suite: suite.yaml' and "
        f"{method}."
    )


def _is_of_mergekit(document: dict[str, Any]) -> bool:
    """Whether the fields are those of a merge, of slices, or of a mixture of experts there."""
    if "merge_method" in document or "gate_mode" in document:
        return True
    parts = {"models": "model", "slices": "sources", "modules": "slices", "experts": "source_model"}
    for field, inner in parts.items():
        value = document.get(field)
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(first, dict) and inner in first:
            return True
    return False

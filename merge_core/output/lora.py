"""A merge written as a LoRA adapter over the suite's base, in PEFT's layout.

Each matrix's update (merged − base) is cut to its leading directions, SVD_k = B·A; what no such
product can hold and has changed (norms, biases, embeddings) is stored whole.

Source: the best rank-k approximation, Eckart and Young 1936; the layout is PEFT's
(https://github.com/huggingface/peft).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from merge_core.checkpoints.lora_config import CONFIG_FILE, WEIGHT_FILES
from merge_core.errors import RecipeError, SuiteError
from merge_core.executors.base import Executor, one_thread
from merge_core.executors.local import Threads
from merge_core.factors.store import FactorStore
from merge_core.files import check_output, write_folder_atomically
from merge_core.merging.engine import check_fits, check_recipe, merge_parameters
from merge_core.merging.recipe import Recipe
from merge_core.output.adapter_draft import AdapterDraft, AdapterRank, AdapterReport
from merge_core.output.model_card import model_card
from merge_core.output.provenance import HEADER_KEY, provenance
from merge_core.progress import Progress
from merge_core.suites.suite import Suite
from merge_core.task_vectors import TensorGroups


def merge_to_adapter(
    recipe: Recipe,
    suite: Suite,
    output: Path,
    rank: AdapterRank,
    store: FactorStore | None = None,
    progress: Progress | None = None,
    learned: Any = None,
    executor: Executor | None = None,
) -> AdapterReport:
    """Merge, and write the result as an adapter of the suite's base.

    Memory holds one parameter at a time as a merge does, and the adapter itself.

    Args:
        recipe: what to do.
        suite: the suite that it names, with a base.
        output: folder to make (absent or empty).
        rank: how many directions are kept.
        store: where factors are kept.
        progress: reports each parameter; cancels between two.
        learned: what a method that needs data has learnt from it.
        executor: where parameters are merged.

    Raises:
        SuiteError: no base, or members that do not fit.
        RecipeError: a method that gives one model per task.
        OutputError: nothing for an adapter to hold, or the folder cannot be written.
        CheckpointError, ExecutorError, Cancelled: as for a merge.

    Example:
        >>> recipe = make_recipe({"method": "average", "tasks": ("digits", "dots")})
        >>> suite, rank = load_suite("vision"), AdapterRank(rank=4)
        >>> report = merge_to_adapter(recipe, suite, Path("adapter"), rank)
        >>> set(report.ranks.values()), report.energy < 1
        ({4}, True)
    """
    check_output(output)
    tasks = suite.select(recipe.tasks)
    if suite.base is None:
        raise SuiteError(
            f"The suite {suite.name!r} names no base, which an adapter is relative to. Add "
            "'base:' to suite.yaml, or write the whole model."
        )
    if recipe.declaration.indexed:
        raise RecipeError(
            f"{recipe.declaration.title} gives one model per task. Write whole models instead."
        )
    check_fits(suite, tasks)
    check_recipe(suite, recipe)
    store = store or FactorStore()
    groups = TensorGroups(suite, tasks, store)
    with write_folder_atomically(output) as staging, torch.no_grad(), one_thread():
        about = provenance(recipe, suite, store.route)
        draft = AdapterDraft(suite, tasks, rank, recipe)
        tensors = merge_parameters(recipe, groups, progress, None, learned, executor or Threads())
        for name, value in tensors:
            draft.take(name, value)
        state, config = draft.finish()
        notes = {"format": "pt", HEADER_KEY: about.to_header()}
        (staging / WEIGHT_FILES[0]).write_bytes(save(state, notes))
        (staging / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (staging / "recipe.yaml").write_text(recipe.publish(suite).to_yaml(), encoding="utf-8")
        card = model_card(recipe, suite, about, adapter=draft.report.sentences())
        (staging / "README.md").write_text(card, encoding="utf-8")
        for member in suite.members(tasks):
            member.check_unchanged()
    return draft.report

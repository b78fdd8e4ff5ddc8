"""A merged model on disk: streamed into safetensors shards, with its recipe and a model card."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from merge_core.checkpoint import SAFETENSORS_DTYPES
from merge_core.engine import check_fits, check_recipe, merged_tensors, written_dtype
from merge_core.errors import OutputError
from merge_core.executors import Executor, Threads
from merge_core.factors import FactorStore
from merge_core.files import folder_written_whole
from merge_core.progress import Progress
from merge_core.provenance import HEADER_KEY, Provenance, provenance
from merge_core.recipe import Recipe
from merge_core.suite import BUNDLED, Suite
from merge_core.task_vectors import Groups

DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Planned:
    """One tensor of the output: name, shape and dtype, known before anything is computed."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def plan_shards(plan: Sequence[Planned], shard_bytes: int) -> list[list[Planned]]:
    """Split the tensors, in order, into shards of at most `shard_bytes` (one tensor at least)."""
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in plan:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def safetensors_header(plan: Sequence[Planned], notes: dict[str, str]) -> bytes:
    """The length-prefixed header of a safetensors file whose tensors follow in `plan`'s order.

    Source: format of https://github.com/huggingface/safetensors (8-byte little-endian length,
    JSON, then the tensors' bytes).
    """
    header: dict[str, object] = {"__metadata__": notes}
    offset = 0
    for tensor in plan:
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensor(stream: BinaryIO, tensor: Tensor, planned: Planned) -> None:
    """Append one tensor's bytes, cast once to its planned dtype.

    Raises:
        OutputError: the value does not fit the dtype (overflow in half precision).
    """
    value = tensor.to(planned.dtype).contiguous()
    wide = value.float() if value.dtype.itemsize == 1 else value
    if wide.dtype.is_floating_point and not bool(torch.isfinite(wide).all()):
        raise OutputError(
            f"Parameter {planned.name!r} of the merged model does not fit into "
            f"{planned.dtype}: it overflows. Choose dtype float32 or a smaller scale."
        )
    stream.write(value.reshape(-1).view(torch.uint8).numpy().data)


def output_plan(recipe: Recipe, groups: Groups) -> list[Planned]:
    """Name, shape and dtype of each tensor of the output."""
    return [
        Planned(group.name, group.info.shape, written_dtype(recipe, group.info.dtype))
        for group in groups
    ]


def model_card(recipe: Recipe, suite: Suite, about: Provenance) -> str:
    """The README.md of a merged model."""
    method = recipe.declaration
    tasks = suite.select(recipe.tasks)
    members = list(about.inputs.items())
    if about.base is not None:
        members.append(("(base)", about.base))
    rows = "\n".join(f"| {name} | `{digest}` |" for name, digest in members)
    return (
        "---\ntags:\n- model-merging\n- mergescope\n---\n\n"
        f"# {method.title} of {len(tasks)} experts of {suite.name}\n\n"
        f"{method.summary}\n\n$$ {method.formula} $$\n\nSource: {method.source}\n\n"
        f"## Recipe\n\n```yaml\n{recipe.to_yaml()}```\n\n"
        "Run it again with `mergescope merge recipe.yaml --output FOLDER`.\n\n"
        f"## Inputs (SHA-256 of their content)\n\n| member | digest |\n|---|---|\n{rows}\n\n"
        f"Made with MergeScope {metadata.version('mergescope')}, torch {torch.__version__}. "
        "Classification heads are not part of a merge: each task keeps its own.\n"
    )


def portable(recipe: Recipe, suite: Suite) -> Recipe:
    """The recipe with the suite's path made absolute, so that it runs from anywhere."""
    if recipe.suite == BUNDLED:
        return recipe
    return recipe.model_copy(update={"suite": str(suite.path)})


def merge_to_folder(
    recipe: Recipe,
    suite: Suite,
    output: Path,
    store: FactorStore | None = None,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
    learned: Any = None,
    executor: Executor | None = None,
) -> Path:
    """Merge and write ``model.safetensors`` (or shards with an index), recipe and model card.

    A method that gives one model per task writes each into a folder named after the task.

    Memory grows with the largest parameter times the number of experts, not with the model.
    The folder appears complete or not at all.

    Args:
        recipe: what to do.
        suite: the suite that it names.
        output: folder to make (absent or empty).
        store: where factors are kept.
        progress: reports each parameter; cancels between two.
        shard_bytes: largest size of one shard.
        learned: what a method that needs data has learnt from it.
        executor: where parameters are merged while others are read and written; on as many
            threads as torch has when None.

    Returns:
        `output`.

    Raises:
        SuiteError, CheckpointError: inputs missing, unreadable or unfit.
        OutputError: the folder exists and is not empty, cannot be written, or the disk is full.
        ExecutorError: workers died again and again.
        Cancelled: `progress` was cancelled; nothing is left behind.
    """
    tasks = suite.select(recipe.tasks)
    check_fits(suite, tasks)
    check_recipe(suite, recipe)
    recipe = portable(recipe, suite)
    store = store or FactorStore()
    groups = Groups(suite, tasks, store)
    with folder_written_whole(output) as staging, torch.no_grad():
        about = provenance(recipe, suite, store.route)
        for task in tasks if recipe.declaration.indexed else (None,):
            folder = staging if task is None else staging / task
            folder.mkdir(exist_ok=True)
            own = about.model_copy(update={"task": task})
            notes = {"format": "pt", HEADER_KEY: own.to_header()}
            shards = plan_shards(output_plan(recipe, groups), shard_bytes)
            tensors = merged_tensors(recipe, groups, progress, task, learned, executor or Threads())
            _write_index(folder, _write_shards(folder, shards, tensors, notes), shards)
        (staging / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        (staging / "README.md").write_text(model_card(recipe, suite, about), encoding="utf-8")
    return output


def _write_index(folder: Path, names: list[str], shards: list[list[Planned]]) -> None:
    """The index of several shards; one file needs none."""
    if len(shards) == 1:
        return
    index = {
        "metadata": {"total_size": sum(t.nbytes for shard in shards for t in shard)},
        "weight_map": {
            t.name: name for name, shard in zip(names, shards, strict=True) for t in shard
        },
    }
    text = json.dumps(index, indent=2)
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _write_shards(
    folder: Path,
    shards: list[list[Planned]],
    tensors: Iterator[tuple[str, Tensor]],
    notes: dict[str, str],
) -> list[str]:
    count = len(shards)
    names = (
        ["model.safetensors"]
        if count == 1
        else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    )
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as stream:
            stream.write(safetensors_header(shard, notes))
            for planned in shard:
                _, tensor = next(tensors)
                write_tensor(stream, tensor, planned)
    # Run to the end, so that the last progress event is sent.
    for _ in tensors:
        pass
    return names


def merged_bytes(recipe: Recipe, groups: Groups, suite: Suite, learned: Any = None) -> bytes:
    """The merged checkpoint as the bytes of one safetensors file (for a download).

    Args:
        recipe: of a method that gives one model for all tasks.
        groups: of the recipe's tasks.
        suite: the suite that it names.
        learned: what a method that needs data has learnt from it.

    Raises:
        MergeScopeError: as :func:`merge_to_folder`.
    """
    check_fits(suite, groups.tasks)
    check_recipe(suite, recipe)
    plan = output_plan(recipe, groups)
    about = provenance(portable(recipe, suite), suite)
    stream = io.BytesIO()
    stream.write(safetensors_header(plan, {"format": "pt", HEADER_KEY: about.to_header()}))
    tensors = merged_tensors(recipe, groups, learned=learned)
    with torch.no_grad():
        for planned, (_, tensor) in zip(plan, tensors, strict=True):
            write_tensor(stream, tensor, planned)
    return stream.getvalue()

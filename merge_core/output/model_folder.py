"""A merged model on disk: streamed into safetensors shards, with its recipe and a model card."""

from __future__ import annotations

import io
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.dtypes import SAFETENSORS_DTYPES
from merge_core.errors import OutputError
from merge_core.executors.base import Executor, one_thread
from merge_core.executors.local import Threads
from merge_core.factors.store import FactorStore
from merge_core.files import check_output, digest_of, size_in_words, write_folder_atomically
from merge_core.merging.engine import check_fits, check_recipe, merge_parameters, written_dtype
from merge_core.merging.recipe import Recipe
from merge_core.output.config_files import Written
from merge_core.output.layout import Layout, layout
from merge_core.output.model_card import model_card
from merge_core.output.provenance import HEADER_KEY, Provenance, provenance
from merge_core.progress import Progress
from merge_core.suites.suite import Suite
from merge_core.task_vectors import TensorGroups

DTYPE_NAMES = {dtype.torch: name for name, dtype in SAFETENSORS_DTYPES.items()}
SHARD_BYTES = 5_000_000_000
KEY_DIGITS = 24


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output, known before anything is computed.

    Attributes:
        name: in the file.
        shape, dtype: in the file.
        parameter: its name in the suite.
        merged: whether it is merged; otherwise it is copied from the base.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parameter: str = ""
    merged: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def plan_shards(plan: Sequence[PlannedTensor], shard_bytes: int) -> list[list[PlannedTensor]]:
    """Split the tensors, in order, into shards of at most `shard_bytes` (one tensor at least)."""
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in plan:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def safetensors_header(plan: Sequence[PlannedTensor], notes: dict[str, str]) -> bytes:
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


def write_tensor(stream: BinaryIO, tensor: Tensor, planned: PlannedTensor) -> None:
    """Append one tensor's bytes, cast once to its planned dtype.

    Raises:
        OutputError: the value does not fit the dtype (overflow in half precision).
    """
    if not _fits(tensor, planned.dtype):
        raise OutputError(
            f"Parameter {planned.name!r} of the merged model does not fit into "
            f"{planned.dtype}: it overflows. Choose dtype float32 or a smaller scale."
        )
    value = tensor.to(planned.dtype).contiguous()
    stream.write(value.reshape(-1).view(torch.uint8).numpy().data)


def _fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether all entries stay finite in a dtype: one pass, and the cast of the two extremes."""
    if not dtype.is_floating_point or not tensor.numel():
        return True
    extremes = torch.stack(torch.aminmax(tensor.float() if tensor.itemsize == 1 else tensor))
    cast = extremes.to(dtype)
    return bool((cast.float() if cast.itemsize == 1 else cast).isfinite().all())


def output_plan(recipe: Recipe, groups: TensorGroups, where: Layout) -> list[PlannedTensor]:
    """The tensors of the output: what is merged, then what only the base has."""
    plan = [
        PlannedTensor(
            where.stored_name(name),
            group.info.shape,
            written_dtype(recipe, group.info.dtype.torch),
            name,
        )
        for group in groups.members
        for name in (group.name, *groups.manifest.also_written.get(group.name, ()))
    ]
    for name in where.kept:
        info = where.reference.info(name)
        dtype = written_dtype(recipe, info.dtype.torch)
        plan.append(PlannedTensor(where.stored_name(name), info.shape, dtype, name, merged=False))
    return plan


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
    The folder appears complete or not at all. A killed run leaves a hidden folder beside it;
    the same merge to the same place goes on where that run stood (from the start if its method
    learns from data).

    Names are those of the base's files (of the manifest's reference without a base); what only
    the base has is written unchanged; configuration and tokenizer files beside it come along. So
    a folder of timm, open_clip or transformers gives a folder that opens there.

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

    Example:
        >>> recipe = make_recipe({"method": "average", "tasks": ("digits", "dots")})
        >>> folder = merge_to_folder(recipe, load_suite("vision"), Path("merged"))
        >>> sorted(path.name for path in folder.iterdir())
        ['README.md', 'model.safetensors', 'recipe.yaml']
    """
    check_output(output)
    tasks = suite.select(recipe.tasks)
    check_fits(suite, tasks)
    check_recipe(suite, recipe)
    store, workers = store or FactorStore(), executor or Threads()
    groups = TensorGroups(suite, tasks, store)
    where = layout(groups)
    _ = where.side_files  # refuses links to the outside before any work
    about = provenance(recipe, suite, store.route)
    # What a killed run left is taken up by a run that would write the same bytes. What is
    # learnt afresh may differ in its last bits, and takes longer than all the rest.
    key = None
    if learned is None:
        key = digest_of("staging-1", about.to_header(), str(shard_bytes))[:KEY_DIGITS]
    with write_folder_atomically(output, key) as staging, torch.no_grad(), one_thread():
        for task in tasks if recipe.declaration.indexed else (None,):
            folder = staging if task is None else staging / task
            folder.mkdir(exist_ok=True)
            own = about.model_copy(update={"task": task})
            shards = _shards(folder, output_plan(recipe, groups, where), own, where, shard_bytes)
            _check_space(folder, shards)
            wanted = {t.parameter for shard in shards for t in shard.missing if t.merged}
            merged = merge_parameters(recipe, groups, progress, task, learned, workers, wanted)
            _write_weights(folder, shards, merged, where)
        published = recipe.publish(suite).to_yaml()
        (staging / "recipe.yaml").write_text(published, encoding="utf-8")
        (staging / "README.md").write_text(model_card(recipe, suite, about), encoding="utf-8")
        for member in (suite.base, *(suite.expert(task) for task in tasks)):
            if member is not None:
                member.check_unchanged()
    return output


def _write_weights(
    folder: Path, shards: Sequence[_Shard], merged: Iterator[tuple[str, Tensor]], where: Layout
) -> None:
    """Write merged parameters as they come, with the index and the files beside them."""
    for shard in shards:
        shard.finish(_order_tensors(shard.missing, merged, where.reference))
    for _ in merged:  # to the end, so that the last progress event is sent
        pass
    _write_index(folder, shards)
    if where.side_files:
        where.copy_side_files(folder, Written.of(Checkpoint(folder)))


def _order_tensors(
    plan: Sequence[PlannedTensor], merged: Iterator[tuple[str, Tensor]], base: Checkpoint
) -> Iterator[tuple[PlannedTensor, Tensor]]:
    """The planned tensors, each with its value."""
    for planned in plan:
        yield planned, next(merged)[1] if planned.merged else base.tensor(planned.parameter)


class _Shard:
    """A file of the output, perhaps begun by a run that was killed.

    A killed process leaves a file that ends somewhere, but whose bytes up to there are right.

    Args:
        path: of the file.
        plan: its tensors.
        notes: of its header.
    """

    def __init__(self, path: Path, plan: Sequence[PlannedTensor], notes: dict[str, str]) -> None:
        self.path = path
        self.plan = plan
        self._header = safetensors_header(plan, notes)
        ends = list(accumulate((tensor.nbytes for tensor in plan), initial=len(self._header)))
        self._written = bisect_right(ends, self._size()) - 1
        self._start = ends[max(self._written, 0)]

    @property
    def missing(self) -> Sequence[PlannedTensor]:
        """The tensors that are still to be written."""
        return self.plan[max(self._written, 0) :]

    @property
    def missing_bytes(self) -> int:
        """Their size."""
        return sum(tensor.nbytes for tensor in self.missing)

    def finish(self, tensors: Iterator[tuple[PlannedTensor, Tensor]]) -> None:
        """Write what is missing.

        Raises:
            OSError: the disk is full, say.
        """
        with self.path.open("wb" if self._written < 0 else "r+b") as stream:
            if self._written < 0:
                stream.write(self._header)
            else:
                stream.truncate(self._start)
                stream.seek(self._start)
            for planned, tensor in tensors:
                write_tensor(stream, tensor, planned)

    def _size(self) -> int:
        """Size of what an earlier run wrote; 0 if that run was to write another file."""
        with suppress(FileNotFoundError), self.path.open("rb") as stream:
            if stream.read(len(self._header)) == self._header:
                return os.fstat(stream.fileno()).st_size
        return 0


def _shards(
    folder: Path,
    plan: Sequence[PlannedTensor],
    about: Provenance,
    where: Layout,
    shard_bytes: int,
) -> list[_Shard]:
    """The files of a model, named as the libraries that read the input expect."""
    plans = plan_shards(plan, shard_bytes) if where.may_be_sharded else [plan]
    count = len(plans)
    names = (
        [where.weights_name]
        if count == 1
        else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    )
    notes = {"format": "pt", HEADER_KEY: about.to_header()}
    return [_Shard(folder / name, own, notes) for name, own in zip(names, plans, strict=True)]


def _check_space(folder: Path, shards: Sequence[_Shard]) -> None:
    """Refuse a disk that is too small before any work.

    Raises:
        OutputError: it is.
    """
    needed = sum(shard.missing_bytes for shard in shards)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"The disk has {size_in_words(free)} free and the merged model takes "
            f"{size_in_words(needed)}. Free some space or choose another folder."
        )


def _write_index(folder: Path, shards: Sequence[_Shard]) -> None:
    """The index of several shards; one file needs none."""
    if len(shards) == 1:
        return
    index = {
        "metadata": {"total_size": sum(t.nbytes for shard in shards for t in shard.plan)},
        "weight_map": {t.name: shard.path.name for shard in shards for t in shard.plan},
    }
    text = json.dumps(index, indent=2)
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def merged_bytes(recipe: Recipe, groups: TensorGroups, suite: Suite, learned: Any = None) -> bytes:
    """The merged checkpoint as the bytes of one safetensors file (for a download).

    Args:
        recipe: of a method that gives one model for all tasks.
        groups: of the recipe's tasks.
        suite: the suite that it names.
        learned: what a method that needs data has learnt from it.

    Raises:
        MergeScopeError: as :func:`merge_to_folder`.

    Example:
        >>> suite = load_suite("vision")
        >>> recipe = make_recipe({"method": "average", "tasks": ("digits", "dots")})
        >>> data = merged_bytes(recipe, TensorGroups(suite, recipe.tasks, FactorStore()), suite)
        >>> len(data) > suite.expert("digits").nbytes
        True
    """
    check_fits(suite, groups.tasks)
    check_recipe(suite, recipe)
    where = layout(groups)
    plan = output_plan(recipe, groups, where)
    about = provenance(recipe, suite)
    stream = io.BytesIO()
    stream.write(safetensors_header(plan, {"format": "pt", HEADER_KEY: about.to_header()}))
    tensors = merge_parameters(recipe, groups, learned=learned)
    with torch.no_grad(), one_thread():
        for planned, tensor in _order_tensors(plan, tensors, where.reference):
            write_tensor(stream, tensor, planned)
    return stream.getvalue()

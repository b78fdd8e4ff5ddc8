"""The base of a planned suite: where it is, and its copy in the suite's folder."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from analysis.fine_tuning.plan import PACKAGE, SuitePlan
from merge_core.checkpoints.checkpoint import Checkpoint, is_finite
from merge_core.checkpoints.side_files import describes_model
from merge_core.errors import SuiteError
from merge_core.files import digest_of, file_digest, write_atomically
from merge_core.hub.files import is_hub_id
from merge_core.hub.models import find_or_fetch, require_cached
from merge_core.opening.draft import name_architecture
from merge_core.output.config_files import Written
from merge_core.output.layout import Layout
from merge_core.suites.suite_spec import ArchitectureSpec

WEIGHTS = "model.safetensors"
METADATA = {"format": "pt"}  # without it, transformers refuses a file


def open_base(plan: SuitePlan, download: bool = False) -> Checkpoint:
    """A plan's base.

    Args:
        plan: names it.
        download: whether one on the hub may be fetched.

    Raises:
        SuiteError: a package that is not installed, or does not hold one model.
        CheckpointError: no readable weights; on the hub, and not downloaded.
    """
    if plan.base.startswith(PACKAGE):
        return Checkpoint(_find_in_package(plan.base.removeprefix(PACKAGE).strip()))
    if is_hub_id(plan.base):
        return Checkpoint(find_or_fetch(plan.base) if download else require_cached(plan.base))
    return Checkpoint(Path(plan.base))


def _find_in_package(name: str) -> Path:
    """The one model's folder among the files of an installed package.

    Raises:
        SuiteError: not installed, or it holds none or several.
    """
    try:
        files = importlib.metadata.distribution(name).files or []
    except (importlib.metadata.PackageNotFoundError, ValueError) as fault:
        raise SuiteError(
            f"The package {name!r:.80}, which holds the base, is not installed. Run pip install "
            f"{name:.80}, or name another base."
        ) from fault
    folders = {Path(str(file.locate())).parent for file in files if file.suffix == ".json"}
    models = sorted(folder for folder in folders if describes_model(folder))
    # Parts of a model, such as its pooling, have configurations of their own.
    models = [each for each in models if not any(other in each.parents for other in models)]
    if len(models) != 1:
        found = ", ".join(map(str, models)) or "none"
        raise SuiteError(
            f"The package {name!r} must hold one model, and there is {found}. Give the folder of "
            "the model as the base."
        )
    return models[0]


def architecture_of(plan: SuitePlan, base: Checkpoint) -> ArchitectureSpec:
    """The network that is trained: as the plan says, else as the base's own files do.

    Raises:
        SuiteError: nothing says it.
    """
    if plan.architecture is not None:
        return plan.architecture
    found = name_architecture([{name: base.info(name).shape for name in base}], [base])
    if found is None:
        raise SuiteError(
            f"Nothing beside {plan.base} says which network it is, or it is none that can be run. "
            "Add 'architecture: {name: ..., args: {...}}' to the plan."
        )
    return found


def base_identity(base: Checkpoint) -> str:
    """Digest (hex) of a base's weights and of the files that come along with it."""
    beside = Layout(base, ()).side_files
    return digest_of(base.digest, *(p for n, f in beside.items() for p in (n, file_digest(f))))


def copy_base(base: Checkpoint, folder: Path, dtype: torch.dtype | None) -> None:
    """Write a base's weights, and its configuration and tokenizer, into a folder.

    Experts start from what is written, so that their task vectors begin at exactly zero.

    Args:
        base: to copy.
        folder: to write into.
        dtype: of floating tensors; their own if None.

    Raises:
        SuiteError: numbers that do not fit the dtype.
        OutputError: it cannot be written.
    """
    names = [name for name in base if name not in base.aliases]
    tensors = {name: to_dtype(name, base.tensor(name), dtype) for name in names}
    write_weights(tensors, folder / WEIGHTS)
    Layout(base, ()).copy_side_files(folder, Written.of(Checkpoint(folder / WEIGHTS)))


def to_dtype(name: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor as it is written; those of whole numbers as they are.

    Raises:
        SuiteError: it does not fit.
    """
    if dtype is None or not value.is_floating_point():
        return value.detach().cpu()
    written = value.detach().to("cpu", dtype)
    if not is_finite(written):
        raise SuiteError(f"{name!r} does not fit into {dtype}. Choose the dtype float32.")
    return written


def write_weights(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    packed = {name: value.contiguous() for name, value in tensors.items()}
    write_atomically(path, save(packed, METADATA))

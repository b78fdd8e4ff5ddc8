"""Work that is measured in fresh processes: MergeScope's, and the plain routes beside it.

Each function is named by a measurement and gets its arguments from JSON.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from analysis.spectral.spectra import spectral_summary, spectrum
from benchmarks.synthetic import is_matrix
from merge_core.executors.choose import choose_executor as executor_named
from merge_core.factors.low_rank import count_directions
from merge_core.factors.store import FactorStore
from merge_core.merging.recipe import make_recipe
from merge_core.methods.declaration import Run
from merge_core.methods.selection import count_kept
from merge_core.methods.sparse import TiesParameters, thresholds
from merge_core.output.model_folder import merge_to_folder
from merge_core.progress import Progress
from merge_core.suites.suite import load_suite
from merge_core.task_vectors import TensorGroups


def idle() -> None:
    """Do nothing, to measure a process that has only imported everything."""


def merge(
    suite: str, method: str, parameters: dict[str, Any], output: str, executor: str = "threads"
) -> None:
    """A merge from files to a folder, as ``mergescope merge`` does it."""
    recipe = make_recipe({"suite": suite, "method": method, "parameters": parameters})
    where = executor_named(executor)
    merge_to_folder(recipe, load_suite(suite), Path(output), executor=where)


def _members(suite: str) -> list[Any]:
    """The experts' files, opened without MergeScope."""
    document = yaml.safe_load(Path(suite).read_text())
    folder = Path(suite).parent
    return [
        safe_open(folder / expert["weights"], framework="pt")
        for expert in document["experts"].values()
    ]


def _centre(members: list[Any], name: str) -> tuple[Tensor, Tensor]:
    """The average and the centred task vectors of a parameter, as in the authors' code."""
    experts = torch.stack([member.get_tensor(name) for member in members])
    average = experts.mean(dim=0)
    return average, experts - average


def authors(
    suite: str, rank: float, scale: float, output: str, blocks: list[str]
) -> dict[str, float]:
    """CART with `torch.linalg.svd` on every matrix as stored, streamed tensor by tensor.

    Args:
        suite: one file per expert.
        rank, scale: of CART.
        output: file to write.
        blocks: only matrices whose name starts so are decomposed (all where there is none); the
            others are averaged.

    Returns:
        Seconds spent on the decomposed matrices, how many entries they have, and how many all
        matrices have.
    """
    members = _members(suite)
    merged: dict[str, Tensor] = {}
    seconds, done, entries = 0.0, 0, 0
    for name in members[0].keys():  # noqa: SIM118 - no dictionary
        average, centred = _centre(members, name)
        if is_matrix(name, tuple(average.shape)):
            entries += average.numel()
            if not blocks or name.startswith(tuple(blocks)):
                start = time.perf_counter()
                k = count_directions(rank, min(average.shape))
                for matrix in centred:
                    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
                    average = average + scale * (U[:, :k] * S[:k]) @ Vh[:k]
                seconds += time.perf_counter() - start
                done += average.numel()
        merged[name] = average
    save_file(merged, output, {"format": "pt"})
    return {"seconds": seconds, "entries": done, "all": entries}


def update_error(suite: str, merged: str, names: list[str], rank: float, scale: float) -> float:
    """The largest relative error of CART's updates of some parameters, against a float64 SVD.

    ‖(θ − θ_avg) − λ Σ_t SVD_k(C_t)‖_F / ‖λ Σ_t SVD_k(C_t)‖_F, with θ as it was written.
    """
    members = _members(suite)
    result = safe_open(merged, framework="pt")
    worst = 0.0
    for name in names:
        experts = torch.stack([member.get_tensor(name) for member in members]).double()
        average = experts.mean(dim=0)
        k = count_directions(rank, min(average.shape))
        update = torch.zeros_like(average)
        for expert in experts:
            U, S, Vh = torch.linalg.svd(expert - average, full_matrices=False)
            update += scale * (U[:, :k] * S[:k]) @ Vh[:k]
        off = result.get_tensor(name).double() - average - update
        worst = max(worst, float(off.norm() / update.norm()))
    return worst


def output_distance(first: str, second: str) -> float:
    """The largest relative distance ‖a − b‖_F / ‖b‖_F of the tensors of two folders' weights."""
    ours, theirs = _tensors(Path(first)), _tensors(Path(second))
    if set(ours) != set(theirs):
        raise ValueError("the two outputs hold different parameters")
    worst = 0.0
    for name, other in theirs.items():
        b = other.get_tensor(name).double()
        off = (ours[name].get_tensor(name).double() - b).norm() / b.norm().clamp_min(1e-30)
        worst = max(worst, float(off))
    return worst


def _tensors(folder: Path) -> dict[str, Any]:
    """The open file of each parameter in a folder."""
    files = [safe_open(path, framework="pt") for path in folder.glob("*.safetensors")]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118


def groups_of(suite: str) -> TensorGroups:
    """All parameters of a suite, with the store of factors in the cache folder."""
    return TensorGroups(load_suite(suite), None, FactorStore())


def _named_groups(suite: str, prefixes: list[str]) -> TensorGroups:
    groups = groups_of(suite)
    if prefixes:
        groups.members = [g for g in groups.members if g.name.startswith(tuple(prefixes))]
    return groups


def spectra(suite: str, prefixes: list[str], shown: str) -> dict[str, Any]:
    """The spectral summary of all matrices and tasks, and one matrix's values of the first task.

    Returns:
        matrices (matrices times tasks), seconds of the summary, sigma.
    """
    groups = _named_groups(suite, prefixes)
    start = time.perf_counter()
    summary = spectral_summary(groups, "average")
    seconds = time.perf_counter() - start
    group = next(g for g in groups.members if g.name == shown)
    frame = spectrum(group, "average")
    sigma = frame.loc[frame["task"] == group.tasks[0], "sigma"]
    return {"matrices": len(summary), "seconds": seconds, "sigma": [float(s) for s in sigma]}


def plain_spectra(suite: str, prefixes: list[str], shown: str) -> dict[str, Any]:
    """The same with `torch.linalg.svdvals`, matrix by matrix in float32; sigma in float64."""
    members = _members(suite)
    count = 0
    start = time.perf_counter()
    for name in members[0].keys():  # noqa: SIM118 - no dictionary
        if not name.startswith(tuple(prefixes)):
            continue
        average, centred = _centre(members, name)
        if is_matrix(name, tuple(average.shape)):
            for matrix in centred:
                torch.linalg.svdvals(matrix)
                count += 1
    seconds = time.perf_counter() - start
    experts = torch.stack([member.get_tensor(shown) for member in members]).double()
    sigma = torch.linalg.svdvals(experts[0] - experts.mean(dim=0))
    return {"matrices": count, "seconds": seconds, "sigma": sigma.tolist()}


def ties_thresholds(suite: str, tasks: list[str], density: float) -> dict[str, Any]:
    """TIES' thresholds over the whole model, by MergeScope and by sorting, and their masks.

    Returns:
        Seconds of both, reading included, whether all masks are equal, and the entries per task.
    """
    loaded = load_suite(suite)
    groups = TensorGroups(loaded, tasks, FactorStore())
    start = time.perf_counter()
    limits = thresholds(groups, TiesParameters(density=density), Run("base"), Progress())
    seconds = time.perf_counter() - start
    assert limits is not None
    base, equal, sorting, entries = loaded.base, True, 0.0, 0
    assert base is not None
    for task, limit in zip(tasks, limits, strict=True):
        start = time.perf_counter()
        expert = loaded.expert(task)
        parts = [(expert.tensor(n) - base.tensor(n)).abs().flatten() for n in loaded.parameters]
        magnitudes = torch.cat(parts)
        entries = magnitudes.numel()
        least = magnitudes.sort(descending=True).values[count_kept(density, entries) - 1]
        sorting += time.perf_counter() - start
        equal &= torch.equal(magnitudes >= limit, magnitudes >= least)
    return {"seconds": seconds, "sort": sorting, "equal": equal, "entries": entries}

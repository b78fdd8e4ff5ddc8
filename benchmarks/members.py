"""Synthetic suites on disk, and the measurements that several parts make of them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import synthetic
from benchmarks.measure import Laboratory, Measurement, remove, warm, weights_below
from benchmarks.synthetic import Model, Spectrum

# CART's, as its authors use it.
RANK, SCALE = 0.08, 1.0


@dataclass(frozen=True)
class Members:
    """A synthetic suite on disk.

    Attributes:
        suite: its suite.yaml.
        model: layout of its members.
    """

    suite: Path
    model: Model

    @classmethod
    def make(cls, laboratory: Laboratory, model: Model, spectrum: Spectrum, tasks: int) -> Members:
        """Write the suite, or find it complete."""
        folder = laboratory.work / f"{model.name}-{spectrum}-{tasks}"
        return cls(synthetic.write_suite(folder, model, spectrum, tasks), model)

    @cached_property
    def experts(self) -> list[Path]:
        """All files of the experts."""
        return weights_below(self.suite.parent / "experts")

    @cached_property
    def base(self) -> list[Path]:
        """All files of the base."""
        place = self.suite.parent.parent / f"{self.model.name}-base-0"
        return weights_below(place if place.is_dir() else place.with_suffix(".safetensors"))

    def block(self) -> str:
        """The prefix of the parameters of the block in the middle."""
        layers = "model.layers" if "decoder" in self.model.name else "blocks"
        return f"{layers}.{self.depth // 2}."

    @cached_property
    def depth(self) -> int:
        """Number of blocks."""
        place = 2 if "decoder" in self.model.name else 1
        return 1 + max(
            int(name.split(".")[place])
            for name in self.model.shapes
            if name.startswith(("blocks.", "model.layers."))
        )

    @property
    def matrices(self) -> list[str]:
        """Names of the matrices of the middle block, the largest last."""
        prefix = self.block()
        shapes = self.model.shapes
        names = [n for n in shapes if n.startswith(prefix) and synthetic.is_matrix(n, shapes[n])]
        return sorted(names, key=lambda name: np.prod(shapes[name]))


def measure_merge(
    laboratory: Laboratory,
    members: Members,
    method: str,
    parameters: dict[str, Any],
    *,
    fresh: bool,
    cold: bool,
    repeats: int = 1,
    job: str = "benchmarks.jobs:merge",
    python: str | Path = sys.executable,
    extra: dict[str, Any] | None = None,
) -> Measurement:
    """A merge into the work folder's ``output``, which is left there.

    Args:
        laboratory, members, method, parameters: what to measure.
        fresh: forget all that MergeScope has stored before each repeat.
        cold: drop the files from the system's cache before each repeat; else read them first.
        repeats: how often.
        job, python, extra: another way to merge.
    """
    output = laboratory.work / "output"

    def before() -> None:
        remove(output)
        if fresh:
            laboratory.fresh_cache()
        if not cold:
            warm(files)

    files = [*members.experts, *members.base]
    arguments = {
        "suite": str(members.suite),
        "method": method,
        "parameters": parameters,
        "output": str(output),
        **(extra or {}),
    }
    return laboratory.run(
        job, arguments, repeats=repeats, cold=files if cold else (), before=before, python=python
    )


def measure_copy(
    laboratory: Laboratory, members: Members, files: list[Path], cold: bool, repeats: int
) -> Measurement:
    """Reading files and writing as many bytes as one model has, without a merge."""
    output = laboratory.work / "copy"

    def before() -> None:
        remove(output)
        if not cold:
            warm(files)

    written = members.model.nbytes
    arguments = {"files": [str(f) for f in files], "output": str(output), "written": written}
    job = "benchmarks.copying:copy"
    result = laboratory.run(
        job, arguments, repeats=repeats, cold=files if cold else (), before=before
    )
    remove(output)
    return result


def measure_spectra(laboratory: Laboratory, members: Members, prefixes: list[str]) -> Measurement:
    """MergeScope's spectra of the parameters whose names start so (all without), nothing stored."""

    def before() -> None:
        laboratory.fresh_cache()
        warm([*members.experts, *members.base])

    arguments = {
        "suite": str(members.suite),
        "prefixes": prefixes,
        "shown": members.matrices[0],
    }
    return laboratory.run("benchmarks.jobs:spectra", arguments, before=before)

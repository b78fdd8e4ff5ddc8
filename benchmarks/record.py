"""What was measured, as JSON for comparison and as a table to read."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

Better = Literal["lower", "higher", "neither"]
FORMAT = 1
GB = 1e9


@dataclass(frozen=True)
class Row:
    """One measured number.

    Attributes:
        part: the group of measurements it belongs to.
        what: its name, unique within the part.
        value: the number.
        unit: s, ms, MB, GB/s, x (a ratio), or "" for pure numbers.
        better: which way is an improvement.
        spread: relative distance of the slowest from the fastest repeat, 0 for a single one.
        at_least, at_most: what was asked of it.
        note: how it was measured, where that is not plain.
    """

    part: str
    what: str
    value: float
    unit: str = "s"
    better: Better = "lower"
    spread: float = 0.0
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""

    @property
    def asked(self) -> str:
        """What was asked, in words."""
        if self.at_least is not None:
            return f"≥ {self.at_least:g}"
        return "" if self.at_most is None else f"≤ {self.at_most:g}"

    @property
    def met(self) -> bool | None:
        """Whether that is so; None where nothing was asked."""
        if self.at_least is not None:
            return self.value >= self.at_least
        return None if self.at_most is None else self.value <= self.at_most


def spread(values: Sequence[float]) -> float:
    """Relative distance of the largest from the smallest value."""
    return max(values) / min(values) - 1 if min(values) > 0 else 0.0


class Sheet:
    """The rows of one part while they are measured; each is printed when it is known.

    Args:
        part: its name.
    """

    def __init__(self, part: str) -> None:
        self.part = part
        self.rows: list[Row] = []

    def add(self, what: str, value: float, unit: str, better: Better, **more: Any) -> None:
        """Any row; `more` are further fields of :class:`Row`."""
        row = Row(self.part, what, value, unit, better, **more)
        self.rows.append(row)
        said = "  ".join(cell for cell in _cells(row, judged=False) if cell)
        print(f"  {said}", flush=True)

    def seconds(self, what: str, times: Sequence[float], note: str = "") -> None:
        """The fastest of several repeats."""
        self.add(what, min(times), "s", "lower", spread=spread(times), note=note)

    def rate(self, what: str, nbytes: int, times: Sequence[float]) -> None:
        """GB/s of the fastest of several repeats."""
        self.add(what, nbytes / GB / min(times), "GB/s", "higher", spread=spread(times))

    def memory(self, what: str, nbytes: float, at_most: float | None = None) -> None:
        """Bytes, shown in GB; `at_most` is in GB."""
        self.add(what, nbytes / GB, "GB", "lower", at_most=at_most)

    def speedup(self, what: str, value: float, at_least: float | None = None) -> None:
        """How many times faster than another route."""
        self.add(what, value, "x", "higher", at_least=at_least)

    def cost(self, what: str, value: float, at_most: float | None = None) -> None:
        """Time as a multiple of another's."""
        self.add(what, value, "x", "lower", at_most=at_most)


@dataclass
class Part:
    """All rows of a part, when they were measured, or why they could not be."""

    rows: list[Row]
    date: str
    seconds: float
    failed: str = ""


@dataclass
class Results:
    """All parts of one or several runs on one machine.

    Attributes:
        machine: processor, cores, memory, versions.
        quick: whether sizes were too small to judge anything by.
        parts: by name.
    """

    machine: dict[str, str]
    quick: bool
    parts: dict[str, Part] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write ``path`` (JSON), and the table beside it as ``.md``."""
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {"format": FORMAT, **asdict(self)}
        path.write_text(json.dumps(document, indent=1, ensure_ascii=False), encoding="utf-8")
        path.with_suffix(".md").write_text(table(self), encoding="utf-8")


def load(path: Path) -> Results:
    """Results that :meth:`Results.save` wrote.

    Raises:
        ValueError: another format.
        OSError: unreadable.
    """
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if document.pop("format", None) != FORMAT:
        raise ValueError(f"{path} was written by another version of the benchmarks")
    parts = {
        name: Part(**{**part, "rows": [Row(**row) for row in part["rows"]]})
        for name, part in document.pop("parts").items()
    }
    return Results(**document, parts=parts)


def machine(threads: int) -> dict[str, str]:
    """What the figures depend on."""
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = {name: metadata.version(name) for name in ("torch", "numpy", "safetensors")}
    return {
        "processor": processor,
        "cores": str(os.cpu_count()),
        "memory": f"{memory:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "threads": str(threads),
        **versions,
    }


def number(value: float, unit: str) -> str:
    """A value as it is printed, to three digits, with its unit."""
    text = f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:,.{_decimals(value)}f}"
    return f"{text} {unit}".strip()


def _decimals(value: float) -> int:
    size = abs(value)
    return 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 or size == 0 else 3


def _cells(row: Row, judged: bool) -> list[str]:
    noise = f" ± {row.spread:.0%}" if row.spread >= 0.005 else ""
    met = {True: "yes", False: "**no**", None: ""}[row.met if judged else None]
    return [row.what, number(row.value, row.unit) + noise, row.asked, met, row.note]


def table(results: Results) -> str:
    """The results as Markdown."""
    machine = ", ".join(f"{name} {value}" for name, value in results.machine.items())
    lines = ["# Benchmark results", "", f"Measured on: {machine}.", ""]
    if results.quick:
        lines += ["**A quick run: sizes too small to judge anything by.**", ""]
    lines += [
        "Ratios hold across machines, seconds do not; both sides of a ratio come from one run. "
        "± is the distance of the slowest from the fastest repeat; times are the fastest. Memory "
        "is the highest anonymous memory of the process and those below it, looked at every "
        "20 ms. Made by `python -m benchmarks.run`; see [README.md](README.md).",
        "",
    ]
    for name, part in results.parts.items():
        lines += [f"## {name}", "", f"{part.date}, {part.seconds:.0f} s.", ""]
        if part.failed:
            lines += [f"**Failed:** {part.failed}", ""]
        if part.rows:
            lines += ["| what | measured | asked | met | note |", "|---|---|---|---|---|"]
            lines += ["| " + " | ".join(_cells(row, not results.quick)) + " |" for row in part.rows]
            lines.append("")
    return "\n".join(lines)

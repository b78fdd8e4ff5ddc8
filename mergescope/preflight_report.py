"""The tables of ``mergescope inspect``: what a pre-flight found, in few rows or in full."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING, TypeVar

from mergescope.terminal import print_table, size

if TYPE_CHECKING:
    from rich.console import Console

    from merge_core.suites.preflight import Difference, ParameterPlan, Preflight

Row = TypeVar("Row")
MOST_DIFFERENCES = 20
MOST_SHAPES = 3


def print_preflight(
    out: Console, report: Preflight, full: bool = False, timed: bool = True
) -> None:
    """Print a report.

    Args:
        out: where to.
        report: of :func:`merge_core.suites.preflight.preflight`.
        full: every parameter and difference rather than one row a kind.
        timed: with an estimate of time, for which torch is imported and this machine measured.
    """
    if report.unsafe_globals:
        out.print(
            f"named in pickled files, neither imported nor run: {', '.join(report.unsafe_globals)}"
        )
    decomposed = sum(row.decomposed for row in report.plan)
    out.print(
        f"parameters: {len(report.plan)} ({decomposed} decomposed, "
        f"{len(report.plan) - decomposed} averaged)"
    )
    _print_cost(out, report, timed and not report.blocking)
    for note in report.notes:
        out.print(f"note: {note}")
    every = full or len(report.differences) <= MOST_DIFFERENCES
    print_table(
        out,
        "Differences between the members",
        ["member", "parameter", "kind", "detail"],
        [[d.member, d.parameter, d.kind, d.detail] for d in report.differences]
        if every
        else _kinds_of_differences(report.differences),
    )
    if full:
        columns = ["parameter", "shape", "dtype", "treatment", "why"]
        rows = [[r.name, _shape(r), r.dtype, _treatment(r), r.reason] for r in report.plan]
    else:
        columns = ["parameters", "what", "treatment", "shapes", "for example"]
        rows = _kinds_of_parameters(report.plan)
    print_table(out, "Parameters" if full else "Parameters (each with --full)", columns, rows)


def _print_cost(out: Console, report: Preflight, timed: bool) -> None:
    """What a merge takes; its time where asked for."""
    workers = report.job.workers
    threads = "one thread" if workers == 1 else f"{workers} threads"
    less = ""
    if report.entrywise_bytes < report.memory_bytes:
        less = f" ({size(report.entrywise_bytes)} by methods that decompose nothing)"
    out.print(
        f"a merge takes about {size(report.memory_bytes)} of memory on {threads}{less} "
        f"and {size(report.disk_bytes)} on disk"
    )
    if report.factor_bytes:
        out.print(
            f"spectral methods also store up to {size(report.factor_bytes)} of factors in the "
            "cache, so that another rank or scale is quick"
        )
    if timed:
        from merge_core.suites.estimates import TIME_NOTE, seconds, time_in_words

        taken = seconds(report.job)
        out.print(
            f"time on this machine: {time_in_words(taken.entrywise)} to average, "
            f"{time_in_words(taken.spectral)} by CART ({TIME_NOTE})"
        )


def _kinds_of_differences(differences: Iterable[Difference]) -> list[list[str]]:
    found = _group(((d.member, d.kind), d) for d in differences)
    return [
        [member, f"{rows[0].parameter} and {len(rows) - 1} more", kind, rows[0].detail]
        if len(rows) > 1
        else [member, rows[0].parameter, kind, rows[0].detail]
        for (member, kind), rows in found.items()
    ]


def _kinds_of_parameters(plan: Iterable[ParameterPlan]) -> list[list[str]]:
    found = _group(((_treatment(r), r.reason), r) for r in plan)
    return [
        [str(len(rows)), reason, treatment, _shapes(rows), rows[0].name]
        for (treatment, reason), rows in sorted(
            found.items(), key=lambda item: item[0][0] != "decomposed"
        )
    ]


Key = TypeVar("Key", bound=Hashable)


def _group(pairs: Iterable[tuple[Key, Row]]) -> dict[Key, list[Row]]:
    """Rows by key, in the order in which the keys first come."""
    found: dict[Key, list[Row]] = {}
    for key, row in pairs:
        found.setdefault(key, []).append(row)
    return found


def _treatment(row: ParameterPlan) -> str:
    return "decomposed" if row.decomposed else "averaged"


def _shape(row: ParameterPlan) -> str:
    return " x ".join(map(str, row.shape)) or "one number"


def _shapes(rows: list[ParameterPlan]) -> str:
    shapes = list(dict.fromkeys(_shape(row) for row in rows))
    more = f", and {len(shapes) - MOST_SHAPES} more" if len(shapes) > MOST_SHAPES else ""
    return ", ".join(shapes[:MOST_SHAPES]) + more

"""What commands say of files beside the weights, and of experts and their base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from mergescope.terminal import print_table

if TYPE_CHECKING:
    from rich.console import Console

    from merge_core.compatibility.findings import Finding
    from merge_core.compatibility.kinship import Kinships
    from merge_core.suites.suite import Suite

MOST_WARNINGS = 6
QUESTION = "Is this a fine-tune of that base?"
ALONE = "Do these experts belong together?"


def print_findings(out: Console, findings: Sequence[Finding]) -> None:
    """What differs between the files beside the weights, the gravest first.

    Args:
        out: where to.
        findings: of :func:`merge_core.compatibility.compare.compare_companions`.
    """
    print_table(
        out,
        "Differences in the files beside the weights",
        ["level", "file", "field", "who has what", "meaning"],
        [[f.level, f.file, f.field, f.values, f.meaning] for f in findings],
    )


def print_kinships(out: Console, found: Kinships | None) -> None:
    """How experts stand to their base and to each other; nothing where it is not known."""
    if found is None:
        return
    if found.has_base:
        title, columns = QUESTION, ["expert", "verdict", "|t - b| / |b|", "cos(t, b)"]
    else:
        title, columns = ALONE, ["expert", "verdict", "|t - mean| / |mean|", "cos, at most"]
    print_table(
        out,
        title,
        [*columns, "most alike", "cos of updates"],
        [
            [
                row.member,
                row.verdict,
                f"{row.distance:.3g}",
                _figure(row.cosine),
                row.nearest,
                _figure(row.update_cosine),
            ]
            for row in found.rows
        ],
    )
    away = " and the distance about 1.41" if found.has_base else ""
    out.print(
        f"read: {found.entries:,} weights of {found.matrices} matrices; for two networks of "
        f"different random starts the cosine is 0 ± {found.deviation:.1g}{away}"
    )
    for warning in found.warnings:
        out.print(f"warning: {warning}")


def echo_warnings(suite: Suite, tasks: Sequence[str] | None) -> None:
    """Say on stderr, before a merge, what its output should not be trusted with.

    Args:
        suite: the suite.
        tasks: chosen experts (all when None).
    """
    from merge_core.compatibility.compare import compare_companions
    from merge_core.compatibility.kinship import measure_kinship

    kinships = measure_kinship(suite, tasks)
    said = list(kinships.warnings if kinships else ())
    said += [f.sentence for f in compare_companions(suite, tasks) if f.level == "warned"]
    for sentence in said[:MOST_WARNINGS]:
        typer.echo(f"warning: {sentence}", err=True)
    if (more := len(said) - MOST_WARNINGS) > 0:
        typer.echo(f"warning: {more} more; see 'mergescope inspect'", err=True)


def _figure(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"

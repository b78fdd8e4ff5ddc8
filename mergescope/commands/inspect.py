"""``mergescope inspect``: what fits, what differs, and what a merge takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from merge_core.errors import MergeScopeError
from mergescope.commands.hub import suite_or_model, with_headers
from mergescope.compatibility_report import print_findings, print_kinships
from mergescope.preflight_report import print_preflight
from mergescope.terminal import TasksOption, console, print_frame, progress_bar, split_names

if TYPE_CHECKING:
    import pandas as pd

    from merge_core.suites.suite import Suite


def inspect(
    suite: Annotated[
        str,
        typer.Argument(
            help="A suite.yaml, its folder, a bundled suite by name, say vision, or one model on "
            "the hub: hf://org/name. What is on the hub alone shows its headers; no weights are "
            "downloaded."
        ),
    ],
    tasks: TasksOption = None,
    headers_only: Annotated[
        bool, typer.Option("--headers-only", help="Pre-flight only; read no weights.")
    ] = False,
    spectra: Annotated[
        bool,
        typer.Option(
            "--spectra",
            help="Norms and ranks of the task vectors too, and how long a merge takes here: "
            "decomposes every matrix, which is stored for later.",
        ),
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Every parameter, not one row for each kind.")
    ] = False,
) -> None:
    """Pre-flight of a suite: what fits, what a merge takes, whether members belong together."""
    from merge_core.compatibility.compare import compare_companions
    from merge_core.compatibility.kinship import measure_kinship
    from merge_core.suites.preflight import preflight

    given = suite_or_model(suite)
    loaded = with_headers(given)
    headers_only = headers_only or loaded is not given
    report = preflight(loaded, split_names(tasks))
    out = console()
    out.print(f"{loaded.name}: {len(loaded.tasks)} experts ({', '.join(loaded.tasks)})")
    out.print(f"base: {'none' if loaded.spec.base is None else 'yes'}")
    if (network := loaded.network_in_words) is not None:
        out.print(f"network: {network}")
    lacking = loaded.why_not_evaluated
    out.print(f"evaluation: {'ready' if lacking is None else 'not possible, ' + lacking}")
    print_preflight(out, report, full, timed=spectra)
    findings = compare_companions(loaded, split_names(tasks))
    print_findings(out, findings)
    read = not headers_only and not report.blocking
    if read:
        print_kinships(out, measure_kinship(loaded, split_names(tasks)))
    if read and not spectra:
        out.print("norms and ranks of the task vectors, and the time of a merge: --spectra")
    if read and spectra:
        print_frame(
            out,
            "Task vectors: norm, stable and effective rank (means over matrices)",
            _norms(loaded, split_names(tasks)),
        )
    refused = [finding for finding in findings if finding.level == "refused"]
    if count := len(report.blocking) + len(refused):
        raise MergeScopeError(
            f"A merge is impossible; differences that prevent it: {count} (see the table above)."
        )


def _norms(suite: Suite, tasks: list[str] | None) -> pd.DataFrame:
    """Norms and ranks of the task vectors about each available origin, one row a task."""
    import pandas as pd

    from analysis.spectral.spectra import spectral_summary
    from merge_core.factors.store import FactorStore
    from merge_core.task_vectors import Origin, TensorGroups

    origins: list[Origin] = ["average"] if suite.base is None else ["base", "average"]
    parts = []
    for origin in origins:
        groups = TensorGroups(suite, tasks, FactorStore())
        summary = spectral_summary(groups, origin, progress=progress_bar("decomposing"))
        by_task = summary.groupby("task", sort=False)
        parts.append(
            pd.DataFrame(
                {
                    "about": origin,
                    "norm": by_task["frobenius"].agg(lambda x: (x**2).sum() ** 0.5),
                    "stable": by_task["stable_rank"].mean(),
                    "effective": by_task["effective_rank"].mean(),
                    "k for 90 %": by_task["energy_rank_90"].mean(),
                    "top 8 %": by_task["top_share"].mean(),
                }
            ).reset_index()
        )
    return pd.concat(parts, ignore_index=True)

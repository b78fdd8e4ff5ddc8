"""``mergescope record``: what the dashboard shows of a suite, in a file without its weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from mergescope.terminal import SuiteArgument, TasksOption, progress_bar, size, split_names


def record(
    suite: SuiteArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file to write: NAME.mergescope.")
    ],
    tasks: TasksOption = None,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Record spectra and interference alone.")
    ] = False,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods whose accuracies are recorded, separated by commas; all that learn "
            "nothing from data when left out. What was evaluated before is not evaluated again."
        ),
    ] = None,
) -> None:
    """Pack a suite's card and frames, without its weights and inputs, to be opened by anyone.

    Of the weights 32 x 32 numbers of one matrix are in it, which the first page draws.
    """
    from analysis.frames.recording import check_record_path, record_suite, write_record
    from analysis.frames.store import FrameStore
    from merge_core.factors.store import FactorStore
    from merge_core.suites.suite import load_suite

    check_record_path(output)
    loaded = load_suite(suite).restrict(split_names(tasks))
    begun = time.monotonic()
    bar = progress_bar("recording")
    only = split_names(methods)
    data = record_suite(loaded, suite, FrameStore(), FactorStore(), bar, weights_only, only)
    write_record(output, data)
    typer.echo(
        f"{output} ({size(len(data))}, {len(loaded.tasks)} tasks, "
        f"{time.monotonic() - begun:.0f} s); open it with: mergescope app {output}"
    )

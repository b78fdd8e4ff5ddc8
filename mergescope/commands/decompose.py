"""``mergescope decompose``: the factors of a suite's task vectors, ready before they are needed."""

from __future__ import annotations

import time
from typing import Annotated, cast, get_args

import typer

from merge_core.errors import MergeScopeError
from mergescope.terminal import SuiteArgument, TasksOption, progress_bar, split_names


def decompose(
    suite: SuiteArgument,
    origin: Annotated[
        str, typer.Option(help="What task vectors are taken about: average or base.")
    ] = "average",
    tasks: TasksOption = None,
    executor: Annotated[
        str,
        typer.Option(
            help="Where matrices are decomposed: serial, threads, processes, ray (:N for N "
            "workers), or ray://HOST:PORT of a cluster that shares $MERGESCOPE_CACHE."
        ),
    ] = "threads",
) -> None:
    """Decompose all matrices once; spectra, interference, every rank and scale then reuse it."""
    from merge_core.executors.choose import choose_executor as executor_named
    from merge_core.factors.factorise import decompose_all
    from merge_core.factors.store import FactorStore
    from merge_core.merging.engine import check_fits
    from merge_core.suites.suite import load_suite
    from merge_core.task_vectors import Origin, TensorGroups

    if origin not in get_args(Origin):
        raise MergeScopeError(f"--origin must be average or base, got {origin!r}.")
    where = executor_named(executor)
    loaded = load_suite(suite)
    chosen = loaded.select(split_names(tasks))
    check_fits(loaded, chosen)
    store = FactorStore()
    begun = time.monotonic()
    groups = TensorGroups(loaded, chosen, store)
    bar = progress_bar("decomposing")
    done = decompose_all(groups, cast("Origin", origin), where, bar)
    typer.echo(
        f"{done} matrices of {len(chosen)} experts in {time.monotonic() - begun:.1f} s; factors "
        f"in {store.folder}"
    )

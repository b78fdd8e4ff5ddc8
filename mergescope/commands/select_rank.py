"""``mergescope select-rank``: the rank and scale that merge best, and how sure that is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from merge_core.errors import MergeScopeError, OutputError
from mergescope.terminal import (
    SHARES,
    CsvOption,
    PrecisionOption,
    SuiteArgument,
    TasksOption,
    check_csv,
    console,
    numbers,
    parse_precision,
    print_frame,
    progress_bar,
    size,
    split_names,
    write_csv,
)

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from analysis.rank_selection.rule import Mode
    from analysis.rank_selection.select import Selection

MODES = ("labels", "inputs", "weights")


def select(
    suite: SuiteArgument,
    method: Annotated[str, typer.Option(help="A method with a rank or a scale.")] = "cart",
    mode: Annotated[
        str | None,
        typer.Option(
            help="What may be looked at: labels (validation inputs with labels), inputs (without "
            "them) or weights (no input); labels where the suite has them when left out."
        ),
    ] = None,
    tasks: TasksOption = None,
    ranks: Annotated[
        str | None, typer.Option(help="Shares (0.08) or numbers of directions (8), by commas.")
    ] = None,
    scales: Annotated[str | None, typer.Option(help="Scaling coefficients, by commas.")] = None,
    full_grid: Annotated[
        bool, typer.Option("--full-grid", help="Every setting on every input; slow and complete.")
    ] = False,
    every_proxy: Annotated[
        bool,
        typer.Option(
            "--every-proxy",
            help="Also what every other rule picks: those that read weights in one pass over the "
            "matrices, those that read inputs by a search each.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the inputs that a search begins with.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the recommended recipe here.")
    ] = None,
    csv: CsvOption = None,
    report: Annotated[
        bool, typer.Option(help="Evaluate the recommendation on the test split, at the end.")
    ] = True,
    executor: Annotated[
        str | None,
        typer.Option(
            help="Where the settings of a full grid are evaluated side by side: threads:2, "
            "processes:2, ray, ray://host:port. One after another if left out."
        ),
    ] = None,
    precision: PrecisionOption = "float32",
) -> None:
    """Which rank and scale: from labels, from inputs alone, or from weights alone."""
    from analysis.evaluation.evaluator import Evaluator
    from analysis.rank_selection.select import SelectionOptions, select_rank
    from analysis.rank_selection.space import search_space
    from merge_core.executors.choose import choose_executor as executor_named
    from merge_core.factors.store import FactorStore
    from merge_core.files import write_atomically
    from merge_core.merging.engine import MergeSession
    from merge_core.suites.suite import load_suite

    check_csv(csv)
    computed = parse_precision(precision)
    if output is not None and output.is_dir():
        raise OutputError(f"{output} is a folder; give a file name for the recipe.")
    where = None if executor is None else executor_named(executor)
    loaded = load_suite(suite)
    chosen = _parse_mode(mode, loaded.can_evaluate)
    axes = numbers(ranks, "--ranks"), numbers(scales, "--scales")
    space = search_space(method, suite, split_names(tasks), *axes)
    evaluator = Evaluator(loaded, precision=computed) if loaded.can_evaluate else None
    session = MergeSession(loaded, space.base.tasks, FactorStore())
    result = select_rank(
        space,
        session,
        evaluator,
        SelectionOptions(chosen, full_grid, every_proxy, report, seed, not every_proxy),
        progress=progress_bar("searching"),
        executor=where,
    )
    _print(console(), result, every_proxy)
    write_csv(result.points, csv)
    if output is not None:
        write_atomically(output, result.recipe.publish(loaded).to_yaml().encode())


def _parse_mode(text: str | None, can_evaluate: bool) -> Mode:
    if text is None:
        return "labels" if can_evaluate else "weights"
    if text not in MODES:
        raise MergeScopeError(f"--mode must be labels, inputs or weights, got {text!r}.")
    return cast("Mode", text)


def _print(out: Console, result: Selection, every: bool) -> None:
    from analysis.metrics import mean_over_tasks, metric_of
    from analysis.rank_selection.select import setting_words

    out.print(f"recommended: {setting_words(result.rank, result.scale)}")
    if result.at_edge:
        out.print(result.at_edge)
    out.print(result.why)
    if result.accuracy is not None:
        out.print(f"validation: {_share(result.accuracy)}")
    if result.report is not None:
        out.print(f"test: {_share(mean_over_tasks(result.report).iloc[0])}")
    tied = result.tied
    for axis in ("rank", "scale"):
        values = tied[axis].dropna()
        if len(values):
            out.print(
                f"{axis} of the {len(tied)} settings that these inputs do not tell apart: "
                f"{values.min():g} to {values.max():g}"
            )
    metric = metric_of(result.picks)
    columns = ["title", "mode", "rank", "scale", metric.column]
    print_frame(
        out,
        "What each rule picks" if every else "What the rule picks",
        result.picks[columns].dropna(axis=1, how="all"),
        () if metric.unit else SHARES,
    )
    if not every:
        out.print("what the other rules pick: --every-proxy")
    for row in result.picks[result.picks["at_edge"] != ""].to_dict("records"):
        if row["proxy"] != result.rule:
            out.print(f"{row['title']}: {row['at_edge']}")
    if result.mode != "weights":
        out.print(
            f"inputs that decided: {result.asked_images:,}, run now: {result.forward_images:,}"
        )
    out.print(f"seconds: {result.seconds:.1f}")
    if result.low_rank_bytes is not None:
        out.print(f"kept directions: {size(result.low_rank_bytes)} in factored form")
    out.print(f"merged model: {size(result.model_bytes)}")


def _share(row: pd.Series) -> str:
    from analysis.metrics import metric_of

    metric = metric_of(row)
    if not metric.unit:
        return f"{row['accuracy']:.1%} ({row['low']:.1%} to {row['high']:.1%})"
    interval = metric.show_interval(row["low"], row["high"])
    return f"{metric.show(row[metric.column])} {metric.unit} ({interval})"

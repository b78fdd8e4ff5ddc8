"""``mergescope compare``: methods on one suite, what each reaches and costs, and what is real."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from merge_core.errors import MergeScopeError
from mergescope.terminal import (
    CsvOption,
    LimitOption,
    PrecisionOption,
    SuiteArgument,
    TasksOption,
    check_csv,
    console,
    parse_precision,
    parse_split,
    print_table,
    progress_bar,
    split_names,
    write_csv,
)

if TYPE_CHECKING:
    from rich.console import Console

    from analysis.comparison.run import Comparison
    from merge_core.merging.recipe import Recipe
    from merge_core.suites.suite import Suite

ALL = "all"


def compare(
    suite: SuiteArgument,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods separated by commas, or 'all'; all that learn nothing from data when "
            "left out."
        ),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            help="A recipe of your own beside the methods: a YAML file, or a link's query such as "
            "'method=cart&rank=0.16&scale=3'. It is merged as it is, with SUITE and --tasks. May "
            "be given several times."
        ),
    ] = None,
    best_of: Annotated[
        int,
        typer.Option(
            min=1, help="Settings that each method may try on the validation split; 1: defaults."
        ),
    ] = 1,
    seeds: Annotated[int, typer.Option(min=1, help="Of methods that draw random numbers.")] = 3,
    tasks: TasksOption = None,
    split: Annotated[str, typer.Option(help="val or test.")] = "test",
    limit: LimitOption = None,
    csv: CsvOption = None,
    precision: PrecisionOption = "float32",
) -> None:
    """Methods on the same inputs: accuracy, cost, and which differences are real."""
    from analysis.comparison.run import run_comparison
    from analysis.evaluation.evaluator import Evaluator
    from analysis.evaluation.precision import precision_words
    from merge_core.factors.store import FactorStore
    from merge_core.merging.engine import MergeSession
    from merge_core.suites.suite import load_suite

    part, computed = parse_split(split), parse_precision(precision)
    check_csv(csv)
    loaded = load_suite(suite)
    chosen = loaded.select(split_names(tasks))
    names = _choose_methods(methods, loaded, chosen)
    own = [_read_own_recipe(text, loaded, chosen) for text in recipe or []]
    evaluator = Evaluator(loaded, precision=computed)
    session = MergeSession(loaded, chosen, FactorStore())
    result = run_comparison(
        suite,
        names,
        session,
        evaluator,
        budget=best_of,
        seeds=seeds,
        split=part,
        limit=limit,
        progress=progress_bar("comparing"),
        own=own,
    )
    if part == "val" and best_of > 1:
        typer.echo(
            "note: settings were chosen on the validation split too, so these accuracies are "
            "too high; report --split test.",
            err=True,
        )
    out = console()
    _print_summary(out, result, split)
    if changed := precision_words(evaluator, chosen, part, limit):
        out.print(changed)
    _print_settings(out, result)
    _print_seeds(out, result)
    _print_differences(out, result)
    write_csv(result.summary, csv)


def _choose_methods(text: str | None, suite: Suite, tasks: tuple[str, ...]) -> list[str]:
    """Names of methods: those asked for, or those that can run here."""
    from analysis.comparison.run import usable_methods

    if text is None or text.strip() == ALL:
        found = usable_methods(suite, tasks)
        return [name for name, method in found.items() if text is not None or not method.learns]
    names = list(dict.fromkeys(split_names(text) or []))
    if not names:
        raise MergeScopeError(
            "--methods takes names separated by commas; see 'mergescope methods'."
        )
    return names


def _read_own_recipe(text: str, suite: Suite, tasks: tuple[str, ...]) -> Recipe:
    """A recipe from a file, or from a link or its query."""
    from merge_core.merging.recipe import read_recipe, recipe_from_query

    is_link = "=" in text and not Path(text).exists()
    recipe = recipe_from_query(text.rpartition("?")[2]) if is_link else read_recipe(text)
    if recipe.tasks is not None and suite.select(recipe.tasks) != tasks:
        typer.echo(
            f"note: {text} is a recipe for {', '.join(recipe.tasks)}; like the others it is "
            f"compared on {', '.join(tasks)}.",
            err=True,
        )
    return recipe


def _print_summary(out: Console, result: Comparison, split: str) -> None:
    from analysis.metrics import metric_of

    metric = metric_of(result.summary)
    unit = f" ({metric.unit})" if metric.unit else ""
    rows = result.summary.to_dict("records")
    # Two tables, so that each fits a narrow terminal.
    print_table(
        out,
        f"Mean {metric.noun}{unit} on the {split} split, with 95 % intervals{metric.hint}",
        ["method", metric.column, "95 %", "normalised", "worst task"],
        [
            [
                row["label"],
                metric.show(row[metric.column]),
                metric.show_interval(row["low"], row["high"]),
                _format_known(row["normalised"], ".1%"),
                f"{row['worst_task']} {metric.show(row['worst'])}",
            ]
            for row in rows
        ],
    )
    own = metric.show(result.experts[metric.column].mean())
    references = f"experts, each on its own task: {own}"
    out.print(
        references if result.base is None else f"{references}; base: {metric.show(result.base)}"
    )
    print_table(
        out,
        "What each takes: processor seconds to learn, decompose and merge here, from experts in "
        "memory with nothing decomposed before; and storage for all tasks",
        ["method", "seconds", "peak MB", "storage MB", "needs"],
        [
            [
                row["label"],
                f"{row['seconds']:.2g}",
                _format_known(row["peak_mb"], ".0f"),
                f"{row['storage_mb']:.3g}",
                row["needs"],
            ]
            for row in rows
        ],
    )


def _print_settings(out: Console, result: Comparison) -> None:
    """How each setting came about, where they are not all defaults."""
    rows = result.summary[["label", "chosen", "setting"]].to_numpy().tolist()
    if any(chosen != "default" for _, chosen, _ in rows):
        print_table(out, "Settings", ["method", "chosen", "setting"], rows)


def _format_known(value: float, form: str) -> str:
    """A number, or nothing where it is NaN."""
    return "" if math.isnan(value) else format(value, form)


def _print_seeds(out: Console, result: Comparison) -> None:
    from analysis.metrics import metric_of

    metric = metric_of(result.summary)
    for row in result.seeds.to_dict("records"):
        if row["seeds"] > 1:
            out.print(
                f"{row['title']}, {row['seeds']} seeds: {metric.show(row[metric.column])} ± "
                f"{metric.show_difference(row['spread'])[1:]} (standard deviation over seeds; "
                f"{metric.show(row['least'])} to {metric.show(row['most'])})"
            )


def _print_differences(out: Console, result: Comparison) -> None:
    from analysis.accuracy import differences_to, paired_differences, words_for_few_images
    from analysis.metrics import metric_of

    metric = metric_of(result.summary)
    best, *others = result.summary["label"].tolist()
    if not others:
        return
    real = differences_to(paired_differences(result.hits), best)
    print_table(
        out,
        f"Real differences to {best}, in {metric.points} (same inputs; 5 % after Holm's correction "
        "for all pairs; each interval of its pair alone)",
        ["method", "difference", "95 %", "p"],
        [
            [
                row["label"],
                metric.show_difference(row["difference"]),
                f"{metric.show_difference(row['low'])} to {metric.show_difference(row['high'])}",
                f"{row['p']:.1g}",
            ]
            for row in real.to_dict("records")
        ],
    )
    alike = [label for label in others if label not in set(real["label"])]
    out.print(words_for_few_images(result.hits))
    out.print(f"not told apart from {best}: {', '.join(alike) or 'none'}")

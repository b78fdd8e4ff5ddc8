"""``mergescope evaluate``: a recipe, or a suite's members, measured on every task."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

import typer

from mergescope.terminal import (
    CsvOption,
    LimitOption,
    PrecisionOption,
    check_csv,
    console,
    parse_precision,
    parse_split,
    print_metric,
    progress_bar,
    write_csv,
)


def evaluate(
    target: Annotated[str, typer.Argument(help="A recipe's YAML file, or a suite.")],
    split: Annotated[str, typer.Option(help="val or test.")] = "val",
    limit: LimitOption = None,
    csv: CsvOption = None,
    precision: PrecisionOption = "float32",
) -> None:
    """Per-task accuracy with 95 % intervals: of a recipe, or of a suite's members.

    Of language models: cross-entropy in nats per token, and perplexity.
    """
    import pandas as pd
    import yaml

    from analysis.evaluation.evaluator import Evaluator
    from analysis.evaluation.precision import precision_words
    from analysis.metrics import mean_over_tasks
    from merge_core.errors import SuiteError
    from merge_core.factors.store import FactorStore
    from merge_core.input_files import expand_path
    from merge_core.merging.engine import MergeSession
    from merge_core.merging.recipe import load_recipe, make_recipe
    from merge_core.suites.suite import load_suite
    from merge_core.yaml_text import load_yaml, read_text_file

    part, computed = parse_split(split), parse_precision(precision)
    check_csv(csv)
    rows = []
    path = expand_path(target, SuiteError)
    document = None
    # Whatever is wrong with the file, the loader below says it.
    with suppress(yaml.YAMLError, ValueError, OSError):
        document = load_yaml(read_text_file(path)) if path.is_file() else None
    is_recipe = isinstance(document, dict) and "experts" not in document
    if is_recipe:
        recipe, suite = load_recipe(path)
        recipes = {recipe.declaration.title: recipe}
    else:
        suite = load_suite(target)
        recipe = make_recipe({"suite": target, "method": "average"})
        recipes = {"average": recipe}
    evaluator = Evaluator(suite, precision=computed)
    session = MergeSession(suite, recipe.tasks, FactorStore())
    tasks = session.groups.tasks
    if not is_recipe:
        rows.append(evaluator.experts(tasks, part, limit).assign(model="experts"))
        if suite.base is not None:
            frame = evaluator.checkpoint(suite.base, tasks, part, limit)
            rows.append(frame.assign(model="base"))
    for title, each in recipes.items():
        frame = evaluator.recipe(each, session, part, limit, progress_bar("evaluating"))
        rows.append(frame.assign(model=title))
    table = pd.concat(rows, ignore_index=True)
    mean = mean_over_tasks(table, by=["model"]).assign(task="mean over tasks")
    table = evaluator.metric.tell(pd.concat([table, mean], ignore_index=True), ["model", "task"])
    print_metric(console(), split, table)
    if not is_recipe and (changed := precision_words(evaluator, tasks, part, limit)):
        typer.echo(changed)
    write_csv(table, csv)

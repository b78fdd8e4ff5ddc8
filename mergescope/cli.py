"""The command line: ``mergescope app | inspect | merge | evaluate | select-rank | compare | …``.

A user's mistake ends with exit code 2 and one line that says what is wrong and what to do.
Everything heavy is imported by the command that needs it, so that ``--help`` is instant.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from merge_core.errors import MergeScopeError, SuiteError
from mergescope.card_cli import card
from mergescope.compare_cli import compare
from mergescope.decompose_cli import decompose
from mergescope.hub_cli import download, push, suite_or_model, with_headers
from mergescope.inspection import print_preflight
from mergescope.methods_cli import list_methods
from mergescope.pool_cli import pool_app
from mergescope.prepare_cli import prepare
from mergescope.select_rank_cli import select
from mergescope.suite_cli import suite_app
from mergescope.terminal import (
    CsvOption,
    LimitOption,
    TasksOption,
    checked_csv,
    checked_split,
    console,
    print_frame,
    progress_bar,
    split_names,
    write_csv,
)

if TYPE_CHECKING:
    import pandas as pd

    from merge_core.decomposition import Route
    from merge_core.factors import FactorStore
    from merge_core.recipe import Recipe
    from merge_core.suite import Suite

app = typer.Typer(
    name="mergescope",
    help="The microscope for model merging.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
app.add_typer(pool_app)
app.add_typer(suite_app)

# ClickException of the click that typer uses: newer versions carry a copy of their own.
ClickException: type[Exception] = typer.BadParameter.__mro__[2]
CANCELLED = 130


def main() -> NoReturn:
    """Run the command line and leave with its exit code (2 for a user's mistake)."""
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except (MergeScopeError, ClickException) as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        typer.echo(f"mergescope: {' '.join(message.split())}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        code = CANCELLED
    if code == CANCELLED:
        typer.echo("mergescope: cancelled; no half-written output is left.", err=True)
    sys.exit(code if isinstance(code, int) else 0)


@app.command("app")
def open_app(
    references: Annotated[
        list[str] | None,
        typer.Argument(help="Suites and pools to offer beside the bundled ones."),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 8501,
    root: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder below which the page Open checkpoints may look; may be repeated. This one "
            "if left out."
        ),
    ] = None,
) -> None:
    """Open the dashboard in the browser."""
    from merge_core.pool import describes_pool, load_pool
    from merge_core.suite import load_suite
    from ui import roots
    from ui.catalog import POOLS, SUITES

    pools = [load_pool(name).path for name in references or [] if describes_pool(name)]
    suites = [load_suite(name).path for name in references or [] if not describes_pool(name)]
    environment = {
        **os.environ,
        **SUITES.environment(suites),
        **POOLS.environment(pools),
        **roots.environment(root or []),
    }
    home = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "streamlit", "run", str(home / "app.py")]
    # The folder holds .streamlit/config.toml: loopback only, no usage statistics, our themes.
    result = subprocess.run(
        [*command, f"--server.port={port}"], cwd=home, env=environment, check=False
    )
    raise typer.Exit(result.returncode)


@app.command()
def inspect(
    suite: Annotated[
        str,
        typer.Argument(
            help="A suite.yaml, its folder, 'demo' for the bundled suite, or one model on the hub: "
            "hf://org/name. What is on the hub alone shows its headers; nothing is downloaded."
        ),
    ],
    tasks: TasksOption = None,
    headers_only: Annotated[
        bool, typer.Option("--headers-only", help="Pre-flight only; read no weights.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Every parameter, not one row for each kind.")
    ] = False,
) -> None:
    """Pre-flight of a suite, and norms and ranks of its task vectors."""
    from merge_core.preflight import preflight

    given = suite_or_model(suite)
    loaded = with_headers(given)
    headers_only = headers_only or loaded is not given
    report = preflight(loaded, split_names(tasks))
    out = console()
    out.print(f"{loaded.name}: {len(loaded.tasks)} experts ({', '.join(loaded.tasks)})")
    out.print(f"base: {'none' if loaded.spec.base is None else 'yes'}")
    lacking = loaded.why_not_evaluated
    out.print(f"evaluation: {'ready' if lacking is None else 'not possible, ' + lacking}")
    print_preflight(out, report, full, timed=not headers_only)
    if not headers_only and not report.blocking:
        print_frame(
            out,
            "Task vectors: norm, stable and effective rank (means over matrices)",
            _norms(loaded, split_names(tasks)),
        )
    if report.blocking:
        raise MergeScopeError(
            f"A merge is impossible; differences that prevent it: {len(report.blocking)} "
            "(see the table above)."
        )


def _norms(suite: Suite, tasks: list[str] | None) -> pd.DataFrame:
    """Norms and ranks of the task vectors about each available origin, one row a task."""
    import pandas as pd

    from analysis.spectral.spectra import spectral_summary
    from merge_core.factors import FactorStore
    from merge_core.task_vectors import Groups, Origin

    origins: list[Origin] = ["average"] if suite.base is None else ["base", "average"]
    parts = []
    for origin in origins:
        groups = Groups(suite, tasks, FactorStore())
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


@app.command()
def merge(
    recipe: Annotated[
        Path,
        typer.Argument(help="A recipe's YAML file; or a merged model, which is made again."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make.")],
    suite: Annotated[
        str | None,
        typer.Option(help="Where the suite of a merged model lies now, if it has moved."),
    ] = None,
    shard_size: Annotated[
        float, typer.Option(min=0.001, max=1e6, help="Largest shard in GB.")
    ] = 5.0,
    full_svd: Annotated[
        bool,
        typer.Option("--full-svd", help="Decompose by LAPACK's SVD instead of the Gram matrix."),
    ] = False,
    executor: Annotated[
        str,
        typer.Option(
            help="Where parameters are merged: serial, threads, processes, ray (:N for N workers), "
            "or ray://HOST:PORT of a cluster."
        ),
    ] = "threads",
    as_adapter: Annotated[
        str | None,
        typer.Option(
            metavar="RANK",
            help="Write a LoRA adapter of the base instead of the whole model: directions (16), "
            "a share (0.08), or a share of the update's energy (energy:0.95).",
        ),
    ] = None,
) -> None:
    """Merge as a recipe says, into a folder with weights, recipe and model card."""
    from merge_core.adapters.export import AdapterRank, merge_to_adapter
    from merge_core.executors.choose import executor as executor_named
    from merge_core.export import merge_to_folder
    from merge_core.factors import FactorStore
    from merge_core.recipe import load_recipe

    where = executor_named(executor)
    rank = None if as_adapter is None else AdapterRank.parse(as_adapter)
    route: Route = "svd" if full_svd else "gram"
    if _is_model(recipe):
        loaded, members, made_by = _recipe_of_model(recipe, suite)
        route = "svd" if full_svd else made_by
    elif suite is not None:
        raise MergeScopeError(
            "--suite goes with a merged model. A recipe's YAML file names its own: edit 'suite:'."
        )
    else:
        loaded, members = load_recipe(recipe)
    for warning in loaded.declaration.warnings(
        len(members.select(loaded.tasks)), loaded.checked_parameters
    ):
        typer.echo(f"note: {warning}", err=True)
    store = FactorStore(route=route)
    learned = _learned(loaded, members, store) if loaded.declaration.learns else None
    bar = progress_bar("merging")
    if rank is None:
        shard = int(shard_size * 1e9)
        merge_to_folder(loaded, members, output, store, bar, shard, learned, where)
    else:
        report = merge_to_adapter(loaded, members, output, rank, store, bar, learned, where)
        typer.echo(report.sentences(), err=True)
    typer.echo(str(output))


def _is_model(path: Path) -> bool:
    """Whether a path names weights rather than a recipe."""
    with suppress(OSError, ValueError):  # a name that no file can have: the loader says so
        if path.is_dir():
            return True
    return path.suffix == ".safetensors" or path.name.endswith(".index.json")


def _recipe_of_model(path: Path, reference: str | None) -> tuple[Recipe, Suite, Route]:
    """Recipe, suite and decomposition that give a merged model again."""
    from merge_core.provenance import read_provenance, recipe_again, versions
    from merge_core.suite import load_suite

    about = read_provenance(path)
    where = reference or about.recipe.suite
    try:
        suite = load_suite(where)
    except SuiteError as error:
        hint = "" if reference else " If the suite has moved, say where it is with --suite."
        raise SuiteError(f"{error}{hint}") from error
    recipe = recipe_again(about, suite, where)
    now = versions()
    others = [
        f"{name} {v} (now {now.get(name)})"
        for name, v in about.versions.items()
        if now.get(name) != v
    ]
    if others:
        typer.echo(
            f"note: made with {', '.join(others)}; the last bits of the weights may differ.",
            err=True,
        )
    return recipe, suite, about.decomposition


def _learned(recipe: Recipe, suite: Suite, store: FactorStore) -> object:
    """What a recipe's method learns from the suite's data before it merges."""
    from analysis.evaluation.evaluator import Evaluator
    from merge_core.engine import MergeSession

    session = MergeSession(suite, recipe.tasks, store)
    return Evaluator(suite).learned(recipe, session, progress_bar("learning"))


@app.command()
def evaluate(
    target: Annotated[str, typer.Argument(help="A recipe's YAML file, or a suite.")],
    split: Annotated[str, typer.Option(help="val or test.")] = "val",
    limit: LimitOption = None,
    csv: CsvOption = None,
) -> None:
    """Per-task accuracy with 95 % intervals: of a recipe, or of a suite's members."""
    import pandas as pd
    import yaml

    from analysis.accuracy import mean_accuracy
    from analysis.evaluation.evaluator import Evaluator
    from merge_core.engine import MergeSession
    from merge_core.factors import FactorStore
    from merge_core.recipe import load_recipe, make_recipe
    from merge_core.suite import load_suite
    from merge_core.yaml_text import load_yaml, read_text_file

    part = checked_split(split)
    checked_csv(csv)
    rows = []
    path = Path(target)
    document = None
    # Whatever is wrong with the file, the loader below says it.
    with suppress(yaml.YAMLError, ValueError, OSError, RuntimeError):
        path = path.expanduser()
        document = load_yaml(read_text_file(path)) if path.is_file() else None
    is_recipe = isinstance(document, dict) and "experts" not in document
    if is_recipe:
        recipe, suite = load_recipe(path)
        recipes = {recipe.declaration.title: recipe}
    else:
        suite = load_suite(target)
        recipe = make_recipe({"suite": target, "method": "average"})
        recipes = {"average": recipe}
    evaluator = Evaluator(suite)
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
    mean = mean_accuracy(table, by=["model"]).assign(task="mean over tasks")
    table = pd.concat([table, mean], ignore_index=True)
    columns = ["model", "task", "accuracy", "low", "high", "correct", "images"]
    print_frame(console(), f"Accuracy on the {split} split, with 95 % intervals", table[columns])
    write_csv(table[columns], csv)


app.command("select-rank")(select)
app.command()(compare)
app.command()(decompose)
app.command("methods")(list_methods)
app.command()(card)
app.command()(download)
app.command()(prepare)
app.command()(push)

"""The command line: ``mergescope app | inspect | merge | evaluate | sweep``.

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

from merge_core.errors import MergeScopeError, OutputError
from mergescope.pool_cli import pool_app

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from merge_core.progress import Progress
    from merge_core.suite import Suite

app = typer.Typer(
    name="mergescope",
    help="The microscope for model merging.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
app.add_typer(pool_app)

# ClickException of the click that typer uses: newer versions carry a copy of their own.
ClickException: type[Exception] = typer.BadParameter.__mro__[2]
CANCELLED = 130

SuiteArgument = Annotated[
    str, typer.Argument(help="A suite.yaml, its folder, or 'demo' for the bundled suite.")
]
TasksOption = Annotated[
    str | None, typer.Option(help="Tasks separated by commas; all when left out.")
]
CsvOption = Annotated[Path | None, typer.Option("--csv", help="Also write the table to this file.")]
LimitOption = Annotated[
    int | None, typer.Option(min=1, help="Only the first so many images of each task.")
]


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
) -> None:
    """Open the dashboard in the browser."""
    from merge_core.pool import describes_pool, load_pool
    from merge_core.suite import load_suite
    from ui.catalog import POOLS, SUITES

    pools = [load_pool(name).path for name in references or [] if describes_pool(name)]
    suites = [load_suite(name).path for name in references or [] if not describes_pool(name)]
    environment = {**os.environ, **SUITES.environment(suites), **POOLS.environment(pools)}
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "streamlit", "run", str(root / "app.py")]
    # The folder holds .streamlit/config.toml: loopback only, no usage statistics, our themes.
    result = subprocess.run(
        [*command, f"--server.port={port}"], cwd=root, env=environment, check=False
    )
    raise typer.Exit(result.returncode)


@app.command()
def inspect(
    suite: SuiteArgument,
    tasks: TasksOption = None,
    headers_only: Annotated[
        bool, typer.Option("--headers-only", help="Pre-flight only; read no weights.")
    ] = False,
) -> None:
    """Pre-flight of a suite, and norms and ranks of its task vectors."""
    from merge_core.preflight import preflight
    from merge_core.suite import load_suite

    loaded = load_suite(suite)
    report = preflight(loaded, _split(tasks))
    console = _console()
    console.print(f"{loaded.name}: {len(loaded.tasks)} experts ({', '.join(loaded.tasks)})")
    console.print(f"base: {'yes' if loaded.base is not None else 'none'}")
    lacking = loaded.why_not_evaluated
    console.print(f"evaluation: {'ready' if lacking is None else 'not possible, ' + lacking}")
    decomposed = sum(row.decomposed for row in report.plan)
    console.print(
        f"parameters: {len(report.plan)} ({decomposed} decomposed, "
        f"{len(report.plan) - decomposed} averaged)"
    )
    console.print(
        f"a merge takes about {_size(report.memory_bytes)} of memory "
        f"and {_size(report.disk_bytes)} on disk"
    )
    _print_table(
        console,
        "Differences from the first expert",
        ["member", "parameter", "kind", "detail"],
        [[d.member, d.parameter, d.kind, d.detail] for d in report.differences],
    )
    _print_table(
        console,
        "Parameters",
        ["parameter", "shape", "dtype", "treatment", "why"],
        [
            [
                row.name,
                " x ".join(map(str, row.shape)),
                row.dtype,
                "decomposed" if row.decomposed else "averaged",
                row.reason,
            ]
            for row in report.plan
        ],
    )
    if not headers_only and not report.blocking:
        _print_frame(
            console,
            "Task vectors: norm, stable and effective rank (means over matrices)",
            _norms(loaded, _split(tasks)),
        )
    if report.blocking:
        raise MergeScopeError(
            f"A merge is impossible; differences that prevent it: {len(report.blocking)} "
            "(see the table above)."
        )


def _norms(suite: Suite, tasks: list[str] | None) -> pd.DataFrame:
    """Norms and ranks of the task vectors about each available origin, one row a task."""
    import pandas as pd

    from analysis.spectra import spectral_summary
    from merge_core.factors import FactorStore
    from merge_core.task_vectors import Groups, Origin

    origins: list[Origin] = ["average"] if suite.base is None else ["base", "average"]
    parts = []
    for origin in origins:
        groups = Groups(suite, tasks, FactorStore())
        summary = spectral_summary(groups, origin, progress=_progress("decomposing"))
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
    recipe: Annotated[Path, typer.Argument(help="A recipe's YAML file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make.")],
    shard_size: Annotated[
        float, typer.Option(min=0.001, max=1e6, help="Largest shard in GB.")
    ] = 5.0,
    full_svd: Annotated[
        bool,
        typer.Option("--full-svd", help="Decompose by LAPACK's SVD instead of the Gram matrix."),
    ] = False,
) -> None:
    """Merge as a recipe says, into a folder with weights, recipe and model card."""
    from merge_core.export import merge_to_folder
    from merge_core.factors import FactorStore
    from merge_core.recipe import load_recipe

    loaded, suite = load_recipe(recipe)
    for warning in loaded.declaration.warnings(
        len(suite.select(loaded.tasks)), loaded.checked_parameters
    ):
        typer.echo(f"note: {warning}", err=True)
    merge_to_folder(
        loaded,
        suite,
        output,
        FactorStore(route="svd" if full_svd else "gram"),
        _progress("merging"),
        int(shard_size * 1e9),
    )
    typer.echo(str(output))


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

    from analysis.evaluation import Evaluator, mean_accuracy
    from merge_core.engine import MergeSession
    from merge_core.factors import FactorStore
    from merge_core.recipe import load_recipe, make_recipe
    from merge_core.suite import load_suite

    part = _checked_split(split)
    _checked_csv(csv)
    rows = []
    path = Path(target)
    document = None
    # Whatever is wrong with the file, the loader below says it.
    with suppress(yaml.YAMLError, ValueError, RecursionError, OSError, RuntimeError):
        path = path.expanduser()
        document = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
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
        frame = evaluator.recipe(each, session, part, limit, _progress("evaluating"))
        rows.append(frame.assign(model=title))
    table = pd.concat(rows, ignore_index=True)
    mean = mean_accuracy(table, by=["model"]).assign(task="mean over tasks")
    table = pd.concat([table, mean], ignore_index=True)
    columns = ["model", "task", "accuracy", "low", "high", "correct", "images"]
    _print_frame(_console(), f"Accuracy on the {split} split, with 95 % intervals", table[columns])
    _write_csv(table[columns], csv)


@app.command()
def sweep(
    suite: SuiteArgument,
    method: Annotated[str, typer.Option(help="A method with a rank or a scale.")] = "cart",
    ranks: Annotated[
        str | None, typer.Option(help="Shares (0.08) or numbers of directions (8), by commas.")
    ] = None,
    scales: Annotated[str | None, typer.Option(help="Scaling coefficients, by commas.")] = None,
    tasks: TasksOption = None,
    split: Annotated[str, typer.Option(help="val or test.")] = "val",
    limit: LimitOption = None,
    csv: CsvOption = None,
) -> None:
    """Accuracy over rank and scale; results are kept, so a sweep interrupted goes on."""
    from analysis.evaluation import Evaluator
    from analysis.sweep import best_point, grid, mean_over_tasks
    from analysis.sweep import sweep as run_sweep
    from merge_core.engine import MergeSession
    from merge_core.factors import FactorStore
    from merge_core.suite import load_suite

    part = _checked_split(split)
    _checked_csv(csv)
    loaded = load_suite(suite)
    recipes = grid(
        method,
        suite,
        _split(tasks),
        _numbers(ranks, "--ranks"),
        _numbers(scales, "--scales"),
    )
    evaluator = Evaluator(loaded)
    session = MergeSession(loaded, recipes[0].tasks, FactorStore())
    frame = run_sweep(recipes, session, evaluator, part, limit, _progress("sweeping"))
    mean = mean_over_tasks(frame)
    console = _console()
    _print_frame(console, f"Mean accuracy on the {split} split", mean.dropna(axis=1, how="all"))
    best = best_point(mean)
    setting = ", ".join(
        f"{name} {best[name]:g}" for name in ("rank", "scale") if best[name] == best[name]
    )
    console.print(
        f"best: {setting}: {best['accuracy']:.1%} ({best['low']:.1%} to {best['high']:.1%})"
    )
    _write_csv(frame, csv)


def _split(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _checked_split(text: str):  # type: ignore[no-untyped-def]
    if text not in ("val", "test"):
        raise MergeScopeError(f"--split must be val or test, got {text!r}.")
    return text


def _numbers(text: str | None, option: str) -> list[float | int] | None:
    """Numbers separated by commas; whole ones stay integers, which for ranks are directions."""
    if text is None:
        return None
    try:
        return [int(p) if p.strip().isdigit() else float(p) for p in text.split(",")]
    except ValueError as error:
        raise MergeScopeError(
            f"{option} takes numbers separated by commas, got {text!r}."
        ) from error


def _size(count: int) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} GB"


def _console() -> Console:
    """A console that prints names as they are: brackets and colons in them are no markup."""
    from rich.console import Console

    return Console(markup=False, emoji=False)


def _print_table(console, title: str, columns: list[str], rows: list[list[str]]) -> None:  # type: ignore[no-untyped-def]
    from rich.table import Table

    if not rows:
        return
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _print_frame(console, title: str, frame: pd.DataFrame) -> None:  # type: ignore[no-untyped-def]
    def cell(column: str, value: object) -> str:
        if isinstance(value, float):
            if value != value:
                return ""
            share = column in ("accuracy", "low", "high") or column == "top 8 %"
            return f"{value:.1%}" if share else f"{value:.4g}"
        return str(value)

    rows = [
        [cell(str(name), value) for name, value in zip(frame.columns, row, strict=True)]
        for row in frame.astype(object).to_numpy().tolist()
    ]
    _print_table(console, title, [str(name) for name in frame.columns], rows)


def _checked_csv(path: Path | None) -> None:
    """Refuse a name that cannot become a file before anything is computed."""
    if path is not None and path.is_dir():
        raise OutputError(f"{path} is a folder; give a file name for the CSV.")


def _write_csv(frame: pd.DataFrame, path: Path | None) -> None:
    from merge_core.files import write_atomically

    if path is not None:
        write_atomically(path, frame.to_csv(index=False).encode())


def _progress(label: str) -> Progress | None:
    """A bar on the terminal, none where the output is not one."""
    from merge_core.progress import Progress

    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int, what: str) -> None:
        width = 24
        filled = width * done // max(1, total)
        end = "\n" if done >= total else ""
        bar = "#" * filled + "." * (width - filled)
        sys.stderr.write(f"\r\x1b[2K{label} [{bar}] {done}/{total} {what}{end}")
        sys.stderr.flush()

    return Progress(show)

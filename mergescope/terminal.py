"""What the commands share: reading options, printing tables, a bar of progress.

Everything heavy is imported by the function that needs it, so that ``--help`` is instant.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from merge_core.errors import MergeScopeError, OutputError

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from merge_core.progress import Progress

SuiteArgument = Annotated[
    str, typer.Argument(help="A suite.yaml, its folder, or a bundled suite by name, say vision.")
]
TasksOption = Annotated[
    str | None,
    typer.Option(help="Tasks or presets of the suite, separated by commas; all when left out."),
]
CsvOption = Annotated[Path | None, typer.Option("--csv", help="Also write the table to this file.")]
LimitOption = Annotated[
    int | None, typer.Option(min=1, help="Only the first so many images of each task.")
]
PrecisionOption = Annotated[
    str,
    typer.Option(
        help="In which networks compute: float32, or bfloat16, which is faster where the device "
        "has it; what it changes is said."
    ),
]
SHARES = ("accuracy", "low", "high", "top 8 %")


def split_names(text: str | None) -> list[str] | None:
    """Names separated by commas; None stays None."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def parse_split(text: str) -> Literal["val", "test"]:
    """The name of a split.

    Raises:
        MergeScopeError: another word.
    """
    if text == "val":
        return "val"
    if text == "test":
        return "test"
    raise MergeScopeError(f"--split must be val or test, got {text!r}.")


def parse_precision(text: str) -> Literal["float32", "bfloat16"]:
    """The name of a precision.

    Raises:
        MergeScopeError: another word.
    """
    if text == "float32":
        return "float32"
    if text == "bfloat16":
        return "bfloat16"
    raise MergeScopeError(f"--precision must be float32 or bfloat16, got {text!r}.")


def numbers(text: str | None, option: str) -> list[float | int] | None:
    """Numbers separated by commas; whole ones stay integers, which for ranks are directions.

    Raises:
        MergeScopeError: something else.
    """
    if text is None:
        return None
    try:
        return [int(p) if p.strip().isdigit() else float(p) for p in text.split(",")]
    except ValueError as error:
        raise MergeScopeError(
            f"{option} takes numbers separated by commas, got {text!r}."
        ) from error


def size(count: float) -> str:
    """A number of bytes in words."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def console() -> Console:
    """A console that prints names as they are: brackets and colons in them are no markup."""
    from rich.console import Console

    return Console(markup=False, emoji=False)


def print_table(
    target: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """A table, or nothing where there are no rows."""
    from rich.table import Table

    if not rows:
        return
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    target.print(table)


def print_frame(
    target: Console, title: str, frame: pd.DataFrame, shares: Sequence[str] = SHARES
) -> None:
    """A frame as a table: shares (columns of these names) in percent, NaN empty."""

    def cell(column: str, value: object) -> str:
        if isinstance(value, float):
            if value != value:
                return ""
            return f"{value:.1%}" if column in shares else f"{value:.4g}"
        return str(value)

    rows = [
        [cell(str(name), value) for name, value in zip(frame.columns, row, strict=True)]
        for row in frame.astype(object).to_numpy().tolist()
    ]
    print_table(target, title, [str(name) for name in frame.columns], rows)


def print_metric(target: Console, split: str, frame: pd.DataFrame) -> None:
    """What models reach on tasks, in the metric that the frame is about."""
    from analysis.metrics import metric_of

    metric = metric_of(frame)
    shares = () if metric.unit else SHARES
    title = f"{metric.label} on the {split} split, with 95 % intervals"
    print_frame(target, title + metric.hint, frame, shares)


def check_csv(path: Path | None) -> None:
    """Refuse a name that cannot become a file before anything is computed.

    Raises:
        OutputError: it is a folder.
    """
    if path is not None and path.is_dir():
        raise OutputError(f"{path} is a folder; give a file name for the CSV.")


def write_csv(frame: pd.DataFrame, path: Path | None) -> None:
    """Write a frame, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    from merge_core.files import write_atomically

    if path is not None:
        write_atomically(path, frame.to_csv(index=False).encode())


def progress_bar(label: str) -> Progress | None:
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


def print_above(sentence: str) -> None:
    """A line on the error output, in place of a bar that may stand there."""
    clear = "\r\x1b[2K" if sys.stderr.isatty() else ""
    sys.stderr.write(f"{clear}{sentence}\n")
    sys.stderr.flush()


def progress_lines(seconds: float = 30.0) -> Progress:
    """A line now and then, for work of many minutes whose output may be no terminal.

    Args:
        seconds: between two lines.
    """
    from merge_core.progress import Progress

    shown = time.monotonic()

    def show(done: int, total: int, what: str) -> None:
        nonlocal shown
        if time.monotonic() - shown >= seconds:
            shown = time.monotonic()
            sys.stderr.write(f"{done / max(1, total):.0%}  {what}\n")
            sys.stderr.flush()

    return Progress(show)

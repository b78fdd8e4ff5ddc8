"""The command line: ``mergescope app | inspect | merge | evaluate | select-rank | compare | …``.

A user's mistake ends with exit code 2 and one line that says what is wrong and what to do.
Everything heavy is imported by the command that needs it, so that ``--help`` is instant.
"""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from merge_core.errors import MergeScopeError
from mergescope.commands.card import card
from mergescope.commands.compare import compare
from mergescope.commands.dashboard import open_app
from mergescope.commands.decompose import decompose
from mergescope.commands.evaluate import evaluate
from mergescope.commands.hub import download, push
from mergescope.commands.inspect import inspect
from mergescope.commands.merge import merge
from mergescope.commands.methods import list_methods
from mergescope.commands.pool import pool_app
from mergescope.commands.prepare import prepare
from mergescope.commands.record import record
from mergescope.commands.select_rank import select
from mergescope.commands.suite import suite_app
from mergescope.computing import computing

app = typer.Typer(
    name="mergescope",
    help="The microscope for model merging.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
app.command("app")(computing(open_app))
app.command()(computing(inspect))
app.command()(computing(merge))
app.command()(computing(evaluate))
app.command("select-rank")(computing(select))
app.command()(computing(compare))
app.command()(computing(decompose))
app.command("methods")(list_methods)
app.command()(computing(card))
app.command()(download)
app.command()(computing(prepare))
app.command()(push)
app.command()(computing(record))
app.add_typer(pool_app)
app.add_typer(suite_app)

# ClickException of the click that typer uses: newer versions carry a copy of their own.
ClickException: type[Exception] = typer.BadParameter.__mro__[2]
CANCELLED = 130


def explain_failure(error: Exception) -> str | None:
    """What the system refused, in words; None for a fault of the program."""
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return "There is not enough memory. Use a machine with more, or smaller models."
    if isinstance(error, OSError) and error.strerror is not None:
        place = f"{error.filename!r:.200}: " if error.filename is not None else ""
        return f"{place}{error.strerror}. Check the path, and who may read and write there."
    return None


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
    except (MemoryError, OSError, RuntimeError) as error:
        reason = explain_failure(error)
        if reason is None:
            raise
        typer.echo(f"mergescope: {reason}", err=True)
        sys.exit(2)
    if code == CANCELLED:
        typer.echo("mergescope: cancelled; no half-written output is left.", err=True)
    sys.exit(code if isinstance(code, int) else 0)

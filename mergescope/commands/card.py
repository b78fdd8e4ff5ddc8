"""``mergescope card``: a merged model's accuracies, into its model card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergescope.terminal import LimitOption, console, parse_split, print_metric


def card(
    folder: Annotated[Path, typer.Argument(help="A merged model, as a merge wrote it.")],
    split: Annotated[str, typer.Option(help="val or test.")] = "test",
    suite: Annotated[
        str | None,
        typer.Option(help="Where its suite lies, if it was merged elsewhere or has moved."),
    ] = None,
    limit: LimitOption = None,
) -> None:
    """Evaluate a merged model and write its model card anew, with the accuracies."""
    from analysis.evaluation.model_card import write_card
    from analysis.metrics import metric_of
    from merge_core.merging.inputs import find_suite
    from merge_core.output.provenance import read_provenance

    part = parse_split(split)
    about = read_provenance(folder)
    members = find_suite(about.recipe.suite, about.members, suite)
    frame = write_card(folder, about, members, part, limit)
    print_metric(console(), part, metric_of(frame).tell(frame, ["task"]))
    typer.echo(str(folder / "README.md"))

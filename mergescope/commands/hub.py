"""``mergescope download`` and ``mergescope push``: models from the hub and onto it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergescope.terminal import console, print_table, progress_bar, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from merge_core.hub.models import HubModel
    from merge_core.suites.suite import Suite


def download(
    reference: Annotated[
        str, typer.Argument(help="A suite, or one model: hf://org/name[@revision][:file].")
    ],
) -> None:
    """Download the members of a suite that are on the hub, into huggingface_hub's cache."""
    from merge_core.hub import models as hub
    from merge_core.opening.download import hub_members, missing_members

    suite = suite_or_model(reference)
    models = [hub.describe(name) for name in missing_members(suite)]
    print_models(models)
    hub.fetch(models, progress_bar("downloading"))
    for name in hub_members(suite):
        typer.echo(f"{hub.resolve_revision(name)} {hub.require_cached(name)}")


def print_models(models: Sequence[HubModel]) -> None:
    """What would be downloaded, one row a model, and whether the disk has room."""
    from merge_core.hub.models import free_space

    if not models:
        return
    print_table(
        console(),
        "On the hub, not downloaded",
        ["model", "commit", "opens by", "size", "to download"],
        [
            [
                str(model.asked),
                model.id.revision[:12],
                model.entry,
                size(model.nbytes),
                size(model.to_download),
            ]
            for model in models
        ],
    )
    total = sum(model.to_download for model in models)
    console().print(f"to download: {size(total)}; free on that disk: {size(free_space())}")


def suite_or_model(reference: str) -> Suite:
    """A suite by its reference; of a name on the hub, a suite of that model alone.

    Raises:
        SuiteError: as :func:`merge_core.suites.suite.load_suite`.
        HubError: not a name on the hub.
    """
    from merge_core.hub.files import HubId, is_hub_id
    from merge_core.suites.suite import Suite, load_suite
    from merge_core.suites.suite_spec import ExpertSpec, SuiteSpec

    if not is_hub_id(reference):
        return load_suite(reference)
    name = HubId.parse(reference).repo
    experts = {name.split("/")[-1]: ExpertSpec(weights=reference)}
    return Suite(SuiteSpec(name=name, experts=experts), Path.cwd() / "suite.yaml")


def with_headers(suite: Suite) -> Suite:
    """The suite; where members are on the hub only, their headers, and what they would take."""
    from merge_core.hub.models import describe
    from merge_core.opening.download import missing_members, with_headers_only

    models = [describe(name) for name in missing_members(suite)]
    print_models(models)
    return with_headers_only(suite, models, progress_bar("reading headers"))


def push(
    folder: Annotated[Path, typer.Argument(help="A merged model, as a merge wrote it.")],
    name: Annotated[str, typer.Argument(help="Where to: org/name on the hub.")],
    public: Annotated[
        bool, typer.Option("--public", help="Everybody may see it; else you and your group alone.")
    ] = False,
) -> None:
    """Upload a merged model to the hub; the token is read from HF_TOKEN."""
    from merge_core.errors import RecipeError
    from merge_core.files import read_yaml
    from merge_core.hub.push import RECIPE
    from merge_core.hub.push import push as push_folder

    if (folder / RECIPE).is_file():
        recipe, _ = read_yaml(folder / RECIPE, RECIPE, RecipeError, "the folder of a merge")
        suite = str(recipe.get("suite"))
        if Path(suite).is_absolute():
            typer.echo(
                f"note: recipe, card and weights name the suite by its path here, {suite}.",
                err=True,
            )
    typer.echo(push_folder(folder, name, public))

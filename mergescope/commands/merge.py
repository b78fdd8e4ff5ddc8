"""``mergescope merge``: a recipe, or a merged model made again."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergescope.compatibility_report import echo_warnings
from mergescope.terminal import progress_bar

if TYPE_CHECKING:
    from merge_core.factors.decomposition import Route
    from merge_core.factors.store import FactorStore
    from merge_core.merging.recipe import Recipe
    from merge_core.suites.suite import Suite


def merge(
    recipe: Annotated[
        Path,
        typer.Argument(help="A recipe's YAML file; or a merged model, which is made again."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make.")],
    suite: Annotated[
        str | None,
        typer.Option(
            help="Where the suite of a merged model, or of the recipe beside one, lies: where it "
            "was merged elsewhere, or has moved."
        ),
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
    from merge_core.executors.choose import choose_executor as executor_named
    from merge_core.factors.store import FactorStore
    from merge_core.merging.engine import check_fits
    from merge_core.merging.recipe import load_recipe
    from merge_core.output.adapter_draft import AdapterRank
    from merge_core.output.lora import merge_to_adapter
    from merge_core.output.model_folder import merge_to_folder
    from merge_core.suites.preflight import merge_notes

    where = executor_named(executor)
    rank = None if as_adapter is None else AdapterRank.parse(as_adapter)
    route: Route = "svd" if full_svd else "gram"
    if _is_model(recipe):
        loaded, members, made_by = _recipe_of_model(recipe, suite)
        route = "svd" if full_svd else made_by
    else:
        loaded, members = load_recipe(recipe, suite)
    for warning in loaded.warnings(members.select(loaded.tasks)):
        typer.echo(f"note: {warning}", err=True)
    check_fits(members, members.select(loaded.tasks))
    notes = (*members.notes(loaded.tasks), *merge_notes(members, members.select(loaded.tasks)))
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    echo_warnings(members, loaded.tasks)
    store = FactorStore(route=route)
    learned = _learn(loaded, members, store) if loaded.declaration.learns else None
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
    from merge_core.merging.inputs import find_suite
    from merge_core.output.provenance import read_provenance, rebuild_recipe, versions

    about = read_provenance(path)
    suite = find_suite(about.recipe.suite, about.members, reference)
    recipe = rebuild_recipe(about, suite, str(suite.path))
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


def _learn(recipe: Recipe, suite: Suite, store: FactorStore) -> object:
    """What a recipe's method learns from the suite's data before it merges."""
    from analysis.evaluation.evaluator import Evaluator
    from merge_core.merging.engine import MergeSession

    session = MergeSession(suite, recipe.tasks, store)
    return Evaluator(suite).learn(recipe, session, progress_bar("learning"))

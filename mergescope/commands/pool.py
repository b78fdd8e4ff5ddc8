"""``mergescope pool build``: train a pool of models on bundled images or on one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from merge_core.errors import PoolError
from mergescope.computing import computing
from mergescope.terminal import progress_bar

pool_app = typer.Typer(
    name="pool",
    help="Pools of models of one architecture on one task.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@pool_app.callback()
def pool() -> None:
    """Pools of models of one architecture on one task."""


@pool_app.command()
@computing
def build(
    output: Annotated[Path, typer.Argument(help="Folder to make.")],
    dataset: Annotated[
        str,
        typer.Option(
            help="digits, noisy-letters, letters or shapes (bundled); cifar10, cifar100 or mnist "
            "(as torchvision stores them); folder (of images, such as Tiny-ImageNet's)."
        ),
    ] = "digits",
    root: Annotated[Path | None, typer.Option(help="Where a dataset of your own lies.")] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Let torchvision fetch what is missing in --root.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many images of each split.")
    ] = None,
    preset: Annotated[
        str, typer.Option(help="small, or paper: linear classifiers as in arXiv:2411.09263.")
    ] = "small",
    architecture: Annotated[
        str | None,
        typer.Option(help="linear, mlp, vgg or a name of timm; vgg (paper: linear) if left out."),
    ] = None,
    arg: Annotated[
        list[str] | None,
        typer.Option(help="An argument of the architecture, such as depth=3; may be repeated."),
    ] = None,
    regime: Annotated[
        str, typer.Option(help="shared (pre-trained start), shared_random, or independent.")
    ] = "independent",
    members: Annotated[int, typer.Option(min=1, help="How many models.")] = 10,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Of each model; the preset's if left out.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is random.")] = 0,
) -> None:
    """Train a pool and write its folder with pool.yaml, weights and images."""
    from data.pool_building import build_pool
    from data.pool_images import ImageTask, limit_images
    from data.pool_presets import Request, plan_request
    from data.pool_tasks import POOL_TASKS, Sizes
    from data.vision_datasets import VISION_DATASETS, load_vision_dataset
    from merge_core.devices import current_device

    task: ImageTask
    if dataset in POOL_TASKS:
        if root is not None or download:
            raise PoolError(f"{dataset} is bundled: leave out --root and --download.")
        task = limit_images(POOL_TASKS[dataset](Sizes(), seed), limit, seed)
    elif dataset in VISION_DATASETS:
        if root is None:
            raise PoolError(f"Say with --root where {dataset} lies.")
        task = load_vision_dataset(dataset, root, seed, limit, download=download)
    else:
        known = ", ".join([*POOL_TASKS, *VISION_DATASETS])
        raise PoolError(f"No dataset {dataset!r}. Choose one of {known}.")
    request = Request(
        name=_name(output),
        architecture=architecture,
        args=_arguments(arg or []),
        regime=regime,  # type: ignore[arg-type]  # checked there
        members=members,
        epochs=epochs,
        preset=preset,  # type: ignore[arg-type]  # checked there
    )
    plan, task = plan_request(request, task)
    build_pool(output, plan, task, seed, current_device().torch, progress_bar("training"))
    typer.echo(str(output))


def _name(output: Path) -> str:
    """The pool's name: its folder's, which must be fit for links."""
    from pydantic import TypeAdapter, ValidationError

    from merge_core.input_files import resolve_path
    from merge_core.suites.pool import PoolName

    name = resolve_path(output, PoolError).name
    try:
        return str(TypeAdapter(PoolName).validate_python(name))
    except ValidationError as error:
        raise PoolError(
            f"{name!r} cannot be a pool's name. Call the folder by letters, digits and . _ + - "
            "(at most 80)."
        ) from error


def _arguments(pairs: list[str]) -> dict[str, Any]:
    """``key=value`` pairs, values as in YAML: numbers, true and false, lists, text."""
    import yaml

    from merge_core.yaml_text import load_yaml

    arguments = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise PoolError(f"--arg takes key=value, got {pair!r}.")
        try:
            arguments[key] = load_yaml(value)
        except yaml.YAMLError as error:
            raise PoolError(f"--arg {key}: {value!r} is not a value.") from error
    return arguments

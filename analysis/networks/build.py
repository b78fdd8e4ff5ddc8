"""Networks built by name."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from analysis.networks.limits import (
    Size,
    TooLargeError,
    build_within,
    check_memory,
    find_fetching,
)
from analysis.networks.plain import PLAIN
from merge_core.errors import MergeScopeError
from merge_core.executors.base import one_thread
from merge_core.suites.suite_spec import ArchitectureSpec


@one_thread()
def build_network(
    architecture: ArchitectureSpec,
    path: Path,
    error: type[MergeScopeError],
    num_classes: int | None = None,
    size: Size | None = None,
) -> nn.Module:
    """A network in evaluation mode, without gradients; its own weights are random.

    Args:
        architecture: ``linear``, ``mlp``, ``vgg`` (see :mod:`analysis.networks.plain`) or a name
            of timm, and arguments.
        path: the file that names it, for messages.
        error: what is raised.
        num_classes: overrides the arguments'; 0 for no classifier.
        size: of the weights that the network is built for, where there are some already.

    Raises:
        MergeScopeError: of the given kind: unknown, not buildable with these arguments, or larger
            than the weights.
    """
    name, args = architecture.name, dict(architecture.args)
    if architecture.library != "timm":
        raise error(
            f"{path}: the networks of a pool are timm's, not those of {architecture.library}. "
            "Give the architecture's name in timm."
        )
    if num_classes is not None:
        if "num_classes" in args:
            raise error(
                f"{path}: timm cannot build {name!r} with num_classes here, as the classes come "
                "from the heads. Correct the args."
            )
        args["num_classes"] = num_classes
    if (fetching := find_fetching(name, args)) is not None:
        raise error(
            f"{path}: architecture: {fetching} would fetch files. Give the plain "
            "timm name and its shape arguments; the weights come from the suite or pool."
        )
    try:
        size = size or Size()
        check_memory(size)
        if name in PLAIN:
            made: nn.Module = build_within(size, args, lambda: PLAIN[name](**args))
            return made.eval().requires_grad_(False)
        import timm  # three seconds: only where a model is run

        if timm.is_model(name):
            made = build_within(
                size, args, lambda: timm.create_model(name, pretrained=False, **args)
            )
            return made.eval().requires_grad_(False)
    except Exception as fault:  # wrong arguments raise almost anything, from deep inside
        raise build_error(architecture, path, fault, error) from fault
    near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:3])
    raise error(
        f"{path}: timm knows no architecture {name!r}." + (f" Similar: {near}." if near else "")
    )


def build_error(
    architecture: ArchitectureSpec, path: Path, fault: Exception, error: type[MergeScopeError]
) -> MergeScopeError:
    """What to tell of a network that a library could not, or may not, build."""
    library = "MergeScope" if architecture.name in PLAIN else architecture.library
    args = f"{architecture.args!s:.200}"
    if isinstance(fault, TooLargeError):
        return error(
            f"{path}: {architecture.name!r} with {args} is not built: {fault}. Correct the args."
        )
    return error(
        f"{path}: {library} cannot build {architecture.name!r} with {args} "
        f"({type(fault).__name__}: {' '.join(str(fault).split()):.200}). Correct the args."
    )

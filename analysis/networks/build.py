"""Networks built by name."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from analysis.networks.plain import PLAIN
from merge_core.errors import MergeScopeError
from merge_core.executors.base import one_thread
from merge_core.suites.suite_spec import ArchitectureSpec

# Arguments of timm that would fetch weights or open other files.
REFUSED_ARGS = ("pretrained", "checkpoint_path", "cache_dir", "scriptable")


@one_thread()
def build_network(
    architecture: ArchitectureSpec,
    path: Path,
    error: type[MergeScopeError],
    num_classes: int | None = None,
) -> nn.Module:
    """A network in evaluation mode, without gradients; its own weights are random.

    Args:
        architecture: ``linear``, ``mlp``, ``vgg`` (see :mod:`analysis.networks.plain`) or a name
            of timm, and arguments.
        path: the file that names it, for messages.
        error: what is raised.
        num_classes: overrides the arguments'; 0 for no classifier.

    Raises:
        MergeScopeError: of the given kind: unknown, or not buildable with these arguments.
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
    refused = [arg for arg in args if arg.startswith(REFUSED_ARGS)]
    if ":" in name or refused:
        what = f"the argument {refused[0]!r}" if refused else f"the name {name!r}"
        raise error(
            f"{path}: architecture: {what} would fetch files. Give the plain "
            "timm name and its shape arguments; the weights come from the suite or pool."
        )
    try:
        if name in PLAIN:
            return PLAIN[name](**args).eval().requires_grad_(False)
        import timm  # three seconds: only where a model is run

        if timm.is_model(name):
            model: nn.Module = timm.create_model(name, pretrained=False, **args)
            return model.eval().requires_grad_(False)
    except Exception as fault:  # wrong arguments raise almost anything, from deep inside
        raise error(
            f"{path}: {'timm' if name not in PLAIN else 'MergeScope'} cannot build {name!r} with "
            f"{args} ({type(fault).__name__}: {fault}). Correct the args."
        ) from fault
    near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:3])
    raise error(
        f"{path}: timm knows no architecture {name!r}." + (f" Similar: {near}." if near else "")
    )

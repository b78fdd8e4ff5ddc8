"""The one option of all commands that compute: on which device."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

DeviceOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="What computes: auto (a GPU where there is one), cpu, or a device by its name. "
        "$MERGESCOPE_DEVICE, else auto, if left out.",
    ),
]


def computing(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the option ``--device``: it, and all that it starts, computes there.

    A command that has a parameter `device` of its own is told it besides.
    """
    signature = inspect.signature(command, eval_str=True)
    told = "device" in signature.parameters

    @wraps(command)
    def run(**options: Any) -> None:
        device = options["device"] if told else options.pop("device")
        if device is None and not os.environ.get("MERGESCOPE_DEVICE"):
            return command(**options)  # torch is not loaded to find that nothing was asked
        from merge_core.devices import use_process_device

        with use_process_device(device):
            return command(**options)

    if not told:
        option = inspect.Parameter(
            "device", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=DeviceOption
        )
        signature = signature.replace(parameters=[*signature.parameters.values(), option])
    run.__annotations__ = {**command.__annotations__, "device": DeviceOption}
    run.__signature__ = signature  # type: ignore[attr-defined]  # what typer reads
    return run

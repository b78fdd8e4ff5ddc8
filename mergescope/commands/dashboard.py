"""``mergescope app``: the dashboard in the browser."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def open_app(
    references: Annotated[
        list[str] | None,
        typer.Argument(help="Suites, pools and records to offer beside the bundled ones."),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 8501,
    root: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder below which the page Open checkpoints may look; may be repeated. This one "
            "if left out."
        ),
    ] = None,
) -> None:
    """Open the dashboard in the browser."""
    from analysis.frames.record import is_record, load_record
    from merge_core.suites.pool import describes_pool, load_pool
    from merge_core.suites.suite import load_suite
    from ui.server import roots
    from ui.server.catalog import POOLS, SUITES

    pools, suites = [], []
    for name in references or []:
        if is_record(name):
            suites.append(load_record(name).path.resolve())
        elif describes_pool(name):
            pools.append(load_pool(name).path)
        else:
            suites.append(load_suite(name).path)
    environment = {
        **os.environ,
        **SUITES.environment(suites),
        **POOLS.environment(pools),
        **roots.environment(root or []),
    }
    home = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "ui.server.launch", "run", str(home / "app.py")]
    # The folder holds .streamlit/config.toml: loopback only, no usage statistics, our themes.
    os.chdir(home)
    # This process becomes the server, so that whatever ends it ends the server.
    os.execve(sys.executable, [*command, f"--server.port={port}"], environment)

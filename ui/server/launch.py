"""The server's process: ``python -m ui.server.launch run app.py``, Streamlit's own command.

A signal ends it at once while it still starts, and later as Streamlit does.
"""

from __future__ import annotations

import importlib
import signal
import threading

# What every page needs and takes longest to import.
SLOW = ("torch", "pandas", "pyarrow.compute", "plotly.graph_objects")


def warm_up() -> None:
    """Import what is slow while the server starts and the browser comes, not on the first page."""
    for name in SLOW:
        importlib.import_module(name)


def main() -> None:
    """Run Streamlit's command line."""
    # Until Streamlit has handlers of its own: an interrupted import would end in a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=warm_up, name="mergescope-warm-up", daemon=True).start()
    from streamlit.web.cli import main as run

    run(prog_name="streamlit")


if __name__ == "__main__":
    main()

"""The server's process: ``python -m ui.server.launch run app.py``, Streamlit's own command.

A signal ends it at once while it still starts, and later as Streamlit does.
"""

from __future__ import annotations

import signal


def main() -> None:
    """Run Streamlit's command line."""
    # Until Streamlit has handlers of its own: an interrupted import would end in a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from streamlit.web.cli import main as run

    run(prog_name="streamlit")


if __name__ == "__main__":
    main()

"""``python -m mergescope``, and the command ``mergescope``."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command line; an interrupt ends it without a word while it still starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from mergescope.cli import main as run

    signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()

"""``python -m mergescope`` is the same as ``mergescope``."""

from mergescope.cli import main

if __name__ == "__main__":
    main()

"""What runs in the fresh process of a measurement: ``python -m benchmarks.child MODULE:JOB FILE``.

The job's arguments come as JSON on standard input, its answer and seconds go to the file. The
module is imported before the clock starts, so that seconds are those of the work alone.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from pathlib import Path


def main() -> None:
    """Run one job."""
    module, _, name = sys.argv[1].partition(":")
    arguments = json.load(sys.stdin)
    job = getattr(import_module(module), name)
    start = time.perf_counter()
    answer = job(**arguments)
    seconds = time.perf_counter() - start
    Path(sys.argv[2]).write_text(json.dumps({"seconds": seconds, "answer": answer}))


if __name__ == "__main__":
    main()

"""All measurements: ``python -m benchmarks.run --work DIR`` (``--quick`` to see that they run).

Writes RESULTS.md, and RESULTS.json for ``python -m benchmarks.compare``. Parts that are run again
with ``--only`` replace their figures in those files.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.measure import FailedError, Laboratory
from benchmarks.parts import larger, scaling, vision
from benchmarks.parts.bundled import bundled
from benchmarks.parts.methods import slow_methods
from benchmarks.parts.neighbour import beside_a_neighbour
from benchmarks.record import Part, Results, Sheet, load, machine

HERE = Path(__file__).resolve().parent
MERGEKIT = Path("/opt/mergekit/bin/python")


@dataclass(frozen=True)
class Plan:
    """One part.

    Attributes:
        measure: fills the sheet.
        uses: what it leaves in the work folder, which is removed after the last such part.
    """

    measure: Callable[[Laboratory, Sheet], None]
    uses: str = ""


def dashboard(laboratory: Laboratory, sheet: Sheet) -> None:
    """The dashboard's part, for which playwright must be installed."""
    from benchmarks.parts.dashboard import dashboard as all_pages

    all_pages(laboratory, sheet)


# Larger models come after those before them are gone, so that the disk holds one kind at a time.
PLANS = {
    "startup": Plan(scaling.startup),
    "streaming": Plan(vision.streaming, "vit"),
    "cart": Plan(vision.cart, "vit"),
    "spectra": Plan(vision.spectra, "vit"),
    "ties": Plan(vision.ties, "vit"),
    "mergekit": Plan(vision.mergekit, "vit"),
    "executors": Plan(scaling.executors, "vit"),
    "growth": Plan(scaling.growth, "plain"),
    "large": Plan(larger.vit_large, "vit-1024"),
    "decoder": Plan(larger.decoder, "decoder"),
    "neighbour": Plan(beside_a_neighbour, "vit-384"),
    "methods": Plan(slow_methods, "vit-384"),
    "bundled": Plan(bundled),
    "dashboard": Plan(dashboard),
}


def models_to_remove(name: str, chosen: Sequence[str]) -> str:
    """The models that no later part needs once a part is done."""
    uses = PLANS[name].uses
    later = chosen[chosen.index(name) + 1 :]
    return "" if any(PLANS[other].uses == uses for other in later) else uses


def measure_part(laboratory: Laboratory, name: str) -> Part:
    """One part's rows, or the reason why it could not be measured."""
    print(f"{name} …", flush=True)
    sheet, start, failed = Sheet(name), time.perf_counter(), ""
    try:
        PLANS[name].measure(laboratory, sheet)
    except Exception as error:  # one part must not cost the figures of the others
        if not isinstance(error, FailedError):
            traceback.print_exc()
        failed = " ".join(str(error).split())[-500:]
        print(f"  failed: {failed}", flush=True)
    seconds = time.perf_counter() - start
    print(f"  {seconds:.0f} s", flush=True)
    return Part(sheet.rows, datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), seconds, failed)


def read_earlier(path: Path, fresh: Results) -> Results:
    """The results in a file, to be completed, where they come from the same machine and sizes."""
    if path.is_file():
        try:
            found = load(path)
        except (ValueError, KeyError, TypeError):
            return fresh
        if (found.machine, found.quick) == (fresh.machine, fresh.quick):
            return found
    return fresh


def tidy(work: Path, uses: str) -> None:
    """Delete the synthetic models of a kind, and what merges of them left."""
    for place in [*work.glob(f"{uses}-*"), work / "cache", work / "output"]:
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for 15 GB of models")
    parser.add_argument("--quick", action="store_true", help="small sizes, single repeats")
    parser.add_argument("--only", nargs="+", choices=list(PLANS), metavar="NAME", default=[])
    parser.add_argument("--keep", action="store_true", help="keep the synthetic models")
    parser.add_argument("--complete", action="store_true", help="the authors' route in full")
    parser.add_argument("--threads", type=int, help="of every measured process; 2, or 1 if quick")
    parser.add_argument("--mergekit", type=Path, default=MERGEKIT, help="a Python that has it")
    parser.add_argument(
        "--output", type=Path, help="RESULTS.json here, or in the work folder if quick"
    )
    asked = parser.parse_args()
    work = asked.work.resolve() / ("quick" if asked.quick else "full")
    work.mkdir(parents=True, exist_ok=True)
    threads = asked.threads or (1 if asked.quick else 2)
    mergekit = asked.mergekit if asked.mergekit.is_file() else None
    laboratory = Laboratory(work, threads, asked.quick, mergekit, asked.complete)
    output = asked.output or (work if asked.quick else HERE) / "RESULTS.json"
    results = Results(machine(threads), asked.quick)
    if asked.only:
        results = read_earlier(output, results)
    chosen = [name for name in PLANS if name in asked.only or not asked.only]
    start, failures = time.perf_counter(), 0
    for name in chosen:
        part = measure_part(laboratory, name)
        results.parts[name] = part
        results.parts = {n: results.parts[n] for n in PLANS if n in results.parts}
        results.save(output)
        failures += bool(part.failed)
        if not asked.keep and (uses := models_to_remove(name, chosen)):
            tidy(work, uses)
    print(f"{time.perf_counter() - start:.0f} s; {output.with_suffix('.md')}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()

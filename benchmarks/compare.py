"""Two runs of the benchmarks side by side: ``python -m benchmarks.compare BEFORE.json AFTER.json``.

A change counts where it exceeds both runs' own spread and 10 %. The exit code is 1 if something
asked is no longer met.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.record import Results, Row, load, number

NOISE = 0.10


def verdict(before: Row, after: Row) -> str:
    """``better``, ``worse``, ``differs``, or nothing where the change is within the noise."""
    low, high = sorted((before.value, after.value))
    # A value may be zero or, as an exponent, negative: then every change counts.
    noise = 1 + max(NOISE, before.spread, after.spread) if low > 0 else 1
    if high <= low * noise:
        return ""
    if after.better == "neither":
        return "differs"
    higher = after.value > before.value
    return "better" if higher == (after.better == "higher") else "worse"


def is_lost(before: Row, after: Row) -> bool:
    """Whether something asked was met before and is not any more."""
    return before.met is True and after.met is False


def compare_results(before: Results, after: Results) -> tuple[list[str], int]:
    """The table's lines, and how many bars were lost."""
    lines, broken = [], 0
    for name, part in after.parts.items():
        old = {row.what: row for row in before.parts[name].rows} if name in before.parts else {}
        shared = [row for row in part.rows if row.what in old]
        if not shared:
            continue
        lines += ["", name]
        for row in shared:
            first = old[row.what]
            said = verdict(first, row)
            if is_lost(first, row):
                broken += 1
                said += f" (asked: {row.asked})"
            ratio = f"{row.value / first.value:8.2f}" if first.value > 0 else " " * 8
            lines.append(
                f"  {row.what[:64]:64s} {number(first.value, row.unit):>12s} "
                f"{number(row.value, row.unit):>12s} {ratio}  {said}".rstrip()
            )
    return lines, broken


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    asked = parser.parse_args()
    before, after = load(asked.before), load(asked.after)
    if before.quick != after.quick:
        raise SystemExit("one of the two is a quick run, whose sizes are others")
    for what, value in after.machine.items():
        if (old := before.machine.get(what)) != value:
            print(f"{what}: {old} before, {value} after")
    lines, broken = compare_results(before, after)
    print("\n".join(lines))
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()

"""What comes with MergeScope: suites with their weights, and records of suites without."""

from __future__ import annotations

from pathlib import Path

from merge_core.suites.suite import BUNDLED, BUNDLED_PATH, RECORD_SUFFIX

BUNDLED_RECORDS = Path(__file__).resolve().parents[2] / "data" / "records"


def bundled_suites() -> dict[str, Path]:
    """Name to ``suite.yaml`` of the suites whose weights come with MergeScope.

    Example:
        >>> bundled_suites()["demo"].name
        'suite.yaml'
    """
    return {BUNDLED: BUNDLED_PATH}


def bundled_records() -> dict[str, Path]:
    """Name to file of the records that come with MergeScope.

    Example:
        >>> all(path.suffix == ".mergescope" for path in bundled_records().values())
        True
    """
    return {path.stem: path for path in sorted(BUNDLED_RECORDS.glob(f"*{RECORD_SUFFIX}"))}

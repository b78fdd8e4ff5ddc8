"""What comes with MergeScope: suites with their weights, and records of suites without."""

from __future__ import annotations

from pathlib import Path

BUNDLED = "vision"  # the one that is opened first
RECORD_SUFFIX = ".mergescope"
FRAMES_NAME = "frames.mergescope"  # beside a bundled suite
_TITLES = {
    BUNDLED: "Twenty vision tasks (1.1 M)",
    "vision-small": "Twenty vision tasks (0.3 M)",
    "vision-apart": "Six vision tasks apart (0.3 M)",
    "sentences": "Eight sentence tasks (MiniLM)",
}
_DATA = Path(__file__).resolve().parents[2] / "data"


def bundled_suites() -> dict[str, Path]:
    """Name to ``suite.yaml`` of the suites whose weights come with MergeScope.

    Example:
        >>> list(bundled_suites())
        ['vision', 'vision-small', 'vision-apart']
    """
    names = (BUNDLED, "vision-small", "vision-apart")
    return {name: _DATA / name / "suite.yaml" for name in names}


def bundled_name(path: Path) -> str | None:
    """The name of the bundled suite that a ``suite.yaml`` is; None for any other.

    Example:
        >>> bundled_name(bundled_suites()["vision"]), bundled_name(Path("suite.yaml"))
        ('vision', None)
    """
    return next((name for name, own in bundled_suites().items() if own == path), None)


def bundled_title(name: str) -> str:
    """What people read instead of the name of a bundled suite or record; any other name as it is.

    Example:
        >>> bundled_title("vision"), bundled_title("mine")
        ('Twenty vision tasks (1.1 M)', 'mine')
    """
    return _TITLES.get(name, name)


def bundled_frames() -> list[Path]:
    """The files that hold what pages show first of the bundled suites, computed beforehand.

    Example:
        >>> all(path.suffix == ".mergescope" for path in bundled_frames())
        True
    """
    return [path.with_name(FRAMES_NAME) for path in bundled_suites().values()]


def bundled_records() -> dict[str, Path]:
    """Name to file of the records that come with MergeScope.

    Example:
        >>> all(path.suffix == ".mergescope" for path in bundled_records().values())
        True
    """
    return {path.stem: path for path in sorted((_DATA / "records").glob(f"*{RECORD_SUFFIX}"))}

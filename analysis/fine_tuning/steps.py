"""Finished steps of a build, known by what they were made from and by what they wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from merge_core.files import file_digest, write_atomically
from merge_core.input_files import read_json

RECORD = "build.json"
FORMAT = "suite-build-1"
MOST_BYTES, MOST_VALUES = 50_000_000, 1_000_000


class Steps:
    """The steps that a build's folder holds.

    A step counts if it was made from the same things and its files are as it wrote them: what was
    being written when a build was killed does not.

    Args:
        folder: of the suite.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, dict[str, Any]] = {}
        self._used: set[str] = set()
        with suppress(OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            found = read_json(folder / RECORD, MOST_BYTES, MOST_VALUES)
            if found["format"] == FORMAT:
                self._known = {str(name): dict(step) for name, step in found["steps"].items()}

    def is_done(self, name: str, digest: str) -> bool:
        """Whether a step is finished that was made from what has this digest."""
        self._used.add(name)
        step = self._known.get(name)
        if step is None or step.get("digest") != digest:
            return False
        files = step.get("files")
        with suppress(OSError):
            return isinstance(files, dict) and all(
                file_digest(self._folder / path) == known for path, known in files.items()
            )
        return False

    def facts(self, name: str) -> dict[str, Any]:
        """What a finished step found out."""
        return dict(self._known[name].get("facts", {}))

    def content(self, name: str) -> str:
        """JSON of the digests of what a finished step wrote."""
        return json.dumps(self._known[name]["files"], sort_keys=True)

    def do(
        self, name: str, digest: str, places: list[str], work: Callable[[], dict[str, Any]]
    ) -> None:
        """Do a step if it is not finished, and remember it.

        Args:
            name: of the step.
            digest: of what it is made from.
            places: the files and folders that it writes, relative to the suite's.
            work: writes them, and gives what it found out.

        Raises:
            OutputError: the record cannot be written.
            Exception: what `work` raises.
        """
        if self.is_done(name, digest):
            return
        roots = [self._folder / place for place in places]
        for root in roots:  # of another plan, or half-written
            if root.is_dir():
                shutil.rmtree(root)
            root.unlink(missing_ok=True)
        facts = work()
        files = [
            path
            for root in roots
            for path in ([root] if root.is_file() else sorted(root.rglob("*")))
            if path.is_file() and not path.name.startswith(".")
        ]
        written = {p.relative_to(self._folder).as_posix(): file_digest(p) for p in files}
        self._known[name] = {"digest": digest, "files": written, "facts": facts}
        self._write()

    def finish(self) -> None:
        """Forget steps that this build had no use for."""
        self._known = {name: self._known[name] for name in sorted(self._used)}
        self._write()

    def _write(self) -> None:
        text = json.dumps({"format": FORMAT, "steps": self._known}, indent=1, sort_keys=True)
        write_atomically(self._folder / RECORD, (text + "\n").encode())

"""The plainest program that moves as many bytes as a merge; it imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

BUFFER = 1 << 22


def copy(files: list[str], output: str, written: int) -> None:
    """Read all files, and write `written` bytes of the last one: a bound that no merge can beat."""
    view = memoryview(bytearray(BUFFER))
    with Path(output).open("wb", buffering=0) as target:
        for i, file in enumerate(files):
            left = written if i == len(files) - 1 else 0
            with Path(file).open("rb", buffering=0) as stream:
                while count := stream.readinto(view):
                    if left:
                        target.write(view[: min(count, left)])
                        left -= min(count, left)

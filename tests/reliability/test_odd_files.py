"""What is no file or no path is refused in words, wherever it stands; nothing waits for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from analysis.data_sources import archive
from analysis.outputs.inputs import load_inputs
from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.errors import (
    CheckpointError,
    MergeScopeError,
    OutputError,
    PoolError,
    RecipeError,
    SuiteError,
)
from merge_core.files import cache_dir, file_digest
from merge_core.merging.recipe import load_recipe
from merge_core.suites.data_files import content_digest
from merge_core.suites.pool import describes_pool, load_pool
from merge_core.suites.suite import load_suite
from tests.evaluable import TASKS, copy_evaluable, edit_document
from tests.reliability.limits import run_confined

ROOT = Path(__file__).resolve().parents[2]


def replace_by_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)


def replace_by_zeros(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def read_images(folder: Path) -> None:
    load_inputs(load_suite(folder), TASKS[0], "val")


def of_folder(suite_folder: Path) -> None:
    """Make the first task's data a folder of images."""
    images = suite_folder / "images" / "cat"
    images.mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (16, 16)).save(images / f"{number}.png")
    document = load_suite(suite_folder).spec.model_dump(mode="json", exclude_unset=True)
    document["experts"][TASKS[0]]["data"] = {
        "kind": "folder", "path": "images", "mean": [0.5] * 3, "std": [0.5] * 3,
    }  # fmt: skip
    edit_document(suite_folder, experts=document["experts"])


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "safetensors": ("m.safetensors", Checkpoint),
    "pickle": ("m.pt", Checkpoint),
    "index": ("m.safetensors.index.json", Checkpoint),
    "suite": ("suite.yaml", load_suite),
    "pool": ("pool.yaml", load_pool),
    "recipe": ("recipe.yaml", load_recipe),
    "adapter": ("adapter_config.json", lambda path: Checkpoint(path.parent)),
    "digest": ("x.bin", file_digest),
    "digest of a folder": ("x.bin", lambda path: content_digest(path.parent)),
}
REPLACEMENTS = {"pipe": replace_by_pipe, "zeros": replace_by_zeros}


@pytest.mark.parametrize("kind", REPLACEMENTS)
@pytest.mark.parametrize("reader", READERS)
def test_no_reader_waits_for_what_is_no_file(tmp_path: Path, reader: str, kind: str) -> None:
    name, read = READERS[reader]
    REPLACEMENTS[kind](tmp_path / name)

    def told() -> str:
        try:
            read(tmp_path / name)
        except (MergeScopeError, OSError) as error:
            return str(error)
        return ""

    assert run_confined(told, seconds=20)


@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_no_reader_of_data_waits(tmp_path: Path, kind: str) -> None:
    copy_evaluable(tmp_path / "s")
    REPLACEMENTS[kind](tmp_path / "s" / "inputs" / f"{TASKS[0]}.npz")

    def told() -> str:
        with pytest.raises(SuiteError) as refused:
            read_images(tmp_path / "s")
        return str(refused.value)

    assert "npz" in run_confined(told, seconds=60)


@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_no_reader_of_images_waits(tmp_path: Path, kind: str) -> None:
    copy_evaluable(tmp_path / "s")
    of_folder(tmp_path / "s")
    REPLACEMENTS[kind](tmp_path / "s" / "images" / "cat" / "odd.png")

    def told() -> str:
        with pytest.raises(SuiteError) as refused:
            read_images(tmp_path / "s")
        return str(refused.value)

    assert run_confined(told, seconds=60)


def test_an_archive_that_unpacks_to_fill_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "ALWAYS_UNPACKED", 1_000_000)
    suite = copy_evaluable(tmp_path / "s")
    zeros = np.zeros((5, 1000, 1000, 3), np.uint8)
    np.savez_compressed(suite.root / f"inputs/{TASKS[0]}.npz", val_images=zeros)
    with pytest.raises(SuiteError, match="unpack to"):
        load_inputs(suite, TASKS[0], "val")


def test_labels_without_end_are_refused(tmp_path: Path) -> None:
    suite = copy_evaluable(tmp_path / "s")
    path = suite.root / f"inputs/{TASKS[0]}.npz"
    with np.load(path) as stored:
        arrays = {n: v for n, v in stored.items() if n != "class_names"}
    arrays["val_labels"] = np.full_like(arrays["val_labels"], 1 << 60)
    np.savez(path, **arrays)
    with pytest.raises(SuiteError, match="labels go up to"):
        load_inputs(suite, TASKS[0], "val")


@pytest.mark.parametrize("text", ["~nobody-of-that-name/x", "a\0b", "a" * 5000])
@pytest.mark.parametrize(
    ("read", "error"),
    [(load_suite, SuiteError), (load_pool, PoolError), (load_recipe, RecipeError),
     (describes_pool, PoolError)],
)  # fmt: skip
def test_what_is_no_path_is_refused_in_words(
    text: str, read: Callable[[str], object], error: type[Exception]
) -> None:
    with pytest.raises(error, match="is not a path"):
        read(text)


ODD = ("~nobody-of-that-name/x", "a" * 5000, "loop/x", "\udcff\udcfe")
COMMANDS = (
    ("inspect",), ("merge",), ("suite", "init"), ("app",), ("app", "--root"), ("evaluate",),
    ("compare",),
)  # fmt: skip


def test_commands_say_in_words_what_is_no_path(tmp_path: Path) -> None:
    """All in one process: each import of the command line takes a second."""
    (tmp_path / "loop").symlink_to("loop")
    code = (
        "import sys, os\n"
        "from mergescope.cli import main\n"
        "for command in COMMANDS:\n"
        "  for odd in ODD:\n"
        "    sys.argv = ['mergescope', *command, odd]\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 2, (command, odd[:40], end.code)\n"
    )
    code = code.replace("COMMANDS", repr(COMMANDS)).replace("ODD", repr(ODD))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    said = done.stderr.decode("utf-8", "replace")
    assert "Traceback" not in said, said[-2000:]
    assert done.returncode == 0
    assert len(said.splitlines()) == len(COMMANDS) * len(ODD)


@pytest.mark.parametrize("variable", ["MERGESCOPE_CACHE", "XDG_CACHE_HOME"])
@pytest.mark.parametrize("value", ["~nobody-of-that-name", "loop/cache", "a" * 5000])
def test_a_cache_folder_that_is_none_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.delenv("MERGESCOPE_CACHE", raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(OutputError, match=rf"The cache folder \(\${variable}\): .*is not a path"):
        cache_dir()


def test_a_cache_folder_that_is_none_is_said_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MERGESCOPE_CACHE": "loop/cache"}
    done = subprocess.run(
        [sys.executable, "-m", "mergescope", "inspect", "vision", "--spectra"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == 2
    assert done.stderr.startswith("mergescope: The cache folder")


def test_an_input_changed_in_place_with_its_time_restored_is_noticed(tmp_path: Path) -> None:
    suite = copy_evaluable(tmp_path / "s")
    path = suite.root / f"experts/{TASKS[0]}.safetensors"
    opened = Checkpoint(path)
    before, state = opened.digest, path.stat()
    with path.open("r+b") as stream:  # one bit of the last number
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        opened.tensor(next(iter(opened)))
    assert Checkpoint(path).digest != before

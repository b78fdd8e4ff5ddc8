"""A user's mistake: exit code 2, one line that says what and where, and nothing half-written."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from merge_core import files
from merge_core.output import model_folder
from mergescope import cli
from tests.evaluable import copy_evaluable, edit_document


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
    copy_evaluable(tmp_path / "suite")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "suite"


@pytest.fixture
def mistake(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[..., str]:
    """Run a command that must fail; gives its one line."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["mergescope", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        error = capsys.readouterr().err
        assert caught.value.code == 2
        assert error.startswith("mergescope: ")
        assert error.count("\n") == 1
        assert error.endswith("\n")
        assert "Traceback" not in error
        return error

    return run


def write_recipe(folder: Path, **fields: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"suite": ".", "method": "cart", **fields}))
    return path


def listing(folder: Path) -> set[Path]:
    """All files but those of the cache."""
    return {path for path in folder.rglob("*") if "cache" not in path.parts}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def write_text(path: Path) -> None:
    path.write_text("these are not weights\n")


def reshape(path: Path) -> None:
    state = load_file(path)
    save_file({**state, "norm.weight": torch.ones(9)}, path)


def remove_tensor(path: Path) -> None:
    state = load_file(path)
    del state["norm.weight"]
    save_file(state, path)


def write_nan(path: Path) -> None:
    state = load_file(path)
    state["norm.weight"][3] = torch.nan
    save_file(state, path)


DAMAGES = [
    (truncate, ("shapes.safetensors", "truncated or damaged", "Copy or download")),
    (write_text, ("shapes.safetensors", "not in the safetensors format", "Give the original")),
    (reshape, ("'shapes'", "'norm.weight'", "(9,)", "(16,)", "mergescope inspect")),
    (remove_tensor, ("'shapes'", "'norm.weight'", "missing")),
    (write_nan, ("shapes.safetensors", "'norm.weight'", "1 NaN or infinite")),
    (Path.unlink, ("shapes.safetensors", "does not exist", "Check the path")),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("command", ["merge", "evaluate", "select-rank"])
def test_damaged_experts(
    folder: Path, mistake: Callable[..., str], damage: Any, words: tuple[str, ...], command: str
) -> None:
    damage(folder / "experts" / "shapes.safetensors")
    recipe = write_recipe(folder)
    before = listing(folder.parent)
    arguments = {
        "merge": [recipe, "-o", "out"],
        "evaluate": [recipe, "--csv", "t.csv"],
        "select-rank": [folder, "--ranks", "2", "--scales", "1", "--csv", "t.csv"],
    }[command]
    line = mistake(command, *arguments)
    for word in words:
        assert word in line
    assert listing(folder.parent) == before


def test_inspect_shows_differences_and_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    reshape(folder / "experts" / "shapes.safetensors")
    monkeypatch.setattr(sys, "argv", ["mergescope", "inspect", str(folder)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert captured.err == (
        "mergescope: A merge is impossible; differences that prevent it: 1 (see the table above).\n"
    )
    (row,) = [line for line in captured.out.splitlines() if "norm.weight" in line]
    assert "shapes" in row
    assert "(9,)" in row


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "bogus"}, ("no method 'bogus'", "Known: average, ")),
        ({"parameters": {"rank": 0}}, ("rank", "got 0", "a share in (0, 1]")),
        ({"parameters": {"rank": 1.5}}, ("rank", "got 1.5", "whole number")),
        ({"parameters": {"scale": "big"}}, ("scale", "'big'")),
        ({"parameters": {"rnak": 2}}, ("no parameter 'rnak'", "rank, scale")),
        ({"paramters": {}}, ("recipe.yaml", "paramters", "check its spelling")),
        ({"dtype": "float31"}, ("recipe.yaml", "dtype", "float32")),
        ({"tasks": ["digits", "cats"]}, ("no task 'cats'", "digits, shapes, lines")),
        ({"tasks": []}, ("at least one task",)),
        ({"suite": "elsewhere.yaml"}, ("elsewhere.yaml", "cannot be read", "Give a suite.yaml")),
        ({"seed": -1}, ("seed", "greater than or equal to 0")),
    ],
)
@pytest.mark.parametrize("command", ["merge", "evaluate"])
def test_wrong_recipes(
    folder: Path,
    mistake: Callable[..., str],
    fields: dict[str, Any],
    words: tuple[str, ...],
    command: str,
) -> None:
    recipe = write_recipe(folder, **fields)
    before = listing(folder.parent)
    line = mistake(command, recipe, *(["-o", "out"] if command == "merge" else []))
    for word in words:
        assert word in line
    assert listing(folder.parent) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "missing.yaml"], ("missing.yaml", "No such file", "Give a suite.yaml")),
        (["inspect", "suite", "--tasks", "cats"], ("no task 'cats'",)),
        (["inspect", "suite", "--tasks", ","], ("at least one task",)),
        (["merge", "missing.yaml", "-o", "out"], ("missing.yaml", "Give a recipe")),
        (["merge", "suite", "-o", "out"], ("suite", "no recipe is in its header")),
        (["merge", "suite/inputs", "-o", "out"], ("suite/inputs", "no weight file")),
        (["merge", "suite/base.safetensors", "-o", "out"], ("base.safetensors", "no recipe is")),
        (["merge", "suite/inputs/lines.npz", "-o", "out"], ("lines.npz", "not a text")),
        (["merge", "gone.safetensors", "-o", "out"], ("gone.safetensors", "does not exist")),
        (["merge", "x" * 300, "-o", "out"], ("File name too long",)),
        (["merge", "suite/suite.yaml", "-o", "out"], ("method", "required")),
        (["merge", "suite/suite.yaml"], ("Missing option", "--output")),
        (["merge", "~nobody-here/r.yaml", "-o", "out"], ("~nobody-here", "home")),
        (["merge", "r", "-o", "out", "--shard-size", "nan"], ("--shard-size",)),
        (["merge", "r", "-o", "out", "--shard-size", "inf"], ("--shard-size",)),
        (["evaluate", "missing"], ("missing", "No such file")),
        (["evaluate", "x" * 300], ("File name too long",)),
        (["evaluate", "~nobody-here/r.yaml"], ("~nobody-here", "home")),
        (["evaluate", "suite/base.safetensors"], ("base.safetensors", "not valid YAML")),
        (["evaluate", "suite", "--split", "train"], ("--split must be val or test", "'train'")),
        (["evaluate", "suite", "--limit", "0"], ("--limit",)),
        (["evaluate", "suite", "--csv", "suite"], ("suite is a folder", "give a file name")),
        (["select-rank", "suite", "--csv", "suite"], ("suite is a folder", "give a file name")),
        (["select-rank", "suite", "--output", "suite"], ("suite is a folder", "file name")),
        (["select-rank", "suite", "--mode", "guess"], ("--mode must be labels, inputs or",)),
        (["select-rank", "suite", "--ranks", "a,b"], ("--ranks takes numbers", "'a,b'")),
        (["select-rank", "suite", "--ranks", ""], ("--ranks takes numbers",)),
        (["select-rank", "suite", "--ranks", "1.5"], ("rank", "got 1.5")),
        (["select-rank", "suite", "--ranks", "0"], ("rank", "got 0")),
        (["select-rank", "suite", "--ranks", "1,1.0"], ("--ranks names 1 twice",)),
        (["select-rank", "suite", "--scales", "1,,2"], ("--scales takes numbers",)),
        (["select-rank", "suite", "--scales", "nan"], ("scale", "finite")),
        (["select-rank", "suite", "--method", "average"], ("neither a rank nor a scale",)),
        (["select-rank", "suite", "--method", "bogus"], ("no method 'bogus'",)),
        (["select-rank", "suite", "--bogus"], ("No such option: --bogus",)),
        (["bogus"], ("No such command 'bogus'",)),
        (["app", "missing.yaml"], ("missing.yaml", "Give a suite.yaml")),
        (["app", "--port", "99999"], ("--port",)),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_wrong_arguments(
    folder: Path,
    mistake: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: tuple[str, ...],
) -> None:
    monkeypatch.setattr(subprocess, "run", None)  # nothing may be started
    before = listing(folder.parent)
    line = mistake(*arguments)
    for word in words:
        assert word in line
    assert listing(folder.parent) == before


def test_yaml_that_is_none(folder: Path, mistake: Callable[..., str]) -> None:
    for content in ("name: 2020-13-45\n", "a: [1\n", "- 1\n", "", "[" * 3000):
        (folder / "odd.yaml").write_text(content)
        for command in (["evaluate"], ["merge", "-o", "out"], ["inspect"]):
            assert "odd.yaml" in mistake(*command, folder / "odd.yaml")


def test_evaluation_files(folder: Path, mistake: Callable[..., str]) -> None:
    head = folder / "heads" / "shapes.safetensors"
    write_text(head)
    assert "Head of task 'shapes'" in mistake("evaluate", folder)
    head.unlink()
    assert "heads/shapes.safetensors" in mistake("evaluate", folder)
    edit_document(folder, architecture=None)
    assert "names no architecture" in mistake("evaluate", folder)
    assert "names no architecture" in mistake("select-rank", folder, "--mode", "labels")


def test_a_method_that_needs_a_base(folder: Path, mistake: Callable[..., str]) -> None:
    edit_document(folder, base=None)
    recipe = write_recipe(folder, method="task_arithmetic")
    assert "Add 'base:' to suite.yaml" in mistake("merge", recipe, "-o", "out")
    assert "Add 'base:' to suite.yaml" in mistake("evaluate", recipe)
    assert not Path("out").exists()


def test_an_output_in_use(folder: Path, mistake: Callable[..., str]) -> None:
    recipe = write_recipe(folder)
    (folder / "notes.txt").write_text("mine")
    before = listing(folder.parent)
    assert "exists and is not empty" in mistake("merge", recipe, "-o", folder)
    assert "is a file; the output must be a folder" in mistake(
        "merge", recipe, "-o", folder / "notes.txt"
    )
    assert "notes.txt" in mistake("merge", recipe, "-o", folder / "notes.txt" / "below")
    assert listing(folder.parent) == before
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_full_disk(
    folder: Path, mistake: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(folder)
    before = listing(folder.parent)
    original, written = model_folder.write_tensor, []

    def write(stream: Any, tensor: Any, planned: Any) -> None:
        written.append(planned.name)
        if len(written) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(stream, tensor, planned)

    monkeypatch.setattr(model_folder, "write_tensor", write)
    line = mistake("merge", recipe, "-o", "out")
    assert "The disk is full: out was not written. Free some space" in line
    assert listing(folder.parent) == before
    assert len(written) == 5

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (folder.parent / "t.csv").write_text("old")
    before = listing(folder.parent)
    monkeypatch.setattr(files.tempfile, "mkstemp", full)
    assert "The disk is full: t.csv" in mistake("evaluate", recipe, "--csv", "t.csv")
    assert listing(folder.parent) == before
    assert Path("t.csv").read_text() == "old"


def test_a_write_that_really_fails(folder: Path) -> None:
    """A limit of the operating system on file sizes, in a process of its own."""
    recipe = write_recipe(folder)
    before = listing(folder.parent)
    done = subprocess.run(
        [sys.executable, "-m", "mergescope", "merge", str(recipe), "-o", "out"],
        capture_output=True,
        text=True,
        cwd=folder.parent,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)),
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mergescope: out could not be written: File too large.\n"
    assert listing(folder.parent) == before


def test_a_real_process_ends_alike(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mergescope", "select-rank", "suite", "--bogus"],
        capture_output=True,
        text=True,
        cwd=folder.parent,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mergescope: No such option: --bogus\n"


def test_interrupting_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    recipe = write_recipe(folder)
    before = listing(folder.parent)

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model_folder, "write_tensor", interrupted)
    monkeypatch.setattr(sys, "argv", ["mergescope", "merge", str(recipe), "-o", "out"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 130
    assert capsys.readouterr().err.startswith("mergescope: cancelled")
    assert listing(folder.parent) == before

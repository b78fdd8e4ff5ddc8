"""The commands on a tiny suite: what they print and write."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from merge_core.checkpoints.checkpoint import Checkpoint
from mergescope import cli, terminal
from tests.evaluable import (
    TASKS,
    by_hand,
    copy_evaluable,
    edit_document,
    state_of,
    timm_model,
    write_evaluable,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")
    copy_evaluable(tmp_path / "suite")
    return tmp_path / "suite"


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit code of the command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["mergescope", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def write_recipe(folder: Path, **fields: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"suite": ".", "method": "cart", **fields}))
    return path


def test_inspect(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert call(monkeypatch, "inspect", folder, "--spectra") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "evaluable: 3 experts (digits, shapes, lines)" in captured.out
    assert "base: yes" in captured.out
    assert "evaluation: ready" in captured.out
    suite = copy_evaluable(folder.parent / "again")
    assert f"parameters: {len(suite.parameters)} ({len(suite.matrices)} decomposed" in captured.out
    assert "Differences" not in captured.out
    # Norms of the task vectors by hand, about either origin, over the decomposed matrices.
    base, experts = state_of(suite), {t: state_of(suite, t) for t in TASKS}
    for task in TASKS:
        for about in ("base", "average"):
            square = 0.0
            for name in suite.matrices:
                every = torch.stack([e[name] for e in experts.values()]).double()
                origin = base[name].double() if about == "base" else every.mean(0)
                square += (experts[task][name].double() - origin).square().sum().item()
            row = next(
                line for line in captured.out.splitlines() if task in line and f" {about} " in line
            )
            assert f"{square**0.5:.4g}" in row


def test_inspect_headers_only_reads_no_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    read: list[str] = []
    original = Checkpoint.read_unchecked
    monkeypatch.setattr(
        Checkpoint, "read_unchecked", lambda self, name: read.append(name) or original(self, name)
    )
    assert call(monkeypatch, "inspect", folder, "--headers-only", "--tasks", "lines, digits") == 0
    assert read == []
    assert "Task vectors" not in capsys.readouterr().out
    assert call(monkeypatch, "inspect", folder, "--spectra") == 0
    assert read  # the count can count


def test_inspect_tells_fine_tunes_without_torch_and_spectra_on_request(folder: Path) -> None:
    code = (
        "import sys\n"
        "from mergescope.cli import main\n"
        f"sys.argv = ['mergescope', 'inspect', {str(folder)!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0, end.code\n"
        "heavy = {'torch', 'timm', 'pandas', 'streamlit', 'plotly', 'scipy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Is this a fine-tune of that base?" in done.stdout
    assert "Task vectors" not in done.stdout
    assert "time on this machine" not in done.stdout
    assert "--spectra" in done.stdout


def test_inspect_prints_names_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    write_evaluable(tmp_path / "odd", TASKS[:1], name="a [/b] [red]c :smile:", with_base=False)
    assert call(monkeypatch, "inspect", tmp_path / "odd", "--headers-only") == 0
    captured = capsys.readouterr().out
    assert "a [/b] [red]c :smile:: 1 experts (digits)" in captured
    assert "base: none" in captured


def test_inspect_names_what_pickled_members_would_import(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    model = timm_model()
    model.load_state_dict(load_file(folder / "experts/digits.safetensors"))
    torch.save(model, folder / "experts/digits.pt")
    document = yaml.safe_load((folder / "suite.yaml").read_text())
    document["experts"]["digits"]["weights"] = "experts/digits.pt"
    (folder / "suite.yaml").write_text(yaml.safe_dump(document))
    assert call(monkeypatch, "inspect", folder, "--headers-only") == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if "neither imported nor run" in line]
    assert "timm.models.vision_transformer.VisionTransformer" in " ".join(lines)
    assert line.startswith("named in pickled files")


def test_inspect_without_evaluation(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    edit_document(folder, architecture=None)
    assert call(monkeypatch, "inspect", folder, "--headers-only") == 0
    assert "not possible, the suite names no architecture" in capsys.readouterr().out


def test_merge_gives_a_model_that_loads_and_its_recipe_gives_it_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    recipe = write_recipe(folder, parameters={"rank": 3, "scale": 1.5})
    assert call(monkeypatch, "merge", recipe, "-o", tmp_path / "out") == 0
    captured = capsys.readouterr()
    assert (captured.out.strip(), captured.err) == (str(tmp_path / "out"), "")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    base = state_of(copy_evaluable(tmp_path / "copy"))
    assert {k: v.shape for k, v in merged.items()} == {k: v.shape for k, v in base.items()}
    by_hand(merged, folder, "digits", "val")  # load_state_dict takes it
    experts = [load_file(folder / f"experts/{t}.safetensors") for t in TASKS]
    for name in ("norm.weight", "blocks.0.mlp.fc1.weight"):
        every = torch.stack([e[name] for e in experts]).double()
        expected = every.mean(0)
        if every.ndim == 3:
            U, S, V = torch.linalg.svd(every - expected, full_matrices=False)
            low = (U[:, :, :3] * S[:, None, :3]) @ V[:, :3]
            expected = expected + 1.5 * low.sum(0)
        torch.testing.assert_close(merged[name].double(), expected, atol=1e-5, rtol=1e-5)
    # The recipe beside the model says everything: from anywhere, bit by bit.
    monkeypatch.chdir("/")
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "other cache"))
    again = tmp_path / "again"
    at = ("--suite", folder)  # the recipe names no place on this machine
    assert call(monkeypatch, "merge", tmp_path / "out" / "recipe.yaml", "-o", again, *at) == 0
    for name in ("model.safetensors", "recipe.yaml"):
        assert (again / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_merge_notes_what_makes_no_sense(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    recipe = write_recipe(folder, tasks=["digits", "lines"])
    assert call(monkeypatch, "merge", recipe, "-o", tmp_path / "out") == 0
    assert capsys.readouterr().err.startswith("note: With two tasks CART equals")


def test_evaluate_a_suite(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    csv = folder / "deep" / "table.csv"
    assert call(monkeypatch, "evaluate", folder, "--split", "test", "--csv", csv) == 0
    assert "Accuracy on the test split" in capsys.readouterr().out
    table = pd.read_csv(csv).set_index(["model", "task"])
    assert list(table.columns) == ["accuracy", "low", "high", "correct", "images"]
    suite = copy_evaluable(folder.parent / "again")
    states = [state_of(suite, t) for t in TASKS]
    average = {name: sum(s[name] for s in states) / 3 for name in states[0]}
    for model, weights in (("base", state_of(suite)), ("average", average), ("experts", None)):
        right = []
        for task in TASKS:
            predicted, labels = by_hand(weights or state_of(suite, task), folder, task, "test")  # type: ignore[arg-type]
            right.append(int((predicted == labels).sum()))
            assert table.loc[(model, task), "correct"] == right[-1]
        assert table.loc[(model, "mean over tasks"), "accuracy"] == pytest.approx(sum(right) / 60)


def test_evaluate_a_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    recipe = write_recipe(folder, tasks=["lines", "digits"], method="task_arithmetic")
    csv = folder / "t.csv"
    assert call(monkeypatch, "evaluate", recipe, "--limit", "5", "--csv", csv) == 0
    table = pd.read_csv(csv)
    assert table["task"].tolist() == ["digits", "lines", "mean over tasks"]
    assert set(table["model"]) == {"Task Arithmetic"}
    assert table["images"].dropna().tolist() == [5, 5]
    assert "mean over tasks" in capsys.readouterr().out


def test_app_becomes_streamlit_on_loopback_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def execve(program: str, command: list[str], environment: dict[str, str]) -> None:
        seen.update(program=program, command=command, env=environment, cwd=Path.cwd())

    monkeypatch.setattr("os.execve", execve)
    monkeypatch.chdir(Path.cwd())  # what the command changes is put back
    assert call(monkeypatch, "app", folder, "--port", "9000") == 0
    assert seen["program"] == sys.executable
    assert seen["command"] == [
        *(sys.executable, "-m", "ui.server.launch", "run", str(ROOT / "app.py")),
        "--server.port=9000",
    ]
    assert not any("address" in part for part in seen["command"])
    assert seen["env"]["MERGESCOPE_SUITES"] == str(folder / "suite.yaml")
    assert "STREAMLIT_SERVER_ADDRESS" not in seen["env"]
    # The working folder brings the configuration, which binds to this machine alone.
    config = tomllib.loads((seen["cwd"] / ".streamlit" / "config.toml").read_text())
    assert config["server"]["address"] == "127.0.0.1"
    assert config["browser"]["gatherUsageStats"] is False


def test_help_is_light() -> None:
    code = (
        "import sys; sys.argv = ['mergescope', '--help']\n"
        "from mergescope.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0, end.code\n"
        "heavy = {'torch', 'timm', 'pandas', 'numpy', 'streamlit', 'plotly', 'scipy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    names = (
        "app",
        "inspect",
        "merge",
        "evaluate",
        "select-rank",
        "compare",
        "methods",
        "pool",
        "suite",
    )
    for command in names:
        assert f"  {command} " in done.stdout


def test_without_arguments_it_helps(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert call(monkeypatch) == 0
    captured = capsys.readouterr()
    assert "Commands:" in captured.out
    assert captured.err == ""


def test_a_terminal_sees_how_far_it_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert call(monkeypatch, "merge", write_recipe(folder), "-o", tmp_path / "out") == 0
    lines = capsys.readouterr().err.split("\r\x1b[2K")[1:]
    count = len(load_file(tmp_path / "out" / "model.safetensors"))
    assert len(lines) == count + 1
    assert lines[0].startswith(f"merging [{'.' * 24}] 0/{count} ")
    assert lines[-1] == f"merging [{'#' * 24}] {count}/{count} merged\n"


def test_sizes_in_words() -> None:
    sizes = {999: "999 B", 1500: "1.5 KB", 25_000_000: "25 MB", 3_210_000_000: "3.21 GB"}
    assert {size: terminal.size(size) for size in sizes} == sizes

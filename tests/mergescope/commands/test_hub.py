"""``inspect hf://…``, ``download``, ``push`` and ``card``, against a hub on loopback."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from merge_core.hub.models import find_cached
from mergescope import cli
from tests.evaluable import TASKS, by_hand, copy_evaluable
from tests.hub_client import files_of, hub, shard_files, weights
from tests.hub_server import Hub

__all__ = ["hub"]
SECRET = "hf_WriterToken"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    """Run a command; gives its exit code, output and errors."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mergescope", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, captured.out, captured.err

    return call


def test_inspect_a_model_without_download(run: Any, hub: Hub) -> None:
    made = hub.repository("org/model", shard_files(weights(side=400)))
    code, out, err = run("inspect", "hf://org/model")
    assert (code, err) == (0, "")
    assert made.branches["main"][:12] in out
    total = sum(map(len, made.commits[made.branches["main"]].values()))
    assert 640_000 < total < 644_000
    assert "to download: 643 KB" in out  # the index is here already
    assert "org/model: 1 experts (model)" in out
    assert "encoder.0.weight" in out
    assert "400 x 400" in out
    assert find_cached("hf://org/model") is None
    code, out, err = run("inspect", "hf://org/model", "--spectra")  # takes what is not here
    assert (code, err) == (0, "")
    assert "Task vectors" not in out
    assert find_cached("hf://org/model") is None


def test_a_suite_on_the_hub_from_report_to_merge(run: Any, hub: Hub, tmp_path: Path) -> None:
    hub.repository("org/one", files_of(weights(1)))
    hub.repository("org/two", files_of(weights(2)))
    experts = {name: {"weights": f"hf://org/{name}"} for name in ("one", "two")}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"name": "s", "experts": experts}))
    code, out, _ = run("inspect", tmp_path)
    assert code == 0
    assert "On the hub, not downloaded" in out
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"suite": ".", "method": "average"}))
    merge = ("merge", tmp_path / "recipe.yaml", "-o", tmp_path / "out")
    code, _, err = run(*merge)
    assert code == 2
    assert "mergescope download hf://org/one" in err
    assert err.count("\n") == 1
    code, out, _ = run("download", tmp_path)
    assert code == 0
    for name in ("one", "two"):
        commit = hub.repositories[f"org/{name}"].branches["main"]
        assert f"hf://org/{name}@{commit} {find_cached(f'hf://org/{name}')}" in out
    hub.requests.clear()
    assert run(*merge)[0] == 0
    code, out, _ = run("inspect", tmp_path, "--spectra")
    assert code == 0
    assert "Task vectors" in out
    assert "not downloaded" not in out
    assert run("download", tmp_path)[0] == 0
    assert hub.requests == []


def test_push(run: Any, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(files_of(weights())["model.safetensors"])
    (tmp_path / "recipe.yaml").write_text("suite: /home/me/suite.yaml\nmethod: average\n")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    hub.writer = SECRET
    code, out, err = run("push", tmp_path, "me/merged")
    assert code == 0
    assert out == f"{hub.url}/me/merged\n"
    assert "note: recipe, card and weights name the suite by its path here, /home/me" in err
    assert hub.repositories["me/merged"].private
    hub.writer = "another"
    code, out, err = run("push", tmp_path, "me/merged")
    assert (code, out) == (2, "")
    assert SECRET not in err


def test_mistakes(run: Any, hub: Hub) -> None:
    for name, words in (
        ("hf://org/absent", "has no repository 'org/absent'"),
        ("hf://a/b/c", "is not a name on the hub"),
    ):
        for command in ("inspect", "download"):
            code, out, err = run(command, name)
            assert (code, out) == (2, "")
            assert err.startswith("mergescope: ")
            assert words in err
            assert err.count("\n") == 1


@pytest.mark.parametrize("method", ["average", "cart_indexing"])
def test_the_card_learns_the_accuracies(run: Any, tmp_path: Path, method: str) -> None:
    suite = copy_evaluable(tmp_path / "suite")
    document = {"suite": "suite", "method": method, "tasks": list(TASKS[:2])}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
    folder = tmp_path / "out"
    assert run("merge", tmp_path / "recipe.yaml", "-o", folder)[0] == 0
    plain = ModelCard.load(folder / "README.md")
    assert plain.data.eval_results is None
    code, out, err = run("card", folder, "--limit", 16)
    assert (code, err) == (0, "")
    card = ModelCard.load(folder / "README.md")
    assert card.data.eval_results is not None
    for task, result in zip(TASKS, card.data.eval_results, strict=False):
        own = folder / task if method == "cart_indexing" else folder
        state = load_file(own / "model.safetensors")
        predicted, labels = by_hand(state, suite.root, task, "test", 16)
        assert result.dataset_type == task
        assert result.dataset_split == "test"
        assert result.metric_value == round(float((predicted == labels).mean()), 4)
        assert f"{(predicted == labels).mean():.1%}" in out
    assert len(card.data.eval_results) == 2
    # Nothing else of the card has changed.
    assert (
        card.text.replace(card.text[card.text.index("## Acc") : card.text.index("## Rec")], "")
        == plain.text
    )
    # Members that have changed since are not what was merged.
    (suite.root / "experts/digits.safetensors").write_bytes(
        (suite.root / "experts/shapes.safetensors").read_bytes()
    )
    code, _, err = run("card", folder)
    assert code == 2
    assert "expert 'digits': digest was" in err

"""``mergescope prepare``: what is read, fetched and said."""

from __future__ import annotations

import hashlib
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from torchvision.datasets import CIFAR10, CIFAR100
from typer.testing import CliRunner

from merge_core.errors import SuiteError
from merge_core.yaml_text import dump_yaml
from mergescope.cli import app
from tests.analysis.data_sources.files import write_cifar10, write_mnist
from tests.evaluable import TASKS, copy_evaluable

FIRST = TASKS[0]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def describe_suite(tmp_path: Path, **fields: Any) -> Path:
    """A suite whose first task has other fields; None removes one."""
    suite = copy_evaluable(tmp_path / "suite")
    document = yaml.safe_load(suite.path.read_text())
    document["experts"][FIRST] = {
        name: value
        for name, value in (document["experts"][FIRST] | fields).items()
        if value is not None
    }
    suite.path.write_text(dump_yaml(document))
    return suite.path


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["prepare", *arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


def row(output: str, task: str) -> list[str]:
    """The cells of a task's row."""
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines()]
    return next(cells for cells in lines if cells[:1] == [task])


def test_everything_is_read_and_told(tmp_path: Path, cache: Path) -> None:
    write_mnist(tmp_path / "mnist", train=30)
    data = {"kind": "idx", "path": "../mnist", "transform": {"size": 16}, "limit": 10}
    path = describe_suite(tmp_path, data=data, head={"file": f"heads/{FIRST}.safetensors"})
    said = run(str(path))
    assert row(said, FIRST)[1:] == ["idx", "16 x 16", "3", "10", "3", "4 x 16"]
    assert row(said, TASKS[1])[1:] == ["numpy", "16 x 16", "20", "20", "4", "4 x 16"]
    assert len(list((cache / "images").glob("*.npy"))) == 2
    assert TASKS[1] not in run(str(path), "--tasks", FIRST)


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    path = describe_suite(tmp_path, data=None, head=None)
    assert row(run(str(path)), FIRST)[1:] == ["none", "", "", "", "", "none"]


def test_labels_beyond_the_head_are_refused(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "cifar", each=8)
    path = describe_suite(tmp_path, data={"kind": "cifar", "path": "../cifar", "mean": [0, 0, 0]})
    with pytest.raises(SuiteError, match=rf"head of task '{FIRST}' has 4 classes.*labels up to 7"):
        run(str(path), "--tasks", FIRST)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def published(tmp_path: Path) -> Iterator[str]:
    """The address of a server on loopback that gives the files in ``source``."""
    (tmp_path / "source").mkdir()
    handler = partial(_Quiet, directory=str(tmp_path / "source"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_nothing_is_fetched_unasked(
    tmp_path: Path, published: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source" / CIFAR10.base_folder
    write_cifar10(source, each=8)
    archive = tmp_path / "source" / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(source, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "url", f"{published}/{archive.name}")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "__init__", None)  # its class would unpickle
    data = {"kind": "torchvision", "dataset": "CIFAR10", "path": "../own", "mean": [0, 0, 0]}
    path = describe_suite(tmp_path, data=data, head=None)
    with pytest.raises(SuiteError, match="--download"):
        run(str(path), "--tasks", FIRST)
    assert not (tmp_path / "own").exists()
    said = row(run(str(path), "--tasks", FIRST, "--download"), FIRST)
    assert said[1:] == ["torchvision", "32 x 32", "4", "8", "10", "none"]
    monkeypatch.setattr(CIFAR10, "url", f"{published}/gone.tar.gz")
    assert row(run(str(path), "--tasks", FIRST, "--download"), FIRST) == said  # it is there


def test_what_cannot_be_fetched_says_so(
    tmp_path: Path, published: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CIFAR100, "url", f"{published}/gone.tar.gz")
    data = {"kind": "torchvision", "dataset": "CIFAR100", "path": "own"}
    path = describe_suite(tmp_path, data=data, head=None)
    with pytest.raises(SuiteError, match=r"could not fetch CIFAR100.*by hand"):
        run(str(path), "--tasks", FIRST, "--download")

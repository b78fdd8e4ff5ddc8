"""No page makes Markdown of what a suite, a pool or a link says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import torch
import yaml
from google.protobuf.message import Message
from markdown_it import MarkdownIt
from safetensors.torch import save_file
from streamlit.testing.v1 import AppTest

from merge_core.suites.pool import Pool
from merge_core.yaml_text import dump_yaml
from tests.evaluable import TASKS, write_evaluable
from tests.pages.test_pages import finish, open_page
from ui.shell import PAGES

HOST = "evil.example"
IMAGE = f"![x](http://{HOST}/p.png)"
HOSTILE = f"{IMAGE} [in](http://{HOST}) http://{HOST} www.{HOST} <img src=//{HOST}> :red[a] `b` $c$"
PARSER = MarkdownIt("commonmark").enable("table")
# Fields of Streamlit's messages that are not read as Markdown.
LETTERS = {
    "alt",
    "id",
    "options",
    "placeholder",
    "url",
    "query_param_key",
    "key",
    "file_urls",
    "raw_value",
    "code_text",
    "raw_values",
    "value",
    "session_id",
    "file_name",
    "default",
}


def texts(message: Message) -> Iterator[tuple[str, str]]:
    """Every text in a message to the browser, with the name of its field."""
    for field, value in message.ListFields():
        for each in value if field.is_repeated else [value]:
            if isinstance(each, Message):
                yield from texts(each)
            elif isinstance(each, str):
                yield field.name, each


def shown(at: AppTest) -> Iterator[tuple[str, str]]:
    """Every text on a page that may be read as Markdown, with where it stands."""
    waiting = list(at._tree.children.values())
    while waiting:
        node = waiting.pop()
        waiting += list(getattr(node, "children", {}).values())
        proto = node.proto
        kind = type(node).__name__
        if isinstance(proto, Message):
            yield from ((f"{kind}.{name}", text) for name, text in texts(proto))


def assert_no_markdown(at: AppTest) -> str:
    """Neither links nor images of strangers are on a page; returns all its texts."""
    assert not at.exception
    everything = []
    for place, text in shown(at):
        name = place.rpartition(".")[2]
        everything.append(text)
        if HOST not in text or name in LETTERS:
            continue
        if name in ("spec", "figure"):  # a figure, as JSON
            assert "<img" not in text.replace("\\u003c", "<"), place
            continue
        tokens = [t for token in PARSER.parse(text) for t in (token.children or [token])]
        kinds = {t.type for t in tokens}
        assert not kinds & {"image", "link_open", "html_inline", "html_block"}, (place, text)
        bare = " ".join(t.content for t in tokens if t.type == "text")  # code is left as it is
        assert f"http://{HOST}" not in bare, (place, text)
        assert f"www.{HOST}" not in bare, (place, text)
        assert ":red[" not in text.replace("\\:red", "").replace(f"`{text}`", ""), (place, text)
    return "\n".join(everything)


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A suite that can be evaluated, hostile in all its texts."""
    path = write_evaluable(tmp_path / f"www.{HOST}", description=HOSTILE)
    document = yaml.safe_load(path.read_text())
    for task in TASKS:
        document["experts"][task]["title"] = HOSTILE
    renamed = {f"www.{HOST}" if t == "lines" else t: e for t, e in document["experts"].items()}
    path.write_text(dump_yaml(document | {"experts": renamed}))
    monkeypatch.setenv("MERGESCOPE_SUITES", str(path))
    return path


LINK = {
    "suite": f"www.{HOST}", "own": HOSTILE, "pin": f"method={quote(HOSTILE)}",
    "overrides": f"{HOSTILE}=1", "method": HOSTILE, "layer": HOSTILE, "tasks": HOSTILE,
    "seed": HOSTILE, "pool": HOSTILE, "members": HOSTILE, "from": HOSTILE, "show": HOSTILE,
}  # fmt: skip


@pytest.mark.parametrize("page", [entry.name for entry in PAGES if entry.subject != "pool"])
def test_no_text_of_a_suite_or_a_link_is_markdown(suite: Path, page: str) -> None:
    at = open_page(page, **LINK)
    told = assert_no_markdown(finish(at))
    if page in ("overview", "compare"):
        assert HOST in told  # it is there, as letters


@pytest.mark.parametrize("page", ["compare", "merge_lab"])
def test_no_recipe_in_a_link_is_markdown(suite: Path, page: str) -> None:
    for own in (IMAGE, f"method=cart&rank={IMAGE}", f"method=average&{IMAGE}=1"):
        at = open_page(page, suite=f"www.{HOST}", own=own, pin=own, overrides=f"{IMAGE}: 1")
        assert HOST in assert_no_markdown(at)


def name_tensors(folder: Path) -> Path:
    """A suite whose tensors have hostile names."""
    names = [f"blocks.0.{HOSTILE}.weight", f"blocks.1.{HOSTILE}.weight"]
    for i in range(3):
        tensors = {name: torch.randn(6, 5) for name in names}
        if i == 2:
            tensors[names[1]] = torch.randn(4, 5)
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / f"e{i}.safetensors")
    experts = {f"t{i}": {"weights": f"e{i}.safetensors"} for i in range(3)}
    path = folder / "suite.yaml"
    path.write_text(dump_yaml({"name": HOSTILE, "experts": experts}))
    return path


@pytest.mark.parametrize("page", ["overview", "spectra", "interference", "merge_lab"])
def test_no_name_of_a_tensor_is_markdown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str
) -> None:
    monkeypatch.setenv("MERGESCOPE_SUITES", str(name_tensors(tmp_path / "mine")))
    for tasks in (["t0", "t1"], ["t0", "t1", "t2"]):
        at = finish(open_page(page, suite="mine", tasks=tasks))
        told = assert_no_markdown(at)
    assert HOST in told


@pytest.mark.parametrize("page", ["weights_or_features", "magnitude_and_stability", "patterns"])
def test_no_text_of_a_pool_is_markdown(offer_pool: Callable[..., Pool], page: str) -> None:
    pool = offer_pool("linear")
    document = yaml.safe_load(pool.path.read_text())
    texts = dict.fromkeys(("title", "description", "task", "family"), HOSTILE)
    pool.path.write_text(dump_yaml(document | texts))
    at = finish(open_page(page, pool=f"{HOSTILE}, {HOSTILE}"))
    assert HOST in assert_no_markdown(at)


@pytest.mark.parametrize("page", ["overview", "patterns"])
def test_no_error_is_markdown(
    suite: Path, monkeypatch: pytest.MonkeyPatch, page: str, offer_pool: Callable[..., Pool]
) -> None:
    pool = offer_pool("linear")
    pool.path.write_text(dump_yaml({HOSTILE: 1}))
    suite.write_text(dump_yaml({HOSTILE: HOSTILE}))
    at = open_page(page, suite=f"www.{HOST}")
    assert HOST in assert_no_markdown(at)

"""What can go wrong between a hub and its cache: refusals, damage, full disks, forged files."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import save

from merge_core.errors import HubError, OutputError
from merge_core.hub import models as product
from merge_core.hub.headers import read_headers
from merge_core.hub.models import describe, fetch, find_cached, find_or_fetch
from tests.hub_client import INDEX, files_of, hub, weights
from tests.hub_server import Hub

__all__ = ["hub"]
ID = "hf://org/model"
SECRET = "hf_VerySecretToken"


def make_gated(hub: Hub) -> None:
    hub.repository("org/model", files_of(weights()), gated=True, token="another")


def make_private(hub: Hub) -> None:
    hub.repository("org/model", files_of(weights()), token="another")


def answer_with(status: int) -> Callable[[Hub], None]:
    def answer(hub: Hub) -> None:
        hub.status = status

    return answer


def serve_plain(hub: Hub) -> None:
    hub.repository("org/model", files_of(weights()))


def stop(hub: Hub) -> None:
    hub.close()


@pytest.mark.parametrize(
    ("arrange", "name", "message"),
    [
        (
            serve_plain,
            "hf://org/absent",
            "has no repository 'org/absent', or it is private.*HF_TOKEN",
        ),
        (serve_plain, f"{ID}@v9", "org/model has no revision 'v9'"),
        (serve_plain, f"{ID}:x.safetensors", "has no file or folder 'x.safetensors'"),
        (make_private, ID, "has no repository 'org/model', or it is private"),
        (make_gated, ID, "is gated. Accept its terms"),
        (answer_with(403), ID, "forbids this"),
        (answer_with(429), ID, "too many requests"),
        (answer_with(500), ID, "the hub fails .HTTP 500.. Try again later"),
        (stop, ID, "no connection to 127.0.0.1"),
    ],
)
@pytest.mark.parametrize("token", [None, SECRET])
def test_what_the_hub_refuses(
    hub: Hub,
    arrange: Callable[[Hub], None],
    name: str,
    message: str,
    token: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    arrange(hub)
    with pytest.raises(HubError, match=message) as caught:
        find_or_fetch(name)
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)
    assert SECRET not in caplog.text
    assert set(hub.tokens) <= {token}
    assert hub.sent == {}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_file_is_refused_and_removed(hub: Hub, name: str) -> None:
    hub.repository("org/model", files_of(weights()))
    hub.damaged = {name}
    with pytest.raises(HubError, match=f"{name} arrived damaged"):
        find_or_fetch(ID)
    assert find_cached(ID) is None
    hub.damaged = set()
    content = (find_or_fetch(ID).parent / name).read_bytes()
    assert content == files_of(weights())[name]


def test_no_room_on_the_disk(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repository("org/model", files_of(weights()))
    needed = describe(ID).nbytes
    monkeypatch.setattr(product, "free_space", lambda: needed - 1)
    with pytest.raises(HubError, match="Free some space, or choose another disk with HF_HOME"):
        find_or_fetch(ID)
    assert hub.sent == {}
    monkeypatch.setattr(product, "free_space", lambda: needed)
    assert find_or_fetch(ID).is_file()


def test_a_cache_that_cannot_be_written(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repository("org/model", files_of(weights()))
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="file could not be written"):
        find_or_fetch(ID)


def test_a_file_that_arrives_short_or_is_gone(hub: Hub) -> None:
    repository = hub.repository("org/model", files_of(weights()))
    model = describe(ID)
    hub.short = {"model.safetensors"}
    with pytest.raises(HubError, match="a file arrived incomplete"):
        fetch([model])
    assert find_cached(ID) is None
    hub.short = set()
    del repository.commits[model.id.revision]["model.safetensors"]
    with pytest.raises(HubError, match="a file of it is gone from the hub"):
        fetch([model])


def test_a_disk_that_fills_up(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repository("org/model", files_of(weights()))

    def full(*arguments: object, **options: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    with pytest.raises(OutputError, match=r"The disk is full: .*hub cache"):
        find_or_fetch(ID)


def forge(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc", "damaged"),
        (forge(b"{not json"), "damaged"),
        ((2**62).to_bytes(8, "little") + b"{}", "damaged"),
        (forge(b'{"a": {"dtype": "F32", "shape": [2]}}'), "damaged"),
        (forge(b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}'), "damaged"),
        (forge(b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 8]}}'), "damaged"),
        (forge(b'{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}'), "has dtype 'F4'"),
        (forge(b'["a"]'), "damaged"),
        (forge(b"{}"), "holds no tensors"),
    ],
)
def test_a_forged_header(hub: Hub, content: bytes, message: str) -> None:
    hub.repository("org/model", {"model.safetensors": content})
    with pytest.raises(HubError, match=message):
        read_headers(describe(ID))


@pytest.mark.parametrize(
    "index",
    [b"[]", b'{"weight_map": {"a": "../../x.safetensors"}}', b'{"weight_map": {"a": "x.bin"}}'],
)
def test_a_forged_index(hub: Hub, index: bytes, tmp_path: Path) -> None:
    hub.repository("org/model", {INDEX: index, "m.safetensors": save(weights())})
    with pytest.raises(Exception, match=r"(shard index|outside its folder|is not there)") as caught:
        describe(ID)
    assert isinstance(caught.value, product.CheckpointError)
    assert not list(tmp_path.rglob("x.safetensors"))


def test_names_that_leave_the_repository_are_not_fetched(hub: Hub, tmp_path: Path) -> None:
    files = {**files_of(weights()), "../../out/config.json": b"{}", "..\\model.safetensors": b""}
    hub.repository("org/model", files)
    assert set(describe(ID).files) == {"config.json", "README.md", "model.safetensors"}

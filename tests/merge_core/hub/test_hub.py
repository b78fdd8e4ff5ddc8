"""Models on a hub served on loopback: headers, download, cache, and what goes wrong."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.errors import Cancelled, HubError
from merge_core.hub.client import reporting_bar
from merge_core.hub.headers import read_headers
from merge_core.hub.models import describe, fetch, find_cached, find_or_fetch, resolve_revision
from merge_core.progress import Progress
from tests.hub_client import INDEX, SHARDS, files_of, hub, shard_files, weights
from tests.hub_server import Hub

__all__ = ["hub"]
ID = "hf://org/model"
SECRET = "hf_VerySecretToken"
RANGE = 100_001  # what huggingface_hub asks for first


def infos(checkpoint: Checkpoint) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {n: (checkpoint.info(n).shape, checkpoint.info(n).dtype.torch) for n in checkpoint}


def test_headers_alone_are_transferred(hub: Hub, tmp_path: Path) -> None:
    state = weights(side=600, dtype=torch.bfloat16)
    hub.repository("org/model", files_of({f"module.{n}": v for n, v in state.items()}))
    size = len(hub.repositories["org/model"].commits.popitem()[1]["model.safetensors"])
    hub.repository("org/model", files_of({f"module.{n}": v for n, v in state.items()}))
    model = describe(ID)
    found = read_headers(model)
    assert infos(found) == {n: (tuple(v.shape), v.dtype) for n, v in sorted(state.items())}
    assert found.nbytes == sum(v.nbytes for v in state.values())
    assert hub.sent == {"model.safetensors": RANGE}
    assert size > 7 * RANGE
    # Weights, configuration and card; nothing of the rest.
    assert set(model.files) == {"config.json", "README.md", "model.safetensors"}
    assert model.nbytes == model.to_download > size
    for use in (lambda: found.tensor("norm.weight"), lambda: found.digest):
        with pytest.raises(HubError, match=f"not downloaded yet.*mergescope download {ID}"):
            use()


def test_headers_of_shards(hub: Hub, tmp_path: Path) -> None:
    state = weights(side=400)
    hub.repository("org/model", shard_files(state))
    seen: list[tuple[int, int, str]] = []
    found = read_headers(describe(ID), Progress(lambda *event: seen.append(event)))
    assert hub.sent[SHARDS[0]] == RANGE < state["encoder.0.weight"].nbytes
    assert seen == [(1, 2, SHARDS[0]), (2, 2, SHARDS[1])]
    assert infos(found) == infos(Checkpoint(find_or_fetch(ID)))


def test_a_download_comes_once(hub: Hub) -> None:
    state = weights()
    files = files_of(state)
    hub.repository("org/model", files)
    assert find_cached(ID) is None
    assert resolve_revision(ID) is None
    path = find_or_fetch(ID)
    assert path.name == "model.safetensors"
    assert path.read_bytes() == files["model.safetensors"]
    assert torch.equal(Checkpoint(path).tensor("norm.weight"), state["norm.weight"])
    assert sorted(hub.sent) == ["README.md", "config.json", "model.safetensors"]
    assert (path.parent / "config.json").read_bytes() == files["config.json"]
    hub.requests.clear()
    assert find_or_fetch(ID) == find_cached(ID) == path
    assert hub.requests == []
    commit = hub.repositories["org/model"].branches["main"]
    assert resolve_revision(ID) == f"{ID}@{commit}"
    assert find_cached(f"{ID}@{commit}") == path
    assert find_cached(f"{ID}@{commit}:model.safetensors") == path
    assert find_cached(f"{ID}:other.safetensors") is None


def test_a_revision_stays(hub: Hub) -> None:
    repository = hub.repository("org/model", files_of(weights(1)))
    first = repository.branches["main"]
    path = find_or_fetch(ID)
    second = repository.commit(files_of(weights(2)))
    # The branch has moved on; what was downloaded stands for it until it is asked for by name.
    assert find_or_fetch(ID) == path
    for commit, seed in ((first, 1), (second, 2)):
        tensor = Checkpoint(find_or_fetch(f"{ID}@{commit}")).tensor("norm.weight")
        assert torch.equal(tensor, weights(seed)["norm.weight"])
    assert describe(f"{ID}@{first}").id.revision == first
    assert describe(ID).id.revision == second


def test_shards_pickles_and_adapters(hub: Hub) -> None:
    state = weights()
    hub.repository("org/shards", shard_files(state))
    path = find_or_fetch("hf://org/shards")
    assert path.name == INDEX
    assert torch.equal(Checkpoint(path).tensor("norm.weight"), state["norm.weight"])
    stream = io.BytesIO()
    torch.save(state, stream)
    hub.repository("org/old", {"pytorch_model.bin": stream.getvalue(), "run.py": b""})
    with pytest.raises(HubError, match=r"pickled weights.*mergescope download hf://org/old"):
        read_headers(describe("hf://org/old"))
    path = find_or_fetch("hf://org/old")
    assert torch.equal(Checkpoint(path).tensor("norm.weight"), state["norm.weight"])
    adapter = {"adapter_config.json": b"{}", "adapter_model.safetensors": save(state)}
    hub.repository("org/lora", {f"deep/{name}": content for name, content in adapter.items()})
    with pytest.raises(HubError, match="an adapter"):
        read_headers(describe("hf://org/lora:deep"))
    folder = find_or_fetch("hf://org/lora:deep")
    assert sorted(path.name for path in folder.iterdir()) == sorted(adapter)


def test_a_half_downloaded_model_is_not_there(hub: Hub) -> None:
    hub.repository("org/model", shard_files(weights()))
    path = find_or_fetch(ID)
    (path.parent / SHARDS[1]).unlink()
    assert find_cached(ID) is None
    hub.sent.clear()
    assert find_or_fetch(ID) == path
    assert SHARDS[0] not in hub.sent


def test_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repository("org/model", files_of(weights()))
    hub.repository("org/other", files_of(weights()))
    path = find_or_fetch(ID)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_or_fetch(ID) == path
    with pytest.raises(
        HubError, match=r"hf://org/other is not in the cache \(.*hub cache\).*HF_HUB"
    ):
        find_or_fetch("hf://org/other")
    assert hub.requests == []


def test_the_token_of_the_environment_opens_what_is_gated(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repository("org/model", files_of(weights()), gated=True, token=SECRET)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert set(read_headers(describe(ID))) == set(weights())
    assert find_or_fetch(ID).is_file()
    assert set(hub.tokens) == {SECRET}


def test_an_interrupted_download_resumes(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    files = files_of(weights(side=300))
    hub.repository("org/model", files)
    hub.break_after = 200_000
    path = find_or_fetch(ID)
    assert path.read_bytes() == files["model.safetensors"]
    # Each byte came once.
    assert hub.sent["model.safetensors"] == len(files["model.safetensors"])
    assert hub.requests.count(f"GET /org/model/resolve/{path.parent.name}/model.safetensors") == 2
    assert capfd.readouterr().err == ""  # the library's warnings hold signed addresses


def test_a_cancelled_download_keeps_what_is_complete(hub: Hub) -> None:
    hub.repository("org/model", shard_files(weights(side=700)))
    progress = Progress()
    seen: list[tuple[int, int, str]] = []

    def listen(done: int, total: int, label: str) -> None:
        seen.append((done, total, label))
        if SHARDS[0] in label:
            progress.cancel.set()

    progress.listener = listen
    with pytest.raises(Cancelled, match=rf"download of {ID} was cancelled.*kept"):
        find_or_fetch(ID, progress)
    assert find_cached(ID) is None
    # 700 x 700 float32 and two vectors: 1.97 MB in all.
    assert seen[-1][:2] == (1, 1)
    hub.sent.clear()
    assert torch.equal(
        Checkpoint(find_or_fetch(ID)).tensor("norm.weight"), weights(side=700)["norm.weight"]
    )
    assert set(hub.sent) == {SHARDS[1]}


def test_progress_ends_at_the_total(hub: Hub) -> None:
    hub.repository("org/one", files_of(weights(side=600)))
    hub.repository("org/two", shard_files(weights(side=600)))
    seen: list[tuple[int, int, str]] = []
    models = [describe("hf://org/one"), describe("hf://org/two")]
    fetch(models, Progress(lambda *event: seen.append(event)))
    total = sum(model.nbytes for model in models) // 10**6
    assert total == 2
    assert [done for done, *_ in seen] == sorted(done for done, *_ in seen)
    assert seen[-1][:2] == (total, total)
    assert models[0].to_download == models[1].to_download == 0


def test_chunked_transfers_report_to_the_same_bar(hub: Hub) -> None:
    """What hf_xet tells of its progress reaches the listener, and a cancel stops it."""
    from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

    seen: list[tuple[int, int, str]] = []
    progress = Progress(lambda *event: seen.append(event))
    bar = reporting_bar(progress, 2_000_000, 9_000_000, "x")
    with XetDownloadProgressReporter(
        reconstruction_desc="", total=7_000_000, log_level=30, tqdm_class=bar
    ) as reporter:
        for bytes_ in (3_000_000, 5_000_000):
            report = SimpleNamespace(
                total_bytes=7_000_000,
                total_bytes_completed=bytes_,
                total_transfer_bytes_completed=bytes_ // 2,
                total_bytes_completion_rate=1.0,
                total_transfer_bytes_completion_rate=1.0,
            )
            reporter.update_progress(report)
        assert seen == [(5, 9, "x"), (7, 9, "x")]
        progress.cancel.set()
        report.total_bytes_completed = 6_000_000
        with pytest.raises(Cancelled):
            reporter.update_progress(report)


def test_the_cache_is_that_of_huggingface_hub(hub: Hub) -> None:
    """What another library downloads is found, and the other way round."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    hub.repository("org/model", files_of(weights()))
    theirs = hf_hub_download("org/model", "model.safetensors", endpoint=hub.url, token=False)
    assert find_cached(ID) == Path(theirs)
    hub.repository("org/other", files_of(weights(3)))
    ours = find_or_fetch("hf://org/other")
    assert try_to_load_from_cache("org/other", "model.safetensors") == str(ours)
    content = files_of(weights(3))["model.safetensors"]
    assert ours.resolve().name == hashlib.sha256(content).hexdigest()

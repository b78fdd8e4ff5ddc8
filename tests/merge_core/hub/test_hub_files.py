"""Names on the hub, and which files of a repository are taken."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_core.errors import HubError
from merge_core.hub.files import (
    HubId,
    entry_file,
    is_hub_id,
    is_plain_path,
    is_weights,
    side_files,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf://gpt2", ("gpt2", "main", None)),
        ("hf://openai/clip-vit-base-patch32", ("openai/clip-vit-base-patch32", "main", None)),
        ("hf://a/b@v1.0", ("a/b", "v1.0", None)),
        ("hf://a/b@refs/pr/3", ("a/b", "refs/pr/3", None)),
        (f"hf://a/b.c_d@{COMMIT}:x/y.safetensors", ("a/b.c_d", COMMIT, "x/y.safetensors")),
        ("hf://a/b:unet", ("a/b", "main", "unet")),
    ],
)
def test_a_name_has_three_parts(text: str, parts: tuple[str, str, str | None]) -> None:
    parsed = HubId.parse(text)
    assert (parsed.repo, parsed.revision, parsed.file) == parts
    assert is_hub_id(text)
    assert str(parsed) == text
    assert parsed.pinned == (parts[1] == COMMIT)


@pytest.mark.parametrize(
    "text",
    [
        "hf://",
        "hf:///a",
        "hf://a/b/c",
        "hf://../x",
        "hf://a/..",
        "hf://a--b/c",
        "hf://a/b@",
        "hf://a/b@../../etc",
        "hf://a/b@x/../y",
        "hf://a/b@/x",
        "hf://a/b@x y",
        "hf://a/b:",
        "hf://a/b:../x.safetensors",
        "hf://a/b:/etc/passwd",
        "hf://a/b:x//y",
        "hf://a/b:x\\..\\y",
        "hf://a/b:x\0y",
        "hf://a/" + "b" * 97,
        "https://huggingface.co/a/b",
        "HF://a/b",
    ],
)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(HubError, match=r"is not a name on the hub\. Write hf://org/name"):
        HubId.parse(text)


@given(st.text(max_size=60))
def test_whatever_parses_stays_inside_the_cache(tail: str) -> None:
    try:
        parsed = HubId.parse(f"hf://{tail}")
    except HubError:
        return
    for part in (parsed.repo, parsed.revision, parsed.file or "x"):
        path = PurePosixPath(part)
        assert not path.is_absolute()
        assert ".." not in path.parts
        assert is_plain_path(part)
    assert HubId.parse(str(parsed)) == parsed


@pytest.mark.parametrize(
    ("names", "wanted", "entry"),
    [
        # Safetensors first, whole before other names, the index before a single file.
        (["model.safetensors", "pytorch_model.bin"], None, "model.safetensors"),
        (["model.safetensors.index.json", "m-1.safetensors"], None, "model.safetensors.index.json"),
        (["own.safetensors", "pytorch_model.bin"], None, "own.safetensors"),
        (["a.safetensors", "b.safetensors", "model.safetensors"], None, "model.safetensors"),
        # A pickle only where there is nothing else; what a trainer leaves is no weights.
        (["pytorch_model.bin", "training_args.bin", "optimizer.pt"], None, "pytorch_model.bin"),
        (["image_encoder.pt", "scheduler.pt", "rng_state_0.pth"], None, "image_encoder.pt"),
        # Adapters, by what says so beside them; a whole model comes first.
        (["adapter_config.json", "adapter_model.bin"], None, "adapter_model.bin"),
        (
            ["adapter_config.json", "adapter_model.bin", "adapter_model.safetensors"],
            None,
            "adapter_model.safetensors",
        ),
        (
            ["adapter_config.json", "adapter_model.safetensors", "model.safetensors"],
            None,
            "model.safetensors",
        ),
        # Folders and files by name.
        (["model.safetensors", "unet/model.safetensors"], "unet", "unet/model.safetensors"),
        (["model.safetensors", "x/y.bin"], "x/y.bin", "x/y.bin"),
    ],
)
def test_the_entry_of_a_repository(names: list[str], wanted: str | None, entry: str) -> None:
    assert entry_file(names, wanted, "a/b") == entry
    assert entry_file(names[::-1], wanted, "a/b") == entry
    assert is_weights(entry)


@pytest.mark.parametrize(
    ("names", "wanted", "message"),
    [
        (["config.json"], None, "holds no weights"),
        (["x/model.safetensors"], None, "holds no weights"),
        (
            ["a.safetensors", "b.safetensors"],
            None,
            r"several weight files .*hf://a/b:a.safetensors",
        ),
        (["a.pt", "b.pt"], None, "several weight files"),
        (["a.safetensors", "b.safetensors", "x.pt"], None, "several weight files"),
        (["model.safetensors"], "other", "has no file or folder 'other'"),
        (["m-00001-of-00002.bin"], None, r"without their index: .* m\.bin\.index\.json"),
        (["m-00001-of-00002.bin"], "m-00001-of-00002.bin", "shard 1 of 2"),
        (["model.safetensors", "config.json"], "config.json", "is no weight file"),
    ],
)
def test_no_entry(names: list[str], wanted: str | None, message: str) -> None:
    with pytest.raises(HubError, match=message):
        entry_file(names, wanted, "a/b")


def test_side_files_lie_beside_the_weights() -> None:
    names = ["config.json", "tokenizer.json", "own.py", "x/config.json", "x/run.sh", "x/m.bin"]
    assert side_files(names, "m.safetensors") == ["config.json", "tokenizer.json"]
    assert side_files(names, "x/m.bin") == ["x/config.json"]

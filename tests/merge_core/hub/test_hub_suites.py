"""Suites whose members are on the hub, what a merge of them says of itself, and its way back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from safetensors import safe_open

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.errors import HubError, SuiteError
from merge_core.hub.models import describe, find_or_fetch
from merge_core.hub.push import push
from merge_core.merging.inputs import find_suite
from merge_core.merging.recipe import load_recipe, make_recipe
from merge_core.opening.download import download, missing_members, with_headers_only
from merge_core.output.adapter_draft import AdapterRank
from merge_core.output.lora import merge_to_adapter
from merge_core.output.model_card import Result, model_card
from merge_core.output.model_folder import merge_to_folder
from merge_core.output.provenance import provenance, read_provenance
from merge_core.suites.preflight import preflight
from merge_core.suites.suite import Suite, load_suite
from tests.hub_client import files_of, hub, shard_files, weights
from tests.hub_server import Hub

__all__ = ["hub"]
SECRET = "hf_WriterToken"


@pytest.fixture
def suite(hub: Hub, tmp_path: Path) -> Suite:
    """Two experts and their base on the hub: one is sharded, one is pinned to a commit."""
    hub.repository("org/base", files_of(weights(0)))
    hub.repository("org/digits", shard_files(weights(1)))
    first = hub.repository("org/shapes", files_of(weights(2))).branches["main"]
    hub.repositories["org/shapes"].commit(files_of(weights(9)))
    document = {
        "name": "from the hub",
        "base": "hf://org/base@main",
        "experts": {
            "digits": {"weights": "hf://org/digits"},
            "shapes": {"weights": f"hf://org/shapes@{first}"},
        },
    }
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(document))
    return load_suite(tmp_path)


def merge_to(suite: Suite, output: Path) -> Path:
    recipe = make_recipe({"suite": str(suite.path), "method": "task_arithmetic"})
    return merge_to_folder(recipe, suite, output)


@pytest.mark.parametrize("field", ["base", "weights"])
def test_a_malformed_name_is_told_at_once(tmp_path: Path, field: str) -> None:
    expert = {"weights": "y.safetensors"}
    document: dict[str, Any] = {"name": "s", "base": "x.safetensors", "experts": {"a": expert}}
    (document if field == "base" else expert)[field] = "hf://a/b@../c"
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(SuiteError, match=rf"{field}: 'hf://a/b@../c' is not a name on the hub"):
        load_suite(tmp_path)


def test_nothing_is_downloaded_unasked(suite: Suite, hub: Hub) -> None:
    names = missing_members(suite)
    assert names[:2] == ["hf://org/base@main", "hf://org/digits"]
    assert len(names) == 3
    assert [each.kind for each in preflight(suite).blocking] == ["unreadable"] * 3
    for use in (lambda: suite.base, lambda: suite.expert("digits")):
        with pytest.raises(
            HubError, match=r"'from the hub', .* not downloaded yet.*page Open check"
        ):
            use()
    assert hub.requests == []


def test_headers_are_enough_for_the_report(
    suite: Suite, hub: Hub, suite_of: Callable[..., Suite]
) -> None:
    shown = with_headers_only(suite, [describe(name) for name in missing_members(suite)])
    on_disk = suite_of({"digits": weights(1), "shapes": weights(2)}, base=weights(0))
    assert preflight(shown) == preflight(on_disk)
    assert missing_members(suite)  # still not here
    download(suite)
    assert missing_members(suite) == []
    assert preflight(suite) == preflight(on_disk)


def test_towers_and_heads_are_downloaded_with_the_suite(
    hub: Hub, suite_of: Callable[..., Suite]
) -> None:
    made = {"zero_shot": {"text_tower": "hf://org/clip", "classes": ["a", "b"]}}
    suite = suite_of({"one": weights(1), "two": weights(2)})
    document = yaml.safe_load(suite.path.read_text())
    document["experts"]["one"]["head"] = made
    document["experts"]["two"]["head"] = "hf://org/head:two.safetensors"
    suite.path.write_text(yaml.safe_dump(document))
    hub.repository("org/clip", files_of(weights(3)))
    hub.repository("org/head", {"two.safetensors": files_of(weights(4))["model.safetensors"]})
    suite = load_suite(suite.path)
    assert missing_members(suite) == ["hf://org/clip", "hf://org/head:two.safetensors"]
    # The members are here: nothing about them is asked of the hub.
    assert with_headers_only(suite, [describe(name) for name in missing_members(suite)]) is suite
    download(suite)
    assert missing_members(suite) == []
    assert suite.file("hf://org/head:two.safetensors") == find_or_fetch(
        "hf://org/head:two.safetensors"
    )


def test_a_merge_of_downloaded_members(suite: Suite, hub: Hub, tmp_path: Path) -> None:
    download(suite)
    hub.requests.clear()
    folder = merge_to(suite, tmp_path / "out")
    assert hub.requests == []
    result = Checkpoint(folder)
    scale = make_recipe({"suite": "x", "method": "task_arithmetic"}).parameters["scale"]
    for name, base in weights(0).items():
        wanted = base + scale * (weights(1)[name] - base + weights(2)[name] - base)
        torch.testing.assert_close(result.tensor(name), wanted)
    # It says which commits it was made from: in the header and in the card.
    commits = {name: each.branches["main"] for name, each in hub.repositories.items()}
    pinned = suite.spec.experts["shapes"].weights
    about = read_provenance(folder)
    assert about.sources == {"digits": f"hf://org/digits@{commits['org/digits']}", "shapes": pinned}
    assert about.base_source == f"hf://org/base@{commits['org/base']}"
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == ["org/digits", "org/shapes", "org/base"]
    assert card.data.to_dict()["base_model_relation"] == "merge"
    for text in (*about.sources.values(), *about.inputs.values()):
        assert f"`{text}`" in card.text


def test_files_alone_leave_no_trace_of_a_hub(synthetic_suite: Callable[..., Suite]) -> None:
    suite = synthetic_suite()
    about = provenance(make_recipe({"suite": str(suite.path), "method": "average"}), suite)
    assert about.sources == {}
    assert "source" not in about.to_header()


def test_accuracies_in_the_card(synthetic_suite: Callable[..., Suite]) -> None:
    suite = synthetic_suite(tasks=["digits", "a|b".replace("|", "-")])
    recipe = make_recipe({"suite": str(suite.path), "method": "average"})
    results = [
        Result("digits", "test", 0.91234, 0.9, 0.92, 1200),
        Result("a-b", "test", 0.5, 0.4, 0.6, 90),
    ]
    card = ModelCard(model_card(recipe, suite, provenance(recipe, suite), results))
    assert card.data.eval_results is not None
    read = [
        (each.dataset_type, each.dataset_split, each.metric_type, each.metric_value, each.task_type)
        for each in card.data.eval_results
    ]
    assert read == [
        ("digits", "test", "accuracy", 0.9123, "image-classification"),
        ("a-b", "test", "accuracy", 0.5, "image-classification"),
    ]
    assert "| digits | 91.2% | 90.0% to 92.0% | 1,200 (test) |" in card.text
    plain = ModelCard(model_card(recipe, suite, provenance(recipe, suite)))
    assert plain.data.eval_results is None
    assert "Accuracy" not in plain.text


def test_push_and_back(
    suite: Suite, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download(suite)
    folder = merge_to(suite, tmp_path / "out")
    (folder / "train.py").write_text("never pushed")
    (folder / "notes.bin").write_bytes(b"never pushed")
    with pytest.raises(HubError, match="needs a token that may write"):
        push(folder, "me/merged")
    hub.writer = SECRET
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert push(folder, "me/merged") == f"{hub.url}/me/merged"
    made = hub.repositories["me/merged"]
    assert made.private
    pushed = made.commits[made.branches["main"]]
    assert set(pushed) == {"model.safetensors", "recipe.yaml", "README.md", "config.json"}
    assert pushed["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    # From the hub it comes back as it was, and can be an expert again.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    back = Checkpoint(find_or_fetch("hf://me/merged"))
    assert back.digest == Checkpoint(folder / "model.safetensors").digest
    assert read_provenance(back.path).sources == read_provenance(folder).sources
    # Again, as a new commit of the same repository.
    (folder / "vocab.txt").write_text("a")
    push(folder, "hf://me/merged")
    assert set(made.commits[made.branches["main"]]) == {*pushed, "vocab.txt"}


def test_a_model_per_task_is_pushed_with_its_folders(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synthetic_suite: Callable[..., Suite]
) -> None:
    members = synthetic_suite(tasks=["one", "two"])
    recipe = make_recipe({"suite": str(members.path), "method": "cart_indexing"})
    folder = merge_to_folder(recipe, members, tmp_path / "out")
    hub.writer = SECRET
    monkeypatch.setenv("HF_TOKEN", SECRET)
    push(folder, "me/merged", public=True)
    made = hub.repositories["me/merged"]
    assert not made.private
    pushed = made.commits[made.branches["main"]]
    assert set(pushed) == {
        "README.md",
        "recipe.yaml",
        "one/model.safetensors",
        "two/model.safetensors",
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("me/public", "exists and is public. Push with --public"),
        ("me/merged@v1", "Push to a repository"),
        ("me/merged:x.safetensors", "Push to a repository"),
        ("a/b/c", "is not a name on the hub"),
    ],
)
def test_where_a_push_may_not_go(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    (tmp_path / "model.safetensors").write_bytes(files_of(weights())["model.safetensors"])
    hub.writer = SECRET
    monkeypatch.setenv("HF_TOKEN", SECRET)
    hub.repository("me/public", {"README.md": b"mine"})
    with pytest.raises(HubError, match=message):
        push(tmp_path, name)
    assert set(hub.repositories) == {"me/public"}
    assert len(hub.repositories["me/public"].commits) == 1


def test_a_push_that_is_refused(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    with pytest.raises(HubError, match="holds no merged model"):
        push(tmp_path, "me/merged")
    (tmp_path / "model.safetensors").write_bytes(files_of(weights())["model.safetensors"])
    monkeypatch.setenv("HF_TOKEN", SECRET)
    hub.writer = "another"
    with pytest.raises(HubError, match="forbids this to the token in HF_TOKEN") as caught:
        push(tmp_path, "me/merged")
    assert SECRET not in str(caught.value) + caplog.text


def test_the_token_stands_in_no_output(
    suite: Suite, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    hub.writer = SECRET
    download(suite)
    folder = merge_to(suite, tmp_path / "out")
    push(folder, "me/merged")
    assert set(hub.tokens) == {SECRET}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert SECRET not in json.dumps(file.metadata())
    for path in (p for p in tmp_path.rglob("*") if p.is_file()):
        assert SECRET.encode() not in path.read_bytes(), path


def test_a_published_recipe_of_hub_members_runs_elsewhere(
    suite: Suite, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has the recipe has the names of its members: the suite's file is not needed."""
    document = yaml.safe_load(suite.path.read_text()) | {"average": ["encoder.0.*"]}
    suite.path.write_text(yaml.safe_dump(document))
    suite = load_suite(suite.path)
    download(suite)
    folder = merge_to(suite, tmp_path / "out")
    suite.path.unlink()
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "another machine"))
    recipe, found = load_recipe(folder / "recipe.yaml")
    assert found.spec.average == ["encoder.0.*"]
    again = merge_to_folder(recipe, found, tmp_path / "again")
    for name in ("recipe.yaml", "model.safetensors", "README.md"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    about = read_provenance(folder)
    assert find_suite(about.recipe.suite, about.members).spec == found.spec
    # Where they are not downloaded, the message says how to.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(HubError, match="mergescope download hf://org/base@"):
        load_recipe(folder / "recipe.yaml")


def test_an_adapter_names_its_base_on_the_hub(suite: Suite, hub: Hub, tmp_path: Path) -> None:
    download(suite)
    recipe = make_recipe({"suite": str(suite.path), "method": "average"})
    merge_to_adapter(recipe, suite, tmp_path / "thin", AdapterRank.parse("1"))
    config = json.loads((tmp_path / "thin" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    assert config["revision"] == hub.repositories["org/base"].branches["main"]
    data = ModelCard.load(tmp_path / "thin" / "README.md").data.to_dict()
    assert (data["library_name"], data["base_model"]) == ("peft", ["org/base"])
    assert data["base_model_relation"] == "adapter"


def test_what_stands_beside_weights_is_downloaded_and_pushed(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = {"modules.json", "1_Pooling/config.json", "tekken.json", "LICENSE", "x.jinja"}
    beside |= {"additional_chat_templates/tools.jinja"}
    left = {"train.py", "run/config.json.py", "a/b/config.json", "eval_results.json", "x.pt"}
    config = {"config.json": b'{"model_type": "x", "dtype": "float32"}'}
    extra = dict.fromkeys(sorted(beside | left), b"{}")
    for name in ("one", "two"):
        hub.repository(f"org/{name}", files_of(weights(1)) | config | extra)
    experts = {name: {"weights": f"hf://org/{name}"} for name in ("one", "two")}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"name": "s", "experts": experts}))
    suite = load_suite(tmp_path)
    download(suite)
    snapshot = find_or_fetch("hf://org/one").parent
    for name in beside | left:
        assert (snapshot / name).is_file() == (name in beside), name
    folder = merge_to_folder(
        make_recipe({"suite": str(suite.path), "method": "average"}), suite, tmp_path / "out"
    )
    (folder / "mine.py").write_text("never pushed")
    hub.writer = SECRET
    monkeypatch.setenv("HF_TOKEN", SECRET)
    push(folder, "me/merged")
    made = hub.repositories["me/merged"]
    pushed = set(made.commits[made.branches["main"]])
    own = {"README.md", "recipe.yaml", "model.safetensors", "config.json"}
    assert pushed == {*own, *beside}

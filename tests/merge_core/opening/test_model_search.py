"""Models found in folders as people have them: what counts as one, and what is suggested."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from merge_core.errors import Cancelled, SuiteError
from merge_core.opening.draft import draft
from merge_core.opening.roles import FoundModel, draft_suite, heads_for, mistakes, open_by_headers
from merge_core.opening.search import MOST_MODELS, find_models, holds_models
from merge_core.progress import Progress
from merge_core.suites.preflight import preflight

State = dict[str, Tensor]


def state(width: int = 3, prefix: str = "") -> State:
    shapes = {"a.weight": (width, 4), "a.bias": (width,), "b.weight": (2, width), "b.bias": (2,)}
    return {prefix + name: torch.zeros(shape) for name, shape in shapes.items()}


def head() -> State:
    return {"weight": torch.zeros(5, 2), "bias": torch.zeros(5)}


def write(path: Path, tensors: State | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = state() if tensors is None else tensors
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


def write_sharded(folder: Path, stem: str = "model") -> None:
    """Two shards and their index, as transformers writes them."""
    weight_map = {}
    for number, name in enumerate(state()):
        file = f"{stem}-{1 + number % 2:05}-of-00002.safetensors"
        weight_map[name] = file
    for file in set(weight_map.values()):
        write(folder / file, {n: v for n, v in state().items() if weight_map[n] == file})
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_adapter(folder: Path) -> None:
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "base_model_name_or_path": "org/base"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["a"]}))
    tensors = {
        "base_model.model.a.lora_A.weight": torch.ones(1, 4),
        "base_model.model.a.lora_B.weight": torch.ones(3, 1),
    }
    write(folder / "adapter_model.safetensors", tensors)


def table(found: tuple[FoundModel, ...]) -> dict[str, tuple[str, str]]:
    """Where each was found: its role and task."""
    return {each.shown: (each.role, each.task) for each in found}


def benchmark(folder: Path) -> None:
    """As the task-vector benchmark lies on disk."""
    write(folder / "zeroshot.pt")
    for task in ("Cars", "DTD", "SVHN"):
        write(folder / task / "finetuned.pt")
        write(folder / f"head_{task}.pt", head())


def transformers_folders(folder: Path) -> None:
    for name in ("roberta-base", "roberta-base-cola", "roberta-base-sst2"):
        write(folder / name / "model.safetensors")
        (folder / name / "config.json").write_text("{}")
        write(folder / name / "training_args.bin")
        write(folder / name / "checkpoint-500" / "model.safetensors")  # two levels down
    write_sharded(folder / "roberta-base-mnli")


def plain_files(folder: Path) -> None:
    write(folder / "pretrained.safetensors")
    write_sharded(folder, "expert_cola")
    write(folder / "expert_sst2.ckpt")
    write(folder / "optimizer.pt")
    write(folder / ".hidden.pt")
    (folder / "notes.txt").write_text("x")


def many_shapes(folder: Path) -> None:
    for name in ("a1", "a2", "a3"):
        write(folder / f"{name}.safetensors")
    write(folder / "other.safetensors", state(width=7))
    write(folder / "damaged.safetensors").write_bytes(b"no weights")


def adapters(folder: Path) -> None:
    write(folder / "base.safetensors")
    write_adapter(folder / "lora-cola")
    write_adapter(folder / "lora-sst2")


def one_name(folder: Path) -> None:
    for task in ("cola", "sst2"):
        write(folder / task / "best_run.pt")
        write(folder / task / "zero-shot.pt")


@pytest.mark.parametrize(
    ("lay_out", "expected"),
    [
        (
            benchmark,
            {
                "zeroshot.pt": ("base", "zeroshot"),
                "Cars/finetuned.pt": ("expert", "Cars"),
                "DTD/finetuned.pt": ("expert", "DTD"),
                "SVHN/finetuned.pt": ("expert", "SVHN"),
                "head_Cars.pt": ("head", "head_Cars"),
                "head_DTD.pt": ("head", "head_DTD"),
                "head_SVHN.pt": ("head", "head_SVHN"),
            },
        ),
        (
            transformers_folders,
            {
                "roberta-base": ("base", "roberta-base"),
                "roberta-base-cola": ("expert", "cola"),
                "roberta-base-mnli": ("expert", "mnli"),
                "roberta-base-sst2": ("expert", "sst2"),
            },
        ),
        (
            plain_files,
            {
                "pretrained.safetensors": ("base", "pretrained"),
                "expert_cola.safetensors.index.json": ("expert", "cola"),
                "expert_sst2.ckpt": ("expert", "sst2"),
            },
        ),
        (
            many_shapes,
            {
                "a1.safetensors": ("expert", "a1"),
                "a2.safetensors": ("expert", "a2"),
                "a3.safetensors": ("expert", "a3"),
                "other.safetensors": ("left out", "other"),
                "damaged.safetensors": ("left out", "damaged"),
            },
        ),
        (
            adapters,
            {
                "base.safetensors": ("base", "base"),
                "lora-cola": ("expert", "cola"),
                "lora-sst2": ("expert", "sst2"),
            },
        ),
        (
            one_name,
            {
                "cola/best_run.pt": ("expert", "cola"),
                "cola/zero-shot.pt": ("base", "zero-shot"),
                "sst2/best_run.pt": ("expert", "sst2"),
                "sst2/zero-shot.pt": ("left out", "zero-shot"),
            },
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_found_and_suggested(
    lay_out: Callable[[Path], None], expected: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    lay_out(tmp_path)
    assert table(find_models([str(tmp_path)])) == expected


def test_a_model_left_out_says_why(tmp_path: Path) -> None:
    many_shapes(tmp_path)
    notes = {found.shown: found.note for found in find_models([str(tmp_path)])}
    assert "1 of its 4 parameters are as in a1" in notes["other.safetensors"]
    assert "safetensors" in notes["damaged.safetensors"]
    assert notes["a1.safetensors"] == ""


def test_where_nothing_can_be_read_each_file_says_why(tmp_path: Path) -> None:
    (tmp_path / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    torch.save({"generator": state(), "discriminator": state(4)}, tmp_path / "gan.pth")
    (tmp_path / "damaged.safetensors").write_bytes(b"no weights")
    found = find_models([str(tmp_path)])
    assert {each.role for each in found} == {"left out"}
    with pytest.raises(SuiteError) as caught:
        draft_suite(found, "mine")
    for words in ("pointer.pt is a Git LFS pointer", "'generator'", "damaged.safetensors"):
        assert words in str(caught.value)


def test_what_was_chosen_in_a_file_is_said(tmp_path: Path) -> None:
    torch.save({"state_dict": state(), "state_dict_ema": state()}, tmp_path / "timm.pth.tar")
    (found,) = find_models([str(tmp_path)])
    assert "'state_dict_ema' (averaged while training)" in found.note
    named = str(tmp_path / "timm.pth.tar#state_dict")
    (found,) = find_models([named])
    assert (found.reference, found.label, found.note) == (named, "timm-state_dict", "")
    suite = open_by_headers(draft_suite([found], "mine"), tmp_path / "suite.yaml", [found])
    assert len(suite.parameters) == len(state())


@pytest.mark.parametrize(("base", "experts"), [("", "model."), ("bert.", "")])
def test_names_that_differ_by_a_prefix_are_of_one_network(
    base: str, experts: str, tmp_path: Path
) -> None:
    write(tmp_path / "base.safetensors", state(prefix=base))
    for number in range(3):
        wrapped = {"state_dict": state(prefix=experts), "epoch": number}
        torch.save(wrapped, tmp_path / f"task{number}.ckpt")
    found = find_models([str(tmp_path)])
    assert [each.role for each in found] == ["base", "expert", "expert", "expert"]
    suite = open_by_headers(draft_suite(found, "mine"), tmp_path / "suite.yaml", found)
    report = preflight(suite)
    assert report.blocking == ()
    assert len(report.plan) == 4


def test_a_snapshot_of_the_hub_is_called_by_its_repository(tmp_path: Path) -> None:
    for name in ("net-cars", "net-dtd"):
        folder = tmp_path / f"models--org--{name}" / "snapshots" / ("4d" * 20)
        write(folder / "model.safetensors")
        (folder.parent.parent / "refs").mkdir()
        (folder.parent.parent / "refs" / "main").write_text("4d" * 20)
    snapshots = [str(path.parent) for path in sorted(tmp_path.rglob("*.safetensors"))]
    repositories = [str(path) for path in sorted(tmp_path.iterdir())]
    for places in (snapshots, repositories):
        assert [each.task for each in find_models(places)] == ["cars", "dtd"]


def test_adapters_by_their_files_and_by_links(tmp_path: Path) -> None:
    write(tmp_path / "base.safetensors")
    write_adapter(tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    (tmp_path / "cars.safetensors").symlink_to(file)
    for place in (file, tmp_path / "cars.safetensors", tmp_path / "lora"):
        (found,) = find_models([str(place)])
        assert (found.kind, found.reference) == ("adapter", str(tmp_path / "lora"))
        spec = draft({"a": str(place)}, str(tmp_path / "base.safetensors"))
        expert = open_by_headers(spec, tmp_path / "suite.yaml", []).expert("a")
        assert torch.equal(expert.tensor("a.weight"), torch.full((3, 4), 2.0))


def test_heads_go_with_the_tasks_of_their_name(tmp_path: Path) -> None:
    benchmark(tmp_path)
    found = find_models([str(tmp_path)])
    assert heads_for(found, ["Cars", "SVHN", "EuroSAT"]) == {
        "Cars": str(tmp_path / "head_Cars.pt"),
        "SVHN": str(tmp_path / "head_SVHN.pt"),
    }


def test_a_draft_is_checked_by_what_was_found(tmp_path: Path) -> None:
    adapters(tmp_path)
    found = find_models([str(tmp_path)])
    members = {each.task: each.reference for each in found if each.role == "expert"}
    base = next(each.reference for each in found if each.role == "base")
    suite = open_by_headers(draft(members, base), tmp_path / "suite.yaml", found)
    report = preflight(suite)
    assert report.blocking == ()
    assert len(report.plan) == 4
    # The header that was read already is used again.
    assert suite.base is next(each.checkpoint for each in found if each.role == "base")
    assert suite.expert("cola").info("a.weight").shape == (3, 4)


def test_several_places_and_a_model_of_its_own(tmp_path: Path) -> None:
    transformers_folders(tmp_path)
    extra = write(tmp_path / "elsewhere" / "qqp.pt")
    found = find_models([str(tmp_path / "roberta-base-cola"), str(extra), str(extra)])
    assert [each.reference for each in found] == [str(tmp_path / "roberta-base-cola"), str(extra)]
    # A folder on its own is searched, even if it is a model itself.
    alone = find_models([str(tmp_path / "roberta-base-cola")])
    assert [each.shown for each in alone] == ["roberta-base-cola", "checkpoint-500"]


@pytest.mark.parametrize("place", ["nothing", "empty", "a\0b", "~nobody-here/x", "loop"])
def test_a_place_without_models_is_refused(place: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(SuiteError):
        find_models([place if place.startswith("~") else str(tmp_path / place)])


def test_too_many_models_are_refused_before_they_are_opened(tmp_path: Path) -> None:
    for number in range(MOST_MODELS + 1):
        (tmp_path / f"{number}.pt").touch()
    with pytest.raises(SuiteError, match=f"{MOST_MODELS + 1} models"):
        find_models([str(tmp_path)])


def test_links_to_the_outside_are_not_opened(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    write(inside / "mine.safetensors")
    write(outside / "secret.safetensors")
    write_sharded(outside / "sharded")
    write_sharded(inside / "sharded")
    for link, target in {
        inside / "linked.safetensors": outside / "secret.safetensors",
        inside / "folder": outside,
        inside / "again.safetensors": inside / "mine.safetensors",
        inside / "whole": outside / "sharded",
    }.items():
        link.symlink_to(target)
    write_sharded(inside, "loose")
    for shard in (inside / "sharded" / "model-00002-of-00002.safetensors",
                  inside / "loose-00001-of-00002.safetensors"):  # fmt: skip
        shard.unlink()
        shard.symlink_to(outside / "sharded" / "model-00002-of-00002.safetensors")
    found = {each.shown: each for each in find_models([str(inside)], inside=inside)}
    opened = {shown for shown, each in found.items() if each.checkpoint is not None}
    assert opened == {"mine.safetensors", "again.safetensors"}
    for shown, each in found.items():
        if shown not in opened:
            assert each.role == "left out"
            assert "outside" in each.note
            assert mistakes([replace(each, role="expert", task="t")])  # whatever a browser says
            assert str(outside) not in each.note


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "README.md"])
def test_descriptions_that_lie_outside_are_not_read(tmp_path: Path, name: str) -> None:
    """What differs between tokenizers is shown, and would show what lies outside."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    write(inside / "net.safetensors")
    outside.mkdir()
    (outside / "secret.json").write_text("{}")
    (inside / name).symlink_to(outside / "secret.json")
    (found,) = find_models([str(inside)], inside=inside)
    assert found.refused
    (inside / name).unlink()
    assert not find_models([str(inside)], inside=inside)[0].refused


def test_the_search_can_be_cancelled(tmp_path: Path) -> None:
    many_shapes(tmp_path)
    seen: list[tuple[int, int, str]] = []
    progress = Progress(lambda *step: seen.append(step))
    find_models([str(tmp_path)], progress=progress)
    assert [step[:2] for step in seen] == [(i, 5) for i in range(1, 6)]
    progress.cancel.set()
    with pytest.raises(Cancelled):
        find_models([str(tmp_path)], progress=progress)


def test_folders_that_hold_models_are_told_by_names(tmp_path: Path) -> None:
    plain_files(tmp_path / "files")
    write_adapter(tmp_path / "adapter")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "optimizer.pt").touch()
    assert holds_models(tmp_path / "files")
    assert holds_models(tmp_path / "adapter")
    assert not holds_models(tmp_path / "none")
    assert not holds_models(tmp_path / "absent")

"""Drafted suites: names, base, architecture; what is written says the same when it is read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from merge_core.errors import OutputError, SuiteError
from merge_core.opening.draft import (
    VITS,
    base_candidates,
    draft,
    guess_architecture,
    task_name,
    task_names,
    write_suite,
)
from merge_core.suites.suite import load_suite
from merge_core.suites.suite_spec import ArchitectureSpec, SuiteSpec, TaskName

VALID = TypeAdapter(TaskName)


@given(st.lists(st.text(max_size=100), max_size=8))
@example(["", "", "..", "a" * 90, "a" * 90, "ü/ß,é", "x\n"])
def test_task_names_are_valid_and_unlike_each_other(labels: list[str]) -> None:
    names = task_names(labels)
    assert len(names) == len(labels) == len(set(names))
    for name in names:
        assert VALID.validate_python(name) == name
        assert not name.startswith((".", "-"))


@given(st.from_regex(r"[A-Za-z0-9_+][A-Za-z0-9_+.-]{0,40}[A-Za-z0-9_+]", fullmatch=True))
def test_a_valid_name_stays_as_it_is(text: str) -> None:
    assert task_name(text) == text
    assert task_name(text, {text}) == f"{text}-2"


@given(
    st.lists(st.from_regex(r"[a-z]{2,6}", fullmatch=True), min_size=2, max_size=5, unique=True),
    st.sampled_from(["", "vit-b-32_", "clip.", "a-b_c-"]),
    st.sampled_from(["", "_best", "-final.v2"]),
)
def test_what_all_labels_share_is_left_out(tasks: list[str], front: str, back: str) -> None:
    assert task_names([front + task + back for task in tasks]) == tasks


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["expert-1", "expert-2"], ["expert-1", "expert-2"]),  # 1 and 2 would say nothing
        (["model_a", "model_a"], ["a", "a-2"]),
        (["only"], ["only"]),
        (["Größe", "日本"], ["Groe", "task"]),
    ],
)
def test_labels_that_need_care(labels: list[str], names: list[str]) -> None:
    assert task_names(labels) == names


@pytest.mark.parametrize(
    ("labels", "bases"),
    [
        (["base", "cars", "dtd"], ["base"]),
        (["Cars", "DTD", "zeroshot"], ["zeroshot"]),
        (["pre-trained", "a", "b"], ["pre-trained"]),
        (["clip-vit-base-patch32", "clip-vit-base-patch32_a", "clip-vit-base-patch32_b"],
         ["clip-vit-base-patch32"]),
        (["vit_base_cars", "vit_base_dtd"], []),  # the size of the model
        (["vit_base_cars", "vit_base_dtd", "vit_base_pretrained"], ["vit_base_pretrained"]),
        (["roberta-base", "roberta-base-sst2", "roberta-base-cola"], ["roberta-base"]),
        (["cars", "dtd"], []),
        (["base"], []),  # nothing to be the base of
        ([], []),
    ],
)  # fmt: skip
def test_the_base_is_told_by_its_name(labels: list[str], bases: list[str]) -> None:
    assert [labels[i] for i in base_candidates(labels)] == bases


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch32_224"])
def test_a_vit_of_timm_is_recognised_and_built_again(name: str, pool: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, img_size=320, global_pool=pool, num_classes=7)
    layout = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = guess_architecture(layout)
    assert found is not None
    with torch.device("meta"):
        again = timm.create_model(found.name, num_classes=7, **found.args)
    assert {k: tuple(v.shape) for k, v in again.state_dict().items()} == layout
    assert (again.num_prefix_tokens, again.global_pool) == (model.num_prefix_tokens, pool)
    assert again.blocks[0].attn.num_heads == model.blocks[0].attn.num_heads


def test_every_vit_in_the_table_is_one_of_timm() -> None:
    names = [f"vit_{size}_patch{p}_224" for size, _, patches in VITS.values() for p in patches]
    assert [name for name in names if not timm.is_model(name)] == []


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch32_clip_224",  # as many layouts: two activations
        "vit_small_patch16_dinov3",
        "vit_base_patch16_siglip_224",
        "vit_tiny_r_s16_p8_224",
        "deit_tiny_distilled_patch16_224",
        "resnet18",
        "swin_tiny_patch4_window7_224",
    ],
)
def test_what_could_be_something_else_is_not_guessed(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    layout = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert guess_architecture(layout) is None


@pytest.mark.parametrize(
    "change",
    [
        {"pos_embed": (1, 51, 192)},  # not a square
        {"pos_embed": (1, 0, 192)},
        {"patch_embed.proj.weight": (192, 1, 16, 16)},
        {"patch_embed.proj.weight": (192, 3, 12, 12)},
        {"blocks.12.norm1.weight": (192,)},
        {"blocks.3.attn.qkv.weight": (576, 193)},
    ],
)
def test_a_changed_vit_is_not_guessed(change: dict[str, tuple[int, ...]]) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224")
    layout = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert guess_architecture(layout) == ArchitectureSpec(name="vit_tiny_patch16_224")
    assert guess_architecture(layout | change) is None


def test_a_written_suite_says_the_same(tmp_path: Path) -> None:
    spec = draft(
        {"cars": str(tmp_path / "experts" / "cars.pt"), "dtd": "hf://org/dtd@main"},
        base="/elsewhere/base.safetensors",
        name="größer: {mine}",
        architecture=ArchitectureSpec(name="vit_tiny_patch16_224", args={"img_size": 32}),
        heads={"cars": str(tmp_path / "head_cars.pt")},
    )
    path = tmp_path / "suite.yaml"
    write_suite(spec, path)
    suite = load_suite(path)
    assert suite.spec.name == "größer: {mine}"
    assert suite.spec.base == "/elsewhere/base.safetensors"
    assert suite.spec.architecture == spec.architecture
    assert [e.weights for e in suite.spec.experts.values()] == [
        "experts/cars.pt",
        "hf://org/dtd@main",
    ]
    assert suite.spec.experts["cars"].head == "head_cars.pt"
    assert suite.spec.experts["dtd"].head is None
    assert suite.file(suite.spec.experts["cars"].weights) == tmp_path / "experts" / "cars.pt"
    text = path.read_text()
    assert text.startswith("# ")
    assert set(yaml.safe_load(text)) == {"name", "architecture", "base", "experts"}
    assert str(tmp_path) not in text


def test_a_file_is_replaced_only_when_told(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text("precious")
    spec = draft({"a": "/a.pt"})
    with pytest.raises(OutputError, match=re.escape(f"{path} exists")):
        write_suite(spec, path)
    assert path.read_text() == "precious"
    write_suite(spec, path, overwrite=True)
    assert load_suite(path).tasks == ("a",)
    link = tmp_path / "link.yaml"
    link.symlink_to(tmp_path / "nowhere.yaml")
    with pytest.raises(OutputError, match="exists"):
        write_suite(spec, link)


def test_any_suite_is_written_as_it_is(tmp_path: Path) -> None:
    document = yaml.safe_load((Path(__file__).parents[3] / "data/vision/suite.yaml").read_text())
    spec = SuiteSpec.model_validate(document)
    write_suite(spec, tmp_path / "suite.yaml")
    assert load_suite(tmp_path).spec == spec


@pytest.mark.parametrize("members", [{}, {"a b": "/a.pt"}, {"a/b": "/a.pt"}])
def test_members_that_make_no_suite_are_refused(members: dict[str, str]) -> None:
    with pytest.raises(SuiteError):
        draft(members)

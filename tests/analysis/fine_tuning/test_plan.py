"""Plans: what is said once for all tasks, and the base that they name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from analysis.fine_tuning.base import architecture_of, open_base
from analysis.fine_tuning.plan import load_plan
from merge_core.errors import MergeScopeError, SuiteError
from merge_core.suites.data_spec import HeadSpec
from tests.analysis.fine_tuning.tiny_plans import write_plan
from tests.minilm import MINILM, WIDTH

DATA: dict[str, Any] = {"kind": "text", "path": "{task}", "text_columns": ["text"]}


def test_what_is_said_once_holds_for_all_tasks(tmp_path: Path) -> None:
    tasks: dict[str, Any] = {
        "one": None,
        "two": {"title": "2nd", "data": {"path": "other", "length": 9}, "head": "own.pt"},
    }
    document = {"base": "base", "tasks": tasks, "data": DATA, "head": "heads/{task}.pt"}
    plan = load_plan(write_plan(tmp_path, document), data=tmp_path / "data")
    one, two = plan.tasks["one"], plan.tasks["two"]
    assert (one.data.path, one.data.length, one.title) == (str(tmp_path / "data/one"), 128, None)
    other = str(tmp_path / "data/other")
    assert (two.data.path, two.data.length, two.title) == (other, 9, "2nd")
    assert one.data.tokenizer == two.data.tokenizer == "base"
    assert (one.head, two.head) == (str(tmp_path / "heads/one.pt"), str(tmp_path / "own.pt"))
    assert plan.base == str(tmp_path / "base")


def test_a_name_without_quotes_is_still_the_task(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(
        "{name: a, base: b, tasks: [one], data: {kind: text, path: {task}, text_columns: [t]}}"
    )
    assert load_plan(path).tasks["one"].data.path == str(tmp_path / "one")


def test_paths_of_every_kind_are_absolute(tmp_path: Path) -> None:
    head = {"zero_shot": {"text_tower": "clip", "classes": "names.txt", "templates": ["a {}."]}}
    data = {"file": "{task}.npz", "classes": "names.txt"}
    document = {"base": "hf://org/name", "tasks": ["one"], "data": data, "head": head}
    plan = load_plan(write_plan(tmp_path, document), instead={"base": None, "device": "cpu"})
    found = plan.tasks["one"]
    assert plan.base == "hf://org/name"
    assert (found.data.file, found.data.classes) == (
        str(tmp_path / "one.npz"),
        str(tmp_path / "names.txt"),
    )
    assert isinstance(found.head, HeadSpec)
    assert found.head.zero_shot is not None
    assert found.head.zero_shot.text_tower == str(tmp_path / "clip")
    assert found.head.zero_shot.templates == ["a {}."]


def test_the_base_in_a_package_says_which_network_it_is() -> None:
    plan = load_plan("sentences", data=Path("/data"))
    base = open_base(plan)
    assert base.path.resolve() == MINILM.resolve()
    found = architecture_of(plan, base)
    assert (found.name, found.library, found.pooling) == ("bert", "transformers", "mean")
    assert found.args["hidden_size"] == WIDTH


@pytest.mark.parametrize("package", ["numpy", "no-such-package", "../x"])
def test_packages_without_a_model_are_refused(package: str) -> None:
    plan = load_plan("sentences", instead={"base": f"package:{package}"})
    with pytest.raises(SuiteError, match="The package"):
        open_base(plan)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": "one"}, "tasks"),
        ({"tasks": {"one": "two"}}, "tasks.one"),
        ({"tasks": {"one two": None}}, "tasks"),
        ({"data": ["one"]}, r"tasks\.one\.data"),
        ({"data": DATA | {"lenght": 3}}, r"tasks\.one\.data\.lenght: this field is not known"),
        ({"head": 3}, r"tasks\.one\.head"),
        ({"dtype": "int8"}, "dtype"),
        ({"probe": {"penalty": 0}}, r"probe\.penalty"),
        ({"fine_tuning": {"method": "lora", "rest": 0.5}}, "leave 'rest' out"),
        ({"extra": 1}, "extra: this field is not known"),
    ],
)
def test_mistakes_name_their_field(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    document = {"base": "base", "tasks": ["one"], "data": DATA} | fields
    with pytest.raises(MergeScopeError, match=message) as caught:
        load_plan(write_plan(tmp_path, document))
    assert "\n" not in str(caught.value)

"""suite.yaml: what it means, and what is said when it is wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merge_core.errors import CheckpointError, SuiteError
from merge_core.suites.bundled import bundled_name, bundled_suites
from merge_core.suites.suite import Suite, load_suite

MINIMAL = "name: s\nexperts:\n  a: {weights: a.safetensors}\n  b: {weights: b.safetensors}\n"


def write_suite(folder: Path, text: str | bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "suite.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refusal(reference: str | Path) -> str:
    with pytest.raises(SuiteError) as caught:
        load_suite(reference)
    return str(caught.value)


def test_paths_are_relative_to_the_file_not_to_where_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = MINIMAL.replace("a.safetensors", "../weights/a.safetensors")
    path = write_suite(tmp_path / "suite", text)
    (tmp_path / "weights").mkdir()
    save_file({"w": torch.ones(1)}, tmp_path / "weights" / "a.safetensors")
    save_file({"w": torch.zeros(1)}, tmp_path / "suite" / "b.safetensors")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    for reference in (path, path.parent, "suite", "suite/suite.yaml"):
        suite = load_suite(reference)
        monkeypatch.chdir(elsewhere)
        assert suite.expert("a").tensor("w").item() == 1
        assert suite.expert("b").tensor("w").item() == 0
        monkeypatch.chdir(tmp_path)


def test_absolute_paths_and_home_folders_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in (("a", 1.0), ("b", 2.0)):
        save_file({"w": torch.tensor(value)}, tmp_path / f"{name}.safetensors")
    text = MINIMAL.replace("a.safetensors", str(tmp_path / "a.safetensors"))
    suite = load_suite(write_suite(tmp_path / "s", text.replace("b.saf", "~/b.saf")))
    assert [suite.expert(t).tensor("w").item() for t in suite.tasks] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (MINIMAL + "bse: x\n", "bse"),
        (MINIMAL.replace("weights: a", "weight: a"), "experts.a.weight"),
        (MINIMAL.replace("}\n  b", ", hed: x}\n  b"), "experts.a.hed"),
        ("experts: {a: {weights: x}}", "name"),
        ("name: ''\nexperts: {a: {weights: x}}", "name"),
        ("name: s", "experts"),
        ("name: s\nexperts: {}", "experts"),
        ("name: s\nexperts: [a, b]", "experts"),
        ("name: s\nexperts: {a: null}", "experts.a"),
        ("name: s\nexperts: {a: {head: x}}", "experts.a.weights"),
        ("name: s\nexperts: {'a b': {weights: x}}", "a b"),
        ("name: s\nexperts: {'a,b': {weights: x}}", "a,b"),
        ("name: s\nexperts: {1: {weights: x}}", "experts.1"),
        (MINIMAL + "architecture: {nam: vit}\n", "architecture.nam"),
        (MINIMAL.replace("}\n  b", ", data: {file: x, std: [0, 1, 1]}}\n  b"), "std"),
    ],
)
def test_the_faulty_field_and_the_file_are_named(tmp_path: Path, text: str, named: str) -> None:
    path = write_suite(tmp_path, text)
    message = refusal(path)
    assert str(path) in message
    assert named in message


@pytest.mark.parametrize(
    "text",
    ["name: [", "name: 2024-13-45", "\tname: s", "{" * 5000, "a: &x\nb: *y", b"\xff\xfe\x00", "\0",
     "!!python/object/apply:os.system [false]"],
)  # fmt: skip
def test_what_is_not_yaml_is_refused_in_words(tmp_path: Path, text: str | bytes) -> None:
    assert "not valid YAML" in refusal(write_suite(tmp_path, text))


@pytest.mark.parametrize("text", ["", "[]", "just text", "3"])
def test_yaml_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    assert "not a suite" in refusal(write_suite(tmp_path, text))


def test_a_missing_file_folder_or_home_is_refused(tmp_path: Path) -> None:
    for reference in (tmp_path / "no.yaml", tmp_path):
        assert "cannot be read" in refusal(reference)
    for reference in ("~nobody-lives-here/s", "n" * 5000):
        assert "is not a path" in refusal(reference)


def test_a_missing_expert_is_named_when_it_is_asked_for(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    suite = load_suite(write_suite(tmp_path, MINIMAL))  # opening the suite opens no checkpoint
    assert suite.expert("a").tensor("w").item() == 1
    with pytest.raises(CheckpointError, match=r"expert 'b'.*b\.safetensors does not exist"):
        suite.expert("b")


def test_a_missing_base_is_named(tmp_path: Path) -> None:
    suite = load_suite(write_suite(tmp_path, MINIMAL + "base: zero.safetensors\n"))
    with pytest.raises(CheckpointError, match=r"base.*zero\.safetensors does not exist"):
        _ = suite.base


def test_the_order_of_chosen_tasks_does_not_matter(synthetic_suite: Callable[..., Suite]) -> None:
    suite = synthetic_suite(tasks=["c", "a", "b"])
    for chosen in itertools.permutations(("a", "b", "c"), 2):
        assert suite.select(chosen) == tuple(t for t in ("c", "a", "b") if t in chosen)
    assert suite.select(None) == suite.tasks == ("c", "a", "b")
    assert suite.select(["a", "a"]) == ("a",)
    digests = {
        suite.members_digest(suite.select(chosen), True) for chosen in itertools.permutations("abc")
    }
    assert len(digests) == 1


def test_unknown_tasks_and_no_tasks_are_refused(synthetic_suite: Callable[..., Suite]) -> None:
    suite = synthetic_suite(tasks=["a", "b"])
    with pytest.raises(SuiteError, match=r"no task 'z'.*a, b"):
        suite.select(["a", "z"])
    with pytest.raises(SuiteError, match="at least one"):
        suite.select([])


PRESETS = "{name: s, experts: {a: {weights: a}, b: {weights: b}, c: {weights: c}}, presets: %s}"


def test_a_presets_name_stands_for_its_tasks(tmp_path: Path) -> None:
    suite = load_suite(write_suite(tmp_path, PRESETS % "{'2': [b, a], more: [a, b, c]}"))
    assert suite.select(["2"]) == ("a", "b")
    assert suite.select(["c", "2"]) == suite.select(["more"]) == suite.select(None)
    assert suite.select(["b"]) == ("b",)
    with pytest.raises(SuiteError, match=r"no task '3'.*Its presets: 2, more\."):
        suite.select(["3"])


def test_a_suite_can_be_that_of_some_of_its_tasks(tmp_path: Path) -> None:
    suite = load_suite(write_suite(tmp_path, PRESETS % "{two: [c, a]}"))
    part = suite.restrict(["two"])
    assert part.tasks == suite.select(["two"]) == ("a", "c")
    assert (part.path, part.name, part.spec.presets) == (suite.path, suite.name, {})
    assert suite.tasks == suite.restrict(None).tasks == ("a", "b", "c")
    with pytest.raises(SuiteError, match="no task 'b'"):
        part.select(["b"])


@pytest.mark.parametrize(
    ("presets", "named"),
    [
        ("{'2': [a, d]}", "names 'd', which is no task"),
        ("{a: [b, c]}", "'a' is called as a task"),
        ("{'2': []}", "presets.2"),
        ("{'a b': [a]}", "presets.a b"),
    ],
)
def test_presets_that_name_no_tasks_are_refused(tmp_path: Path, presets: str, named: str) -> None:
    assert named in refusal(write_suite(tmp_path, PRESETS % presets))


def test_the_members_digest_tells_every_change_of_members(
    synthetic_suite: Callable[..., Suite],
) -> None:
    suite, other = synthetic_suite(seed=1), synthetic_suite(seed=2)
    tasks = suite.tasks
    digests = [
        suite.members_digest(tasks, True),
        suite.members_digest(tasks, False),
        suite.members_digest(tasks[:2], True),
        suite.members_digest(tasks[:1], False),
        other.members_digest(tasks, True),
    ]
    assert len(set(digests)) == len(digests)
    assert synthetic_suite(seed=1).members_digest(tasks, True) == digests[0]


def test_a_suite_without_base_heads_or_architecture_says_what_it_lacks(tmp_path: Path) -> None:
    suite = load_suite(write_suite(tmp_path, MINIMAL))
    assert suite.base is None
    assert not suite.can_evaluate
    assert suite.why_not_evaluated is not None
    assert "architecture" in suite.why_not_evaluated
    suite = load_suite(write_suite(tmp_path, MINIMAL + "architecture: {name: vit}\n"))
    assert suite.why_not_evaluated is not None
    assert "head" in suite.why_not_evaluated
    assert "a, b" in suite.why_not_evaluated
    with pytest.raises(SuiteError, match=r"'a'.*head"):
        suite.data_digest("a")


def evaluable_suite(tmp_path: Path, extra: str = "") -> Suite:
    text = (
        "name: s\narchitecture: {name: vit, args: {depth: 2}}\nexperts:\n"
        "  a: {weights: a.safetensors, title: The first, head: h.bin, data: {file: d.npz%s}}\n"
    )
    return load_suite(write_suite(tmp_path, text % extra))


def test_the_data_digest_follows_files_normalisation_and_architecture(tmp_path: Path) -> None:
    suite = evaluable_suite(tmp_path)
    with pytest.raises(SuiteError, match=r"d\.npz.*'a'.*does not exist"):
        suite.data_digest("a")
    (tmp_path / "d.npz").write_bytes(b"data")
    (tmp_path / "h.bin").write_bytes(b"head")
    assert suite.can_evaluate
    assert suite.title("a") == "The first"
    first = suite.data_digest("a")
    assert evaluable_suite(tmp_path).data_digest("a") == first
    changed = [evaluable_suite(tmp_path, ", mean: [0, 0, 0]").data_digest("a")]
    (tmp_path / "d.npz").write_bytes(b"dota")
    changed.append(evaluable_suite(tmp_path).data_digest("a"))
    (tmp_path / "h.bin").write_bytes(b"hoad")
    changed.append(evaluable_suite(tmp_path).data_digest("a"))
    assert len({first, *changed}) == 4


def test_only_common_parameters_are_listed(suite_of: Callable[..., Suite]) -> None:
    w, b = torch.ones(3, 3), torch.ones(3)
    experts = {"x": {"w.weight": w, "b": b, "own": b}, "y": {"w.weight": w, "b": b, "else": b}}
    suite = suite_of(experts)
    assert sorted(suite.parameters) == ["b", "w.weight"]
    assert suite.matrices == ("w.weight",)
    assert sorted(suite.manifest(["x"]).names) == ["b", "own", "w.weight"]


@pytest.mark.parametrize("name", bundled_suites())
def test_the_bundled_suites_go_through_the_same_door(name: str) -> None:
    suite = load_suite(name)
    assert suite.name == bundled_name(suite.path) == name
    assert suite.path == bundled_suites()[name]
    assert suite.can_evaluate, suite.why_not_evaluated
    assert suite.base is not None
    assert len(suite.parameters) == len(suite.expert(suite.tasks[0]))

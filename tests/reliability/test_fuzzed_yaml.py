"""Damaged and hostile suite.yaml, pool.yaml, recipes and links: a value or one clear error.

MERGESCOPE_FUZZ=20000 asks for a longer run.
"""

from __future__ import annotations

import copy
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml
from safetensors.torch import load_file, save_file

from merge_core.errors import MergeScopeError
from merge_core.merging.recipe import Recipe, load_recipe, recipe_from_query, recipe_from_yaml
from merge_core.output.provenance import read_provenance
from merge_core.suites.pool import load_pool
from merge_core.suites.preflight import preflight
from merge_core.suites.suite import Suite, load_suite
from merge_core.yaml_text import UNUSABLE, dump_yaml, load_yaml
from tests.evaluable import write_evaluable
from tests.pools import write_pool
from tests.reliability.limits import SECONDS, run_confined

INPUTS = int(os.environ.get("MERGESCOPE_FUZZ", "1500"))

VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 10**18, -(10**30), 1e308, -1e-300, float("nan"), float("inf"), "", " ", ".",
    "..", "../../../etc/passwd", "/etc/passwd", "/dev/zero", "/dev/null", "/proc/self/mem", "~",
    "~nobody-here/x", "a\0b", "\ud800", "\x1b[2J", "n" * 5000, "*", "[", "a" * 200 + "*" * 200, "é",
    "experts/shapes.safetensors", "vision", "cart", "ties", "numpy", "base", [], {}, [[]], {"": ""},
    {"a": {"b": {"c": {}}}}, ["x"] * 300, [1, 2, 3], [None], {1: 2}, "1e5", "0.5", "true",
)  # fmt: skip
PIECES = (
    "&a ", "*a", "*b", "!!python/object/apply:os.system [touch owned]", "!!python/name:os.system ",
    "!!binary aGk=", "!!set {a, b}", "!!timestamp 2024-13-45", "!!int ''", "!!float x", "!x ", "? ",
    "- ", ": ", "[", "]", "{", "}", "|", ">", "'", '"', "#", "\t", "\n", "\n---\n", "%YAML 9.9\n",
    "<<: *a", "<<: {name: x}", ".nan", ".inf", "-.inf", "0x" + "f" * 300, "9" * 5000, "1e999",
    "1:" * 50 + "1", "2024-01-01", "2024-13-01", "0o7", "~", "\x85", "\ufeff", "\\ud800",
    '"\\ud800"', '"\\0"', "[" * 500, "- " * 500, "&a [*a]", "null", "yes", "\u202e",
)  # fmt: skip

RECIPES: tuple[dict[str, Any], ...] = (
    {"suite": "suite.yaml", "method": "cart", "parameters": {"rank": 0.2, "scale": 1.5}},
    {"suite": "suite.yaml", "method": "ties", "tasks": ["digits", "lines"], "seed": 3,
     "parameters": {"density": 0.3}, "weights": {"digits": 0.5}, "dtype": "float16"},
    {"suite": "suite.yaml", "method": "task_arithmetic", "origin": "base",
     "overrides": [{"match": "blocks.*", "parameters": {"scale": 0.2}}]},
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(child, (*path, key))


def change(document: Any, source: random.Random) -> Any:
    """A document with some values or names replaced, removed or added."""
    document = copy.deepcopy(document)
    for _ in range(source.choice([1, 1, 1, 2, 4])):
        path = source.choice(list(places(document)))
        value = copy.deepcopy(source.choice(VALUES))
        if not path:
            if source.random() < 0.1:
                return value
            continue
        holder = document
        for key in path[:-1]:
            holder = holder[key]
        kind = source.randrange(5)
        if kind == 0:
            del holder[path[-1]]
        elif kind == 1 and isinstance(holder, dict):
            name = value if isinstance(value, str | int | None) else "more"
            holder[name] = holder.pop(path[-1])
        elif kind == 2 and isinstance(holder, dict):
            holder[source.choice(["more", "name", "kind", "base", "args"])] = value
        else:
            holder[path[-1]] = value
    return document


def write(document: Any) -> bytes:
    try:
        return yaml.safe_dump(document, sort_keys=False).encode()
    except (UnicodeEncodeError, yaml.YAMLError):
        return json.dumps(document, default=str).encode()


def damage(text: bytes, source: random.Random) -> bytes:
    """A text with pieces of YAML put in, bytes changed, or its end cut off."""
    data = bytearray(text)
    for _ in range(source.choice([1, 1, 2, 6])):
        at = source.randrange(len(data) + 1)
        if source.random() < 0.2:
            data[at : at + 1] = bytes([source.randrange(256)])
        else:
            piece = source.choice(PIECES).encode("utf-8", "surrogatepass")
            data[at : at + source.choice([0, 0, 1, 8])] = piece
    return bytes(data[: source.randrange(len(data) + 1)] if source.random() < 0.1 else data)


def make_hostile(document: Any, source: random.Random) -> bytes:
    if source.random() < 0.5:
        return damage(write(document), source)
    text = write(change(document, source))
    return damage(text, source) if source.random() < 0.1 else text


def use_suite(path: Path) -> None:
    """Everything that is asked of a suite before weights are read in earnest."""
    suite: Suite = load_suite(path)
    report = preflight(suite)
    assert report.memory_bytes >= 0
    assert suite.matrices is not None
    for task in suite.tasks:
        assert suite.title(task)
        if suite.can_evaluate:
            suite.data_digest(task)


def use_pool(path: Path) -> None:
    pool = load_pool(path)
    assert pool.title
    for number in pool.select(None):
        pool.member(number)
    assert pool.start is None or len(pool.start)
    assert pool.data_digest
    assert all(isinstance(file, Path) for file in pool.files)


def use_recipe(path: Path) -> None:
    recipe, suite = load_recipe(path)
    assert len(recipe.digest(suite)) == 64
    assert recipe_from_yaml(recipe.to_yaml()) == recipe
    assert recipe_from_query(recipe.to_query()) == recipe
    for name in suite.parameters:
        assert recipe.parameters_of(name)


def outcome(use: Callable[[Any], object], what: Any) -> str | None:
    """None if all went well, else the sentence; any other exception passes."""
    try:
        use(what)
    except MergeScopeError as error:
        return str(error)
    return None


def assert_clear(message: str | None) -> None:
    if message is not None:
        message.encode()  # what cannot be written cannot be shown
        assert not UNUSABLE.search(message), repr(message)
        assert 10 < len(message) < 6000, len(message)


def fuzz(
    use: Callable[[Path], object],
    path: Path,
    documents: tuple[Any, ...],
    seed: int,
    inputs: int,
) -> tuple[int, int]:
    """Fuzz one kind of file; gives how many were refused and how many were of use."""
    source, tallies = random.Random(seed), [0, 0]
    for place in range(inputs):
        text = make_hostile(source.choice(documents), source)
        path.write_bytes(text)
        start = time.process_time()
        try:
            message = outcome(use, path)
        except Exception as error:
            raise AssertionError(f"{error!r:.300} at input {place}: {text!r:.3000}") from error
        assert time.process_time() - start < SECONDS, text[:500]
        assert_clear(message)
        tallies[message is None] += 1
    return tallies[0], tallies[1]


@pytest.fixture(scope="module")
def evaluable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a suite that can be evaluated, with little in it."""
    folder = tmp_path_factory.mktemp("fuzzed") / "suite"
    write_evaluable(folder)
    for path in [*folder.glob("experts/*"), folder / "base.safetensors"]:
        state = load_file(path)
        save_file({name: state[name] for name in sorted(state)[:6]}, path)
    return folder


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def fuzz_confined(
    use: Callable[[Path], object], path: Path, documents: tuple[Any, ...], seed: int, share: float
) -> None:
    """Fuzz in a process of its own; the originals pass, and nothing appears beside them."""
    for document in documents:
        path.write_bytes(write(document))
        assert outcome(use, path) is None
    before, inputs = tree(path.parent), int(INPUTS * share)
    work = lambda: fuzz(use, path, documents, seed, inputs)  # noqa: E731
    refused, read = run_confined(work, 60 + inputs * SECONDS)
    assert refused > inputs // 3
    assert read > inputs // 50
    assert tree(path.parent) == before


def test_suites(evaluable: Path) -> None:
    path = evaluable / "suite.yaml"
    good = yaml.safe_load(path.read_text())
    (evaluable / "images").mkdir(exist_ok=True)
    (evaluable / "names.txt").write_text("a\nb\n")
    richer = copy.deepcopy(good) | {
        "vocabulary": "common", "decompose": ["blocks.*.weight"], "average": ["*bias"],
        "base_prefix": "", "presets": {"1": list(good["experts"])[:1]},
    }  # fmt: skip
    richer["experts"]["lines"]["data"] = {
        "kind": "folder", "path": "images", "classes": "names.txt", "limit": 10, "seed": 1,
        "val_share": 0.2, "transform": {"size": 16, "crop_pct": 0.9},
    }  # fmt: skip
    try:
        fuzz_confined(use_suite, path, (good, richer), 0, 0.4)
    finally:
        path.write_bytes(write(good))


def test_pools(tmp_path: Path) -> None:
    path = write_pool(tmp_path / "pool", "linear", 2).path
    fuzz_confined(use_pool, path, (yaml.safe_load(path.read_text()),), 1, 0.2)


def test_recipes(evaluable: Path) -> None:
    fuzz_confined(use_recipe, evaluable / "recipe.yaml", RECIPES, 2, 0.4)


def test_links() -> None:
    """Whatever a link says, it is a recipe or one clear error."""
    source = random.Random(3)
    goods = [Recipe.model_validate({**r, "suite": "vision"}).to_query() for r in RECIPES]

    def one() -> str:
        text = source.choice(goods)
        for _ in range(source.choice([1, 2, 5])):
            at = source.randrange(len(text) + 1)
            value = str(source.choice([*VALUES, *PIECES])).encode("utf-8", "surrogatepass")
            piece = source.choice(["&", "=", "%", ",", "%00", "%ff", "+", quote(value)])
            text = text[:at] + piece + text[at + source.choice([0, 1, 5]) :]
        return text

    refused = 0
    for _ in range(INPUTS // 5):
        message = outcome(recipe_from_query, one())
        assert_clear(message)
        refused += message is not None
    assert refused > INPUTS // 20


def test_notes_of_merged_models(tmp_path: Path, evaluable: Path) -> None:
    """A model's note on how it was made comes from whoever made the file."""
    from merge_core.output.model_folder import merge_to_folder

    suite = load_suite(evaluable)
    recipe = Recipe.model_validate({**RECIPES[0], "suite": str(suite.path)})
    folder = merge_to_folder(recipe, suite, tmp_path / "out")
    note = json.loads(read_provenance(folder).to_header())
    path, source = tmp_path / "m.safetensors", random.Random(4)
    tensors = load_file(folder / "model.safetensors")
    for _ in range(INPUTS // 10):
        text = json.dumps(change(note, source), default=str)
        if source.random() < 0.3:
            text = damage(text.encode(), source).decode("utf-8", "replace")
        save_file(tensors, path, {"mergescope": text.replace("\0", "")})
        assert_clear(outcome(read_provenance, path))


LAUGHS = "\n".join(
    ["a: &a [x, x, x, x, x, x, x, x, x]"]
    + [
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]"
        for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
    ]
)
MERGED = "\n".join(
    ["a: &a {k: 1}"]
    + [
        f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}"
        for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
    ]
)
HOSTILE = {
    "a billion laughs": LAUGHS,
    "a billion merged laughs": MERGED,
    "laughs in arguments": f"name: x\nexperts: {{a: {{weights: w}}}}\n{LAUGHS}\n"
    "architecture: {name: x, args: {all: *k}}",
    "a list that holds itself": "&a [*a]",
    "a table that holds itself": "&a {name: *a}",
    "lists in lists": "[" * 100_000,
    "lists in lists, closed": "[" * 100_000 + "]" * 100_000,
    "lists in lists, by dashes": "- " * 100_000,
    "questions in questions": "? " * 100_000,
    "indentation": "\n".join(" " * i + "a:" for i in range(900)),
    "a long text": "name: " + "x" * 5_000_000,
    "many names": "\n".join(f"k{i}: v" for i in range(40_000)),
    "many names in braces": "{" + ", ".join(f"k{i}: 1" for i in range(40_000)) + "}",
    "a number of a million digits": "seed: " + "9" * 450_000,
    "a hexadecimal one": "seed: 0x" + "f" * 450_000,
    "a base-60 one": "seed: " + "1:" * 200_000 + "1",
    "code": "!!python/object/apply:os.system [touch owned]",
    "code in a field": "name: !!python/object/new:subprocess.Popen [[touch, owned]]",
    "a name twice": "name: x\nname: y\nexperts: {}",
    "a million lines": "\n" * 1_000_000,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_the_worst_texts_take_neither_time_nor_memory(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.yaml"
    path.write_text(HOSTILE[kind])

    def all_readers() -> list[tuple[str | None, float]]:
        results = []
        for read in (use_suite, use_pool, use_recipe):
            start = time.process_time()
            results.append((outcome(read, path), time.process_time() - start))
        return results

    for message, seconds in run_confined(all_readers, 30):
        assert message is not None
        assert str(path) in message
        assert_clear(message)
        assert seconds < SECONDS
    assert tree(tmp_path) == {"hostile.yaml"}


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/urandom", "/proc/self/mem", "pipe"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "pipe":
        os.mkfifo(path)
    for read in (load_suite, load_pool, load_recipe):
        message = run_confined(lambda read=read: outcome(read, path), 10)
        assert message is not None
        assert_clear(message)


@pytest.mark.parametrize(
    "text",
    [
        "experts: {digits: &one {weights: w}, shapes: {<<: *one}}",
        "experts: {digits: *one}",
        "experts: [&one w]",
        "&one {name: x}",
        "&one name: x",
        "experts: &one",
    ],
)
def test_anchors_and_aliases_are_refused_whatever_they_stand_at(tmp_path: Path, text: str) -> None:
    with pytest.raises(yaml.YAMLError, match="such as 'one' are not read; write the value"):
        load_yaml(text)
    path = tmp_path / "given.yaml"
    path.write_text(text)
    for read in (load_suite, load_pool, load_recipe):
        message = outcome(read, path)
        assert message is not None
        assert "write the value out in each place" in message
        assert_clear(message)


def test_ampersands_and_stars_in_values_are_no_anchors() -> None:
    text = 'match: blocks.*\nmore: ["*", "*bias", a*b, R&D, "&x"]\n<<: {name: x}'
    assert load_yaml(text) == {
        "match": "blocks.*", "more": ["*", "*bias", "a*b", "R&D", "&x"], "name": "x",
    }  # fmt: skip


@pytest.mark.parametrize("flow", [None, False, True])
def test_what_is_written_is_read_back_though_objects_repeat(flow: bool | None) -> None:
    table, numbers = {"size": 16, "name": "é"}, [0.5, -1, None]
    document = {"z": table, "a": [table, {"more": table}, numbers], "list": numbers, "*": "*x"}
    text = dump_yaml(document, flow=flow)
    assert load_yaml(text) == yaml.safe_load(text) == document
    assert list(load_yaml(text)) == list(document)


def test_the_yaml_that_is_shipped_or_shown_has_no_anchors() -> None:
    root = Path(__file__).parents[2]
    files = list(root.glob("data/**/*.yaml"))
    assert len(files) > 15
    for path in files:
        assert load_yaml(path.read_text(encoding="utf-8"))
    shown = [
        block.split("```")[0]
        for page in (root / "README.md", root / "SECURITY.md", *root.glob("docs/*.md"))
        for block in page.read_text(encoding="utf-8").split("```yaml\n")[1:]
    ]
    assert len(shown) > 5
    for text in shown:
        assert all(getattr(event, "anchor", None) is None for event in yaml.parse(text))

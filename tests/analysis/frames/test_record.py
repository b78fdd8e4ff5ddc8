"""A record answers as its suite does, holds no weights, and a forged one is refused."""

from __future__ import annotations

import io
import json
import os
import threading
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from analysis.evaluation.evaluator import Evaluator
from analysis.frames.entries import NotRecorded
from analysis.frames.from_outputs import OutputFrames
from analysis.frames.from_weights import WeightFrames
from analysis.frames.record import Record, load_record
from analysis.frames.recording import record_suite, write_record
from analysis.frames.store import FrameStore
from analysis.frames.usual import SHARES
from analysis.rank_selection.select import SelectionOptions
from analysis.rank_selection.space import search_space
from merge_core.errors import Cancelled, MergeScopeError, OutputError, RecipeError, SuiteError
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import make_recipe
from merge_core.progress import Progress
from merge_core.suites.suite import Suite, load_suite
from merge_core.yaml_text import dump_yaml
from tests.evaluable import write_evaluable


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("secret-place")


@pytest.fixture(scope="module")
def suite(folder: Path) -> Suite:
    return load_suite(write_evaluable(folder / "suite"))


@pytest.fixture(scope="module")
def data(folder: Path, suite: Suite) -> bytes:
    return record_suite(suite, "mine", FrameStore(folder / "frames"), FactorStore(folder / "f"))


@pytest.fixture(scope="module")
def record(folder: Path, data: bytes) -> Record:
    write_record(folder / "mine.mergescope", data)
    return load_record(folder / "mine.mergescope")


@pytest.fixture
def fresh(tmp_path: Path, suite: Suite) -> tuple[WeightFrames, OutputFrames]:
    """What the suite itself answers, computed anew."""
    frames, factors = FrameStore(tmp_path / "frames"), FactorStore(tmp_path / "factors")
    session, evaluator = MergeSession(suite, None, factors), Evaluator(suite)
    outputs = OutputFrames("mine", suite, suite.tasks, frames, lambda: session, lambda: evaluator)
    return WeightFrames(suite, suite.tasks, frames, factors), outputs


def assert_alike(found: pd.DataFrame, wanted: pd.DataFrame) -> None:
    """Equal to the seven digits that a record keeps, a float32's rounding."""
    pd.testing.assert_frame_equal(found, wanted, rtol=2**-23, atol=1e-12)


def test_a_record_answers_what_the_weights_answer(
    record: Record, fresh: tuple[WeightFrames, OutputFrames]
) -> None:
    weights = fresh[0]
    assert record.suite.matrices == weights.suite.matrices
    for layer in (*weights.suite.matrices, None):
        for origin in ("average", "base"):
            assert_alike(record.weights.cosines(layer, origin), weights.cosines(layer, origin))
            for share in (SHARES[0], 0.08, SHARES[-1]):
                asked = (layer, origin, share, "column")
                assert_alike(record.weights.pairs(*asked), weights.pairs(*asked))
            mine = record.weights.over_rank(layer, origin, "row")
            assert_alike(mine, weights.over_rank(layer, origin, "row"))
            if layer is not None:
                mine = record.weights.spectrum(layer, origin)
                assert_alike(mine, weights.spectrum(layer, origin))
    assert_alike(record.weights.signs(), weights.signs())
    assert_alike(record.weights.centring(0.16, "column"), weights.centring(0.16, "column"))
    assert_alike(record.weights.summary("base"), weights.summary("base"))


def test_a_record_answers_what_the_outputs_answer(
    record: Record, fresh: tuple[WeightFrames, OutputFrames]
) -> None:
    outputs, tasks = fresh[1], record.suite.tasks
    for split in ("val", "test"):
        assert_alike(record.outputs.experts(split), outputs.experts(split))
        recipe = make_recipe({"suite": "mine", "tasks": tasks, "method": "cart"})
        assert_alike(record.outputs.recipe(recipe, split), outputs.recipe(recipe, split))
    for mode in ("labels", "weights"):
        space = search_space("cart", "mine", tasks)
        mine = record.outputs.select(space, SelectionOptions(mode))
        other = outputs.select(space, SelectionOptions(mode))
        assert (mine.rank, mine.scale, mine.rule, mine.why) == (
            *(other.rank, other.scale, other.rule, other.why),
        )
        assert mine.recipe == other.recipe
        assert_alike(mine.picks, other.picks)
        assert_alike(mine.points, other.points)
    names = ["average", "cart", "ties"]
    mine, other = record.outputs.compare(names, 1, []), outputs.compare(names, 1, [])
    costs = ["seconds", "peak_mb", "storage_mb"]
    assert_alike(mine.summary.drop(columns=costs), other.summary.drop(columns=costs))
    for label, hits in other.hits.items():
        for task, vector in hits.items():
            np.testing.assert_array_equal(mine.hits[label][task], vector)
    assert record.outputs.first_result_if_known() is not None


def test_what_was_not_recorded_is_said_with_what_is_nearest(record: Record) -> None:
    layer = record.suite.matrices[0]
    with pytest.raises(NotRecorded, match=r"share 0\.085.*nearest.*share 0\.08"):
        record.weights.pairs(layer, "average", 0.085)
    recipe = make_recipe(
        {"tasks": record.suite.tasks, "method": "cart", "parameters": {"rank": 0.3, "scale": 0.9}}
    )
    with pytest.raises(NotRecorded) as caught:
        record.outputs.recipe(recipe, "val")
    assert caught.value.nearest is not None
    assert caught.value.nearest["method"] == "cart"
    some = WeightFrames(record.suite, record.suite.tasks[:2], record.frames, FactorStore())
    with pytest.raises(NotRecorded, match="Choose all tasks"):
        some.summary("average")
    space, options = (
        search_space("cart", "mine", record.suite.tasks),
        SelectionOptions("labels", seed=7),
    )
    with pytest.raises(NotRecorded, match="does not hold this choice"):
        record.outputs.select(space, options)


def test_methods_that_were_not_asked_for_are_not_recorded(suite: Suite, folder: Path) -> None:
    stores = FrameStore(folder / "frames"), FactorStore(folder / "f")
    write_record(
        folder / "few.mergescope",
        record_suite(suite, "mine", *stores, only=["average", "cart"]),
    )
    few = load_record(folder / "few.mergescope").outputs
    assert len(few.compare(["average", "cart"], 1).summary) == 2
    assert few.first_result_if_known() is not None
    options = SelectionOptions("labels")
    assert few.select(search_space("cart", "mine", suite.tasks), options).recipe.method == "cart"
    with pytest.raises(NotRecorded):
        few.compare(["ties"], 1)
    with pytest.raises(NotRecorded):
        few.select(search_space("task_arithmetic", "mine", suite.tasks), options)
    with pytest.raises(RecipeError, match="carte"):
        record_suite(suite, "mine", *stores, only=["carte"])


def test_weights_inputs_and_places_are_not_in_it(data: bytes, folder: Path, suite: Suite) -> None:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        everything = b"".join(archive.read(name) for name in archive.namelist())
    assert str(folder).encode() not in everything
    assert folder.name.encode() not in everything
    for name in suite.matrices:
        tensor = suite.expert(suite.tasks[0]).tensor(name)
        assert tensor.numpy().tobytes()[:64] not in everything
        assert tensor.double().numpy().tobytes()[:64] not in everything
    with np.load(folder / "suite/inputs/digits.npz") as arrays:
        assert arrays["val_images"].tobytes()[:64] not in everything


def test_a_suite_that_cannot_be_evaluated_has_a_record_too(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    for task in ("a", "b", "c"):
        state = {"blocks.0.mlp.fc1.weight": torch.randn(6, 8, generator=g)}
        save_file(state, tmp_path / f"{task}.safetensors")
    experts = {task: {"weights": f"{task}.safetensors"} for task in ("a", "b", "c")}
    (tmp_path / "suite.yaml").write_text(dump_yaml({"name": "small", "experts": experts}))
    frames, factors = FrameStore(tmp_path / "frames"), FactorStore(tmp_path / "factors")
    data = record_suite(load_suite(tmp_path), "small", frames, factors)
    write_record(tmp_path / "small.mergescope", data)
    record = load_record(tmp_path / "small.mergescope")
    assert record.suite.why_not_evaluated == "the suite names no architecture"
    assert len(record.weights.spectrum("blocks.0.mlp.fc1.weight", "average")) == 3 * 6
    with pytest.raises(SuiteError, match="is a record"):
        load_suite(record.path)


def test_a_cancelled_record_leaves_nothing(tmp_path: Path, suite: Suite) -> None:
    cancel = threading.Event()

    def stop(done: int, total: int, label: str) -> None:
        if done == 1:
            cancel.set()

    frames, factors = FrameStore(tmp_path / "frames"), FactorStore(tmp_path / "factors")
    with pytest.raises(Cancelled):
        record_suite(suite, "mine", frames, factors, Progress(stop, cancel))
    with pytest.raises(OutputError, match="ends in"):
        write_record(tmp_path / "mine.zip", b"")
    (tmp_path / "folder.mergescope").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        write_record(tmp_path / "folder.mergescope", b"")
    assert not list(tmp_path.glob("*.zip"))


def parts_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(parts: dict[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", how) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    return stream.getvalue()


def with_json(name: str, change: Callable[[dict], object]) -> Callable[[dict[str, bytes]], bytes]:
    def forge(parts: dict[str, bytes]) -> bytes:
        document = json.loads(parts[name])
        change(document)
        return zipped({**parts, name: json.dumps(document).encode()})

    return forge


def deep(parts: dict[str, bytes]) -> bytes:
    return zipped({**parts, "card.json": b"[" * 100_000})


FORGED: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "nothing": lambda parts: b"",
    "no zip": lambda parts: b"PK\x03\x04" + b"x" * 1000,
    "a pickle": lambda parts: b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "no card": lambda parts: zipped({n: p for n, p in parts.items() if n != "card.json"}),
    "no index": lambda parts: zipped({n: p for n, p in parts.items() if n != "index.json"}),
    "stored, not packed": lambda parts: zipped(parts, zipfile.ZIP_STORED),
    "packed by LZMA": lambda parts: zipped(parts, zipfile.ZIP_LZMA),
    "a bomb": lambda parts: zipped({**parts, "table_0.arrow": bytes(150_000_000)}),
    "a long card": lambda parts: zipped({**parts, "card.json": b" " * 20_000_000}),
    "a card of commas": lambda parts: zipped({**parts, "card.json": b"[" + b"1," * 4_000_000}),
    "an index of commas": lambda parts: zipped({**parts, "index.json": b"[" + b"1," * 4_000_000}),
    "a deep card": deep,
    "many parts": lambda parts: zipped({**parts, **{f"x{i}": b"" for i in range(2_000)}}),
    "another format": with_json("index.json", lambda d: d.update(format="frames-9")),
    "an unknown field": with_json("card.json", lambda d: d.update(run="rm")),
    "no tasks": with_json("card.json", lambda d: d.update(tasks={})),
    "a task with a slash": with_json(
        "card.json", lambda d: d["tasks"].update({"../x": next(iter(d["tasks"].values()))})
    ),
    "headers that are not there": with_json("card.json", lambda d: d["base"].update(layout=9)),
    "no dtype": with_json("card.json", lambda d: d["merged"].update(w=["object", [2, 2]])),
    "a shape below zero": with_json("card.json", lambda d: d["merged"].update(w=["float32", [-2]])),
    "a huge shape": with_json(
        "card.json", lambda d: d["merged"].update(w=["float32", [1 << 39, 1 << 39]])
    ),
    "a name of control characters": with_json(
        "card.json", lambda d: d["merged"].update({"a\x1bb": ["float32", [2]]})
    ),
    "inputs that are not there": with_json(
        "index.json", lambda d: d["entries"][0].update(inputs=99)
    ),
    "a digest that is none": with_json(
        "card.json", lambda d: d["base"].update(digest="<img src=x>")
    ),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_record_is_refused_in_a_sentence(what: str, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "forged.mergescope"
    path.write_bytes(FORGED[what](parts_of(data)))
    with pytest.raises(SuiteError) as caught:
        load_record(path)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_a_table_that_is_none_is_not_recorded(data: bytes, tmp_path: Path) -> None:
    parts = parts_of(data)
    tables = {name: b"no table" for name in parts if name.endswith(".arrow")}
    path = tmp_path / "forged.mergescope"
    path.write_bytes(zipped({**parts, **tables}))
    record = load_record(path)
    with pytest.raises(NotRecorded, match="damaged"):
        record.weights.summary("average")


def test_rows_beyond_a_table_are_not_recorded(data: bytes, tmp_path: Path) -> None:
    def move(document: dict) -> None:
        for entry in document["entries"]:
            for rows in entry.get("frames", {}).values():
                rows["start"] += 1_000_000_000

    path = tmp_path / "forged.mergescope"
    path.write_bytes(with_json("index.json", move)(parts_of(data)))
    with pytest.raises(NotRecorded, match="damaged"):
        load_record(path).weights.summary("average")


def test_odd_files_are_no_records(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mergescope")
    (tmp_path / "folder.mergescope").mkdir()
    for name in ("pipe", "folder", "absent"):
        with pytest.raises(SuiteError):
            load_record(tmp_path / f"{name}.mergescope")


def test_damage_anywhere_gives_a_sentence_or_the_record(data: bytes, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    path = tmp_path / "damaged.mergescope"
    for turn in range(60):
        bad = bytearray(data)
        for place in random.integers(0, len(data), 1 + turn % 5):
            bad[place] = int(random.integers(0, 256))
        path.write_bytes(bytes(bad[: len(bad) - (turn % 3) * 1000]))
        with suppress(MergeScopeError):
            record = load_record(path)
            record.weights.spectrum(record.suite.matrices[0], "average")


def test_a_record_never_enters_the_store_of_this_machine(record: Record, tmp_path: Path) -> None:
    asked = next(iter(record.frames._known.values()))
    kept = record.frames.get(asked)
    assert kept is not None
    record.frames.put(replace(asked, version=99), kept)
    assert record.frames.get(replace(asked, version=99)) is None
    assert FrameStore(tmp_path).get(asked) is None

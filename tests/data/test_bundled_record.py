"""The bundled record: it opens, its card and accuracies are right, and every page shows it."""

from __future__ import annotations

import getpass
import io
import re
import zipfile
from functools import cache
from pathlib import Path

import pytest

from analysis.fine_tuning.plan import load_plan
from analysis.frames.record import Record, load_record
from merge_core.merging.recipe import make_recipe
from merge_core.suites.bundled import bundled_records
from tests.pages.test_pages import assert_healthy, figures, finish, metrics, open_page
from ui.shell import PAGES

NAME = "sentences"
README = Path(__file__).resolve().parents[2] / "data" / "README.md"
# What MiniLM's card says: 6 layers of width 384, inner width 1536, 30,522 words, 512 positions.
WIDTH, INNER, LAYERS, EMBEDDED = 384, 1536, 6, 30_522 + 512 + 2
PARAMETERS = (
    EMBEDDED * WIDTH
    + LAYERS * (4 * WIDTH * (WIDTH + 1) + WIDTH * (INNER + 1) + INNER * (WIDTH + 1))
    + (2 * LAYERS + 1) * 2 * WIDTH  # layer norms
    + WIDTH * (WIDTH + 1)  # the pooler, which its checkpoints hold and mean pooling leaves unused
)


@cache
def record() -> Record:
    return load_record(bundled_records()[NAME])


def test_its_card_is_that_of_the_plan() -> None:
    suite, plan = record().suite, load_plan(NAME, data=Path("/data"))
    assert suite.name == plan.name == NAME
    assert suite.tasks == tuple(plan.tasks)
    assert [suite.title(task) for task in suite.tasks] == [t.title for t in plan.tasks.values()]
    assert " ".join(suite.spec.description.split()) == " ".join((plan.description or "").split())
    assert suite.architecture is not None
    assert suite.architecture.name == "bert"
    infos = suite.manifest(suite.tasks).infos.values()
    assert sum(info.numel for info in infos if info.is_floating) == PARAMETERS
    assert len(suite.matrices) == 6 * LAYERS


def listed() -> dict[str, tuple[float, float]]:
    """Model to its accuracies in % on validation and test, as data/README.md lists them."""
    section = README.read_text().split("## A real model: eight sentence tasks")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+) \[[^|]+\| ([\d.]+) \[", section, re.MULTILINE)
    return {model: (float(val), float(test)) for model, val, test in rows}


def test_its_accuracies_are_those_of_the_table() -> None:
    outputs, told = record().outputs, listed()
    for place, split in enumerate(("val", "test")):
        found = {"experts, each on its task": outputs.experts(split)}
        for name, recipe in (
            ("weight average", {"method": "average"}),
            ("CART, rank 0.08, λ 1", {"method": "cart"}),
        ):
            asked = make_recipe({**recipe, "suite": NAME, "tasks": record().suite.tasks})
            found[name] = outputs.recipe(asked, split)
        for name, frame in found.items():
            assert 100 * frame["accuracy"].mean() == pytest.approx(told[name][place], abs=0.0501)
    base = outputs.compare(["average"], 1).base
    assert base is not None
    assert 100 * base == pytest.approx(told["base"][1], abs=0.0501)


def test_no_place_and_no_user_is_in_it() -> None:
    path = bundled_records()[NAME]
    assert path.stat().st_size < 8_000_000
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
        everything = b"".join(archive.read(name) for name in archive.namelist())
    for place in ("/tmp", "/work", "/home", "/root", "file:", str(Path.home())):
        assert place.encode() not in everything, place
    user = getpass.getuser().encode()
    assert not re.search(rb"\b" + re.escape(user) + rb"[/\\@]", everything)


@pytest.mark.parametrize("name", [page.name for page in PAGES if page.subject == "suite"])
def test_every_page_shows_it_or_says_that_it_was_not_recorded(name: str) -> None:
    at = assert_healthy(finish(open_page(name, suite=NAME)))
    said = " ".join(info.value for info in at.info)
    assert figures(at) or "This record does not hold" in said
    if name == "overview":
        assert metrics(at)["Parameters each"] == f"{PARAMETERS / 1e6:.1f} M"
        assert "figures of a real model" in said
        assert "mergescope suite build sentences" in said


def test_a_link_into_it_works() -> None:
    layer = "encoder.layer.3.intermediate.dense.weight"
    at = assert_healthy(open_page("spectra", suite=NAME, layer=layer, share="4 %"))
    (chosen,) = (each for each in at.selectbox if each.label == "Layer")
    assert chosen.value == layer
    assert figures(at)

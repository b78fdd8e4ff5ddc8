"""Pages on suites that people bring: weights only, no base, and broken ones."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from analysis.outputs.suite_outputs import SuiteOutputs
from merge_core.suites.bundled import bundled_records, bundled_suites, bundled_title
from merge_core.yaml_text import dump_yaml
from tests.evaluable import write_evaluable
from tests.pages.test_pages import PAGES, figures, finish, metrics, open_page
from ui.server import resources

NEEDS_EVALUATION = ("overview", "rank_and_scale", "merge_lab")


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a suite named ``mine``, damage it, and offer it to the dashboard."""

    def make(damage: Callable[[Path], None] = lambda folder: None, **fields: object) -> Path:
        path = write_evaluable(tmp_path / "mine", **fields)
        damage(path.parent)
        monkeypatch.setenv("MERGESCOPE_SUITES", os.pathsep.join([str(path)]))
        return path

    return make


def drop(*lines: str) -> Callable[[Path], None]:
    """Take whole fields out of suite.yaml, by the names they begin with."""

    def damage(folder: Path) -> None:
        import yaml

        path = folder / "suite.yaml"
        document = yaml.safe_load(path.read_text())
        for name in lines:
            document.pop(name, None)
            for expert in document["experts"].values():
                expert.pop(name, None)
        path.write_text(dump_yaml(document))

    return damage


def change(file: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Change every two-dimensional tensor of a file of the suite."""

    def damage(folder: Path) -> None:
        state = load_file(folder / file)
        changed = {k: how(v).contiguous() if v.ndim == 2 else v for k, v in state.items()}
        save_file(changed, folder / file)

    return damage


def truncate(folder: Path) -> None:
    path = folder / "experts" / "shapes.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def write_plain_text(folder: Path) -> None:
    (folder / "experts" / "shapes.safetensors").write_text("not weights at all")


def remove_head(folder: Path) -> None:
    (folder / "heads" / "shapes.safetensors").unlink()


@pytest.mark.parametrize("lost", [("head",), ("data",), ("architecture",), ("head", "data")])
@pytest.mark.parametrize("name", PAGES)
def test_without_heads_or_data_pages_analyse_and_say_politely_what_is_missing(
    name: str, lost: tuple[str, ...], offer: Callable[..., Path]
) -> None:
    offer(drop(*lost))
    at = open_page(name, suite="mine")
    assert not at.exception
    assert [error.value for error in at.error] == []
    notes = " ".join(info.value for info in at.info)
    if name in NEEDS_EVALUATION:
        assert "can be analysed and merged but not evaluated" in notes
        assert lost[0] in notes
    else:
        assert figures(at)
    if name == "merge_lab":
        assert any("method: cart" in code.value for code in at.code)


@pytest.mark.parametrize("name", PAGES)
def test_without_a_base_everything_about_the_average_works(
    name: str, offer: Callable[..., Path]
) -> None:
    offer(drop("base"))
    at = open_page(name, suite="mine")
    assert not at.exception
    assert [error.value for error in at.error] == []
    if name == "merge_lab":
        offered = set(at.selectbox(key="method").options)
        assert {"Weight average", "CART", "Karcher mean"} <= offered
        assert not {"TIES", "Task Arithmetic", "SLERP"} & offered


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (truncate, "shapes.safetensors"),
        (write_plain_text, "shapes.safetensors"),
        (change("experts/shapes.safetensors", lambda v: v * float("nan")), "NaN"),
        (change("experts/shapes.safetensors", lambda v: v[:, :-1]), "shape"),
        (remove_head, "head"),
        (lambda folder: (folder / "suite.yaml").write_text("name: x\nexpert: {}"), "experts"),
        (lambda folder: (folder / "suite.yaml").write_text("name: [x"), "YAML"),
        (lambda folder: (folder / "suite.yaml").unlink(), "suite.yaml"),
    ],
    ids=["truncated", "text", "nan", "shape", "no-head", "field", "yaml", "missing"],
)
def test_a_damaged_suite_is_explained_on_the_page(
    damage: Callable[[Path], None], named: str, offer: Callable[..., Path]
) -> None:
    offer(damage)
    at = open_page("merge_lab", suite="mine")
    assert not at.exception
    messages = [error.value for error in at.error]
    assert len(messages) == 1
    assert named in messages[0]
    assert "Traceback" not in messages[0]
    assert "unexpectedly" not in messages[0]
    # The sidebar still lets one choose another suite.
    assert at.sidebar.selectbox(key="suite").options == [
        *map(bundled_title, [*bundled_suites(), *bundled_records()]),
        "mine",
    ]


def test_sets_of_tasks_are_offered_and_the_first_is_chosen(offer: Callable[..., Path]) -> None:
    offer(presets={"two": ["lines", "digits"], "all": ["digits", "shapes", "lines"]})
    at = open_page("spectra", suite="mine")
    assert at.session_state["tasks"] == ["digits", "lines"]
    at.session_state["preset"] = "all"
    at.run()
    assert not at.exception
    assert at.session_state["tasks"] == ["digits", "shapes", "lines"]


def test_a_link_names_tasks_beside_the_first_set(offer: Callable[..., Path]) -> None:
    offer(presets={"two": ["lines", "digits"]})
    at = open_page("spectra", suite="mine", tasks=["shapes", "lines"])
    assert not at.exception
    assert at.session_state["tasks"] == ["shapes", "lines"]


def test_the_first_result_of_a_new_suite_is_a_button_away(offer: Callable[..., Path]) -> None:
    offer()
    at = open_page("overview", suite="mine")
    next(b for b in at.button if b.label.startswith("Evaluate base")).click()
    at = finish(at.run())
    assert not at.exception
    assert figures(at)
    assert {"Base", "Weight average", "Task Arithmetic", "CART", "Experts"} <= set(metrics(at))
    assert any("default" in m.value for m in at.markdown)


def test_the_lab_runs_experts_of_large_models_in_the_background_too(
    offer: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    offer()
    ran: set[int] = set()
    run = SuiteOutputs._run

    def recorded(self: SuiteOutputs, *args: Any) -> Any:
        ran.add(threading.get_ident())
        return run(self, *args)

    monkeypatch.setattr(SuiteOutputs, "_run", recorded)
    monkeypatch.setattr(resources, "count_parameters", lambda _view: 10**8)
    at = open_page("merge_lab", suite="mine")
    assert not ran
    next(button for button in at.button if button.label == "Merge and evaluate").click()
    at = finish(at.run())
    assert not at.exception
    assert "Experts" in set(metrics(at))
    assert ran <= {thread.ident for thread in resources.job_runner()._pool._threads}
    assert ran


def test_a_replaced_checkpoint_is_read_again(offer: Callable[..., Path]) -> None:
    path = offer()
    before = metrics(open_page("spectra", suite="mine"))
    change("experts/shapes.safetensors", lambda v: v + torch.ones_like(v))(path.parent)
    assert metrics(open_page("spectra", suite="mine")) != before

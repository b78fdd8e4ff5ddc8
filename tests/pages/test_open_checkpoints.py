"""The page Open checkpoints: folders, uploads, what fits, and the suite that comes of it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import save, save_file
from streamlit.testing.v1 import AppTest

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.opening.roles import FoundModel
from merge_core.suites.bundled import bundled_title
from merge_core.suites.suite import load_suite
from tests.conftest import random_states
from tests.hub_client import files_of, hub, weights
from tests.hub_server import Hub
from tests.pages.test_pages import app_at, assert_healthy, finish, open_page
from ui.sections.opening.members import apply_edits, members_frame
from ui.server import session_files
from ui.server.catalog import SUITES

__all__ = ["hub"]
TASKS = ("cars", "dtd", "svhn")


def titles() -> list[str]:
    """What the sidebar offers at rest."""
    return [bundled_title(name) for name in SUITES.list_offered()]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of each test's own, and its allowed folder."""
    folder = tmp_path / "root"
    folder.mkdir()
    monkeypatch.setenv("MERGESCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MERGESCOPE_ROOTS", str(folder))
    session_files.janitor.cache_clear()
    yield folder
    session_files.janitor().close()
    session_files.janitor.cache_clear()


def write_models(folder: Path) -> None:
    experts, base = random_states(TASKS)
    folder.mkdir(parents=True)
    for name, state in {"base": base, **experts}.items():
        save_file(dict(state), folder / f"{name}.safetensors")


def open_source(source: str) -> AppTest:
    """The page, with one of its sources chosen by the link."""
    return assert_healthy(open_page("open_checkpoints", **{"from": source}))


def choose_folder(folder: str) -> AppTest:
    at = open_source("Folder")
    return at.selectbox(key="open_folder").set_value(folder).run()


def press(at: AppTest, label: str) -> AppTest:
    """Press the button whose label begins so."""
    next(button for button in at.button if button.label.startswith(label)).click()
    return at.run()


def members(at: AppTest) -> pd.DataFrame:
    """The table of models."""
    return at.dataframe[0].value


def opened_suite(at: AppTest) -> str:
    """The suite that the app shows, on its overview."""
    assert at.header[0].value.startswith("Why does averaging")
    name = at.sidebar.selectbox(key="suite").value
    assert at.query_params["suite"] in (name, [name])
    return str(name)


def message_text(at: AppTest) -> str:
    return " ".join(m.value for m in (*at.error, *at.warning, *at.info, *at.success))


def test_a_folder_becomes_a_suite_that_the_app_shows(root: Path) -> None:
    write_models(root / "runs" / "models")
    (root / "runs" / "models" / "damaged.safetensors").write_bytes(b"x")
    at = open_source("Folder")
    assert at.selectbox(key="open_folder").options == ["runs/models"]
    at = assert_healthy(choose_folder("runs/models"))
    table = members(at)
    assert table["model"].tolist() == [f"{n}.safetensors" for n in ("base", *TASKS, "damaged")]
    assert table["role"].tolist() == ["base", "expert", "expert", "expert", "leave out"]
    assert str(root) not in table["note"].iloc[-1]
    assert at.success[0].value.startswith("All 4 models fit")
    told = {metric.label: metric.value for metric in at.metric}
    assert told["Experts"] == "3"
    assert told["Time of a merge"] == "under 1 s"
    assert 300 < float(told["Memory of a merge"].removesuffix(" MB")) < 600
    assert told["Stored factors"] == "0.0 MB"
    at = assert_healthy(press(at, "Write runs/models/suite.yaml and open it"))
    assert opened_suite(at) == "models"
    assert not any("mergescope merge" in text.value for text in at.markdown)
    at.switch_page("pages/overview.py").session_state["preflight"] = True
    at = assert_healthy(at.run())
    (cost,) = (text.value for text in at.markdown if "mergescope merge" in text.value)
    assert "averaging takes under 1 s, CART under 1 s" in cost
    assert list(at.sidebar.get("button_group")[0].value) == list(TASKS)
    document = yaml.safe_load((root / "runs/models/suite.yaml").read_text())
    assert document["base"] == "base.safetensors"
    assert document["experts"] == {t: {"weights": f"{t}.safetensors"} for t in TASKS}
    # It stays on offer as the visitor goes on, and to this visitor alone.
    at = assert_healthy(at.switch_page("pages/spectra.py").run())
    assert at.sidebar.selectbox(key="suite").value == "models"
    other = open_page("spectra", suite="models")
    assert other.sidebar.selectbox(key="suite").options == titles()
    assert other.sidebar.selectbox(key="suite").value == "vision"


def test_a_suite_that_is_there_is_opened_or_replaced_only_when_told(root: Path) -> None:
    write_models(root / "models")
    path = root / "models" / "suite.yaml"
    path.write_text("name: theirs\nexperts: {cars: {weights: cars.safetensors}}\n")
    before = path.read_bytes()
    at = press(choose_folder("models"), "Write")
    assert "exists" in message_text(at)
    assert path.read_bytes() == before
    at = assert_healthy(press(choose_folder("models"), "Open it as it is"))
    assert opened_suite(at) == "theirs"
    assert list(at.sidebar.get("button_group")[0].value) == ["cars"]
    at = choose_folder("models")
    at.checkbox[0].check().run()
    assert opened_suite(assert_healthy(press(at, "Write"))) == "models"
    assert load_suite(path).tasks == TASKS


@pytest.mark.parametrize(
    "document",
    [
        {"base": "{outside}"},
        {"experts": {"a": {"weights": "link.safetensors"}}},
        {"experts": {"a": {"weights": "cars.safetensors", "data": {"file": "{outside}"}}}},
    ],
)
def test_a_suite_that_names_files_outside_is_not_opened(
    document: dict[str, object], root: Path
) -> None:
    write_models(root / "models")
    outside = root.parent / "secret.safetensors"
    save_file({"w": torch.zeros(2, 2)}, outside)
    (root / "models" / "link.safetensors").symlink_to(outside)
    whole = {"name": "x", "experts": {"a": {"weights": "cars.safetensors"}}, **document}
    text = yaml.safe_dump(whole).replace("{outside}", str(outside))
    (root / "models" / "suite.yaml").write_text(text)
    at = press(choose_folder("models"), "Open it as it is")
    assert "outside the allowed folders" in message_text(at)
    assert at.header[0].value.startswith("Which models")


def test_a_suite_that_is_itself_outside_is_not_opened(root: Path) -> None:
    write_models(root / "models")
    outside = root.parent / "suite.yaml"
    outside.write_text("name: secret\nexperts: {a: {weights: nothing.safetensors}}\n")
    (root / "models" / "suite.yaml").symlink_to(outside)
    at = press(choose_folder("models"), "Open it as it is")
    assert "outside the allowed folders" in message_text(at)
    # Written anew, it takes the link's place and leaves alone what that led to.
    at = choose_folder("models")
    at.checkbox[0].check().run()
    assert opened_suite(assert_healthy(press(at, "Write"))) == "models"
    assert "secret" in outside.read_text()


def test_the_last_part_of_a_path_can_be_typed(root: Path) -> None:
    write_models(root / "runs" / "models")
    at = app_at("open_checkpoints")
    at.session_state["open_folder"] = "models"
    assert len(members(assert_healthy(at.run()))) == 1 + len(TASKS)


@pytest.mark.parametrize("text", ["..", "{outside}", "link"])
def test_a_path_outside_cannot_be_typed(text: str, root: Path) -> None:
    write_models(root / "models")
    write_models(root.parent / "outside")
    (root / "link").symlink_to(root.parent / "outside")
    at = app_at("open_checkpoints")
    at.session_state["open_folder"] = text.format(outside=root.parent / "outside")
    at.run()
    assert "is not a folder below root" in message_text(at)
    assert not at.dataframe


def test_one_of_several_allowed_folders_is_chosen(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_models(root / "models")
    (root.parent / "more").mkdir()
    write_models(root.parent / "more" / "others")
    monkeypatch.setenv("MERGESCOPE_ROOTS", os.pathsep.join([str(root), str(root.parent / "more")]))
    at = open_source("Folder")
    assert at.selectbox(key="open_folder").options == ["models"]
    at = assert_healthy(at.selectbox(key="open_root").select_index(1).run())
    assert at.selectbox(key="open_folder").options == ["others"]
    at = assert_healthy(at.selectbox(key="open_folder").set_value("others").run())
    assert any(button.label == "Write others/suite.yaml and open it" for button in at.button)


def test_a_folder_is_read_again_when_it_changes(root: Path) -> None:
    write_models(root / "models")
    at = choose_folder("models")
    assert "zoo" not in members(at)["task"].tolist()
    state = dict(random_states(TASKS)[1])
    save_file(state, root / "models" / "zoo.safetensors")
    at = assert_healthy(at.run())
    assert "zoo" in members(at)["task"].tolist()
    (root / "models" / "dtd.safetensors").unlink()
    assert "dtd" not in members(assert_healthy(at.run()))["task"].tolist()


def test_what_does_not_fit_is_said(root: Path) -> None:
    write_models(root / "models")
    state = {n: v.clone() for n, v in random_states(TASKS)[1].items() if n != "norm.weight"}
    state["conv.weight"] = torch.zeros(5, 3, 2, 2)
    save_file(state, root / "models" / "zoo.safetensors")
    at = choose_folder("models")
    assert "do not fit cars: zoo" in message_text(at)
    fits = at.dataframe[1].value.set_index("member")
    assert fits["fits"].to_dict() == {**dict.fromkeys([*TASKS, "base"], "yes"), "zoo": "no"}
    assert fits.loc["zoo", "differences"] == "1 shape, 1 missing"


def test_where_the_folder_is_read_only_the_suite_stays_in_the_session(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_models(root / "models")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    at = assert_healthy(press(choose_folder("models"), "Open this suite"))
    assert opened_suite(at) == "models"
    assert not (root / "models" / "suite.yaml").exists()
    assert list((root.parent / "cache" / "sessions").rglob("suite.yaml"))


def upload(at: AppTest, *files: tuple[str, bytes]) -> AppTest:
    at.file_uploader[0].set_value([(*file, "application/octet-stream") for file in files])
    return at.run()


def page_with_uploads(files: dict[str, bytes]) -> AppTest:
    return upload(open_source("Upload"), *files.items())


def models_as_bytes() -> dict[str, bytes]:
    experts, base = random_states(TASKS)
    states = {"base": base, **experts}
    return {f"{name}.safetensors": save(dict(state)) for name, state in states.items()}


def test_uploads_are_seen_by_their_session_alone_and_removed_after_it(root: Path) -> None:
    at = assert_healthy(page_with_uploads(models_as_bytes()))
    assert members(at)["role"].tolist() == ["base", "expert", "expert", "expert"]
    # A second batch joins the first.
    extra = save({n: v + 1 for n, v in random_states(TASKS)[1].items()})
    at = assert_healthy(upload(at, ("extra.safetensors", extra)))
    assert "extra" in members(at)["task"].tolist()
    at = assert_healthy(press(at, "Open this suite"))
    assert opened_suite(at) == "uploads"
    places = list((root.parent / "cache").rglob("cars.safetensors"))
    assert len(places) == 1
    assert places[0].parent.parent.stat().st_mode & 0o077 == 0
    # Another visitor has neither the suite nor, by the same link, the files.
    other = open_page("overview", suite="uploads")
    assert other.sidebar.selectbox(key="suite").options == titles()
    assert not open_source("Upload").dataframe
    # What is derived from uploads lies beside them.
    assert_healthy(at.switch_page("pages/spectra.py").run())
    assert list(places[0].parent.glob("factors/*/*.safetensors"))
    assert not (root.parent / "cache" / "factors").exists()
    session_files.janitor().sweep(time.monotonic() + 10_000)
    assert not list((root.parent / "cache").rglob("*.safetensors"))
    at = at.switch_page("pages/overview.py").run()
    assert at.sidebar.selectbox(key="suite").options == titles()


def test_uploads_that_are_no_weights_are_refused_in_words(root: Path) -> None:
    good = models_as_bytes()
    at = page_with_uploads(
        {
            "../../escape.safetensors": good["cars.safetensors"],
            "cut.safetensors": good["dtd.safetensors"][:-10],
            "text.safetensors": b"hello",
        }
    )
    assert not at.exception
    refused = [text for w in at.warning if "needs two or more" not in (text := w.value)]
    assert len(refused) == 2
    assert any("'cut.safetensors'" in text for text in refused)
    assert any("'text.safetensors'" in text for text in refused)
    assert not any(str(root.parent) in text for text in refused)
    kept = list(root.parent.rglob("*escape*"))
    assert [path.parent.name for path in kept] == ["uploads"]
    assert Checkpoint(kept[0]).nbytes
    at = press(at, "Remove all uploads")
    assert not at.dataframe
    assert not list(root.parent.rglob("*escape*"))


def test_models_of_the_hub_are_asked_after_downloaded_and_opened(hub: Hub, root: Path) -> None:
    for seed, name in enumerate(("net", "net-cars", "net-dtd")):
        hub.repository(f"org/{name}", files_of(weights(seed)))
    at = open_source("Hugging Face Hub")
    at.text_area(key="open_ids").set_value("hf://org/net\n\n org/net-cars \nhf://org/net-dtd").run()
    assert hub.requests == []  # nothing before it is asked for
    at = assert_healthy(finish(press(at, "Ask the hub")))
    assert members(at)["role"].tolist() == ["base", "expert", "expert"]
    assert members(at)["task"].tolist()[1:] == ["cars", "dtd"]
    assert "All 3 models fit" in message_text(at)
    assert not list(root.parent.rglob("blobs"))  # headers alone
    at = assert_healthy(finish(press(at, "Download 3 models")))
    at = assert_healthy(press(at, "Open this suite"))
    assert opened_suite(at) == "from-the-hub"
    assert list(at.sidebar.get("button_group")[0].value) == ["cars", "dtd"]


def test_what_the_hub_does_not_give_is_said_in_whole_sentences(hub: Hub) -> None:
    hub.status = 503
    at = open_source("Hugging Face Hub")
    at.text_area(key="open_ids").set_value("hf://org/net\nhf://org/net-cars").run()
    at = finish(press(at, "Ask the hub"))
    (warning,) = at.warning
    assert "2 of 2 could not be read" in warning.value
    assert "org/net:" in warning.value
    assert "org/net-cars:" in warning.value
    assert not at.dataframe  # a table of nothing
    assert any(button.label == "Ask the hub again" for button in at.button)


def test_a_benchmark_without_the_hub_is_there_all_the_same(hub: Hub) -> None:
    hub.status = 503
    at = open_source("Benchmark")
    at.selectbox(key="open_preset").set_value("clip-vit-b-32-8").run()
    at = assert_healthy(finish(press(at, "Ask the hub")))
    table = members(at)
    assert table["role"].tolist() == ["base"] + 8 * ["expert"]
    assert "sun397" in table["task"].tolist()
    assert "not known yet" in message_text(at)
    assert any(button.label == "Ask the hub again" for button in at.button)
    assert at.get("download_button")


def test_a_suite_on_offer_that_is_not_downloaded_can_be(
    hub: Hub, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repository("org/net", files_of(weights()))
    path = root / "suite.yaml"
    path.write_text("name: far\nexperts: {net: {weights: 'hf://org/net'}}\n")
    monkeypatch.setenv("MERGESCOPE_SUITES", str(path))
    at = open_source("Upload")
    assert any("root is not downloaded" in title.value for title in at.subheader)
    at = assert_healthy(finish(press(at, "Download the model")))
    assert not at.subheader
    assert Checkpoint(load_suite(path).file("hf://org/net")).nbytes


def test_only_roles_and_names_are_taken_from_the_browser() -> None:
    found = (
        FoundModel("/real/a.pt", "a", "a", "a.pt", task="a"),
        FoundModel("/real/b.pt", "b", "b", "b.pt", task="b"),
    )
    frame = members_frame(found)
    frame["model"] = "/etc/shadow"
    frame["role"] = ["base", "root"]
    frame["task"] = ["a", "  new "]
    result = apply_edits(found, frame)
    assert [each.reference for each in result] == ["/real/a.pt", "/real/b.pt"]
    assert [each.shown for each in result] == ["a.pt", "b.pt"]
    assert [each.role for each in result] == ["base", "left out"]
    assert result[1].task == "new"


def test_roles_and_names_come_with_the_link(root: Path) -> None:
    write_models(root / "models")
    link = {"from": "Folder", "open_folder": "models"}
    at = assert_healthy(
        open_page("open_checkpoints", **link, roles=["1:leave out:cars", "2:expert:a:b"])
    )
    table = members(at)
    assert table["role"].tolist() == ["base", "leave out", "expert", "expert"]
    assert table["task"].tolist()[1:] == ["cars", "a:b", "svhn"]
    assert at.query_params["roles"] == ["1:leave out:cars", "2:expert:a:b"]
    for wrong in ("9:expert:a", "1:admin:a", "x", "-1:expert:a"):
        at = assert_healthy(open_page("open_checkpoints", **link, roles=[wrong]))
        assert members(at)["role"].tolist() == ["base", "expert", "expert", "expert"]
        assert "roles" not in at.query_params


def test_uploads_named_alike_have_a_row_each(root: Path) -> None:
    experts, _ = random_states(TASKS)
    name = "model.safetensors"
    at = assert_healthy(
        upload(open_source("Upload"), *((name, save(dict(experts[t]))) for t in TASKS))
    )
    frame = members(at)
    assert len(frame) == len(set(frame["task"])) == len(TASKS)
    assert any("named alike" in warning.value and name in warning.value for warning in at.warning)
    assert [success.value for success in at.success] == ["All 3 models fit together."]
    at = assert_healthy(upload(at, (name, save(dict(experts[TASKS[0]])))))
    assert len(members(at)) == len(TASKS) + 1
    at = press(at, "Remove all uploads")
    assert not any("named alike" in warning.value for warning in at.warning)


def test_one_expert_is_no_merge(root: Path) -> None:
    experts, _ = random_states(TASKS)
    at = assert_healthy(
        upload(open_source("Upload"), ("cars.safetensors", save(dict(experts["cars"]))))
    )
    assert not at.success
    assert any("A merge needs two or more" in warning.value for warning in at.warning)

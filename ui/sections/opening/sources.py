"""Where the models of a new suite come from: a folder, the hub, a preset, or uploads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import streamlit as st

from merge_core.errors import SuiteError
from merge_core.files import digest_of
from merge_core.hub.files import HubId
from merge_core.input_files import stays_inside
from merge_core.opening.draft import task_name
from merge_core.opening.presets import presets
from merge_core.opening.roles import FoundModel, apply_preset
from merge_core.opening.search import MOST_ENTRIES, find_models
from merge_core.suites.suite import load_suite
from merge_core.suites.suite_spec import SuiteSpec
from ui.controls import optional_selectbox, selectbox, text
from ui.plain_text import plain, show_info, show_warning
from ui.progress import run_job
from ui.server import roots, session_files, uploads
from ui.server.resources import stamp

FILE = "suite.yaml"
MOST_SAID = 3  # models that could not be read, each in words


@dataclass(frozen=True)
class Collection:
    """Models to make a suite of.

    Attributes:
        found: the models, with suggested roles and task names.
        name: suggested name of the suite.
        key: changes when the models do.
        path: where its file is to lie.
        shown: that path as people know it; empty in the session's own folder.
        preset: the suite that they come from, if there is one.
    """

    found: tuple[FoundModel, ...]
    name: str
    key: str
    path: Path
    shown: str = ""
    preset: SuiteSpec | None = None


def from_folder(open_suite: Callable[[str, Path], None]) -> Collection | None:
    """Models in a folder below an allowed root.

    Args:
        open_suite: opens a suite.yaml that is there already, by name and path.
    """
    allowed = roots.roots()
    root = allowed[0]
    if len(allowed) > 1:
        root = selectbox("Below", allowed, "open_root")
    options, complete = _folders(str(root))
    typed = optional_selectbox(
        f"Folder below {plain(root)}",
        options,
        "open_folder",
        words=lambda option: "(the folder itself)" if option == "." else option,
        placeholder="Choose a folder, or type its path",
        typed=True,
        help="Folders that hold weight files, sharded or not, Hugging Face or adapter folders. "
        "Folders below the chosen one are searched too, one level deep. Start with "
        "`mergescope app --root FOLDER` to choose below another folder.",
    )
    if not complete:
        st.info("There are many folders here, and not all were looked into: type the path.")
    if typed is None:
        if not options and complete:
            show_info(f"No weight files were found below {root}, {roots.DEPTH} levels deep.")
        return None
    place = roots.confine(_interpret(typed, options), root)
    existing = place / FILE
    if existing.is_file():
        _offer_existing(existing, root, open_suite)
    found = _read(str(place), str(root), _state(place))
    shown = existing.relative_to(root).as_posix()
    if not os.access(place, os.W_OK):
        existing, shown = session_files.folder() / task_name(place.name) / FILE, ""
    return Collection(found, place.name or "suite", _key(found), existing, shown)


def _interpret(text: str, options: Sequence[str]) -> str:
    """What was typed; a bare name means the only folder that is called so."""
    named = [option for option in options if Path(option).name == text]
    return named[0] if len(named) == 1 and text not in options else text


@st.cache_data(ttl=20, max_entries=8, show_spinner="Looking for models …")
def _folders(root: str) -> tuple[list[str], bool]:
    return roots.folders(Path(root))


@st.cache_resource(max_entries=4, show_spinner="Reading headers …")
def _read(place: str, root: str, state: str) -> tuple[FoundModel, ...]:
    """What is found in a folder in that state."""
    return find_models([place], inside=Path(root))


def _state(place: Path) -> str:
    """What tells one state of a folder, and of the folders in it, from another."""
    stamps: list[str] = []
    with suppress(OSError):  # said by the search
        for folder in [place, *(child for child in place.iterdir() if child.is_dir())]:
            stamps += [stamp(path) for path in islice(folder.iterdir(), MOST_ENTRIES)]
    return digest_of(*sorted(stamps))


def _offer_existing(path: Path, root: Path, open_suite: Callable[[str, Path], None]) -> None:
    """A suite.yaml that lies in the folder already can be opened as it is."""
    left, right = st.columns([3, 1], vertical_alignment="center")
    left.markdown(f"This folder has a **{FILE}** already.")
    if right.button("Open it as it is", icon=":material/open_in_new:", width="stretch"):
        if not stays_inside(path, root):
            raise SuiteError(f"This {FILE} is a link to a place outside the allowed folders.")
        suite = load_suite(path)
        document = suite.spec.model_dump(mode="json")
        if (named := roots.names_outside(document, suite.root, root)) is not None:
            raise SuiteError(
                f"This {FILE} names {named!r}, which lies outside the allowed folders. Open it "
                "from the command line: mergescope app, with its path."
            )
        open_suite(suite.name, suite.path)


def from_hub() -> Collection | None:
    """Models that are named by their hub ids."""
    lines = text(
        "Hub ids, one a line",
        "open_ids",
        lines=True,
        placeholder="hf://org/base-model\nhf://org/first-expert\nhf://org/second-expert",
        help="hf://org/name, hf://org/name@revision or hf://org/name@revision:file. Private and "
        "gated models need HF_TOKEN in the server's environment.",
    )
    ids = [line.strip() for line in lines.splitlines() if line.strip()]
    if not ids:
        return None
    places = [line if "://" in line else f"hf://{line}" for line in ids]
    found = _headers([str(HubId.parse(place)) for place in places])
    if found is None or len(_list_unread(found)) == len(found):
        return None  # what went wrong is said
    return _in_session(found, "from the hub")


def from_preset() -> Collection | None:
    """A published benchmark."""
    known = presets()
    name = optional_selectbox(
        "Benchmark",
        known,
        "open_preset",
        words=lambda name: f"{known[name].title} ({known[name].protocol})",
        placeholder="Choose one",
    )
    if name is None:
        return None
    spec = known[name].spec
    st.markdown(plain(spec.description))
    members = [*([spec.base] if spec.base else []), *(e.weights for e in spec.experts.values())]
    found = _headers(members)
    return None if found is None else _in_session(apply_preset(found, spec), name, spec)


def _headers(ids: Sequence[str]) -> tuple[FoundModel, ...] | None:
    """The headers of models on the hub, read in the background when asked for."""
    attempt = st.session_state.setdefault("open_attempt", 0)
    job = run_job(
        key=f"headers:{attempt}:{digest_of(*ids)}",
        title="Read headers",
        button="Ask the hub what fits",
        note=f"{len(ids)} models. Only their headers are read now; weights are downloaded when "
        "you say so.",
        work=lambda progress: find_models(ids, progress=progress),
    )
    if job is None:
        return None
    found: tuple[FoundModel, ...] = job.result
    if unread := _list_unread(found):
        st.warning(
            f"{len(unread)} of {len(found)} could not be read:\n\n"
            + "\n".join(f"- {plain(each.note)}" for each in unread[:MOST_SAID])
        )
        st.button("Ask the hub again", icon=":material/refresh:", on_click=_try_again)
    return found


def _list_unread(found: Sequence[FoundModel]) -> list[FoundModel]:
    """Models that the hub said nothing of."""
    return [each for each in found if each.checkpoint is None and not each.nbytes]


def _try_again() -> None:
    st.session_state["open_attempt"] += 1


def from_uploads() -> Collection | None:
    """Safetensors files that are uploaded into the session's own folder."""
    folder = session_files.folder() / "uploads"
    folder.mkdir(exist_ok=True)
    turn = st.session_state.setdefault("open_turn", 0)
    st.file_uploader(
        "Drag safetensors files here",
        type=uploads.SUFFIX.removeprefix("."),
        accept_multiple_files=True,
        key=f"open_upload_{turn}",
        on_change=_take_uploads,
        args=(folder, turn),
        help=f"At most {uploads.MOST_FILES} files and {uploads.MOST_BYTES / 1e9:g} GB. They are "
        "seen in this session alone and removed after it. Larger models: put them in a folder on "
        "the server.",
    )
    for sentence in st.session_state.get("open_refused", []):
        show_warning(sentence)
    kept = sorted(folder.glob(f"*{uploads.SUFFIX}"), key=lambda path: path.stat().st_mtime_ns)
    if not kept:
        return None
    if alike := st.session_state.get("open_alike"):
        show_warning(alike)
    st.button("Remove all uploads", icon=":material/delete:", on_click=_remove, args=(folder,))
    # File by file: a folder with a model.safetensors would be taken for one model.
    found = find_models([str(path) for path in kept], inside=folder)
    return Collection(found, "uploads", _key(found), folder / FILE)


def _take_uploads(folder: Path, turn: int) -> None:
    """Move what was uploaded from the server's memory into the folder, and empty the widget."""
    sent = st.session_state.get(f"open_upload_{turn}") or []
    before = [path.stem for path in folder.glob(f"*{uploads.SUFFIX}")]
    if alike := uploads.say_alike([upload.name for upload in sent], before):
        st.session_state["open_alike"] = alike
    st.session_state["open_refused"] = uploads.keep(sent, folder)
    session_files.forget_uploads(sent)
    st.session_state["open_turn"] = turn + 1


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_file():
            path.unlink(missing_ok=True)
    st.session_state["open_refused"] = []
    st.session_state.pop("open_alike", None)


def _in_session(
    found: tuple[FoundModel, ...], name: str, preset: SuiteSpec | None = None
) -> Collection:
    path = session_files.folder() / task_name(name) / FILE
    return Collection(found, name, _key(found), path, preset=preset)


def _key(found: Sequence[FoundModel]) -> str:
    return digest_of(*(f"{each.reference}:{each.nbytes}:{each.note}" for each in found))[:16]

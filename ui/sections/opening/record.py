"""Records on the page "Open checkpoints": bundled, below an allowed folder, and uploaded ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import streamlit as st

from analysis.frames.pack import MOST_BYTES
from analysis.frames.record import load_record
from merge_core.errors import MergeScopeError, SuiteError
from merge_core.files import write_atomically
from merge_core.input_files import stays_inside
from merge_core.opening.draft import task_name
from merge_core.suites.bundled import RECORD_SUFFIX, bundled_records
from ui.controls import optional_selectbox
from ui.plain_text import show_error
from ui.server import roots, session_files

MOST_RECORDS = 10  # of one session
TURN = "_record_turn"
REFUSED = "_record_refused"


def from_record(open_suite: Callable[[str, Path], None]) -> None:
    """Choose or upload a record, and open it.

    Args:
        open_suite: opens a suite or a record by name and path.
    """
    st.markdown(
        "A record shows a suite without its weights: spectra, interference and accuracies as they "
        "were found by `mergescope record`. Nothing in it is run."
    )
    left, right = st.columns(2, gap="large")
    with left:
        _choose(open_suite)
    with right:
        _upload(open_suite)


def _choose(open_suite: Callable[[str, Path], None]) -> None:
    """A record that comes with MergeScope, or one below an allowed folder."""
    found = {f"{name} (comes with MergeScope)": path for name, path in bundled_records().items()}
    found |= {
        f"{root.name}/{name}": root / name for root in roots.roots() for name in list_of(root)
    }
    if not found:
        st.markdown("No record was found below the allowed folders.")
        return
    chosen = optional_selectbox(
        "Record",
        list(found),
        "open_record",
        placeholder="Choose a record",
        help="Those that come with MergeScope, and files that end in .mergescope in the allowed "
        "folders and the folders in them.",
    )
    if chosen is not None and st.button("Open this record", icon=":material/folder_open:"):
        path = found[chosen]
        load_record(path)  # says what is wrong with it here
        open_suite(path.stem, path)


def list_of(root: Path) -> list[str]:
    """Records in an allowed folder and in the folders in it, relative to it; no links lead out."""
    paths = [*root.glob(f"*{RECORD_SUFFIX}"), *root.glob(f"*/*{RECORD_SUFFIX}")]
    inside = (path for path in paths if path.is_file() and stays_inside(path, root))
    return sorted(path.relative_to(root).as_posix() for path in inside)


def _upload(open_suite: Callable[[str, Path], None]) -> None:
    """A record that is sent by the browser, and lies in the session's own folder."""
    turn = st.session_state.setdefault(TURN, 0)
    sent = st.file_uploader(
        "Or drag a record here",
        type=RECORD_SUFFIX.removeprefix("."),
        key=f"record_upload_{turn}",
        max_upload_size=MOST_BYTES // 1_000_000,
        help=f"At most {MOST_BYTES / 1e6:.0f} MB. It is seen in this session alone and removed "
        "after it.",
    )
    if refused := st.session_state.pop(REFUSED, ""):
        show_error(refused)
    if sent is None:
        return
    st.session_state[TURN] = turn + 1
    try:
        path = _keep(sent.name, sent.getvalue())
    except MergeScopeError as error:
        st.session_state[REFUSED] = str(error)
        st.rerun()
    finally:
        session_files.forget_uploads([sent])
    open_suite(path.stem, path)


def _keep(name: str, data: bytes) -> Path:
    """Keep an upload in the session's own folder, if it is a record.

    Raises:
        MergeScopeError: it is none, or there are too many.
    """
    folder = session_files.folder() / "records"
    known = {path.stem for path in folder.glob(f"*{RECORD_SUFFIX}")}
    shown = f"{name!r:.100}"
    if len(known) >= MOST_RECORDS:
        raise SuiteError(f"{shown}: at most {MOST_RECORDS} records can be uploaded.")
    if len(data) > MOST_BYTES:
        raise SuiteError(f"{shown} is larger than {MOST_BYTES / 1e6:.0f} MB.")
    path = folder / f"{task_name(name.removesuffix(RECORD_SUFFIX), known)}{RECORD_SUFFIX}"
    write_atomically(path, data)
    try:
        load_record(path)
    except MergeScopeError as error:
        path.unlink(missing_ok=True)
        raise SuiteError(str(error).replace(str(path), shown)) from error
    return path

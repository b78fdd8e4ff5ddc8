"""Open checkpoints: point at models, see what fits, write a suite.yaml and open it at once."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from analysis.frames.record import is_record
from merge_core.errors import MergeScopeError
from merge_core.files import digest_of, size_in_words
from merge_core.hub import models as hub
from merge_core.opening import download
from merge_core.opening.draft import suite_text, task_name, write_suite
from merge_core.opening.roles import draft_suite, mistakes, open_by_headers
from merge_core.suites.suite import Suite, load_suite
from merge_core.suites.suite_spec import SuiteSpec
from ui import charts, shell
from ui.controls import choice, text
from ui.plain_text import plain, show_warning
from ui.progress import run_job
from ui.sections.opening.members import fit_section, members_table
from ui.sections.opening.record import from_record
from ui.sections.opening.sources import (
    FILE,
    Collection,
    from_folder,
    from_hub,
    from_preset,
    from_uploads,
)
from ui.server import session_files

shell.enter()

SOURCES = {
    "folder": "Folder",
    "hub": "Hugging Face Hub",
    "preset": "Benchmark",
    "upload": "Upload",
    "record": "Record",
}


def open_suite(name: str, path: Path) -> None:
    """Offer a suite to this session and go to it."""
    offered = session_files.offer(task_name(name), path)
    st.switch_page(shell.page("overview"), query_params={"suite": offered})


def offer_download(suite: Suite, title: str = "Download", nbytes: int = 0) -> bool:
    """Whether members are on the hub only; offers to download them.

    Args:
        suite: the suite.
        title: of the job, unlike others on the page.
        nbytes: how much that is, where it is known.
    """
    missing = download.missing_members(suite)
    if not missing:
        return False
    # Counted, so that what somebody removes from the cache again can be fetched again.
    turn = st.session_state.setdefault("open_downloads", 0)
    what = f"{len(missing)} models" if len(missing) > 1 else "the model"
    job = run_job(
        key=f"download:{turn}:{digest_of(*missing)}",
        title=title,
        button=f"Download {what}" + (f" ({nbytes / 1e6:,.0f} MB)" if nbytes else ""),
        note="They go into the hub's own cache on the server "
        f"({size_in_words(hub.free_space())} free) and are used again.",
        work=lambda progress: download.download(suite, progress),
    )
    if job is not None:
        st.session_state["open_downloads"] = turn + 1
        st.rerun()
    return True


def waiting_suites() -> None:
    """Suites on offer whose models are still to be downloaded."""
    for name, path in session_files.list_offered().items():
        if is_record(path):
            continue
        try:
            suite = load_suite(path)
            if download.missing_members(suite):
                st.subheader(f"The suite {plain(name)} is not downloaded yet", anchor=False)
                offer_download(suite, f"Download {name}")
        except MergeScopeError:  # said where it is opened
            continue


def offer_file(spec: SuiteSpec, path: Path) -> None:
    """A button that downloads the suite's file."""
    st.download_button(
        f"Download {FILE}",
        suite_text(spec, path),
        file_name=FILE,
        mime="text/yaml",
        on_click="ignore",
        icon=":material/download:",
    )


def suite_section(collection: Collection) -> None:
    """Name the members, see what fits, write the file and open it."""
    st.subheader("Who takes part, and as what?", anchor=False)
    found = members_table(collection.found, collection.key)
    if said := mistakes(found):
        for sentence in said:
            show_warning(sentence)
        return
    name = text(
        "Name of the suite",
        "name",
        rest=collection.name,
        most=80,
        slot=f"name of {collection.key}",
    )
    spec = draft_suite(found, name.strip() or collection.name, collection.preset)
    suite = open_by_headers(spec, collection.path, found)
    st.subheader("What fits?", anchor=False)
    fit_section(suite)
    network = suite.network_in_words
    if network is not None:
        lacking = suite.why_not_evaluated
        told = "Accuracies can be measured" if lacking is None else f"For accuracies: {lacking}"
        st.markdown(f"Network: **{plain(network)}**. {plain(told)}.")
    st.subheader("Open it", anchor=False)
    chosen = [each.download for each in found if each.role in ("expert", "base")]
    if offer_download(suite, nbytes=sum(chosen)):
        st.markdown("Until then it can be kept as a file:")
        offer_file(spec, collection.path)
        return
    overwrite = not collection.shown  # in the session's own folder nobody else's file is lost
    if collection.shown:
        label = f"Write {collection.shown} and open it"
        if collection.path.exists():
            overwrite = st.checkbox(f"Replace the {FILE} that is there")
    else:
        label = "Open this suite"
        st.markdown("The suite is seen in this session alone, and is gone with it.")
        if not session_files.has_uploads(suite):
            offer_file(spec, collection.path)
    if st.button(plain(label), type="primary", icon=":material/folder_open:"):
        write_suite(spec, collection.path, overwrite)
        open_suite(spec.name, collection.path)


def page() -> None:
    """The page."""
    charts.heading(
        "Which models do you want to merge?",
        "Point at a folder, at models on the hub, at a published benchmark, or upload files; "
        "or open a record, which shows a suite without its weights. "
        "Headers, small files and a sample of the weights are read, and nothing in a file is ever "
        "run. You see what fits before any long work.",
    )
    source = choice("Where are they?", SOURCES, "from")
    if source == "record":
        from_record(open_suite)
        return
    if source == "folder":
        collection = from_folder(open_suite)
    else:
        collection = {"hub": from_hub, "preset": from_preset, "upload": from_uploads}[source]()
    if collection is not None:
        suite_section(collection)
    waiting_suites()


page()

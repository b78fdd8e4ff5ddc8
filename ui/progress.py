"""How a background job looks on a page: a bar, a cancel button, and what came out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import streamlit as st
from streamlit.runtime.scriptrunner import get_script_run_ctx

from merge_core.progress import Progress
from ui import shell
from ui.plain_text import plain, show_error, show_info
from ui.server import resources
from ui.server.jobs import Job

POLL_SECONDS = 0.25


def run_job(
    key: str,
    title: str,
    button: str,
    note: str,
    work: Callable[[Progress], Any],
    at_once: bool = False,
) -> Job | None:
    """A button that starts work in the background; then its progress; then its result.

    Args:
        key: what the work is determined by; equal keys share one job across sessions.
        title: what is being done.
        button: label of the button.
        note: what to know before starting, such as the number of forward passes.
        work: the work; it must not call Streamlit.
        at_once: start without being asked; the button is there after a cancellation or a fault.

    Returns:
        The finished job, or None while there is no result.
    """
    runner = resources.job_runner()
    job = runner.get(key)
    if job is None and at_once:
        _start(key, title, work)
        job = runner.get(key)
    if job is not None and job.state == "done":
        return job
    if job is None or not job.active:
        if job is not None and job.error:
            (show_info if job.state == "cancelled" else show_error)(job.error)
        st.markdown(note)
        st.button(
            button,
            type="primary",
            key=f"start_{title}",
            on_click=_start,
            args=(key, title, work),
        )
        return None
    runner.join(key, _session())
    _watch(key)
    return None


def _start(key: str, title: str, work: Callable[[Progress], Any]) -> None:
    resources.job_runner().submit(key, title, work, _session())


def _session() -> str:
    context = get_script_run_ctx()
    return "" if context is None else context.session_id


@shell.fragment(run_every=POLL_SECONDS)
def _watch(key: str) -> None:
    """Progress of a running job; one full rerun when it ends."""
    job = resources.job_runner().get(key)
    if job is None or not job.active:
        st.rerun()
        return
    left, right = st.columns([5, 1], vertical_alignment="center")
    count = f"{job.done} of {job.total}" if job.total else "waiting for another job to end"
    left.progress(job.share, text=f"{job.title}: {count} ({plain(job.label or 'starting')})")
    right.button(
        "Cancel",
        key=f"cancel_{job.title}",
        on_click=lambda: resources.job_runner().cancel(key),
        width="stretch",
    )

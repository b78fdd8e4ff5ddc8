"""What belongs to one visitor: suites opened in this session, and a folder for its uploads.

The folder is readable by the server's user only and is removed when the session is over: some
time after its browser tab has gone, when the server ends, or, if the server was killed, when the
next one starts. Other sessions are never offered its suites.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import streamlit as st
from cachetools import Cache, TTLCache
from filelock import FileLock
from streamlit import runtime
from streamlit.runtime.memory_uploaded_file_manager import MemoryUploadedFileManager
from streamlit.runtime.scriptrunner import get_script_run_ctx
from streamlit.runtime.uploaded_file_manager import UploadedFile

from merge_core.files import cache_dir, explain_os_error
from merge_core.hub.files import is_hub_id
from merge_core.suites.suite import Suite
from ui.server import garbage
from ui.server.catalog import SUITES

STATE = "_own_files"
LOCK = "lock"
SWEEP_SECONDS = 30.0
SPARE_SECONDS = 60.0


@dataclass
class Own:
    """What one session has opened.

    Attributes:
        session: Streamlit's id of the session.
        suites: name to path of its suites.
        folder: its folder, once it has one.
    """

    session: str
    suites: dict[str, Path] = field(default_factory=dict)
    folder: Path | None = None


def own_files() -> Own:
    """What the current session has opened."""
    known: Own | None = st.session_state.get(STATE)
    if known is None:
        context = get_script_run_ctx()
        known = Own("" if context is None else context.session_id)
        st.session_state[STATE] = known
    return known


def folder() -> Path:
    """The current session's own folder, made on first use.

    Raises:
        OutputError: the disk is full, or the cache folder cannot be written.
    """
    mine = own_files()
    if mine.folder is None or not mine.folder.is_dir():
        try:
            mine.folder = janitor().folder_for(mine.session)
        except OSError as error:
            raise explain_os_error(error, _place()) from error
    return mine.folder


def offer(name: str, path: Path) -> str:
    """Offer a suite to this session alone.

    Args:
        name: how it should be called.
        path: its file.

    Returns:
        The name under which it is offered: another one where that is taken by another file.
    """
    known = list_offered()
    unique, number = name, 2
    while known.get(unique, path) != path:
        unique, number = f"{name}-{number}", number + 1
    own_files().suites[unique] = path
    return unique


def list_offered() -> dict[str, Path]:
    """The suites on offer to this session: everybody's first, then its own."""
    return SUITES.list_offered() | {
        n: path for n, path in own_files().suites.items() if path.is_file()
    }


def has_uploads(suite: Suite) -> bool:
    """Whether weights of a suite lie in some session's folder."""
    place = _place()
    weights = (expert.weights for expert in suite.spec.experts.values())
    return any(suite.file(w).is_relative_to(place) for w in weights if not is_hub_id(w))


def forget_uploads(uploads: Iterable[UploadedFile]) -> None:
    """Let go of what Streamlit holds in memory of uploads: it would until long after the session.

    Args:
        uploads: of the current session; they cannot be read again.
    """
    context = get_script_run_ctx()
    held = None if context is None else context.uploaded_file_mgr
    if context is not None and isinstance(held, MemoryUploadedFileManager):
        for upload in uploads:
            held.remove_file(context.session_id, upload.file_id)


class Janitor:
    """Makes folders for sessions and removes those whose session is over.

    Args:
        place: where the servers' folders lie. Each holds a file that is locked for as long as
            its server lives, so that what a killed server left is known for certain.

    Raises:
        OSError: the place cannot be written.
    """

    def __init__(self, place: Path) -> None:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _lock_of(place):  # nobody takes a folder for dead before it is locked
            for left in place.glob("server-*"):
                with suppress(OSError), _lock_of(left).acquire(blocking=False):
                    shutil.rmtree(left, ignore_errors=True)
            self.home = Path(tempfile.mkdtemp(dir=place, prefix="server-"))
            self._lock = _lock_of(self.home)
            self._lock.acquire()
        self._folders: dict[Path, tuple[str, float]] = {}
        self._guard = threading.Lock()

    def watch(self) -> None:
        """Sweep for as long as the server lives, and remove everything at its end."""

        def forever() -> None:
            while True:
                time.sleep(SWEEP_SECONDS)
                self.sweep(time.monotonic())
                release_sessions()

        threading.Thread(target=forever, name="mergescope-janitor", daemon=True).start()
        atexit.register(self.close)

    def close(self) -> None:
        """Remove all folders and let go of the lock."""
        shutil.rmtree(self.home, ignore_errors=True)
        self._lock.release()

    def folder_for(self, session: str) -> Path:
        """A new, empty folder for a session.

        Raises:
            OSError: it cannot be made.
        """
        path = Path(tempfile.mkdtemp(dir=self.home, prefix="session-"))
        with self._guard:
            self._folders[path] = (session, time.monotonic())
        return path

    def sweep(self, now: float) -> None:
        """Remove the folders of sessions that have been gone for longer than they may return.

        Args:
            now: monotonic time in seconds.
        """
        # Streamlit keeps a session whose browser has gone for a while, so that it may return.
        patience = float(st.get_option("server.disconnectedSessionTTL")) + SPARE_SECONDS
        with self._guard:
            for path, (session, seen) in list(self._folders.items()):
                if is_active(session):
                    self._folders[path] = (session, now)
                elif now - seen > patience:
                    shutil.rmtree(path, ignore_errors=True)
                    del self._folders[path]
                    if runtime.exists():  # uploads that never reached the page
                        runtime.get_instance().uploaded_file_mgr.remove_session_files(session)


def release_sessions() -> None:
    """Give back what sessions held, once no browser is connected.

    Streamlit forgets sessions whose time is over only when another one leaves, so that the last
    ones would stay for ever. It has no way of its own to ask for that.
    """
    if not runtime.exists():
        return
    server = runtime.get_instance()
    if server.state != runtime.RuntimeState.NO_SESSIONS_CONNECTED:
        return
    manager = getattr(server, "_session_mgr", None)
    stored = getattr(getattr(manager, "_session_storage", None), "_cache", None)
    loop = getattr(getattr(server, "_async_objs", None), "eventloop", None)
    remaining = 0
    if isinstance(stored, TTLCache) and loop is not None:
        loop.call_soon_threadsafe(stored.expire)  # the next sweep collects what it lets go
        remaining = Cache.__len__(stored)
    garbage.release(complete=remaining == 0)


def _lock_of(folder: Path) -> FileLock:
    """What is held for as long as somebody uses the folder, by whichever of its threads."""
    return FileLock(folder / LOCK, thread_local=False, fallback_to_soft=False)


def is_active(session: str) -> bool:
    """Whether a session's browser is connected."""
    return runtime.exists() and runtime.get_instance().is_active_session(session)


def _place() -> Path:
    return cache_dir() / "sessions"


@cache
def janitor() -> Janitor:
    """The server's one janitor.

    Raises:
        OSError: the cache folder cannot be written.
    """
    made = Janitor(_place())
    made.watch()
    return made

"""A real server and a real browser.

Chromium is found through MERGESCOPE_CHROMIUM, the system, or Playwright's own download. Without
one these tests are skipped with the reason on a user's machine, and fail where CI=true.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    Page,
    Request,
    expect,
    sync_playwright,
)

ROOT = Path(__file__).resolve().parents[2]
ARGUMENTS = [  # as root in a container, and without a word to the outside
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
Open = Callable[..., Page]
expect.set_options(timeout=45_000)  # five seconds are few on a machine that is busy with tests


def find_chromium(own: str) -> str | None:
    """Path of a Chromium: the environment's, the system's, or Playwright's own."""
    found = [os.environ.get("MERGESCOPE_CHROMIUM"), *map(shutil.which, NAMES), own]
    return next((path for path in found if path and Path(path).is_file()), None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One headless Chromium for all browser tests."""
    with sync_playwright() as playwright:
        path = find_chromium(playwright.chromium.executable_path)
        if path is None:
            reason = (
                "no Chromium: install one (Debian: apt-get install chromium), or set "
                "MERGESCOPE_CHROMIUM to its path"
            )
            if os.environ.get("CI") == "true":
                pytest.fail(reason)
            pytest.skip(reason)
        running = playwright.chromium.launch(executable_path=path, headless=True, args=ARGUMENTS)
        yield running
        running.close()


class Server:
    """A dashboard on a free port of the loopback interface."""

    def __init__(self, folder: Path, suites: tuple[Path, ...] = (), script: str = "app.py") -> None:
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "MERGESCOPE_CACHE": str(folder / "cache"),
            "MERGESCOPE_SUITES": os.pathsep.join(map(str, suites)),
        }
        command = [sys.executable, "-m", "streamlit", "run", script, "--server.headless=true"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, f"--server.port={self.port}"],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._wait_until_healthy()

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.url}/_stcore/health", timeout=1) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError(self.log.read_text())

    def stop(self) -> str:
        """End the server; returns what it logged."""
        self.process.terminate()
        self.process.wait(timeout=20)
        return self.log.read_text()


@pytest.fixture
def fresh_server(tmp_path: Path) -> Iterator[Server]:
    """A server that nobody has asked anything yet, with an empty cache."""
    server = Server(tmp_path)
    yield server
    assert "Traceback" not in server.stop()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the tests of a module; its log must hold no traceback."""
    running = Server(tmp_path_factory.mktemp("server"))
    yield running
    assert "Traceback" not in running.stop()


@pytest.fixture(scope="session")
def wide(browser: Browser) -> Iterator[BrowserContext]:
    """A wide and light window, which keeps the scripts of the page that it has once loaded."""
    window = browser.new_context(
        viewport={"width": 1400, "height": 1000}, accept_downloads=True, color_scheme="light"
    )
    window.set_default_timeout(45_000)
    yield window
    window.close()


@pytest.fixture
def context(wide: BrowserContext) -> Iterator[BrowserContext]:
    """The window without pages; each page that is opened is a visitor of its own to the server."""
    yield wide
    for page in wide.pages:
        page.close()
    wide.clear_cookies()


@pytest.fixture
def requests(context: BrowserContext) -> Iterator[list[Request]]:
    """Every request that the window makes."""
    seen: list[Request] = []

    def note(request: Request) -> None:
        seen.append(request)

    context.on("request", note)
    yield seen
    context.remove_listener("request", note)


def settle(page: Page) -> None:
    """Wait until the page has a figure and the server has nothing more to say."""
    page.wait_for_selector(".js-plotly-plot .main-svg")
    wait_idle(page)


def wait_idle(page: Page) -> None:
    """Wait until no script of the page runs (Streamlit itself waits 200 ms for further keys)."""
    page.wait_for_timeout(450)
    page.wait_for_function(
        "document.querySelector('[data-testid=stApp]').dataset.testScriptState === 'notRunning'"
    )
    page.wait_for_timeout(250)


def metrics(page: Page) -> dict[str, str]:
    """The page's metric cards: label to value."""
    cards = page.get_by_test_id("stMetric").all()
    lines = [[part for part in card.inner_text().split("\n") if part] for card in cards]
    return {line[0]: line[1] for line in lines}

"""How long a visitor waits: first figure after a cold and a warm start, and a slider's redraw.

Needs playwright and Chromium. Streamlit's own floor for a slider is about 200 ms: it waits that
long for further key presses.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks.measure import FailedError, Laboratory
from benchmarks.record import Sheet
from tests.browser.conftest import ARGUMENTS, Server, find_chromium, settle

PAGES = (
    "",
    "spectra",
    "interference",
    "rank_and_scale",
    "merge_lab",
    "patterns",
    "weights_or_features",
    "magnitude_and_stability",
)
FIGURE = ".js-plotly-plot .main-svg"
# Page and the figure that is watched while its rank slider moves.
REDRAWN = {"spectra": 1, "interference": 0}


def new_session(browser: Browser) -> Page:
    """A page of a browser session with an empty cache."""
    return browser.new_context(viewport={"width": 1400, "height": 1000}).new_page()


def first_figure(page: Page, go: Callable[[], object]) -> float:
    """Seconds from a navigation to the first drawn figure."""
    start = time.perf_counter()
    go()
    page.wait_for_selector(FIGURE, timeout=60_000)
    seconds = time.perf_counter() - start
    settle(page)
    return seconds


def redraws(page: Page, figure: int, steps: int) -> list[float]:
    """Seconds from a key press on the rank slider until a figure's texts differ.

    The marked rank stands in the text of every figure that depends on it.
    """
    page.get_by_role("slider", name="Rank").first.focus()
    texts = f"document.querySelectorAll('.js-plotly-plot')[{figure}].textContent"
    times = []
    for i in range(steps):
        before = page.evaluate(texts)
        start = time.perf_counter()
        page.keyboard.press("ArrowRight" if i % 10 < 5 else "ArrowLeft")
        page.wait_for_function(f"before => {texts} !== before", arg=before, polling=10)
        times.append(time.perf_counter() - start)
        page.wait_for_timeout(500)
    return times


def measure_page(browser: Browser, name: str, sheet: Sheet, reloads: int, steps: int) -> None:
    """One page on a server of its own."""
    title = name or "overview"
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        server = Server(Path(folder))
        up = time.perf_counter() - start
        try:
            url = f"{server.url}/{name}"
            page = new_session(browser)
            cold = up + first_figure(page, partial(page.goto, url))
            note = f"from the start of the server (up after {up:.1f} s), nothing stored"
            sheet.seconds(f"{title}: first figure, cold", [cold], note)
            again = [first_figure(page, page.reload) for _ in range(reloads)]
            sheet.add(f"{title}: reload", statistics.median(again), "s", "lower")
            other = new_session(browser)
            visitor = first_figure(other, partial(other.goto, url))
            sheet.seconds(f"{title}: another visitor", [visitor], "with an empty browser cache")
            if name in REDRAWN:
                times = redraws(page, REDRAWN[name], steps)
                middle = 1000 * statistics.median(times)
                note = f"median of {steps}; slowest {1000 * max(times):.0f} ms"
                sheet.add(f"{title}: slider to redraw", middle, "ms", "lower", note=note)
        finally:
            server.stop()
        measure_stored(browser, name, sheet, Path(folder), cold)


def measure_stored(browser: Browser, name: str, sheet: Sheet, folder: Path, cold: float) -> None:
    """The same page on a new server that finds the frames of the one before, once it is up."""
    title = name or "overview"
    server = Server(folder)
    try:
        page = new_session(browser)
        stored = first_figure(page, partial(page.goto, f"{server.url}/{name}"))
        note = "a new server, frames stored; from the request"
        sheet.seconds(f"{title}: first figure, frames stored", [stored], note)
        sheet.add(f"{title}: stored over cold", stored / cold, "x", "lower")
    finally:
        server.stop()


def dashboard(laboratory: Laboratory, sheet: Sheet) -> None:
    """All pages, one after another; one of them if quick."""
    pages, reloads, steps = (("spectra",), 1, 2) if laboratory.quick else (PAGES, 3, 12)
    with sync_playwright() as playwright:
        path = find_chromium(playwright.chromium.executable_path)
        if path is None:
            raise FailedError("no Chromium found; set MERGESCOPE_CHROMIUM to its path")
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        for name in pages:
            measure_page(browser, name, sheet, reloads, steps)
        browser.close()

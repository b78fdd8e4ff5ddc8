"""How long a visitor waits: first figure after a cold and a warm start, and a slider's redraw.

Run ``python -m benchmarks.dashboard`` (needs playwright and Chromium). Streamlit's own floor for
a slider is about 200 ms: it waits that long for further key presses.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

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
    """Milliseconds from a key press on the rank slider until a figure's texts differ.

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
        times.append(1000 * (time.perf_counter() - start))
        page.wait_for_timeout(500)
    return times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as scratch:
        path = find_chromium(playwright.chromium.executable_path)
        if path is None:
            raise SystemExit("no Chromium found; set MERGESCOPE_CHROMIUM to its path")
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        for name in PAGES:
            folder = Path(scratch) / (name or "overview")
            folder.mkdir()
            start = time.perf_counter()
            server = Server(folder)
            up = time.perf_counter() - start
            url = f"{server.url}/{name}"
            page = new_session(browser)
            cold = up + first_figure(page, partial(page.goto, url))
            warm = statistics.median(first_figure(page, page.reload) for _ in range(5))
            other = new_session(browser)
            visitor = first_figure(other, partial(other.goto, url))
            print(
                f"{name or 'overview':16s} first figure: cold {cold:5.2f} s (server {up:4.2f} s, "
                f"empty cache), reload {warm:5.2f} s, another visitor {visitor:5.2f} s"
            )
            if name in REDRAWN:
                times = redraws(page, REDRAWN[name], steps)
                low, middle, high = statistics.quantiles(times, n=4)
                print(
                    f"{name:16s} slider to redraw: median {middle:.0f} ms, quartiles "
                    f"{low:.0f} to {high:.0f} ms ({steps} steps)"
                )
            server.stop()
        browser.close()


if __name__ == "__main__":
    main()

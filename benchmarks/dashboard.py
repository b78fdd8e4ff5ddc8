"""How long a visitor waits: first figure after a cold and a warm start, and a slider's redraw.

Run ``python -m benchmarks.dashboard`` (needs playwright and Chromium). Streamlit's own floor for
a slider is about 200 ms: it waits that long for further key presses.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from tests.browser.conftest import ARGUMENTS, Server, find_chromium, settle

PAGES = ("", "spectra", "interference", "rank_and_scale", "merge_lab")
FIGURE = ".js-plotly-plot .main-svg"


def first_figure(browser: Browser, url: str) -> float:
    """Seconds from the request to the first drawn figure, in a browser session of its own."""
    session = browser.new_context(viewport={"width": 1400, "height": 1000})
    page = session.new_page()
    start = time.perf_counter()
    page.goto(url)
    page.wait_for_selector(FIGURE, timeout=60_000)
    seconds = time.perf_counter() - start
    settle(page)
    session.close()
    return seconds


def redraws(page: Page, url: str, figure: int, marker: str, steps: int) -> list[float]:
    """Milliseconds from a key press on the rank slider to a figure that differs."""
    page.goto(url)
    settle(page)
    page.get_by_role("slider", name="Rank").first.focus()
    times = []
    script = f"""n => document.querySelectorAll('.js-plotly-plot')[{figure}]
                      .querySelector('{marker}')?.textContent !== n"""
    read = f"""() => document.querySelectorAll('.js-plotly-plot')[{figure}]
                      .querySelector('{marker}')?.textContent"""
    for i in range(steps):
        before = page.evaluate(read)
        start = time.perf_counter()
        page.keyboard.press("ArrowRight" if i % 10 < 5 else "ArrowLeft")
        page.wait_for_function(script, arg=before, polling=10, timeout=30_000)
        times.append(1000 * (time.perf_counter() - start))
        page.wait_for_timeout(300)
    return times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as name:
        path = find_chromium(playwright.chromium.executable_path)
        if path is None:
            raise SystemExit("no Chromium found; set MERGESCOPE_CHROMIUM to its path")
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        for page_name in PAGES:
            folder = Path(name) / (page_name or "overview")
            folder.mkdir()
            start = time.perf_counter()
            server = Server(folder)
            up = time.perf_counter() - start
            cold = up + first_figure(browser, f"{server.url}/{page_name}")
            warm = [first_figure(browser, f"{server.url}/{page_name}") for _ in range(3)]
            print(
                f"{page_name or 'overview':16s} first figure: cold {cold:5.2f} s (server up after "
                f"{up:4.2f} s, empty cache), warm {statistics.median(warm):5.2f} s"
            )
            if page_name in ("spectra", "interference"):
                # What changes with the rank: the marked rank, or the rank in the title.
                figure, marker = (
                    (1, ".annotation-text") if page_name == "spectra" else (0, ".gtitle")
                )
                session = browser.new_context(viewport={"width": 1400, "height": 1000})
                times = redraws(
                    session.new_page(), f"{server.url}/{page_name}", figure, marker, steps
                )
                session.close()
                quarter = statistics.quantiles(times, n=4)
                print(
                    f"{page_name:16s} slider to redraw: median {quarter[1]:.0f} ms, quartiles "
                    f"{quarter[0]:.0f} to {quarter[2]:.0f} ms ({steps} steps)"
                )
            server.stop()
        browser.close()


if __name__ == "__main__":
    main()

"""Strangers' texts in a real browser: letters, and nothing that asks or leads to another host."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import Browser

from tests.browser.conftest import Server
from tests.browser.foreign_texts import HOST, TEXTS
from ui.plain_text import JOINER, UNUSABLE

# What Markdown would make of their marks.
MADE = "a, img, em, strong, del, code, pre, h1, h2, ul, ol, blockquote, table, hr, sup, .katex"


def test_foreign_texts_are_letters(browser: Browser, tmp_path: Path) -> None:
    server = Server(tmp_path, script="tests/browser/foreign_texts.py")
    context = browser.new_context()
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    page.get_by_text("The end.").wait_for(timeout=60_000)
    page.locator(".js-plotly-plot").wait_for()
    assert not [url for url in asked if HOST in url]
    addresses = page.eval_on_selector_all("a", "links => links.map(link => link.outerHTML)")
    addresses += page.eval_on_selector_all("img, image", "images => images.map(i => i.outerHTML)")
    assert not [each for each in addresses if HOST in each]
    assert page.locator(":is([class*=st-key-text-], [role=alert]) :is(" + MADE + ")").count() == 0
    for number, text in enumerate(TEXTS):
        shown = page.locator(f".st-key-text-{number}").inner_text().replace(JOINER, "").strip()
        expected = UNUSABLE.sub("\ufffd", " ".join(text.split()))
        assert shown == expected.replace(" -> ", " → "), text  # Streamlit does
    context.close()
    assert "Traceback" not in server.stop()

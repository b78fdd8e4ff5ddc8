"""Presenter mode: no sidebar, larger type, keys that turn pages; and what a tab is called."""

from __future__ import annotations

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.browser.conftest import Server, settle

pytestmark = pytest.mark.browser

TICK = ".js-plotly-plot .xtick text"


def size_of(page: Page, selector: str) -> float:
    size: str = page.locator(selector).first.evaluate("each => getComputedStyle(each).fontSize")
    return float(size.removesuffix("px"))


def test_a_room_sees_large_figures_and_keys_turn_pages(
    server: Server, context: BrowserContext
) -> None:
    page = context.new_page()
    page.goto(f"{server.url}/spectra")
    settle(page)
    usual = size_of(page, "h2"), size_of(page, TICK)
    page.get_by_text("Presenter mode").click()
    sidebar = page.get_by_test_id("stSidebar")
    expect(sidebar).to_be_hidden()
    expect(page.locator(TICK).first).not_to_have_css("font-size", f"{usual[1]:g}px")
    settle(page)
    assert size_of(page, "h2") == pytest.approx(1.6 * usual[0])
    assert size_of(page, TICK) >= 1.5 * usual[1]
    page.keyboard.press("ArrowRight")
    expect(page).to_have_title("Interference · MergeScope")
    settle(page)
    expect(sidebar).to_be_hidden()  # it is kept over pages
    page.keyboard.press("ArrowLeft")
    expect(page).to_have_title("Spectra · MergeScope")
    settle(page)
    page.keyboard.press("Escape")
    expect(sidebar).to_be_visible()
    assert "present" not in page.url


def test_keys_within_a_control_stay_there(server: Server, context: BrowserContext) -> None:
    page = context.new_page()
    page.goto(f"{server.url}/spectra?present=true")
    settle(page)
    page.get_by_role("slider", name="Rank").first.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_url("**share=**")
    assert "/spectra" in page.url

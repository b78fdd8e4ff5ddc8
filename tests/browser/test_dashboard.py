"""What only a browser shows: deep links, the address, clicks, downloads, themes, requests."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Request, expect
from safetensors.torch import load_file

from analysis.rank_selection.space import search_space
from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import make_recipe
from merge_core.suites.suite import load_suite
from tests.browser.conftest import Server, metrics, settle, wait_idle
from ui.widgets import share_label

pytestmark = pytest.mark.browser

PAGES = {
    "": "Why does averaging",
    "open_checkpoints": "Which models do you want",
    "spectra": "How many directions",
    "interference": "Where do the tasks",
    "rank_and_scale": "Which rank, and",
    "merge_lab": "What does this merge do",
    "compare": "Which method merges best",
    "how_does_it_scale": "How does it scale",
    "patterns": "What patterns do weights hold",
    "weights_or_features": "Average the weights, or",
    "magnitude_and_stability": "What happens when parameters",
    "glossary": "What do the words mean",
}
WITHOUT_FIGURE = ("open_checkpoints", "glossary")


def query(page: Page) -> dict[str, list[str]]:
    return parse_qs(urlparse(page.url).query)


def step(page: Page, name: str, key: str, times: int = 1) -> None:
    """Move a slider by the keyboard."""
    slider = page.get_by_role("slider", name=name)
    slider.focus()
    for _ in range(times):
        page.keyboard.press(key)
    wait_idle(page)


def test_a_deep_link_is_the_first_request_of_a_fresh_server(
    fresh_server: Server, context: BrowserContext
) -> None:
    page = context.new_page()
    link = "interference?scope=Whole+model&share=16+%25&tasks=digits&tasks=greek&tasks=dots"
    page.goto(f"{fresh_server.url}/{link}")
    settle(page)
    # The shell is there (navigation and sidebar), and so is the state of the link.
    assert page.get_by_test_id("stSidebarNavLink").count() == len(PAGES)
    assert page.get_by_role("heading", name=PAGES["interference"]).is_visible()
    titles = page.locator(".js-plotly-plot .gtitle").all_text_contents()
    assert any("whole model" in title for title in titles)
    assert any(re.search(r"k\s=\s*40", title) for title in titles)  # 16 % of 256
    ticks = page.locator(".js-plotly-plot").first.locator(".xtick text").all_text_contents()
    assert ticks == ["digits", "greek", "dots"]


@pytest.mark.parametrize("name", PAGES)
def test_each_page_opens_without_errors_or_foreign_requests(
    name: str, server: Server, context: BrowserContext, requests: list[Request]
) -> None:
    page = context.new_page()
    messages: list[str] = []
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.goto(f"{server.url}/{name}")
    if name in WITHOUT_FIGURE:
        page.get_by_role("heading", name=PAGES[name]).wait_for()
        wait_idle(page)
    else:
        settle(page)
        # Every figure and picture has a description.
        assert page.get_by_role("figure").count() >= 1
    assert all(figure.get_attribute("aria-label") for figure in page.get_by_role("figure").all())
    assert all(image.get_attribute("alt") for image in page.locator("img").all())
    assert page.get_by_role("heading", name=PAGES[name]).is_visible()
    assert page.get_by_test_id("stException").count() == 0
    assert page.get_by_test_id("stAlertContentError").count() == 0
    assert messages == []
    hosts = {urlparse(r.url).hostname for r in requests if r.url.startswith(("http", "ws"))}
    assert hosts == {"127.0.0.1"}


def test_a_comparison_draws_its_ranking(server: Server, context: BrowserContext) -> None:
    page = context.new_page()
    # Widgets are in links by their labels, which for methods are titles.
    methods = "methods=Weight+average&methods=CART&own=method%3Dcart%26rank%3D0.16%26scale%3D3"
    tasks = "tasks=digits&tasks=lines&tasks=dots"
    page.goto(f"{server.url}/compare?{methods}&{tasks}")
    button = page.get_by_role("button", name="Compare these methods")
    button.wait_for()
    wait_idle(page)  # a click on a button that is about to be replaced is lost
    assert page.get_by_text("2 methods and 1 recipe of your own on 3 tasks").is_visible()
    button.click()
    ranking = page.get_by_role("figure", name="Mean test accuracy of each method")
    ranking.locator(".main-svg").first.wait_for(timeout=90_000)
    names = {text[1:].strip() for text in ranking.locator(".ytick text").all_text_contents()}
    assert names == {"Weight average", "CART", "CART (rank 0.16, scale3)"}  # in two lines
    assert page.get_by_test_id("stAlertContentError").count() == 0
    wait_idle(page)
    page.get_by_role("tab", name="Table").click()
    page.get_by_test_id("stDataFrame").first.wait_for()
    page.wait_for_url(re.compile("Table"))  # the tab is kept like any other control
    address = page.url
    page.reload()
    page.get_by_test_id("stDataFrame").first.wait_for()  # what was compared is there at once
    assert page.url == address


def test_choices_stand_in_the_address_and_open_again_as_they_were(
    server: Server, context: BrowserContext
) -> None:
    page = context.new_page()
    page.goto(f"{server.url}/merge_lab")
    settle(page)
    page.get_by_test_id("stSidebar").get_by_role("button", name="dots").click()
    wait_idle(page)
    step(page, "Rank", "ArrowRight", 2)
    page.get_by_role("button", name="Pin this recipe").click()
    wait_idle(page)
    step(page, "Scale", "ArrowRight", 4)
    recipe = page.get_by_test_id("stCode").filter(has_text="method:")
    expect(recipe).to_contain_text("scale: 1.2")
    wait_idle(page)
    address, shown = page.url, metrics(page)
    assert "dots" not in query(page)["tasks"]
    assert len(query(page)["tasks"]) == 7
    assert query(page)["rank"] == ["12 %"]
    assert "rank=0.12" in query(page)["pin"][0]

    other = context.new_page()
    other.goto(address)
    settle(other)
    assert other.url == address
    assert metrics(other) == shown
    assert other.get_by_text("Pinned: CART, rank 12 %, scale 1").count() >= 1
    expect(other.get_by_test_id("stCode").filter(has_text="method:")).to_contain_text("scale: 1.2")


def test_choices_stay_when_the_page_changes(server: Server, context: BrowserContext) -> None:
    page = context.new_page()
    page.goto(f"{server.url}/spectra")
    settle(page)
    page.get_by_test_id("stSidebar").get_by_role("button", name="lines").click()
    wait_idle(page)
    page.get_by_test_id("stSidebarNavLink").filter(has_text="Interference").click()
    page.get_by_role("heading", name=PAGES["interference"]).wait_for()
    settle(page)
    assert "lines" not in query(page)["tasks"]
    ticks = page.locator(".js-plotly-plot").first.locator(".xtick text").all_text_contents()
    assert "lines" not in ticks
    assert len(ticks) == 7


def test_a_slider_redraws_the_figure(server: Server, context: BrowserContext) -> None:
    page = context.new_page()
    page.goto(f"{server.url}/interference")
    settle(page)
    title = page.locator(".js-plotly-plot .gtitle").first
    expect(title).to_contain_text(re.compile(r"k\s=\s*20"))  # 8 % of 256
    step(page, "Rank", "ArrowRight")
    expect(title).to_contain_text(re.compile(r"k\s=\s*25"))  # 10 % of 256


def click_cell(page: Page, figure: int, column: float, row: float, columns: int, rows: int) -> None:
    """Click the middle of a heat map's cell, counted from the left and from the top."""
    area = page.locator(".js-plotly-plot").nth(figure).locator(".nsewdrag").first
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    assert box is not None
    page.mouse.click(
        box["x"] + box["width"] * (column + 0.5) / columns,
        box["y"] + box["height"] * (row + 0.5) / rows,
    )
    wait_idle(page)


def test_a_click_on_the_map_of_layers_opens_that_layer(
    server: Server, context: BrowserContext
) -> None:
    page = context.new_page()
    page.goto(f"{server.url}/spectra")
    settle(page)
    suite = load_suite("vision")
    click_cell(page, 2, 3, 5, len(suite.select(["8"])), len(suite.matrices))
    page.wait_for_url("**/spectra?*layer=*")
    assert query(page)["layer"] == [suite.matrices[5]]
    expect(page.locator(".js-plotly-plot").first).to_be_visible()


def test_a_click_on_the_map_chooses_that_setting_and_the_lab_opens_there(
    server: Server, context: BrowserContext
) -> None:
    page = context.new_page()
    page.goto(f"{server.url}/rank_and_scale")
    settle(page)
    ranks, scales = search_space("cart", "vision").ranks, search_space("cart", "vision").scales
    click_cell(page, 1, 3, len(scales) - 1 - 2, len(ranks), len(scales))
    rank, scale = share_label(ranks[3]), scales[2]
    assert query(page)["at_rank"] == [rank]
    assert float(query(page)["at_scale"][0]) == scale
    expect(page.get_by_text(f"Chosen: rank {rank}, λ = {scale:g}")).to_be_visible()
    page.get_by_role("link", name="The chosen setting in the Merge lab").click()
    page.get_by_role("heading", name=PAGES["merge_lab"]).wait_for()
    settle(page)
    recipe = page.get_by_test_id("stCode").filter(has_text="method:")
    expect(recipe).to_contain_text(f"rank: {ranks[3]:g}")
    expect(recipe).to_contain_text(f"scale: {scale:g}")


def test_the_recommended_setting_has_the_same_accuracy_in_the_lab(
    server: Server, context: BrowserContext
) -> None:
    page = context.new_page()
    page.goto(f"{server.url}/rank_and_scale")
    settle(page)
    shown = metrics(page)
    assert set(shown) == {
        "Recommended rank",
        "Recommended λ",
        "Validation accuracy",
        "Test accuracy",
    }
    page.get_by_role("link", name="Use this in the Merge lab").click()
    page.get_by_role("heading", name=PAGES["merge_lab"]).wait_for()
    settle(page)
    # The same recipe on the same images gives the same number on both pages.
    assert metrics(page)["Mean accuracy"] == shown["Validation accuracy"]


def test_the_downloaded_checkpoint_is_the_merge(
    server: Server, context: BrowserContext, tmp_path: Path
) -> None:
    page = context.new_page()
    page.goto(f"{server.url}/merge_lab?method=Task+Arithmetic&scale=0.4")
    settle(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Merged checkpoint").click()
    target = tmp_path / "merged.safetensors"
    download.value.save_as(target)
    suite = load_suite("vision")
    assert suite.base is not None
    merged = load_file(target)
    assert set(merged) == set(suite.base)
    tasks = suite.select(["8"])
    document = {"method": "task_arithmetic", "parameters": {"scale": 0.4}, "tasks": tasks}
    expected = MergeSession(suite, tasks, FactorStore()).merge(make_recipe(document))
    for name, value in merged.items():
        assert value.dtype == suite.base.info(name).dtype.torch
        assert value.equal(expected[name].to(value.dtype))
    assert "task_arithmetic" in Checkpoint(target).metadata["mergescope"]


def test_the_numbers_can_be_taken_away(
    server: Server, context: BrowserContext, tmp_path: Path
) -> None:
    page = context.new_page()
    page.goto(server.url)
    settle(page)
    page.get_by_text("The numbers").first.click()
    page.get_by_role("button", name="Download CSV").first.wait_for()
    wait_idle(page)  # opening runs the page again, which replaces the button
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").first.click()
    target = tmp_path / "numbers.csv"
    download.value.save_as(target)
    header, *rows = target.read_text().splitlines()
    assert header.startswith("task,correct,images,accuracy")
    assert len(rows) == 5 * 8


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_background_in_both_themes(
    scheme: str, server: Server, browser: Browser
) -> None:
    session = browser.new_context(color_scheme=scheme, viewport={"width": 1400, "height": 900})  # type: ignore[arg-type]
    page = session.new_page()
    page.goto(server.url)
    settle(page)
    colours = page.evaluate(
        """() => {
            const read = (e, p) => getComputedStyle(e)[p].match(/[0-9.]+/g).slice(0, 3).map(Number);
            const app = document.querySelector('[data-testid=stApp]');
            const tick = document.querySelector('.js-plotly-plot .xtick text');
            return [read(app, 'backgroundColor'), read(app, 'color'), read(tick, 'fill')];
        }"""
    )
    session.close()
    brightness = [sum(colour) / 3 for colour in colours]
    assert (brightness[0] < 60) == (scheme == "dark")
    assert abs(brightness[0] - brightness[1]) > 120
    assert abs(brightness[0] - brightness[2]) > 60


def test_a_phone_sees_the_page_without_scrolling_sideways(server: Server, browser: Browser) -> None:
    session = browser.new_context(viewport={"width": 390, "height": 844})
    page = session.new_page()
    page.goto(f"{server.url}/rank_and_scale")
    settle(page)
    main = page.get_by_test_id("stMain")
    overflow = main.evaluate("e => e.scrollWidth - e.clientWidth")
    session.close()
    assert overflow <= 1

"""Every control of every page keeps its value: over pages, back, reload, and in a link.

The controls are found on the page itself, whatever draws them, so that one which another
mechanism draws would be found to lose its value.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlparse

import pytest
from playwright.sync_api import BrowserContext, Locator, Page, TimeoutError

from tests.browser.conftest import Server

pytestmark = pytest.mark.browser

FOUND = """
(where) => {
    const kinds = ["stSelectbox", "stMultiSelect", "stButtonGroup", "stSlider", "stNumberInput",
                   "stTextInput", "stTextArea", "stCheckbox", "stRadio", "stTabs"];
    const words = (e) => e.textContent.trim();
    const value = {
        stSelectbox: (e) => e.querySelector("input").value,
        stMultiSelect: (e) => [...e.querySelectorAll("[data-testid=stMultiSelectTag]")].map(words),
        stButtonGroup: (e) => [...e.querySelectorAll("button[data-selected=true]")].map(words),
        stSlider: (e) => e.querySelector("input").getAttribute("aria-valuetext"),
        stCheckbox: (e) => e.querySelector("input").checked,
        stRadio: (e) => [...e.querySelectorAll("[data-selected=true] p")].map(words),
        stTabs: (e) => [...e.querySelectorAll("[role=tab][aria-selected=true]")].map(words),
    };
    const typed = (e) => e.querySelector("input, textarea").value;
    return kinds.flatMap((kind) => {
        const all = [...document.querySelectorAll(`[data-testid=${kind}]`)];
        return all.map((e, place) => {
            const label = e.querySelector("[data-testid=stWidgetLabel] p");
            const said = [kind, place, label ? words(label) : kind, (value[kind] ?? typed)(e)];
            const seen = where === "seen" ? e.checkVisibility() : where === "" || e.closest(where);
            return seen ? [said] : [];
        }).flat();
    });
}
"""
# Tabs are opened by the links below. Replacing a file is confirmed each time. A presenter has no
# sidebar to click (test_presenting.py).
LEFT = re.compile("stTabs|Replace the|Presenter mode")
THREE = "tasks=digits&tasks=lines&tasks=dots"  # which are quicker than all
TWO = "tasks=digits&tasks=lines&methods=Weight+average&methods=Task+Arithmetic"
# What is drawn only after something else was chosen is opened by its link.
LINKS = {
    "": "",
    "open_checkpoints": "from=Benchmark",
    "spectra": "",
    "interference": f"{THREE}&share=11.3+%25",
    "rank_and_scale": "at_rank=11.3+%25&at_scale=5.63&search=Full+grid",
    "rank_and_scale?tasks": "show=Tasks",
    "rank_and_scale?layers": "show=Layers",
    "rank_and_scale?evidence": "show=Evidence",
    "merge_lab": f"{THREE}&rank=11.3+%25&scale=5.63&then=SVC",
    "compare": THREE,  # of the tasks that it opens with the comparison is shipped
    "compare?tasks": f"{TWO}&show=Tasks",
    "compare?costs": f"{TWO}&show=Costs",
    "compare?published": f"{TWO}&show=Published",
    "how_does_it_scale": "",
    "patterns": "",
    "weights_or_features": "members=0&members=1",
    "magnitude_and_stability": "members=0&members=1&what=One+layer",
}
# In these only the tab is walked: the rest of the page was, and another choice of methods would
# take a comparison away.
TAB = "[role=tabpanel]"
# The comparison of a suite's own tasks is shipped: its tabs come and go with what is changed.
WALKED = {"compare": "seen"}


class Found(NamedTuple):
    """A control on the page."""

    kind: str
    place: int
    label: str
    value: Any


def controls(page: Page, where: str = "") -> list[Found]:
    """The controls of a page, or those within what a selector finds."""
    return [Found(*each) for each in page.evaluate(FOUND, where)]


def values(page: Page) -> dict[str, Any]:
    """Label to value of all controls."""
    return {f"{each.kind} {each.label}": each.value for each in controls(page)}


def query(page: Page) -> dict[str, list[str]]:
    """The parameters in the address."""
    return parse_qs(urlparse(page.url).query)


def rest(page: Page, milliseconds: int = 250) -> None:
    """Wait until no script has run for a while, and no job either."""
    page.wait_for_function(
        """(quiet) => {
            const app = document.querySelector('[data-testid=stApp]');
            const idle = app?.dataset.testScriptState === 'notRunning';
            const waits = '[data-testid=stSkeleton], [data-testid=stProgress]';
            const loading = document.querySelector(waits);
            if (!idle || loading) window.since = undefined;
            else window.since ??= performance.now();
            return window.since !== undefined && performance.now() - window.since > quiet;
        }""",
        arg=milliseconds,
        timeout=90_000,  # a page may have much to compute
    )
    page.evaluate("window.since = undefined")


def change(page: Page, found: Found) -> None:
    """Set a control to another value, as a person does."""
    control = page.get_by_test_id(found.kind).nth(found.place)
    if found.kind == "stSelectbox":
        unfold(page, control)
        options = page.get_by_role("option")
        others = [each for each in options.all() if each.inner_text() != found.value]
        if others:
            others[-1].click()
        else:
            page.keyboard.press("Escape")
    elif found.kind == "stMultiSelect":
        if found.value:
            control.get_by_role("combobox").focus()
            page.keyboard.press("Backspace")
        else:
            unfold(page, control)
            page.get_by_role("option").first.click()
        page.keyboard.press("Escape")
    elif found.kind == "stButtonGroup":
        chosen = "[data-selected=true]" if many(control) else ":not([data-selected=true])"
        buttons = control.locator(
            f"[role=toolbar] button{chosen}, [role=radiogroup] button{chosen}"
        )
        if buttons.count():
            buttons.last.click()
    elif found.kind == "stSlider":
        slider = control.get_by_role("slider")
        at_end = slider.get_attribute("value") == slider.get_attribute("max")
        slider.focus()
        page.keyboard.press("ArrowLeft" if at_end else "ArrowRight")
        page.wait_for_timeout(250)  # Streamlit waits for further keys
    elif found.kind == "stCheckbox":
        control.locator("label").first.click()
    elif found.kind == "stRadio":
        others = control.locator(":not([data-selected=true]) > [data-testid=stRadioOption]")
        if others.count():
            others.last.click()
    else:
        field = control.locator("input, textarea")
        number = found.kind == "stNumberInput"
        field.fill("17" if number else field.get_attribute("placeholder") or "abc")
        field.press("Control+Enter" if found.kind == "stTextArea" else "Enter")
    rest(page)


def unfold(page: Page, control: Locator) -> None:
    """Show the options of a box."""
    control.get_by_role("combobox").click()
    if page.get_by_role("option").count() == 0:
        page.wait_for_timeout(300)
    if page.get_by_role("option").count() == 0:
        page.keyboard.press("ArrowDown")
    page.get_by_role("option").first.wait_for()


def many(control: Locator) -> bool:
    """Whether several buttons of a group are chosen."""
    return control.locator("button[data-selected=true]").count() > 1


def open_folds(page: Page) -> None:
    """Open what folds controls away."""
    folded = "[data-testid=stExpander]:has(input):not(:has(details[open])) summary"
    for fold in page.locator(folded).all():
        fold.click()
        rest(page)


def change_all(page: Page, where: str = "") -> set[str]:
    """Change every control once, and those that come to be by that; returns their labels.

    Args:
        page: the page.
        where: a selector of what is walked; ``seen`` for what no tab hides; all when empty.
    """
    done: set[str] = set()
    while True:
        open_folds(page)
        names = [f"{each.kind} {each.label}" for each in controls(page, where)]
        left = [name for name in names if name not in done and not LEFT.search(name)]
        if not left:
            return done
        done.add(left[0])
        change_patiently(page, left[0])


def change_patiently(page: Page, name: str) -> None:
    """Change a control, found anew where the page was being drawn again under the click."""
    for attempt in range(3):
        found = {f"{each.kind} {each.label}": each for each in controls(page)}.get(name)
        if found is None:  # no longer there, since something else was changed
            return
        try:
            change(page, found)
        except TimeoutError:
            if attempt == 2:
                raise
            page.keyboard.press("Escape")  # a list left open hides all else
            rest(page, 1_000)
        else:
            return


def visit(page: Page, title: str) -> None:
    """Go to a page by the navigation."""
    page.get_by_test_id("stSidebarNavLink").filter(has_text=title).click()
    page.wait_for_timeout(150)
    rest(page)


TITLES = {
    "": "Overview", "open_checkpoints": "Open checkpoints", "spectra": "Spectra",
    "interference": "Interference", "rank_and_scale": "Rank and scale", "merge_lab": "Merge lab",
    "compare": "Compare", "how_does_it_scale": "How does it scale",
    "patterns": "Patterns", "weights_or_features": "Weights or features",
    "magnitude_and_stability": "Magnitude",
}  # fmt: skip


@pytest.mark.parametrize("place", LINKS)
def test_every_control_keeps_its_value(place: str, server: Server, context: BrowserContext) -> None:
    name = place.partition("?")[0]
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.goto(f"{server.url}/{name}?{LINKS[place]}".removesuffix("?"))
    rest(page, 500)
    if place.startswith("compare?"):
        compare, compared = (
            page.get_by_role("button", name="Compare these"),
            page.get_by_role("tab"),
        )
        if not compared.count():  # another test had it compared
            compare.click()
        compared.first.wait_for()
        rest(page)
    linked, address = values(page), query(page)
    other = "Open checkpoints" if name != "open_checkpoints" else "Patterns"
    if LINKS[place]:
        visit(page, other)
        visit(page, TITLES[name])
        assert values(page) == linked  # what a link says, on a control's grid or not
        assert query(page) == address
    changed = change_all(page, TAB if "?" in place else WALKED.get(place, ""))
    shown, address = values(page), query(page)
    assert len(changed) >= 1
    visit(page, other)
    page.go_back()
    page.wait_for_timeout(150)
    rest(page, 400)
    assert values(page) == shown
    assert query(page) == address
    visit(page, other)
    visit(page, TITLES[name])
    assert values(page) == shown
    # To the server a session of its own, as a link is that is opened elsewhere.
    page.reload()
    rest(page, 500)
    assert values(page) == shown
    assert query(page) == address

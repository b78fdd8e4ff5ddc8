"""Uploads as a person makes them: dropped onto the page, opened, and gone with the server."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, FilePayload, Page, expect
from safetensors.torch import save

from tests.browser.conftest import Server, settle, wait_idle
from tests.conftest import random_states

pytestmark = pytest.mark.browser

TASKS = ("cars", "dtd", "svhn")
DROP = """
([zone, files]) => {
    const data = new DataTransfer();
    for (const [name, text] of files) {
        const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
        data.items.add(new File([bytes], name));
    }
    for (const kind of ["dragenter", "dragover", "drop"])
        zone.dispatchEvent(new DragEvent(kind, {dataTransfer: data, bubbles: true}));
}
"""


def models() -> dict[str, bytes]:
    experts, base = random_states(TASKS)
    return {f"{n}.safetensors": save(dict(s)) for n, s in {"base": base, **experts}.items()}


def drop(page: Page, files: dict[str, bytes]) -> None:
    """Drag files from elsewhere onto the page and let go."""
    zone = page.get_by_test_id("stFileUploaderDropzone")
    zone.wait_for()
    encoded = [[name, base64.b64encode(content).decode()] for name, content in files.items()]
    page.evaluate(DROP, [zone.element_handle(), encoded])


def weight_files(server: Server) -> list[Path]:
    return [p for p in (server.log.parent / "cache").rglob("*.safetensors") if p.stem in TASKS]


def rename_second(page: Page, task: str) -> None:
    """Type another task for the second model of the table, and wait until it counts."""
    table = page.get_by_test_id("stDataFrame").first
    table.evaluate("table => table.scrollIntoView({block: 'center'})")
    page.wait_for_timeout(300)
    table.click(position={"x": 30, "y": 85}, force=True)  # its role, drawn below what scrolls
    for key in ("ArrowRight", "Enter", "Control+A", *task, "Enter"):
        page.wait_for_timeout(200)  # the table draws itself between two keys
        page.keyboard.press(key)
    page.wait_for_url(re.compile(f"roles=.*{task}"))
    wait_idle(page)


def test_dropped_files_become_a_suite_of_this_visitor_alone(
    fresh_server: Server, browser: Browser, context: BrowserContext
) -> None:
    page = context.new_page()
    page.goto(f"{fresh_server.url}/open_checkpoints?from=Upload")
    files = models()
    last = files.popitem()
    drop(page, files)
    expect(page.get_by_text("All 3 models fit together.")).to_be_visible()
    wait_idle(page)
    # One more by the button, and one that is no safetensors file, which the browser refuses.
    page.get_by_test_id("stFileUploaderDropzoneInput").set_input_files(
        [FilePayload(name=last[0], mimeType="", buffer=last[1])]
    )
    expect(page.get_by_text("All 4 models fit together.")).to_be_visible()
    wait_idle(page)
    assert len(weight_files(fresh_server)) == 3
    # On disk only: what the server received is not kept in memory as well.
    metrics = context.request.get(f"{fresh_server.url}/_stcore/metrics").text()
    assert "cache_memory_bytes" in metrics
    assert "UploadedFileManager" not in metrics
    rename_second(page, "cars2")
    page.get_by_role("link", name="Patterns").click()
    page.get_by_role("heading", name="What patterns").wait_for()
    wait_idle(page)
    page.get_by_role("link", name="Open checkpoints").click()
    expect(page.get_by_text("All 4 models fit together.")).to_be_visible()
    wait_idle(page)
    assert "cars2" in page.url  # what was typed stays, as every control's value
    page.get_by_role("button", name="Open this suite").click()
    page.get_by_role("heading", name="Why does averaging").wait_for()
    wait_idle(page)
    assert "suite=uploads" in page.url
    expect(page.get_by_test_id("stSidebar").get_by_role("button", name="cars2")).to_be_visible()
    chosen = page.get_by_test_id("stSidebar").get_by_role("combobox", name="Suite")
    assert "uploads" in (chosen.input_value() or chosen.get_attribute("aria-label") or "")
    page.get_by_role("link", name="Spectra").click()
    page.get_by_role("heading", name="How many directions").wait_for()
    settle(page)
    address = page.url
    assert "suite=uploads" in address
    # The same link, opened by somebody else, shows the bundled suite.
    other = browser.new_context()
    stranger = other.new_page()
    stranger.goto(address)
    stranger.get_by_role("heading", name="How many directions").wait_for()
    settle(stranger)
    assert "uploads" not in stranger.get_by_test_id("stSidebar").inner_text()
    assert "suite=uploads" not in stranger.url
    other.close()
    for each in (page, stranger):
        assert each.is_closed() or each.get_by_test_id("stException").count() == 0
    fresh_server.stop()
    assert weight_files(fresh_server) == []
    assert not list((fresh_server.log.parent / "cache").rglob("session-*"))

"""The page at ``/`` in headless Chromium: it takes a prompt, colours the tokens by value and draws the fan chart."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.builders import needs
from tests.serving.server import ServerProcess, make_export

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

LIGHTNESS = """e => {
  const [r, g, b] = getComputedStyle(e).backgroundColor.match(/[0-9]+/g).map(Number);
  return 0.3 * r + 0.6 * g + 0.1 * b;
}"""

pytestmark = [pytest.mark.e2e, needs(None if CHROMIUM else "no Chromium on the PATH")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    export = make_export(tmp_path_factory.mktemp("page") / "export")
    with ServerProcess(export.folder) as running:
        yield running


@pytest.fixture(scope="module")
def page(server: ServerProcess) -> Iterator[Page]:
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page(viewport={"width": 1100, "height": 800})
        page.goto(server.url)
        yield page
        browser.close()


def test_a_prompt_gives_coloured_tokens_and_a_fan(page: Page, server: ServerProcess) -> None:
    expect(page.locator("#model")).to_have_text("Serving tiny, step-000010.")
    page.fill("#prompt", "12+7=")
    page.fill("#n", "4")
    page.select_option("#rank", "cvar")
    page.fill("#most", "12")
    page.press("#prompt", "Enter")
    expect(page.locator("#fan svg")).to_be_visible(timeout=60_000)
    tokens = page.locator(".token")
    assert 1 <= tokens.count() <= 24
    means = [float(t.get_attribute("data-mean") or "nan") for t in tokens.all()]
    lightness = [t.evaluate(LIGHTNESS) for t in tokens.all()]
    order = sorted(range(len(means)), key=means.__getitem__)
    assert [lightness[i] for i in order] == sorted(lightness), "the more is expected, the lighter the token"
    assert len(set(lightness)) > 1
    assert page.locator("#fan path").count() == 6, "two bands and four lines"
    expect(page.locator("#ranking tr")).to_have_count(5)
    tokens.first.hover()
    expect(page.locator("#detail")).to_contain_text(f"mean {means[0]:.3f}")
    if folder := os.environ.get("DVPO_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / "serving-page.png")


def test_an_error_is_shown_in_words(page: Page) -> None:
    page.fill("#prompt", "12+7=")
    page.fill("#most", "100000")
    page.click("#go")
    expect(page.locator("#error")).to_contain_text("400", timeout=30_000)
    expect(page.locator("#go")).to_be_enabled()

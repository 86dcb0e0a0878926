"""Page and ``/docs`` in headless Chromium, behind a proxy that serves them below a path; no vLLM, no Ray."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import Page, expect, sync_playwright

from dvpo_service.serving.value_server import ValueServer
from tests.builders import needs
from tests.serving.fake_replicas import FakePolicy, FakeValues, gateway
from tests.serving.server import free_port

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = needs(None if CHROMIUM else "no Chromium on the PATH")


class StatedValues(FakeValues):
    """Values a response of two tokens, up to 1.11."""

    async def call(self, method: Callable[..., Any], *args: Any, timeout_s: float | None = None) -> Any:
        if method is not ValueServer.along:
            return await super().call(method, *args, timeout_s=timeout_s)
        state = {"mean": 0.5, "cvar": 0.1, "upper_tail": 1.11, "head_disagreement": 0.0, "quantiles": [0.1] * 5}
        states = [state | {"token": token} for token in (None, "2", "9")]
        return {"body": {"states": states, "alpha": 0.1, "beta": 0.1}, "version": "step-000007"}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    app = gateway(FakePolicy(), StatedValues(), note="Sums are reversed.").app()

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        """Take ``/sub`` off the path and say nothing of it, as most proxies are set up."""
        path = scope.get("path", "").removeprefix("/sub") or "/"
        await app(scope | {"path": path, "raw_path": path.encode()} if "path" in scope else scope, receive, send)

    port = free_port()
    server = uvicorn.Server(uvicorn.Config(proxy, port=port, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started and time.monotonic() < until:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}/sub"
    server.should_exit = True
    thread.join(timeout=20)


@pytest.fixture(scope="module")
def page(url: str) -> Iterator[Page]:
    """A page whose requests to any other host fail, as without the internet."""
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page()
        page.route(lambda asked: not asked.startswith(url), lambda route: route.abort())
        yield page
        browser.close()


@pytest.mark.parametrize("slash", ["", "/"])
def test_the_page_works_and_shows_what_each_sample_was(page: Page, url: str, slash: str) -> None:
    page.goto(url + slash)
    expect(page.locator("#note")).to_have_text("Sums are reversed.")
    expect(page.locator("#scale")).to_be_hidden()
    page.fill("#prompt", "27+65=")
    page.fill("#n", "3")
    page.click("#go")
    expect(page.locator("#fan svg")).to_be_visible(timeout=30_000)
    assert page.locator("#ranking td:nth-child(2)").all_inner_texts() == ["t2", "t1", "t0"]
    assert page.locator("#fan .tick").all_text_contents() == ["0", "0.5", "1", "1.5"]
    assert page.locator("#error").inner_text() == ""


def test_docs_list_the_routes_without_the_internet(page: Page, url: str) -> None:
    page.goto(f"{url}/docs")
    expect(page.locator(".opblock")).to_have_count(8, timeout=60_000)
    page.locator(".opblock", has_text="/healthz").click()
    page.get_by_role("button", name="Try it out").click()
    page.get_by_role("button", name="Execute").click()
    expect(page.locator(".opblock-body .request-url")).to_contain_text(f"{url}/healthz", timeout=30_000)
    expect(page.locator(".live-responses-table tbody .response-col_status")).to_contain_text("200", timeout=30_000)

"""A bundle's page in the system's Chromium, driven by Playwright and served by http.server."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from playwright.sync_api import Page, sync_playwright

GENERATE = Path(__file__).with_name("generate.js")
QUESTION = "Name the capital of France."
TIMEOUT_MS = 300_000
GPU_TIMEOUT_MS = 120_000
GPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")

_COUNT = """() => {
  window.updates = 0;
  const count = () => (window.updates += 1);
  const options = { childList: true, characterData: true, subtree: true };
  new MutationObserver(count).observe(document.getElementById("log"), options);
}"""
_SETTLED = """() => {
  const text = document.getElementById("status").textContent;
  return text === "Ready." || /cannot be loaded|No answer/.test(text);
}"""
_GENERATE = """async (settings) => {
  const { generate } = await import("./generate.js");
  return await generate({ ...settings, path: new URL(".", document.baseURI).pathname }, "wasm");
}"""


@dataclass(frozen=True)
class Visit:
    """What a page showed: status, answer, in how many steps, what it asked of other servers."""

    status: str
    answer: str
    updates: int
    load_s: float
    answer_s: float
    outside: Sequence[str]
    generated: list[Mapping[str, Any]]


def visit(
    bundle: Path, questions: Sequence[str], count: int, picture: Path, *, gpu: bool = False
) -> Visit:
    """Open the page, ask it a question, save a picture, and generate answers to `questions`."""
    shutil.copyfile(GENERATE, bundle / "generate.js")
    with serve(bundle) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=flags(gpu)
        )
        page = browser.new_page(viewport={"width": 900, "height": 420})
        page.set_default_timeout(GPU_TIMEOUT_MS if gpu else TIMEOUT_MS)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        start = time.perf_counter()
        page.goto(url)
        page.wait_for_function(_SETTLED)
        load_s, answer, updates = time.perf_counter() - start, "", 0
        start = time.perf_counter()
        if status(page) == "Ready.":
            answer, updates = ask(page)
        answer_s = time.perf_counter() - start
        page.screenshot(path=picture)
        outside = [u for u in asked if not u.startswith((url, "blob:", "data:"))]
        generated = []
        if questions:
            generated = page.evaluate(_GENERATE, {"questions": list(questions), "count": count})
        said = status(page)
        browser.close()
    return Visit(said, answer, updates, load_s, answer_s, outside, generated)


def final_text(bundle: Path, name: str) -> str:
    """Open the page `name` and return its text, when it has any."""
    with serve(bundle) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=flags(False)
        )
        page = browser.new_page()
        page.goto(url + name)
        page.wait_for_function("() => document.body?.innerText.trim()", timeout=TIMEOUT_MS)
        text = str(page.inner_text("body"))
        browser.close()
    return text


def ask(page: Page) -> tuple[str, int]:
    """Ask `QUESTION`; return the answer, and how often the log changed."""
    page.evaluate(_COUNT)
    page.fill("#text", QUESTION)
    page.click("#send")
    page.wait_for_function(_SETTLED)
    answer = page.text_content("#log p.assistant") or ""
    return answer, int(page.evaluate("() => window.updates"))


def status(page: Page) -> str:
    """Return the page's line of status."""
    return page.text_content("#status") or ""


def flags(gpu: bool) -> list[str]:
    """Return Chromium's flags; as root, as in containers, it starts only without its sandbox."""
    root = sys.platform != "win32" and os.geteuid() == 0
    return [*(GPU if gpu else ["--disable-gpu"]), *(["--no-sandbox"] if root else [])]


class _Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve `folder` and yield its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()

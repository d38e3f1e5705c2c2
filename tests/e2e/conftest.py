"""A browser for the tests of the page: Chromium of the system, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

CHROMIUM = "chromium"
TIMEOUT = 60_000
"""Milliseconds, for machines that do much else."""

expect.set_options(timeout=TIMEOUT)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = shutil.which(CHROMIUM)
    if path is None:
        pytest.fail(f"the tests of the page need {CHROMIUM}: install it, for example with apt.")
    # As root, as in containers, Chromium starts only without its own sandbox.
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    flags = ["--disable-gpu", *(["--no-sandbox"] if root else [])]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    context.set_default_timeout(TIMEOUT)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """A tab, in which no error may be left over: uncaught, or a breach of the page's policy."""
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "console",
        lambda message: errors.append(message.text) if "Security Policy" in message.text else None,
    )
    yield page
    assert errors == []


@pytest.fixture(scope="session")
def axe() -> str:
    """The source of axe-core, which the session `e2e` of nox downloads."""
    path = os.environ.get("LLAMA_ONNX_AXE")
    if not path:
        pytest.skip("LLAMA_ONNX_AXE names no axe.min.js: `nox -s e2e` downloads it.")
    return Path(path).read_text(encoding="utf-8")

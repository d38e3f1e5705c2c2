"""The chat page over the server that `llama-onnx serve` runs, with tiny packages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import sleep
from typing import Any

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.parity.prove import prove
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.engine.engine import Limits as EngineLimits
from llama_onnx.runtime.engine.shared_rows import SharedRows
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.measure.verify import verify
from llama_onnx.runtime.serving.app import Settings, create_app
from llama_onnx.runtime.serving.http.api_keys import LOCAL_HOSTS, make_guard
from llama_onnx.runtime.serving.http.limits import Limits
from llama_onnx.targets import cpu
from tests.support import tiny
from tests.support.chat_server import running

LONG = replace(tiny.GQA, max_position_embeddings=16384)
KEY = "open sesame"


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with a certificate, and a context that takes a while to fill."""
    root = tmp_path_factory.mktemp("served")
    source = tiny.write_huggingface(root / "source", LONG)
    package = root / "tiny-served"
    export_package(source, package, cpu.TARGET, Options("fp32"))
    prove(package, open_checkpoint(source), tokens=4, longest=16, certify=True)
    return package


@contextmanager
def serve(
    package: Path, *, key: str | None = None, verified: bool = False, places: int | None = None
) -> Iterator[str]:
    """Serve `package` as the command does; yields the address. Of `places`, none is for waiting."""
    limits = None if places is None else EngineLimits(rows=places)
    model = Llama.load(package, engine="onnxruntime", threads=1, limits=limits)
    settings = Settings() if places is None else Settings(most_waiting=0)
    app = create_app(model, settings, verify(package) if verified else None)
    with running(Limits(app, guard=make_guard(key, LOCAL_HOSTS))) as url:
        yield url


@pytest.fixture(scope="module")
def served(proven: Path) -> Iterator[str]:
    with serve(proven, verified=True) as url:
        yield url


def ask(page: Page, text: str, most_tokens: int | None) -> None:
    if most_tokens is not None and not page.locator("#max-tokens").is_visible():
        page.locator("#settings summary").click()
        page.locator("#max-tokens").fill(str(most_tokens))
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")


def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a step take at least 20 ms: a tiny model fills its limit of tokens in a second."""

    def slowed(original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **options: Any) -> Any:
            sleep(0.02)
            return original(*args, **options)

        return step

    for name in ("step", "verify"):
        monkeypatch.setattr(SharedRows, name, slowed(getattr(SharedRows, name)))


def done(page: Page) -> None:
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    expect(page.locator(".is-writing")).to_have_count(0)


def stored(page: Page) -> list[str]:
    """The texts of the conversation, as the page has them."""
    script = "JSON.parse(sessionStorage['llama-onnx.chat']).map(turn => turn.content)"
    texts: list[str] = page.evaluate(script)
    return texts


def test_a_conversation_is_the_one_that_genai_has(page: Page, served: str, proven: Path) -> None:
    genai = Llama.load(proven, engine="genai", threads=1)
    page.goto(served)
    messages = []
    for question in ("the quick brown fox", "and the dog?"):
        ask(page, question, 12)
        done(page)
        messages.append({"role": "user", "content": question})
        answer = genai.chat(messages, max_new_tokens=12)
        text = "".join(answer)
        messages.append({"role": "assistant", "content": text})
        assert stored(page) == [message["content"] for message in messages]
        stats = page.locator(".answer .stats").last
        expect(stats).to_contain_text(f"{answer.stats.new_tokens} tokens")
    expect(page.locator(".answer .notice").last).to_contain_text("limit of tokens")


def test_stop_frees_the_engine(page: Page, served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_steps(monkeypatch)
    page.goto(served)
    ask(page, "the lazy dog", None)
    expect(page.locator(".answer .body")).not_to_be_empty()
    page.get_by_role("button", name="Stop", exact=True).click()
    done(page)
    expect(page.locator(".answer .notice")).to_have_text("You stopped this answer.")
    assert stored(page)[-1]
    running_now = "vllm:num_requests_running"

    def count() -> float:
        text: str = page.evaluate("fetch('/metrics').then(r => r.text())")
        lines = [line for line in text.splitlines() if line.startswith(running_now)]
        assert lines, text
        return sum(float(line.split()[-1]) for line in lines)

    for _ in range(50):
        if count() == 0:
            break
        page.wait_for_timeout(100)
    assert count() == 0


def test_a_conversation_beyond_the_context_says_so(page: Page, served: str) -> None:
    page.goto(served)
    ask(page, "the quick brown fox " * 8000, 4)
    done(page)
    notice = page.locator(".answer .notice")
    expect(notice).to_contain_text("This conversation no longer fits the model's context.")
    expect(notice).to_contain_text("16,384")


def test_the_corner_has_what_certificate_and_verify_say(
    page: Page, served: str, proven: Path
) -> None:
    page.goto(served)
    summary = page.locator("#about summary")
    expect(summary).to_contain_text("Indistinguishable from the original")
    expect(summary).to_contain_text("Verified on this machine")
    panel = page.locator("#about-panel")
    for text in (proven.name, "16,384 tokens", "fp32", "100.0 %", "1.000", "are intact"):
        expect(panel).to_contain_text(text)


def test_a_key_and_no_verification(page: Page, proven: Path) -> None:
    with serve(proven, key=KEY) as url:
        page.goto(url)
        page.get_by_label("API key").fill(KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#proof-state")).to_have_text("Not verified on this machine")
        expect(page.locator("#about-panel")).to_contain_text("start the server with --verify")
        ask(page, "the fox", 4)
        done(page)
        expect(page.locator(".answer .stats")).to_contain_text("4 tokens")


def test_a_full_server_says_when_to_try_again(
    page: Page, context: BrowserContext, proven: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_steps(monkeypatch)  # the first answer must outlast what the other page does
    with serve(proven, places=1) as url:
        page.goto(url)
        ask(page, "the lazy dog", None)
        expect(page.locator(".answer .body")).not_to_be_empty()
        other = context.new_page()
        other.goto(url)
        ask(other, "the fox", 4)
        done(other)
        expect(other.locator(".answer .notice")).to_contain_text("Too many requests are waiting.")
        expect(other.locator(".answer .notice")).to_contain_text("Try again in")
        page.get_by_role("button", name="Stop", exact=True).click()
        done(page)
        other.get_by_role("button", name="Retry this answer").click()
        done(other)
        expect(other.locator(".answer .stats")).to_contain_text("4 tokens")

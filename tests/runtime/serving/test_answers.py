"""An answer for an HTTP client, which may read slowly or leave."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.serving.answers import Answer
from llama_onnx.runtime.serving.request import Request
from llama_onnx.runtime.serving.service import Service
from llama_onnx.targets.errors import BusyError, LlamaOnnxError, PackageError, UsageError

T = TypeVar("T")
PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def service(package: Path) -> Iterator[Service]:
    running = Service(package, max_waiting=1)
    yield running
    running.close()


def ask(prompt: str = PROMPT, **options: Any) -> Request:
    return Request.from_json({"prompt": prompt, "max_new_tokens": 20, **options})


def run(work: Callable[[], Awaitable[T]]) -> T:
    async def limited() -> T:
        return await asyncio.wait_for(work(), 30)

    return asyncio.run(limited())


def test_pieces_and_a_whole_answer_are_the_models(service: Service, llama: Llama) -> None:
    async def work() -> tuple[list[dict[str, Any]], dict[str, Any]]:
        async with Answer(service, ask()) as answer:
            pieces = [message async for message in answer.messages()]
        async with Answer(service, ask()) as answer:
            return pieces, await answer.whole()

    pieces, whole = run(work)
    expected = "".join(llama.generate(PROMPT, max_new_tokens=20))
    assert "".join(piece["text"] for piece in pieces[:-1]) == whole["text"] == expected
    assert pieces[-1]["stats"]["new_tokens"] == whole["stats"]["new_tokens"] == 20


def test_a_refusal_comes_before_the_answer(service: Service) -> None:
    async def work() -> None:
        async with Answer(service, ask("the " * 300)):
            raise AssertionError("it was started")

    with pytest.raises(UsageError, match="this model's maximum context length is 256"):
        run(work)


def test_a_client_that_reads_nothing_keeps_nobody_waiting(service: Service) -> None:
    async def work() -> tuple[int, int]:
        async with Answer(service, ask(max_new_tokens=100)) as unread:
            async with Answer(service, ask()) as answer:
                second = await answer.whole()
            first = await unread.whole()
        return first["stats"]["new_tokens"], second["stats"]["new_tokens"]

    assert run(work) == (100, 20)


def test_a_client_that_leaves_ends_its_answer(service: Service) -> None:
    async def work() -> list[str]:
        async with Answer(service, ask(max_new_tokens=200)):
            pass
        while service._room._value < 2:
            await asyncio.sleep(0.001)
        async with Answer(service, ask()) as answer:
            return [str(message.get("text")) async for message in answer.messages()]

    alone = [str(message.get("text")) for message in service.stream(ask())]
    assert run(work) == alone


def test_a_client_that_leaves_before_its_turn_is_never_answered(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(
        "llama_onnx.runtime.serving.service._send", lambda process, content: sent.append(content)
    )

    async def work() -> None:
        with service._turn:
            waiting = [asyncio.ensure_future(Answer(service, ask()).__aenter__()) for _ in range(2)]
            while service._room._value:
                await asyncio.sleep(0.001)
            with pytest.raises(BusyError, match="too many"):
                await Answer(service, ask()).__aenter__()
            for one in waiting:
                one.cancel()
            await asyncio.wait(waiting)
        while service._room._value < 2:
            await asyncio.sleep(0.001)

    run(work)
    assert sent == []


def test_a_failure_is_an_error_for_this_client(
    service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(request: Request, handle: object) -> Iterator[dict[str, Any]]:
        yield {"text": "a"}
        raise KeyError("odd")

    async def work() -> None:
        async with Answer(service, ask()) as answer:
            await answer.whole()

    monkeypatch.setattr(service, "stream", broken)
    with pytest.raises(LlamaOnnxError, match="the server failed: see its log"):
        run(work)
    assert "KeyError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "public"),
    [
        ("{package} has no chat template.", "{name} has no chat template."),
        (
            "{package}/model.onnx is damaged: 7 tokens/s.",
            "{name}/model.onnx is damaged: 7 tokens/s.",
        ),
        ("see /var/lib/a b/x.bin, please", "see a b/x.bin, please"),
        ("open('/etc/llama/x'): no", "open('x'): no"),
        (r"C:\Users\me\model.onnx: no", "model.onnx: no"),
        ("and/or 1/2 https://a.b/c", "and/or 1/2 https://a.b/c"),
    ],
)
def test_an_error_says_nothing_about_the_folders_of_the_server(
    service: Service, package: Path, said: str, public: str
) -> None:
    error = PackageError(said.format(package=package))
    assert service.public(error) == public.format(name=package.name)

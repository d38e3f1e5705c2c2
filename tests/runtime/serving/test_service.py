"""One model for many callers: what is asked of it, who waits, and what its process does."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_onnx.runtime.engine.sampling.parameters import Sampling
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.serving import worker
from llama_onnx.runtime.serving.request import Request
from llama_onnx.runtime.serving.service import Service, find_package, http_status
from llama_onnx.targets.errors import (
    BusyError,
    LlamaOnnxError,
    PackageError,
    TooLargeError,
    UsageError,
)
from tests.support.fakes import generation
from tests.support.packages import alter_package

PROMPT = "the quick brown fox"
MESSAGES = [{"role": "user", "content": "Where is Paris?"}]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NAMES = ("prompt", "messages", "stream", "max_new_tokens", "temperature", "stop", "seed", "other")
FIELDS = st.sampled_from(NAMES)


@pytest.fixture(scope="module")
def service(package: Path) -> Iterator[Service]:
    running = Service(package, max_waiting=2)
    yield running
    running.close()


def ask(prompt: str = PROMPT, **options: Any) -> Request:
    return Request.from_json({"prompt": prompt, "max_new_tokens": 20, **options})


# ---- what may be asked ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not valid JSON"),
        (b'{"prompt": ', "not valid JSON"),
        (b"\xff\xfe", "not UTF-8"),
        ("\ud800", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1]", "must be a JSON object"),
        (b'"Once"', "must be a JSON object"),
        (b"{}", "either 'prompt' or 'messages'"),
        (b'{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "either 'prompt'"),
        (b'{"prompt": "a", "prompt": "b"}', "the key 'prompt' twice"),
        (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
        (b'{"prompt": 3}', "'prompt' must be a text"),
        (b'{"prompt": null}', "'prompt' must be a text"),
        (b'{"promt": "a"}', "unknown field 'promt': use prompt, messages"),
        (b'{"%s": "a"}' % (b"p" * 9999), r"unknown field 'p+\.\.\.p+': use prompt"),
        (b'{"messages": []}', "'messages' must have at least one"),
        (b'{"messages": "hi"}', "'messages' must be a list of .*, not a text"),
        (b'{"messages": {"role": "user", "content": "hi"}}', "'messages' must be a list .* object"),
        (b'{"messages": [{"role": "user"}]}', r"'messages'\[0\] has no 'content'"),
        (b'{"messages": [{"role": "user", "content": 1}]}', "'content' must be a text, not 1"),
        (b'{"messages": [{"role": "user", "content": null}]}', "must be a text, not None"),
        (b'{"messages": [{"role": 1, "content": "a"}]}', "'role' must be a text that is not empty"),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            "'content' has a part of type 'image_url'",
        ),
        (
            b'{"messages": [%s]}' % b",".join([b'{"role": "user", "content": "a"}'] * 10_001),
            "has 10,001 messages, more than the 10,000 allowed",
        ),
        (b'{"prompt": "a", "max_new_tokens": "9"}', "'max_new_tokens' must be a whole number"),
        (b'{"prompt": "a", "max_new_tokens": true}', "'max_new_tokens' must be a whole number"),
        (b'{"prompt": "a", "max_new_tokens": 3.0}', "'max_new_tokens' must be a whole number"),
        (b'{"prompt": "a", "max_new_tokens": 0}', "'max_new_tokens' must be .* at least 1, not 0"),
        (b'{"prompt": "a", "seed": 18446744073709551616}', "'seed' must be a whole number from 0"),
        (b'{"prompt": "a", "top_k": 0.5}', "'top_k' must be a whole number"),
        (b'{"prompt": "a", "temperature": -1}', "'temperature' must be a number from 0"),
        (b'{"prompt": "a", "temperature": %s}' % (b"9" * 60), "'temperature' must be .* 60 digits"),
        (b'{"prompt": "a", "temperature": %s}' % (b"9" * 400), "a number of 400 digits"),
        (b'{"prompt": "a", "temperature": 1e400}', "the number 1e400, which is out of range"),
        (b'{"prompt": "a", "temperature": NaN}', "has NaN, which is not a JSON number"),
        (b'{"prompt": "a", "top_p": 1.01}', "'top_p' must be a number from 0 to 1"),
        (b'{"prompt": "a", "stop": 1}', "'stop' must be a text or a list of texts, not 1"),
        (b'{"prompt": "a", "stop": [""]}', "'stop' must hold texts that are not empty"),
        (b'{"prompt": "a", "stop": [1]}', "'stop' must hold texts that are not empty, not 1"),
        (
            b'{"prompt": "a", "stop": [%s]}' % b",".join([b'"ab"'] * 300_000),
            "'stop' has 300,000 texts, more than the 256 allowed",
        ),
        (b'{"prompt": "a", "stop": "%s"}' % (b"x" * 1025), "'stop' has a text of 1,025 characters"),
        (b'{"prompt": "%s"}' % (b"a" * (4 << 20)), "4,194,318 bytes, more than the 4,194,304"),
        (b'{"prompt": "a", "stream": 1}', "'stream' must be true or false"),
    ],
)
def test_a_request_that_makes_no_sense_is_one_sentence(body: str | bytes, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Request.parse(body)


@given(st.dictionaries(FIELDS, JSON, max_size=4) | JSON)
def test_any_json_is_a_request_or_refused(content: Any) -> None:
    try:
        request = Request.from_json(content)
    except UsageError as error:
        assert "\n" not in str(error)
        return
    assert Request.from_json(json.loads(json.dumps(request.to_json()))) == request


def test_whose_fault_it_is() -> None:
    kinds = (UsageError, TooLargeError, BusyError, LlamaOnnxError)
    assert [http_status(kind("x")) for kind in kinds] == [400, 413, 503, 500]


def test_values_that_mean_something() -> None:
    body = b"""{"messages": [{"role": "user", "name": "Eve", "content": [
        {"type": "text", "text": "a\\u0000"}, {"type": "text", "text": "b"}]}],
        "stop": "ab", "top_k": -1, "seed": 18446744073709551615, "temperature": 1e-320,
        "max_new_tokens": 99999999999999999999}"""
    request = Request.parse(body)
    assert request.messages == ({"role": "user", "name": "Eve", "content": "a\0\nb"},)
    assert request.stop == ("ab",)
    assert request.sampling == Sampling(top_k=0, seed=2**64 - 1, temperature=0.0)
    assert request.max_new_tokens == 99999999999999999999


# ---- answers -------------------------------------------------------------------------------------


def test_the_process_answers_what_the_model_does(service: Service, llama: Llama) -> None:
    expected = "".join(llama.generate(PROMPT, max_new_tokens=20))
    answer = service.answer(ask())
    assert answer["text"] == expected
    assert answer["stats"]["new_tokens"] == 20
    pieces = list(service.stream(ask()))
    assert "".join(piece["text"] for piece in pieces[:-1]) == expected
    assert len(pieces) > 2 and pieces[-1]["stats"]["finish_reason"] == "length"


def test_a_conversation(service: Service, llama: Llama) -> None:
    request = Request.from_json({"messages": MESSAGES, "max_new_tokens": 9, "stop": ["zzz"]})
    assert service.answer(request)["text"] == "".join(llama.chat(MESSAGES, max_new_tokens=9))


def test_it_says_what_runs(service: Service) -> None:
    assert "int4 · CPUExecutionProvider" in str(service)
    assert "it is the only provider in the session" in str(service)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (ask("the " * 300), "this model's maximum context length is 256"),
        (ask("the " * 2000), "first 2,048 are already more than 512 tokens"),
        (ask(adapter="law"), "has no adapter 'law'"),
        (ask("\ud800"), "not UTF-8"),
    ],
)
def test_what_this_model_cannot_do_ends_nothing_else(
    service: Service, request_: Request, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        service.answer(request_)
    with pytest.raises(UsageError, match=said):
        service.stream(request_)
    assert service.answer(ask())["text"]


def test_one_at_a_time_some_wait_the_rest_are_refused(service: Service) -> None:
    alone = service.answer(ask())["text"]
    held = service.stream(ask())
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(service.answer, ask()) for _ in range(2)]
        while service._room._value:  # until both have come in
            threading.Event().wait(0.01)
        with pytest.raises(BusyError, match="try again later"):
            service.answer(ask())
        assert not any(future.done() for future in waiting)
        rest = [message for message in held if "text" in message]
        assert "".join(message["text"] for message in rest) == alone
        assert [future.result(30)["text"] for future in waiting] == [alone, alone]


def test_an_answer_left_early_does_not_leak_into_the_next(service: Service) -> None:
    alone = service.answer(ask())["text"]
    for reads in (0, 1):
        stream = service.stream(ask("and the capital", max_new_tokens=200))
        for _ in range(reads):
            next(stream)
        stream.close()
        assert service.answer(ask())["text"] == alone
    dropped = service.stream(ask("and the capital"))
    del dropped
    assert service.answer(ask())["text"] == alone


def test_a_process_that_ended_is_started_again(package: Path) -> None:
    service = Service(package)
    alone = service.answer(ask())["text"]
    stream = service.stream(ask(max_new_tokens=200))
    os.kill(service._process.pid, signal.SIGKILL)
    with pytest.raises(LlamaOnnxError, match="process ended with status -9"):
        while True:
            next(stream)  # what was written before is still read
    assert service.answer(ask())["text"] == alone
    os.kill(service._process.pid, signal.SIGKILL)
    service._process.wait()
    assert service.answer(ask())["text"] == alone
    service.close()


def test_a_package_that_does_not_open_is_one_sentence(package: Path, tmp_path: Path) -> None:
    altered = alter_package(package, tmp_path / "ä 日本", model={"type": "nonsense"})
    with pytest.raises(LlamaOnnxError, match=r"sets 'model\.type' to 'nonsense', which no"):
        Service(altered)


def test_the_package_is_found(package: Path, tmp_path: Path) -> None:
    assert find_package(package) == package
    assert find_package(package.parent) == package
    with pytest.raises(PackageError, match="but 0 were found"):
        find_package(tmp_path)


# ---- the process ---------------------------------------------------------------------------------


class FakeLlama:
    package = SimpleNamespace(require_tokenizer=lambda: None)

    """Answers "hello." letter by letter; `at_step` is called with each step's number."""

    opened: Any = type("Opened", (), {"to_json": lambda self: {"name": "cpu"}})()

    def __init__(self, at_step: Any) -> None:
        self._at_step = at_step

    def generate(self, prompt: str, **options: Any) -> Any:
        return generation("hello.", before_step=self._at_step)


def run_worker(
    monkeypatch: pytest.MonkeyPatch, lines: Iterator[str], at_step: Any = lambda step: None
) -> list[dict[str, Any]]:
    monkeypatch.setattr(Llama, "load", lambda package: FakeLlama(at_step))
    sent: list[dict[str, Any]] = []
    assert worker.work(Path(), cast(IO[str], lines), sent.append) == 0
    return sent


def line(content: Any) -> str:
    return json.dumps(content) + "\n"


def test_the_end_of_an_answer_is_asked_for_in_its_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, arrived, done = threading.Event(), threading.Event(), threading.Event()

    def lines() -> Iterator[str]:
        yield line(ask().to_json())
        assert asked.wait(30)
        yield line(None)
        arrived.set()  # the reader comes back for more, so it has passed that on
        assert done.wait(30)

    def at_step(step: int) -> None:
        if step == 2:
            asked.set()
            assert arrived.wait(30)
            done.set()

    sent = run_worker(monkeypatch, lines(), at_step)
    assert [message.get("text") for message in sent[2:-1]] == ["h", "e", "l"]
    assert sent[-1]["stats"]["finish_reason"] == "interrupted"


class Open:
    """Lines that end when `end` is called: the end of all lines ends an answer too."""

    def __init__(self, *lines: str) -> None:
        self._lines, self._ended = lines, threading.Event()
        self.end = self._ended.set

    def __iter__(self) -> Iterator[str]:
        yield from self._lines
        assert self._ended.wait(30)


def test_an_end_asked_for_too_late_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Open(line(None), line(ask().to_json()))

    def at_step(step: int) -> None:
        if step == len("hello"):
            lines.end()

    sent = run_worker(monkeypatch, iter(lines), at_step)
    assert "".join(message.get("text", "") for message in sent) == "hello"


@pytest.mark.parametrize(
    ("error", "said", "logged"),
    [
        (KeyError("odd"), "the answer failed: 'odd' is missing.", True),
        (
            RuntimeError("bad allocation"),
            "not enough memory for a prompt of 3 tokens and an answer of up to 6: pass a shorter "
            "prompt or a smaller max_new_tokens (--max-new-tokens).",
            False,
        ),
    ],
)
def test_what_a_library_raises_ends_the_answer_alone(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    said: str,
    logged: bool,
) -> None:
    lines = Open(line(ask().to_json()))

    def at_step(step: int) -> None:
        if step == 1:
            lines.end()
            raise error

    sent = run_worker(monkeypatch, iter(lines), at_step)
    assert sent[-1] == {"error": said, "usage": False}
    assert ("Traceback" in capsys.readouterr().err) == logged

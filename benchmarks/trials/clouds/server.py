"""A bundle's server, started as its README says, and the cases that every server must pass."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_onnx.runtime.llama.model import Llama
from tests.support.tables import Case

PROMPTS = ("the quick brown fox", "and the capital of", "Ünïcödé 日本")
MESSAGES = [{"role": "user", "content": "Where is Paris?"}]
PING_LIMIT = 2.0
"""Seconds: SageMaker's limit for a health check, and the default for a probe in Azure ML."""

PLACES = 72
"""Answers in work and waiting that a server takes at most."""

CROWD = 100

WRONG: tuple[Any, ...] = (
    b"",
    b"no JSON",
    b"\xff",
    b"[1]",
    b"{}",
    {"prompt": 3},
    {"prompt": "a", "max_tokens": -1},
    {"prompt": "a", "temperature": "hot"},
    {"prompt": "a", "max_new_tokens": 3},
    {"messages": []},
    {"prompt": "the " * 3000},
)


@dataclass(frozen=True)
class Place:
    """How a place runs a bundle: the start command, the port, and the paths that it requests.

    `model` is the name that requests have to have, None if they need none.
    """

    name: str
    start: Start
    port: int
    chats: str
    prompts: str
    health: str
    model: str | None = None


@dataclass(frozen=True)
class Server:
    """A running server, and its log."""

    place: Place
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def address(self) -> str:
        """Its host and port."""
        return f"127.0.0.1:{self.place.port}"

    def url(self, path: str) -> str:
        """Return the URL of a path."""
        return f"http://{self.address}{path}"

    def request(self, content: Any) -> tuple[str, bytes]:
        """Return the path for `content` and its body; bytes are sent unchanged."""
        if isinstance(content, bytes):
            return self.place.prompts, content
        named = {} if self.place.model is None else {"model": self.place.model}
        path = self.place.chats if "messages" in content else self.place.prompts
        return path, json.dumps({**named, **content}).encode()

    def ask(self, content: Any) -> tuple[int, Any]:
        """Return status and JSON of the reply."""
        path, body = self.request(content)
        return fetch(self.url(path), body)

    def connect(self) -> http.client.HTTPConnection:
        """Open a connection."""
        return http.client.HTTPConnection(self.address, timeout=120)

    def seconds_until_idle(self) -> float:
        """Wait until no answer is in work or waits, by the server's own figures."""
        started = time.monotonic()
        while time.monotonic() - started < 60:
            text = str(fetch(self.url("/metrics"))[1])
            if re.findall(r"^vllm:num_requests_\w+{.*} (.*)$", text, re.MULTILINE) == ["0.0"] * 2:
                break
            time.sleep(0.02)
        return time.monotonic() - started

    @property
    def said(self) -> str:
        """The log so far."""
        return self.log.read_text("utf-8", "replace")


Start = Callable[[Path, Path], "subprocess.Popen[bytes]"]
"""Start a server: arguments are the folder of the package and the file of the log."""


def text_of(reply: Any) -> str | None:
    """Return the text of an answer in OpenAI's format, None for another reply."""
    try:
        (choice,) = reply["choices"]
        return str(choice["text"] if "text" in choice else choice["message"]["content"])
    except (KeyError, TypeError, ValueError):
        return None


def fetch(url: str, body: bytes | None = None) -> tuple[int, Any]:
    """Return status and JSON of the reply to a GET, or to a POST if there is a body."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, _parse(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, _parse(error.read())


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode("utf-8", "replace")


@contextmanager
def running(place: Place, package: Path, log: Path) -> Iterator[Server]:
    """Run the server of `place`, wait until it is healthy, and end it with SIGTERM."""
    process = place.start(package, log)
    server = Server(place, process, log)
    try:
        _await_health(server)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_health(server: Server) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended: {server.said[-2000:]}")
        try:
            if fetch(server.url(server.place.health))[0] == 200:
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"the server does not become healthy: {server.said[-2000:]}")


def environment(**more: str) -> Mapping[str, str]:
    """Return this process's environment without PYTHONPATH, which could lead to llama_onnx."""
    return {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **more}


# ---- cases ---------------------------------------------------------------------------------------


def answer_cases(server: Server, package: Path) -> Iterator[Case]:
    """Answers, refusals, the provider, the other routes of OpenAI's API."""
    with Llama.load(package, engine="onnxruntime") as model:
        provider = re.findall(r"serving (.* · .*)", server.said)
        runs = provider[-1] if provider else "nothing"
        yield Case("the log names the provider", "CPUExecutionProvider" in runs, runs)
        expected = ["".join(model.generate(prompt, max_new_tokens=24)) for prompt in PROMPTS]
        expected_chat = "".join(model.chat(MESSAGES, max_new_tokens=24))
    given = [text_of(server.ask({"prompt": text, "max_tokens": 24})[1]) for text in PROMPTS]
    same = sum(a == b for a, b in zip(given, expected, strict=True))
    yield Case("prompts continued", same == len(PROMPTS), f"{same} of {len(PROMPTS)} as `Llama`")
    status, reply = server.ask({"messages": MESSAGES, "max_tokens": 24})
    same_chat = text_of(reply) == expected_chat
    yield Case("a conversation answered", status == 200 and same_chat, "as `Llama`")
    yield client_case(server, expected_chat)
    yield refusals(server)


def client_case(server: Server, expected: str) -> Case:
    """Ask with the official client, at the routes of OpenAI's API."""
    from openai import OpenAI

    client = OpenAI(base_url=server.url("/v1"), api_key="the cloud's")
    (name,) = [model.id for model in client.models.list()]
    messages: Any = MESSAGES
    chunks = client.chat.completions.create(
        model=name, messages=messages, max_tokens=24, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    said = f"model {name}, streamed, as `Llama`"
    return Case("the library openai at /v1", text == expected, said)


def refusals(server: Server) -> Case:
    """Check that every invalid request gets status 400 and a sentence."""
    replies = [server.ask(content) for content in WRONG]
    wrong = [
        f"{str(content)[:40]}: {status} {reply!r}"
        for content, (status, reply) in zip(WRONG, replies, strict=True)
        if status != 400 or not str(reply["error"]["message"]).endswith(".")
    ]
    said = "; ".join(wrong) or f"{len(WRONG)} of {len(WRONG)}: 400 and a sentence"
    return Case("invalid requests", not wrong, said)


def load_cases(server: Server) -> Iterator[Case]:
    """Health checks during a long prompt; more simultaneous requests than are accepted."""
    long = {"prompt": "7" * 4000, "max_tokens": 4}
    with ThreadPoolExecutor(1) as pool:
        started = time.monotonic()
        answer = pool.submit(server.ask, long)
        pings = [_time_ping(server)]
        while not answer.done():
            pings.append(_time_ping(server))
        took = time.monotonic() - started
    slowest = max(pings)
    said = f"{slowest:.2f} s at most, {len(pings)} times in the {took:.1f} s of an answer"
    # If the prompt held Python's lock, the slowest would take nearly as long as the answer.
    holds = answer.result()[0] == 200 and slowest < min(PING_LIMIT, took / 4)
    yield Case("health checks during a long prompt", holds, said)
    short = {"prompt": "7" * 400, "max_tokens": 8}
    with ThreadPoolExecutor(CROWD) as pool:
        replies = list(pool.map(server.ask, [short] * CROWD))
    statuses = Counter(status for status, _ in replies)
    whole = all(
        reply["usage"]["completion_tokens"] == 8 for status, reply in replies if status == 200
    )
    holds = whole and statuses.keys() <= {200, 429} and statuses[200] >= PLACES
    said = f"{statuses[200]} answered, {statuses[429]} refused with 429"
    yield Case(f"{CROWD} requests at once", holds, said)
    yield Case("afterwards", server.ask(short)[0] == 200, "answers as before")


def _time_ping(server: Server) -> float:
    started = time.monotonic()
    status, _ = fetch(server.url(server.place.health))
    time.sleep(0.05)
    return time.monotonic() - started if status == 200 else float("inf")


def end_case(server: Server) -> Case:
    """Check that SIGTERM ends the server, and that an answer in work is completed first."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.ask, {"prompt": "the quick", "max_tokens": 200})
        time.sleep(0.05)
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(60)
        took = time.monotonic() - started
        status, _ = answer.result()
    said = f"an answer in progress was completed, the process ended in {took:.1f} s"
    return Case("SIGTERM", status == 200, said)


def foreign_case(place: Place, package: Path, log: Path) -> Case:
    """Check that a package for a missing device does not start on the CPU."""
    process = place.start(package, log)
    try:
        status = process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        return Case("a package for cuda on this machine", False, "it runs")
    lines = [line for line in log.read_text("utf-8").splitlines() if "cuda" in line]
    said = lines[-1].rpartition("Error: ")[2] if lines else "cuda is not mentioned"
    return Case("a package for cuda on this machine", bool(status and lines), f"ends: {said}")


def run_place(
    place: Place, package: Path, slow: Path, foreign: Path, logs: Path, more: Sequence[Any] = ()
) -> Iterator[Case]:
    """Yield all cases; `more` are functions that yield cases of a server with the slow package."""
    with running(place, package, logs / f"{place.name}.log") as server:
        yield from answer_cases(server, package)
        yield end_case(server)
    with running(place, slow, logs / f"{place.name}-slow.log") as server:
        yield from load_cases(server)
        for cases in more:
            yield from cases(server)
    yield foreign_case(place, foreign, logs / f"{place.name}-foreign.log")

"""A bundle's server, started as its README says, and the cases that every server must pass."""

from __future__ import annotations

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

WRONG = (
    b"",
    b"no JSON",
    b"\xff",
    b"[1]",
    b"{}",
    b'{"prompt": 3}',
    b'{"prompt": "a", "max_new_tokens": -1}',
    b'{"prompt": "a", "temperature": "hot"}',
    b'{"prompt": "a", "adapter": "law"}',
    b'{"messages": []}',
    b'{"prompt": "%s"}' % (b"the " * 3000),
)


@dataclass(frozen=True)
class Server:
    """A running server: its URLs for requests and for health checks, and its log."""

    process: subprocess.Popen[bytes]
    url: str
    health: str
    log: Path

    def ask(self, content: Any) -> tuple[int, Any]:
        """Return status and JSON of the reply; bytes are sent unchanged."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return fetch(self.url, body)

    @property
    def said(self) -> str:
        """The log so far."""
        return self.log.read_text("utf-8", "replace")

    @property
    def model_process(self) -> int:
        """The process that holds the model, as the log names it."""
        return int(re.findall(r"\(process (\d+)\)", self.said)[-1])


Start = Callable[[Path, Path], "subprocess.Popen[bytes]"]
"""Start a server: arguments are the folder of the package and the file of the log."""


@dataclass(frozen=True)
class Place:
    """How a place runs a bundle: the start command, the port, and the paths that it requests."""

    name: str
    start: Start
    port: int
    answers: str
    health: str


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
    base = f"http://127.0.0.1:{place.port}"
    server = Server(process, base + place.answers, base + place.health, log)
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
            if fetch(server.health)[0] == 200:
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"the server does not become healthy: {server.said[-2000:]}")


def environment(**more: str) -> Mapping[str, str]:
    """Return this process's environment without PYTHONPATH, which could lead to llama_onnx."""
    return {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **more}


# ---- cases ---------------------------------------------------------------------------------------


def answer_cases(server: Server, package: Path) -> Iterator[Case]:
    """Answers, refusals, the provider, telemetry, a killed process."""
    model = Llama.load(package)
    provider = re.findall(r"serving (.* · .*)", server.said)
    runs = re.sub(r" \(process \d+\)", "", provider[-1]) if provider else "nothing"
    yield Case("the log names the provider", "CPUExecutionProvider" in runs, runs)
    expected = ["".join(model.generate(prompt, max_new_tokens=24)) for prompt in PROMPTS]
    given = [server.ask({"prompt": prompt, "max_new_tokens": 24}) for prompt in PROMPTS]
    same = sum(a == 200 and b["text"] == c for (a, b), c in zip(given, expected, strict=True))
    yield Case("prompts continued", same == len(PROMPTS), f"{same} of {len(PROMPTS)} as `Llama`")
    status, reply = server.ask({"messages": MESSAGES, "max_new_tokens": 24})
    same_chat = reply.get("text") == "".join(model.chat(MESSAGES, max_new_tokens=24))
    yield Case("a conversation answered", status == 200 and same_chat, "as `Llama`")
    yield refusals(server)
    pid = server.model_process
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    off = b"ORT_DISABLE_TELEMETRY=1" in variables
    yield Case("telemetry is off in the model's process", off, "ORT_DISABLE_TELEMETRY=1")
    os.kill(pid, signal.SIGKILL)
    time.sleep(1)
    status, reply = server.ask({"prompt": PROMPTS[0], "max_new_tokens": 24})
    holds = status == 200 and reply["text"] == expected[0]
    yield Case("the model's process killed", holds, "started again, the next request answered")


def refusals(server: Server) -> Case:
    """Check that every invalid request gets status 400 and a sentence."""
    replies = [server.ask(body) for body in WRONG]
    wrong = [
        f"{body[:40]!r}: {status} {reply!r}"
        for body, (status, reply) in zip(WRONG, replies, strict=True)
        # Azure's server itself refuses what is not UTF-8, with "message".
        if status != 400 or not isinstance(reply, dict) or reply.keys() - {"error", "message"}
    ]
    said = "; ".join(wrong) or f"{len(WRONG)} of {len(WRONG)}: 400 and a sentence"
    return Case("invalid requests", not wrong, said)


def load_cases(server: Server) -> Iterator[Case]:
    """Health checks during a long prompt; more simultaneous requests than are accepted."""
    long = {"prompt": "7" * 4000, "max_new_tokens": 4}
    with ThreadPoolExecutor(1) as pool:
        started = time.monotonic()
        answer = pool.submit(server.ask, long)
        pings = [_time_ping(server)]
        while not answer.done():
            pings.append(_time_ping(server))
        took = time.monotonic() - started
    slowest = max(pings)
    said = f"{slowest:.2f} s at most, {len(pings)} times in the {took:.1f} s of an answer"
    # If the model ran in the server's process, the slowest would take nearly as long as the answer.
    holds = answer.result()[0] == 200 and slowest < min(PING_LIMIT, took / 4)
    yield Case("health checks during a long prompt", holds, said)
    short = {"prompt": "7" * 400, "max_new_tokens": 8}
    alone = server.ask(short)[1]["text"]
    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(server.ask, [short] * 12))
    statuses = Counter(status for status, _ in replies)
    same = all(reply["text"] == alone for status, reply in replies if status == 200)
    holds = same and statuses.keys() == {200, 503} and statuses[200] >= 9
    said = f"{statuses[200]} answered alike, {statuses[503]} refused with 503"
    yield Case("twelve requests at once", holds, said)
    yield Case("afterwards", server.ask(short)[0] == 200, "answers as before")


def _time_ping(server: Server) -> float:
    started = time.monotonic()
    status, _ = fetch(server.health)
    time.sleep(0.05)
    return time.monotonic() - started if status == 200 else float("inf")


def end_case(server: Server) -> Case:
    """Check that SIGTERM ends the server and the process of the model."""
    pid = server.model_process
    started = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(30)
    while Path(f"/proc/{pid}").exists() and time.monotonic() < started + 10:
        time.sleep(0.05)
    took = time.monotonic() - started
    return Case(
        "SIGTERM", not Path(f"/proc/{pid}").exists(), f"all processes ended in {took:.1f} s"
    )


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

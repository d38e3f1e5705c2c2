"""What strangers send to a server: slow readers and senders, and far too much of everything."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import Any

import psutil

from benchmarks.trials.clouds.server import Server
from tests.support.tables import Case

SHORT = {"prompt": "the quick", "max_tokens": 8}
GROWTH = 300e6
"""Most bytes that a server may grow by."""

Send = Callable[[http.client.HTTPConnection, str], None]


def body_of(size: int) -> Send:
    """Return what sends a body of `size` bytes, with its length in the head."""

    def send(connection: http.client.HTTPConnection, path: str) -> None:
        connection.putrequest("POST", path)
        connection.putheader("Content-Length", str(size))
        connection.endheaders()
        _pieces(connection, size)

    return send


def chunked_body(connection: http.client.HTTPConnection, path: str) -> None:
    """Send 300 MB in chunks: the head says nothing about the size."""
    connection.putrequest("POST", path)
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    piece = b"%x\r\n%s\r\n" % (1 << 16, b" " * (1 << 16))
    try:
        for _ in range(4578):
            connection.send(piece)
        connection.send(b"0\r\n\r\n")
    except OSError:
        pass  # the server has answered and closed


def _pieces(connection: http.client.HTTPConnection, size: int) -> None:
    piece = b" " * (1 << 16)
    try:
        while size > 0:
            connection.send(piece[:size])
            size -= len(piece)
    except OSError:
        pass  # the server has answered and closed


def json_body(content: Any) -> Send:
    """Return what sends `content` as JSON; bytes are sent unchanged."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()

    def send(connection: http.client.HTTPConnection, path: str) -> None:
        with suppress(OSError):
            connection.request("POST", path, body)

    return send


MESSAGE = {"role": "user", "content": "a"}
FOLDED = {**SHORT, "top_k": 10**6, "seed": 2**64 - 1}

CASES: tuple[tuple[str, Send, int], ...] = (
    ("a body of 300 MB", body_of(300_000_000), 413),
    ("a body of 300 MB in chunks", chunked_body, 413),
    ("a prompt of 10 MB", json_body({"prompt": "the " * 2_500_000}), 413),
    ("a prompt of 4 MB", json_body({"prompt": "7" * 4_000_000}), 400),
    ("300,000 stop texts", json_body({**SHORT, "stop": ["ab"] * 300_000}), 400),
    ("10,001 messages", json_body({"messages": [MESSAGE] * 10_001}), 400),
    ("JSON nested 1,000,000 times", json_body(b"[" * 1_000_000), 400),
    ("a temperature of 400 digits", json_body({**SHORT, "temperature": 10**399}), 400),
    ("top_k 1,000,000 and a seed of 64 bits", json_body(FOLDED), 200),
)
"""What is sent, and the status that must come back."""


def stranger_cases(server: Server) -> Iterator[Case]:
    """Send each, and watch memory and other clients meanwhile."""
    for what, send, expected in CASES:
        with watched(server) as seen:
            status = _exchange(server, send)
        yield Case(what, status == expected and seen.fine, f"{status}; {seen}")
    yield slow_reader_case(server)
    yield slow_sender_case(server)
    yield left_case(server)
    for path in ("/docs", "/redoc"):
        connection = server.connect()
        connection.request("GET", path)
        status = connection.getresponse().status
        yield Case(f"GET {path}", status == 404, str(status))


class Seen:
    """How long other clients waited, and by how much the server grew."""

    def __init__(self) -> None:
        self.slowest, self.growth, self.failed = 0.0, 0.0, 0

    @property
    def fine(self) -> bool:
        """Whether every other client was answered, and memory stayed bounded."""
        return not self.failed and self.growth < GROWTH

    def __str__(self) -> str:
        return (
            f"memory grew by {self.growth / 1e6:.0f} MB; others answered after "
            f"{self.slowest:.1f} s at most"
        )


@contextmanager
def watched(server: Server) -> Iterator[Seen]:
    """Ask for short answers while the block runs, and measure."""
    seen, over = Seen(), Event()
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss

    def measure() -> None:
        while not over.wait(0.02):
            seen.growth = max(seen.growth, process.memory_info().rss - before)

    def ask() -> None:
        while True:
            started = time.monotonic()
            status, _ = server.ask(SHORT)
            seen.failed += status != 200
            seen.slowest = max(seen.slowest, time.monotonic() - started)
            if over.wait(0.1):
                return

    threads = [Thread(target=measure), Thread(target=ask)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        over.set()
        for thread in threads:
            thread.join()


def _exchange(server: Server, send: Send) -> int:
    connection = server.connect()
    try:
        send(connection, server.place.prompts)
        return connection.getresponse().status
    except OSError:
        return 0  # no answer
    finally:
        connection.close()


def _open(server: Server, head: bytes) -> socket.socket:
    opened = socket.socket()
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    opened.connect(("127.0.0.1", server.place.port))
    opened.sendall(head)
    return opened


def slow_reader_case(server: Server) -> Case:
    """Ask for long streams and read nothing of them."""
    long = json.dumps({"prompt": "the quick", "max_tokens": 400, "stream": True})
    path = server.place.prompts
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(long)}\r\n\r\n{long}"
    with watched(server) as seen:
        readers = [_open(server, head.encode()) for _ in range(2)]
        time.sleep(1)
        status, _ = server.ask(SHORT)
    for reader in readers:
        reader.close()
    return Case("two clients that read nothing", status == 200 and seen.fine, str(seen))


def slow_sender_case(server: Server) -> Case:
    """Send 200 heads without an end, and 200 bodies a byte at a time."""
    path = server.place.prompts
    heads = [b"POST %s HTTP/1.1\r\nHost: a\r\n" % path.encode()]
    heads.append(heads[0] + b"Content-Length: 4000000\r\n\r\n{")
    with watched(server) as seen:
        senders = [_open(server, heads[number % 2]) for number in range(400)]
        for _ in range(20):
            for sender in senders:
                sender.send(b" ")
            time.sleep(0.1)
    for sender in senders:
        sender.close()
    return Case("400 clients that send a byte at a time", seen.fine, str(seen))


def left_case(server: Server) -> Case:
    """Ask for a long answer, whole, while a long prompt is read, and leave."""
    started = time.monotonic()
    server.ask({"prompt": "5" * 4000, "max_tokens": 90})
    full = time.monotonic() - started
    connection = server.connect()
    # Another prompt: the first is remembered.
    long = json.dumps({"prompt": "6" * 4000, "max_tokens": 90})
    connection.request("POST", server.place.prompts, long)
    time.sleep(0.3)
    connection.close()
    took = server.seconds_until_idle()
    said = f"its place was free after {took:.1f} s; the whole answer takes {full:.1f} s"
    return Case("a client leaves while its prompt is read", took < full / 2, said)

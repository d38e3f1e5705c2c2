"""Replicas: which one answers, what happens when one dies, and what the front says of them all."""

from __future__ import annotations

import asyncio
import errno
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.serving.http.api_keys import make_guard
from llama_onnx.runtime.serving.http.limits import Limits
from llama_onnx.runtime.serving.http.web_server import Protocol, address, listen
from llama_onnx.runtime.serving.openai_errors import NotReadyError
from llama_onnx.runtime.serving.replicas.front import Front
from llama_onnx.runtime.serving.replicas.gathered_metrics import gathered
from llama_onnx.runtime.serving.replicas.keeper import Keeper, Up
from llama_onnx.runtime.serving.replicas.pool import Pool
from llama_onnx.runtime.serving.replicas.routing import (
    PART,
    REMEMBERED,
    WORTH,
    Candidate,
    Seen,
    Wanted,
    choose,
    read_wanted,
)
from llama_onnx.runtime.serving.replicas.serve_replicas import Started, replicas
from llama_onnx.runtime.serving.serving_spec import ServingSpec
from llama_onnx.targets.errors import PackageError, ResourceError
from tests.support.http_calls import call

KEY, ROWS = "only for clients", 4


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


# Which replica


def wanted(**fields: Any) -> Wanted:
    return read_wanted(json.dumps(fields).encode())


def test_the_next_turn_begins_as_the_conversation_did() -> None:
    first = wanted(model="m", messages=[user("a"), user("b")])
    answer = {"role": "assistant", "content": "c"}
    second = wanted(model="m", messages=[user("a"), user("b"), answer, user("d")])
    assert second.beginnings[:2] == first.beginnings and len(second.beginnings) == 4


@pytest.mark.parametrize(
    "changed",
    [
        {"messages": [user("A"), user("b")]},
        {"model": "adapter"},
        {"tools": [{"type": "function"}]},
        {"chat_template_kwargs": {"x": 1}},
    ],
)
def test_what_comes_before_a_message_is_part_of_its_beginning(changed: dict[str, Any]) -> None:
    fields = {"model": "m", "messages": [user("a"), user("b")]}
    ours, other = wanted(**fields), wanted(**fields | changed)
    assert not set(ours.beginnings) & set(other.beginnings)


def test_prompts_are_known_by_their_parts() -> None:
    text = "x" * (3 * PART)
    long, longer = wanted(prompt=text), wanted(prompt=text + "y")
    assert len(long.beginnings) == 3 and longer.beginnings[:3] == long.beginnings
    assert wanted(prompt=[text, "other"], n=2) == Wanted(4, long.beginnings)
    assert len(wanted(prompt=list(range(2 * PART))).beginnings) == 2
    assert wanted(input="a", instructions="b") != wanted(input="a", instructions="c")
    assert wanted(input=[user("a")]).beginnings


@settings(max_examples=40)
@given(st.binary() | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(
    lambda value: json.dumps(dict.fromkeys(("n", "prompt", "messages"), value)).encode()
))  # fmt: skip
def test_a_body_that_means_nothing_is_a_request_all_the_same(body: bytes) -> None:
    assert read_wanted(body).places >= 1


def test_deep_json_is_left_to_the_replica() -> None:
    assert read_wanted(b"[" * 100_000) == Wanted()


def test_the_replica_that_knows_the_beginning_answers_within_bounds() -> None:
    def chosen(load: int, known: int, rows: int = 8) -> int | None:
        return choose([Candidate(0, 0, 0), Candidate(1, load, known)], 1, rows)

    assert [chosen(load, 10) for load in (0, 1, 2)] == [1, 1, 0]
    assert [chosen(load, 2 * WORTH) for load in (3, 4)] == [1, 0]
    assert [chosen(load, 100 * WORTH) for load in (4, 5)] == [1, 0]
    assert chosen(8, 100 * WORTH) == 0


def test_what_nobody_knows_goes_to_the_idlest_and_in_turns() -> None:
    assert choose([Candidate(0, 2), Candidate(1, 1)], 1, 8) == 1
    assert choose([Candidate(0, 1, 0, 5), Candidate(1, 1, 0, 4)], 1, 8) == 1
    assert choose([], 1, 8) is None
    assert choose([Candidate(0, 8), Candidate(1, 7)], 2, 8) is None
    assert choose([Candidate(0, 1), Candidate(1, 0)], 16, 8) == 1


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 20_000)), min_size=1, max_size=6),
    st.integers(1, 8),
)
def test_no_replica_gets_more_than_the_bound(loads: list[tuple[int, int]], rows: int) -> None:
    found = choose([Candidate(n, *one) for n, one in enumerate(loads)], 1, rows)
    free = [load for load, _ in loads if load < rows]
    assert (found is None) == (not free)
    if found is not None:
        assert loads[found][0] < rows and loads[found][0] - min(free) <= max(1, rows // 2)


def test_beginnings_are_forgotten_one_day() -> None:
    seen = Seen()
    old, new = (b"old", 3), (b"new", 4)
    seen.add([old])
    seen.add((str(n).encode(), 1) for n in range(REMEMBERED - 1))
    assert seen.known([old, new]) == 3
    seen.add([new])
    assert seen.known([old]) == 0 and seen.known([old, new]) == 4 and len(seen) == REMEMBERED


# Who waits


def test_the_oldest_request_gets_the_next_row_and_one_that_leaves_none() -> None:
    async def go() -> list[str]:
        pool, done = Pool(1, 1), list[str]()
        pool.set_port(0, 1)

        async def ask(name: str) -> None:
            async with pool.take(Wanted()):
                done.append(name)

        async with pool.take(Wanted()) as held:
            tasks = [asyncio.create_task(ask(name)) for name in "abc"]
            await asyncio.sleep(0)
            assert (held.load, pool.waiting, done) == (1, 3, [])
            tasks[1].cancel()
            await asyncio.sleep(0)
            assert pool.waiting == 2
            async with pool.take(Wanted(0)):  # a page waits for nobody
                pass
        await asyncio.gather(*tasks, return_exceptions=True)
        assert pool.replicas[0].load == 0
        return done

    assert asyncio.run(go()) == ["a", "c"]


def test_requests_wait_for_a_replica_and_not_for_ever() -> None:
    async def go() -> None:
        pool = Pool(2, 1, patience=0.05)
        with pytest.raises(NotReadyError):
            async with pool.take(Wanted()):
                pass
        pool = Pool(2, 1)
        asyncio.get_running_loop().call_later(0.02, pool.set_port, 1, 5)
        async with pool.take(Wanted()) as found:
            assert found.number == 1
        with pytest.raises(NotReadyError):  # it will not do, and the other is not there
            async with pool.take(Wanted(), {5}):
                pass
        pool.rest(found)
        pool.set_port(0, 6)
        async with pool.take(Wanted()) as other:
            assert other.number == 0

    asyncio.run(go())


# The front, before replicas that do as they are told


@dataclass
class Fake:
    """A replica whose next requests are answered by `behave`; `bodies` has what it was asked."""

    port: int = 0
    bodies: list[bytes] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)
    behave: str = "answer"

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        body = await reader.readexactly(size)
        self.bodies.append(head + body)
        events = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
        if self.behave == "answer":
            writer.write(_whole(200, {"port": self.port}))
        elif self.behave == "not ready":
            writer.write(_whole(503, {"error": {"code": "not_ready", "message": "changed"}}))
        elif self.behave == "no memory":
            writer.write(_whole(503, {"error": {"code": "insufficient_memory"}}))
        elif self.behave == "stream":
            writer.write(events + b"data: 1\n\ndata: [DONE]\n\n")
        elif self.behave == "break the stream":
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
                         b"transfer-encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n")  # fmt: skip
        elif self.behave == "hang":
            await reader.read()
            self.left.set()
        await writer.drain()
        writer.close()


def _whole(status: int, content: Any) -> bytes:
    body = json.dumps(content).encode()
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


@dataclass
class Fakes:
    """A front at `url` before two fakes."""

    url: str
    fakes: list[Fake]
    front: Front

    def ask(self, text: str = "hello", path: str = "/v1/chat/completions") -> tuple[int, bytes]:
        return call(self.url, path, {"model": "m", "messages": [user(text)]}, key=KEY)


@pytest.fixture
def fronted() -> Iterator[Fakes]:
    keepers = [Keeper(number, ServingSpec("nowhere"), "inner") for number in range(2)]
    front, fakes = Front(keepers, "inner", rows=1, waiting=1), [Fake(), Fake()]
    guarded: Any = Limits(with_fakes(front, keepers, fakes), guard=make_guard(KEY, None))
    config = uvicorn.Config(guarded, http=Protocol, log_config=None, timeout_graceful_shutdown=1)
    server, opened = uvicorn.Server(config), listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield Fakes(address(opened), fakes, front)
    server.should_exit = True
    thread.join(20)


def with_fakes(front: Front, keepers: list[Keeper], fakes: list[Fake]) -> Any:
    """The front in a loop where the fakes listen as well."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for keeper, fake in zip(keepers, fakes, strict=True):
                server = await asyncio.start_server(fake, "127.0.0.1", 0)
                fake.port = server.sockets[0].getsockname()[1]
                keeper.up = Up(fake.port, 0, "fake", "cpu", None, None)
        await front(scope, receive, send)

    return app


def test_a_conversation_goes_where_it_began_and_has_the_inner_key_alone(fronted: Fakes) -> None:
    ports = {json.loads(fronted.ask("one")[1])["port"] for _ in range(3)}
    other = {json.loads(fronted.ask("two")[1])["port"] for _ in range(3)}
    assert len(ports) == len(other) == 1 and ports != other
    (asked, *_) = fronted.fakes[0].bodies
    assert b"Bearer inner" in asked and KEY.encode() not in asked


def test_the_key_is_asked_for_at_the_front(fronted: Fakes) -> None:
    status, body = call(fronted.url, "/v1/chat/completions", {"messages": []}, key="wrong")
    assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key")
    assert not any(fake.bodies for fake in fronted.fakes)


def test_a_stream_passes_unchanged(fronted: Fakes) -> None:
    for fake in fronted.fakes:
        fake.behave = "stream"
    assert fronted.ask() == (200, b"data: 1\n\ndata: [DONE]\n\n")


@pytest.mark.parametrize("behave", ["gone", "not ready"])
def test_what_a_replica_has_not_begun_another_answers(fronted: Fakes, behave: str) -> None:
    began = json.loads(fronted.ask()[1])["port"]
    (first,) = (fake for fake in fronted.fakes if fake.port == began)
    (second,) = (fake for fake in fronted.fakes if fake.port != began)
    if behave == "gone":
        gone(fronted, first)
    else:
        first.behave = behave
    assert fronted.ask() == (200, json.dumps({"port": second.port}).encode())


def gone(fronted: Fakes, fake: Fake) -> None:
    """Nobody listens at the port of a fake any more, and the front does not know it yet."""
    (replica,) = (one for one in fronted.front.pool.replicas if one.port == fake.port)
    with_nobody = listen("127.0.0.1", 0)
    replica.port = with_nobody.getsockname()[1]
    with_nobody.close()


def test_if_all_refuse_the_client_hears_why(fronted: Fakes) -> None:
    for fake in fronted.fakes:
        fake.behave = "not ready"
    status, body = fronted.ask()
    assert (status, json.loads(body)["error"]["message"]) == (503, "changed")
    fronted.fakes[0].behave = fronted.fakes[1].behave = "no memory"
    assert json.loads(fronted.ask()[1])["error"]["code"] == "insufficient_memory"


def test_an_answer_that_breaks_is_an_error_of_openais(fronted: Fakes) -> None:
    for fake in fronted.fakes:
        fake.behave = "break"
    status, body = fronted.ask()
    assert (status, json.loads(body)["error"]["type"]) == (502, "server_error")
    for fake in fronted.fakes:
        fake.behave = "break the stream"
    status, body = fronted.ask()
    first, last = body.decode().removesuffix("\n\n").split("\n\n")
    assert (status, first) == (200, "data: 1")
    assert "the replica that was answering has ended" in json.loads(last[6:])["error"]["message"]
    status, body = fronted.ask(path="/v1/responses")
    name, data = body.decode().split("\n\n")[1].split("\n")
    assert name == "event: error" and json.loads(data[6:])["type"] == "error"
    assert sum(len(fake.bodies) for fake in fronted.fakes) == 3, "no answer is tried twice"


def test_a_client_that_leaves_is_left_and_a_full_server_says_so(fronted: Fakes) -> None:
    for fake in fronted.fakes:
        fake.behave = "hang"
    clients = [threading.Thread(target=patient, args=(fronted,)) for _ in range(3)]
    for client in clients:
        client.start()
    while fronted.front.pool.waiting < 1:
        time.sleep(0.01)
    status, body = fronted.ask()
    assert (status, json.loads(body)["error"]["type"]) == (429, "rate_limit_error")
    for client in clients:
        client.join()
    assert all(fake.left.wait(10) for fake in fronted.fakes)


def patient(fronted: Fakes) -> None:
    """A client that leaves after half a second."""
    with pytest.raises(TimeoutError):
        call(fronted.url, "/v1/completions", {"prompt": "x"}, key=KEY, seconds=0.5)


def test_figures_have_the_number_of_their_replica() -> None:
    text = '# TYPE vllm:prompt_tokens counter\nvllm:prompt_tokens_total{model_name="m"} 3.0\n'
    found = gathered({0: text, 1: text}, 2, {0: 0, 1: 4}).decode()
    samples = {
        (sample.name, sample.labels.get("engine")): sample.value
        for family in text_string_to_metric_families(found)
        for sample in family.samples
    }
    assert samples["vllm:prompt_tokens_total", "1"] == samples["vllm:prompt_tokens_total", "0"] == 3
    assert samples["llama_onnx:front_waiting", None] == 2
    assert samples["llama_onnx:replica_restarts_total", "1"] == 4


# Real processes


@dataclass
class Real:
    """A front at `url` before real replicas."""

    url: str
    started: Started

    def health(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(call(self.url, "/health")[1])
        return found


@pytest.fixture(scope="module")
def real(package_fp32: Path) -> Iterator[Real]:
    spec = ServingSpec.of(package_fp32, name="tiny", rows=ROWS, cache_bytes=128 << 20, threads=1)
    with replicas(spec, 2) as started:
        guarded: Any = Limits(started.app, guard=make_guard(KEY, None))
        config = uvicorn.Config(guarded, http=Protocol, log_config=None)
        server, opened = uvicorn.Server(config), listen("127.0.0.1", 0)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
        thread.start()
        yield Real(address(opened), started)
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def client(real: Real) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{real.url}/v1", api_key=KEY, max_retries=0)


def test_replicas_answer_as_one_server_and_say_where_they_run(
    real: Real, client: openai.OpenAI, package_fp32: Path
) -> None:
    model = Llama.load(package_fp32, engine="onnxruntime", threads=1)
    for text in ("the quick", "the lazy", "the brown"):
        chat: Any = [user(text)]
        expected = "".join(model.chat(chat, max_new_tokens=12))
        whole = client.chat.completions.create(model="tiny", messages=chat, max_tokens=12)
        stream = client.chat.completions.create(
            model="tiny", messages=chat, max_tokens=12, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert whole.choices[0].message.content == "".join(pieces) == expected
    model.close()
    about = json.loads(call(real.url, "/about", key=KEY)[1])
    assert [one["provider"] for one in about["replicas"]] == ["cpu", "cpu"]
    assert call(real.url, "/")[0] == call(real.url, "/ready")[0] == 200
    assert call(real.url, "/metrics", key=KEY)[1].count(b"vllm:num_requests_running{") == 2


def test_a_second_turn_finds_its_cache(real: Real, client: openai.OpenAI) -> None:
    chat: list[Any] = [user("the quick brown fox jumps over the lazy dog " * 3)]

    def hits() -> float:
        found = call(real.url, "/metrics", key=KEY)[1].decode()
        return sum(
            sample.value
            for family in text_string_to_metric_families(found)
            for sample in family.samples
            if sample.name == "vllm:prefix_cache_hits_total"
        )

    before = hits()
    first = client.chat.completions.create(model="tiny", messages=chat, max_tokens=4)
    assert first.usage is not None
    between = hits()
    chat += [{"role": "assistant", "content": first.choices[0].message.content}, user("more")]
    other: Any = [user("x")]
    for _ in range(3):  # in between, for the other replica
        client.chat.completions.create(model="tiny", messages=other, max_tokens=1)
    others = hits() - between
    client.chat.completions.create(model="tiny", messages=chat, max_tokens=4)
    assert between - before < 20
    assert hits() - between - others >= first.usage.prompt_tokens - 8


def stopped_at_work(process: subprocess.Popen[str], real: Real) -> bool:
    """Stop a replica, and return whether it has answers to do that it cannot complete any more."""
    if real.started.app.pool.replicas[0].load == 0:
        return False
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.05)  # what it had sent has arrived by then
    if real.started.app.pool.replicas[0].load:
        return True
    process.send_signal(signal.SIGCONT)
    return False


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_killed_replica_costs_its_answers_in_work_alone_and_comes_back(real: Real) -> None:
    victim = real.started.keepers[0]
    assert victim.up is not None and victim._process is not None
    old, outcomes = victim.up.pid, list[tuple[int, bytes]]()
    fields = {"model": "tiny", "max_tokens": 60, "temperature": 0, "logit_bias": {"2": -100}}

    def ask(number: int) -> None:
        for turn in range(6):
            chat = {"messages": [user(f"{number} {turn}")], **fields}
            outcomes.append(call(real.url, "/v1/chat/completions", chat, key=KEY))

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for one in clients:
        one.start()
    while len(outcomes) < 8 or not stopped_at_work(victim._process, real):
        time.sleep(0.005)
    victim._process.kill()
    for one in clients:
        one.join()
    statuses = [status for status, _ in outcomes]
    assert len(statuses) == 72 and set(statuses) <= {200, 502}
    assert 1 <= statuses.count(502) <= ROWS
    deadline = time.monotonic() + 60
    while not (up := victim.up) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert up is not None and up.pid != old
    health = real.health()
    assert health["status"] == "ok" and health["replicas"][0]["restarts"] == 1


def test_a_process_that_cannot_be_started_is_a_sentence(
    package_fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with (
        pytest.raises(ResourceError, match=r"replica 0 cannot be started: .*unavailable"),
        replicas(ServingSpec.of(package_fp32), 1),
    ):
        pass


def test_a_package_that_changed_or_cannot_be_opened_is_refused(package_fp32: Path) -> None:
    good = ServingSpec.of(package_fp32)
    other = ServingSpec(good.package, "0" * 64)
    assert ServingSpec.from_json(other.to_json()) == other
    with pytest.raises(PackageError, match="differs from the package"), replicas(other, 1):
        pass
    good.check(contents=True)

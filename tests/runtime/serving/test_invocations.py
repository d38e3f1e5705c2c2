"""SageMaker's routes: what /invocations takes, and what it refuses."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.serving.app import Settings
from llama_onnx.runtime.serving.invocations import add_invocations, read_invocation
from llama_onnx.targets.errors import UsageError
from tests.support.served import Running, running

NAME = "tiny"
PROMPT = "the quick brown fox"
CHAT: list[Any] = [{"role": "user", "content": "the lazy dog"}]


@pytest.fixture(scope="module")
def server(package_fp32: Path) -> Iterator[Running]:
    with running(package_fp32, Settings(name=NAME), add=add_invocations) as found:
        yield found


@pytest.fixture(scope="module")
def model(server: Running) -> Llama:
    return server.served.model


def ask(server: Running, content: Any, path: str = "/invocations") -> tuple[int, bytes]:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    headers = {"Content-Type": "application/json"}
    connection.request("GET" if content is None else "POST", path, body, headers)
    reply = connection.getresponse()
    return reply.status, reply.read()


# Answers


@pytest.mark.parametrize("named", [{}, {"model": None}, {"model": ""}, {"model": NAME}])
def test_a_prompt_and_a_chat_are_answered_with_and_without_a_model(
    server: Running, model: Llama, named: dict[str, Any]
) -> None:
    status, body = ask(server, {"prompt": PROMPT, "max_tokens": 9, **named})
    answer = openai.types.Completion.model_validate_json(body)
    assert (status, answer.model) == (200, NAME)
    assert answer.choices[0].text == "".join(model.generate(PROMPT, max_new_tokens=9)) != ""
    status, body = ask(server, {"messages": CHAT, "max_tokens": 9, **named})
    chat = openai.types.chat.ChatCompletion.model_validate_json(body)
    assert (status, chat.model) == (200, NAME)
    assert chat.choices[0].message.content == "".join(model.chat(CHAT, max_new_tokens=9)) != ""


def test_a_stream_is_openai_s(server: Running, model: Llama) -> None:
    status, body = ask(server, {"messages": CHAT, "max_tokens": 9, "stream": True})
    events = [line.removeprefix(b"data: ") for line in body.split(b"\n\n") if line]
    assert (status, events[-1]) == (200, b"[DONE]")
    chunks = [openai.types.chat.ChatCompletionChunk.model_validate_json(e) for e in events[:-1]]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "".join(model.chat(CHAT, max_new_tokens=9))
    status, body = ask(server, {"prompt": PROMPT, "max_tokens": 9, "stream": True})
    pieces = [json.loads(line[6:]) for line in body.split(b"\n\n")[:-2]]
    text = "".join(piece["choices"][0]["text"] for piece in pieces)
    assert text == "".join(model.generate(PROMPT, max_new_tokens=9))


def test_a_ping_is_answered_while_the_engine_lives(package_fp32: Path) -> None:
    with running(package_fp32, add=add_invocations) as server:
        assert ask(server, None, "/ping")[0] == 200
        server.served.model.close()
        assert ask(server, None, "/ping")[0] == 503
        status, body = ask(server, {"prompt": "a"})
        assert status == 503 and b"restart the server" in body


def test_the_routes_are_those_of_a_container_only(server: Running, package_fp32: Path) -> None:
    document = json.loads(ask(server, None, "/openapi.json")[1])
    assert not {"/ping", "/invocations"} & document["paths"].keys()
    with running(package_fp32) as plain:
        assert ask(plain, None, "/ping")[0] == 404


# Refusals


MANY = b",".join([b'{"role": "user", "content": "a"}'] * 10_001)
WRONG: list[tuple[bytes, str]] = [
    (b"", "not valid JSON"),
    (b'{"prompt": ', "not valid JSON"),
    (b"\xff\xfe", "not UTF-8"),
    (b"[" * 100_000, "nested too deeply"),
    (b"[1]", "must be a JSON object"),
    (b'"Once"', "must be a JSON object"),
    (b"{}", "either 'messages' or 'prompt'"),
    (b'{"prompt": null}', "either 'messages' or 'prompt'"),
    (b'{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "either 'messages' or"),
    (b'{"prompt": "a", "prompt": "b"}', "the key 'prompt' twice"),
    (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
    (b'{"prompt": 3}', "prompt"),
    (b'{"prompt": []}', "prompt must be a text"),
    (b'{"prompt": [-1]}', "-1 is not a token id"),
    (b'{"prompt": [99999999999]}', "99999999999 is not a token id"),
    (b'{"prompt": "a", "promt": "a"}', "unknown field 'promt': see /openapi.json"),
    (b'{"prompt": "a", "max_new_tokens": 1}', "unknown field 'max_new_tokens'"),
    (b'{"prompt": "a", "%s": "a"}' % (b"p" * 9999), "unknown field 'p"),
    (b'{"prompt": "a", "model": 3}', "model"),
    (b'{"messages": []}', "messages must have at least one"),
    (b'{"messages": "hi"}', "messages"),
    (b'{"messages": {"role": "user", "content": "hi"}}', "messages"),
    (b'{"messages": [{"role": "user"}]}', "messages"),
    (b'{"messages": [{"role": "user", "content": 1}]}', "messages"),
    (b'{"messages": [{"role": "user", "content": null}]}', "messages"),
    (b'{"messages": [{"role": 1, "content": "a"}]}', "messages"),
    (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "messages"),
    (b'{"messages": [%s]}' % MANY, "has 10,001 messages, more than the 10,000 allowed"),
    (b'{"prompt": "a", "max_tokens": "9"}', "max_tokens"),
    (b'{"prompt": "a", "max_tokens": true}', "max_tokens"),
    (b'{"prompt": "a", "max_tokens": 0}', "max_tokens"),
    (b'{"prompt": "a", "seed": 18446744073709551616}', "seed"),
    (b'{"prompt": "a", "top_k": 0.5}', "top_k must be a whole number"),
    (b'{"prompt": "a", "temperature": -1}', "temperature must be a number from 0"),
    (b'{"prompt": "a", "temperature": %s}' % (b"9" * 60), "temperature must be"),
    (b'{"prompt": "a", "temperature": %s}' % (b"9" * 400), "a number of 400 digits"),
    (b'{"prompt": "a", "temperature": 1e400}', "the number 1e400, which is out of range"),
    (b'{"prompt": "a", "temperature": NaN}', "has NaN, which is not a JSON number"),
    (b'{"prompt": "a", "top_p": 1.01}', "top_p must be a number from 0 to 1"),
    (b'{"prompt": "a", "stop": 1}', "stop"),
    (b'{"prompt": "a", "stop": [""]}', "stop must hold texts that are not empty"),
    (b'{"prompt": "a", "stop": [1]}', "stop"),
    (b'{"prompt": "a", "stop": [%s]}' % b",".join([b'"ab"'] * 300_000), "300,000 texts"),
    (b'{"prompt": "a", "stop": "%s"}' % (b"x" * 1025), "stop has a text of 1,025 characters"),
    (b'{"prompt": "a", "stream": "yes please"}', "stream"),
    (b'{"prompt": "a", "n": 17}', "n must be a whole number from 1 to 16, not 17"),
    (b'{"prompt": "%s"}' % (b"the " * 300), "maximum context length is 256"),
    (b'{"prompt": "%s"}' % (b"the " * 2000), "first 2,048 are already more than 512 tokens"),
]


@pytest.mark.parametrize(("body", "said"), WRONG, ids=range(len(WRONG)))
def test_a_request_that_makes_no_sense_gets_a_sentence(
    server: Running, body: bytes, said: str
) -> None:
    status, reply = ask(server, body)
    error = json.loads(reply)["error"]
    assert status == 400, error
    assert said in error["message"] and error["message"].endswith(".")
    assert "\n" not in error["message"] and len(error["message"]) < 700
    assert error["type"] == "invalid_request_error"


def test_a_body_of_more_bytes_than_the_limit_is_refused(server: Running) -> None:
    status, reply = ask(server, b'{"prompt": "%s"}' % (b"a" * (4 << 20)))
    assert status == 413 and b"more than the 4,194,304 bytes" in reply


def test_another_model_is_not_found(server: Running) -> None:
    status, reply = ask(server, {"prompt": "a", "model": "law"})
    assert status == 404 and json.loads(reply)["error"]["code"] == "model_not_found"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NAMES = ("prompt", "messages", "stream", "max_tokens", "temperature", "stop", "seed", "model", "x")


@settings(max_examples=50)
@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4) | JSON)
def test_any_json_is_a_request_or_refused(content: Any) -> None:
    try:
        fields = read_invocation(NAME, json.dumps(content).encode())
    except UsageError as error:
        assert "\n" not in str(error)
        return
    assert ("prompt" in fields) != ("messages" in fields)
    assert fields["model"] == (content.get("model") or NAME)

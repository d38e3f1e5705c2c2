"""Clients that others have written, against `llama-onnx serve` with a real model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from tests.support.real_server import Process, serving

QUESTION: list[Any] = [{"role": "user", "content": "Name the capital of France."}]
NAME = "smollm2"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    package = os.environ.get("LLAMA_ONNX_E2E_PACKAGE")
    if not package:
        pytest.fail("LLAMA_ONNX_E2E_PACKAGE must name a package: run `nox -s e2e`.")
    with serving(Path(package), ["--name", NAME]) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Process) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")


def test_openai_chat_stream_and_stop(client: openai.OpenAI) -> None:
    options: Any = {"model": NAME, "messages": QUESTION, "max_tokens": 30}
    whole = client.chat.completions.create(**options).choices[0]
    assert "Paris" in (whole.message.content or "")
    chunks = client.chat.completions.create(**options, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.message.content
    cut = client.chat.completions.create(**options, stop="Paris").choices[0]
    assert cut.finish_reason == "stop"
    assert cut.message.content == text[: text.index("Paris")]


def test_openai_schema_tools_logprobs_and_errors(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    ask: list[Any] = [{"role": "user", "content": "Invent a person."}]
    content = (
        client.chat.completions.create(
            model=NAME, messages=ask, max_tokens=80, response_format=form
        )
        .choices[0]
        .message.content
    )
    jsonschema.validate(json.loads(content or ""), PERSON)
    rain: list[Any] = [{"role": "user", "content": "What is the weather in Rome?"}]
    message: Any = (
        client.chat.completions.create(
            model=NAME, messages=rain, max_tokens=60, tools=[WEATHER], tool_choice="required"
        )
        .choices[0]
        .message
    )
    assert message.tool_calls
    call: Any = message.tool_calls[0]
    assert json.loads(call.function.arguments).keys() == {"city"}
    answered = client.chat.completions.create(
        model=NAME,
        messages=[*rain, message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}],
        max_tokens=20,
        tools=[WEATHER],
    )
    assert answered.choices[0].message.content
    logprobs = (
        client.chat.completions.create(
            model=NAME, messages=QUESTION, max_tokens=3, logprobs=True, top_logprobs=2
        )
        .choices[0]
        .logprobs
    )
    assert logprobs is not None and logprobs.content is not None and len(logprobs.content) == 3
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="context"):
        client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "word " * 30000}]
        )


def test_openai_responses(client: openai.OpenAI) -> None:
    found = client.responses.create(model=NAME, input="Name the capital of France.")
    assert found.status == "completed" and "Paris" in found.output_text
    with client.responses.stream(model=NAME, input="Name the capital of France.") as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text == found.output_text


def test_langchain(server: Process) -> None:
    chat_openai = pytest.importorskip("langchain_openai").ChatOpenAI
    model = chat_openai(
        model=NAME, base_url=f"{server.url}/v1", api_key="none", temperature=0, max_tokens=60
    )
    answer = model.invoke("Name the capital of France.")
    assert "Paris" in answer.content
    assert "".join(piece.content for piece in model.stream("Name the capital of France.")) == (
        answer.content
    )
    tool = model.bind_tools([WEATHER], tool_choice="get_weather")
    (call,) = tool.invoke("What is the weather in Rome?").tool_calls
    assert call["name"] == "get_weather" and call["args"].keys() == {"city"}
    person = model.with_structured_output(PERSON | {"title": "person"}, method="json_schema")
    jsonschema.validate(person.invoke("Invent a person."), PERSON)


def test_litellm(server: Process) -> None:
    litellm = pytest.importorskip("litellm")
    options: Any = {
        "model": f"openai/{NAME}",
        "api_base": f"{server.url}/v1",
        "api_key": "none",
        "messages": QUESTION,
        "max_tokens": 30,
    }
    answer = litellm.completion(**options).choices[0].message.content
    assert "Paris" in answer
    chunks = litellm.completion(**options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer
    with pytest.raises(litellm.ContextWindowExceededError):
        long = [{"role": "user", "content": "word " * 30000}]
        litellm.completion(**{**options, "messages": long})


def test_openai_for_javascript(server: Process) -> None:
    folder = os.environ.get("LLAMA_ONNX_E2E_NODE")
    if not folder:
        pytest.fail("LLAMA_ONNX_E2E_NODE must name a folder with npm's openai: run `nox -s e2e`.")
    script = Path(shutil.copy(Path(__file__).with_name("client.mjs"), folder))
    done = subprocess.run(
        ["node", script.name, f"{server.url}/v1", NAME],
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "Paris" in found["whole"] and found["streamed"] == found["whole"]
    assert found["cut"] == found["whole"][: found["whole"].index("Paris")]
    jsonschema.validate(json.loads(found["person"]), PERSON)
    assert json.loads(found["call"]).keys() == {"city"}
    assert found["logprobs"] == 3
    assert found["unknown"] == 404
    assert found["response"] == found["whole"]


def test_the_server_ends_after_its_answers(server: Process) -> None:
    package = Path(os.environ["LLAMA_ONNX_E2E_PACKAGE"])
    with serving(package, ["--name", NAME]) as own:
        client = openai.OpenAI(base_url=f"{own.url}/v1", api_key="none")
        chunks = client.chat.completions.create(
            model=NAME, messages=QUESTION, max_tokens=8, stream=True
        )
        text = next(chunks).choices[0].delta.content or ""
        own.process.terminate()
        text += "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert "Paris" in text
        assert own.process.wait(60) == 0
        assert not [line for line in own.lines if "Traceback" in line]

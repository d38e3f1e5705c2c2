"""The server's endpoints, called by OpenAI's own client, against what the model says itself."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from llama_onnx.runtime.engine.sampling.parameters import Sampling
from llama_onnx.runtime.llama.generation import TextEvent
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.serving.app import Settings
from tests.support.served import Running, running

PROMPT = "the quick brown fox"
CHAT: list[Any] = [{"role": "user", "content": "the lazy dog"}]
NAME = "tiny"


@pytest.fixture(scope="module")
def server(package_fp32: Path) -> Iterator[Running]:
    with running(package_fp32, Settings(name=NAME)) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model(server: Running) -> Llama:
    return server.served.model


def text_of(model: Llama, **options: Any) -> str:
    return "".join(model.chat(CHAT, **options))


# The texts


def test_a_chat_is_answered_as_by_the_model(client: openai.OpenAI, model: Llama) -> None:
    answer = client.chat.completions.create(model=NAME, messages=CHAT, max_completion_tokens=20)
    (choice,) = answer.choices
    stats = model.chat(CHAT, max_new_tokens=20)
    assert choice.message.content == "".join(stats) != ""
    assert choice.finish_reason == stats.stats.finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == stats.stats.prompt_tokens
    assert answer.usage.completion_tokens == stats.stats.new_tokens


def test_the_pieces_of_a_stream_are_the_whole(client: openai.OpenAI, model: Llama) -> None:
    chunks = list(
        client.chat.completions.create(
            model=NAME,
            messages=CHAT,
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *pieces, last = chunks
    text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
    assert text == text_of(model, max_new_tokens=20)
    assert pieces[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in pieces[-2:]] == [None, "length"]
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens == 20
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_a_seed_gives_the_same_answers_and_each_choice_its_own(
    client: openai.OpenAI, model: Llama
) -> None:
    def ask() -> list[str | None]:
        answer = client.chat.completions.create(
            model=NAME, messages=CHAT, max_tokens=12, n=3, seed=7, temperature=1.5
        )
        return [choice.message.content for choice in answer.choices]

    first = ask()
    assert first == ask()
    own = [text_of(model, max_new_tokens=12, seed=7 + i, temperature=1.5) for i in range(3)]
    assert first == own and len(set(own)) > 1


def test_a_stop_text_ends_an_answer_and_is_left_out(client: openai.OpenAI, model: Llama) -> None:
    text = text_of(model, max_new_tokens=40)
    stop = text[9:12]
    answer = client.chat.completions.create(model=NAME, messages=CHAT, max_tokens=40, stop=[stop])
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_ignore_eos_goes_on_after_an_end_token(
    client: openai.OpenAI, model: Llama, stream: bool
) -> None:
    """Load generators ask for it: their answers have to be equally long."""
    end = min(model.codec.end_tokens)
    found = []
    for ignored in (False, True):
        fields: dict[str, Any] = {"model": NAME, "messages": CHAT, "max_tokens": 5}
        fields |= {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        answer: Any = client.chat.completions.create(
            **fields, logit_bias={str(end): 100}, extra_body={"ignore_eos": ignored}
        )
        chunks = list(answer) if stream else [answer]
        choices = [choice for chunk in chunks for choice in chunk.choices]
        found.append((chunks[-1].usage.completion_tokens, choices[-1].finish_reason))
    assert found == [(1, "stop"), (5, "length")]


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"ignore_eos": 1}, "ignore_eos must be true or false"),
        (
            {"ignore_eos": True, "structured_outputs": {"regex": "a+"}},
            "an answer with a given format ends with it",
        ),
    ],
)
def test_ignore_eos_that_means_nothing(
    client: openai.OpenAI, extra: dict[str, Any], said: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=said) as error:
        client.chat.completions.create(model=NAME, messages=CHAT, extra_body=extra)
    assert error.value.param == "ignore_eos"


def test_logprobs_are_the_models(client: openai.OpenAI, model: Llama) -> None:
    answer = client.chat.completions.create(
        model=NAME, messages=CHAT, max_tokens=6, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    events = [
        event
        for event in model.chat(CHAT, max_new_tokens=6, sampling=Sampling(logprobs=3)).events()
        if isinstance(event, TextEvent)
    ]
    assert [token.logprob for token in logprobs.content] == pytest.approx(
        [event.logprobs.logprob for event in events], abs=1e-5
    )
    for token, event in zip(logprobs.content, events, strict=True):
        assert token.bytes is not None
        assert bytes(token.bytes) == model.codec.token_bytes(event.token)
        assert [top.logprob for top in token.top_logprobs] == sorted(
            (top.logprob for top in token.top_logprobs), reverse=True
        )
        assert len(token.top_logprobs) == 3


def test_completions_take_texts_and_ids(client: openai.OpenAI, model: Llama) -> None:
    ids = [int(token) for token in model.encode(PROMPT)]
    texts = client.completions.create(model=NAME, prompt=[PROMPT, "a"], max_tokens=8, n=2)
    assert [choice.index for choice in texts.choices] == [0, 1, 2, 3]
    expected = ["".join(model.generate(text, max_new_tokens=8)) for text in (PROMPT, "a")]
    assert [choice.text for choice in texts.choices] == [
        expected[0],
        expected[0],
        expected[1],
        expected[1],
    ]
    by_ids = client.completions.create(model=NAME, prompt=ids, max_tokens=8, echo=True)
    assert by_ids.choices[0].text == PROMPT + expected[0]
    pieces = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=8, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == expected[0]


def test_the_logprobs_of_a_completion_have_offsets(client: openai.OpenAI) -> None:
    choice = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=6, logprobs=2).choices[
        0
    ]
    found = choice.logprobs
    assert found is not None and found.tokens and found.text_offset is not None
    assert found.token_logprobs is not None and found.top_logprobs is not None
    # A token alone may be a part of a character, which is U+FFFD.
    whole = choice.text.replace("\ufffd", "")
    assert "".join(found.tokens).replace("\ufffd", "") == whole
    for start, token in zip(found.text_offset, found.tokens, strict=True):
        assert choice.text[start:].startswith(token) or "\ufffd" in token
    for token, logprob, top in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, strict=True
    ):
        assert top[token] == logprob == max(top.values()) or "\ufffd" in token


def test_a_response_is_the_same_answer(client: openai.OpenAI, model: Llama) -> None:
    answer = client.responses.create(
        model=NAME, input="the lazy dog", max_output_tokens=20, instructions=None
    )
    assert answer.output_text == text_of(model, max_new_tokens=20)
    assert answer.status == "incomplete" and answer.incomplete_details is not None
    messages: list[Any] = [
        {"role": "system", "content": "fox"},
        {"role": "user", "content": "dog"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
    ]
    longer = client.responses.create(
        model=NAME,
        instructions="fox",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "dog"}]},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": "b"},
        ],
        max_output_tokens=8,
    )
    assert longer.output_text == "".join(model.chat(messages, max_new_tokens=8))


def test_a_response_leaves_out_the_oldest_turns_if_it_may(
    client: openai.OpenAI, model: Llama
) -> None:
    turns: list[Any] = []
    for number in range(8):
        turns.append({"role": "user", "content": f"{number}: the quick brown fox"})
        turns.append({"role": "assistant", "content": "the lazy dog"})
    asked: dict[str, Any] = {
        "model": NAME,
        "instructions": "a dog",
        "input": [*turns, *CHAT],
        "max_output_tokens": 20,
    }
    refused: list[dict[str, Any]] = [{}, {"truncation": "disabled"}]
    for truncation in refused:
        with pytest.raises(openai.BadRequestError, match="context length is 256"):
            client.responses.create(**asked, **truncation)
    answer = client.responses.create(**asked, truncation="auto")
    # Written out: what is left of the turns is what fits with the 20 tokens of the answer.
    system = {"role": "system", "content": "a dog"}
    lengths = [len(model.encode_chat([system, *turns[2 * n :], *CHAT])) for n in range(9)]
    oldest = next(n for n, length in enumerate(lengths) if length + 20 <= 256)
    assert 0 < oldest < 8
    kept = [system, *turns[2 * oldest :], *CHAT]
    assert answer.output_text == "".join(model.chat(kept, max_new_tokens=20)) != ""
    assert answer.usage is not None and answer.usage.input_tokens == lengths[oldest]
    assert answer.truncation == "auto"
    events = client.responses.create(**asked, truncation="auto", stream=True)
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(pieces) == answer.output_text


def test_the_events_of_a_response_build_it(client: openai.OpenAI, model: Llama) -> None:
    events = list(
        client.responses.create(model=NAME, input="the lazy dog", max_output_tokens=12, stream=True)
    )
    final = events[-1]
    assert final.type == "response.incomplete"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    text = text_of(model, max_new_tokens=12)
    assert "".join(deltas) == final.response.output_text == text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"


# What an answer must be


SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "maximum": 99, "minimum": 0},
        "ok": {"type": "boolean"},
    },
    "required": ["n", "ok"],
    "additionalProperties": False,
}


def test_a_schema_is_followed(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    answer = client.chat.completions.create(
        model=NAME, messages=CHAT, max_tokens=60, response_format=form
    )
    content = answer.choices[0].message.content
    assert content is not None
    jsonschema.validate(json.loads(content), SCHEMA)
    flat: Any = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
    response = client.responses.create(model=NAME, input="a", max_output_tokens=60, text=flat)
    jsonschema.validate(json.loads(response.output_text), SCHEMA)


@pytest.mark.parametrize(
    ("structured", "allowed"),
    [
        ({"choice": ["red (1)", "green"]}, {"red (1)", "green"}),
        ({"regex": "ab?c"}, {"abc", "ac"}),
        ({"grammar": 'start: "x" | "yy"'}, {"x", "yy"}),
    ],
)
def test_structured_outputs_are_followed(
    client: openai.OpenAI, structured: Any, allowed: set[str]
) -> None:
    answer = client.chat.completions.create(
        model=NAME, messages=CHAT, max_tokens=20, extra_body={"structured_outputs": structured}
    )
    assert answer.choices[0].message.content in allowed
    assert answer.choices[0].finish_reason == "stop"


TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Rome", "Paris"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("weather", "time")
]


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_is_required_is_called(client: openai.OpenAI, stream: bool) -> None:
    choice: Any = {"type": "function", "function": {"name": "time"}}
    options: dict[str, Any] = {
        "model": NAME,
        "messages": CHAT,
        "max_tokens": 60,
        "tools": TOOLS,
        "tool_choice": choice,
    }
    if stream:
        chunks = list(client.chat.completions.create(**options, stream=True))
        calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
        assert [chunk.choices[0].delta.content or "" for chunk in chunks] == [""] * len(chunks)
        finish = chunks[-1].choices[0].finish_reason
    else:
        answer = client.chat.completions.create(**options).choices[0]
        calls, finish = answer.message.tool_calls, answer.finish_reason
        assert answer.message.content is None
    assert finish == "tool_calls"
    (call,) = calls
    assert call.function.name == "time"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Paris")
    assert call.id.startswith("call_")


def test_a_function_call_of_a_response_has_its_events(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", **tool["function"], "strict": True} for tool in TOOLS]
    with client.responses.stream(
        model=NAME, input="a", max_output_tokens=60, tools=tools, tool_choice="required"
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    (call,) = final.output
    assert call.type == "function_call"
    assert json.loads(call.arguments)["city"] in ("Rome", "Paris")
    assert kinds.count("response.function_call_arguments.done") == 1
    assert final.status == "completed"


# What is refused


@pytest.mark.parametrize(
    ("changes", "status", "param", "code", "words"),
    [
        ({"model": "other"}, 404, "model", "model_not_found", "there is no model 'other'"),
        ({"messages": []}, 400, "messages", None, "at least one message"),
        ({"messages": [{"role": "user"}]}, 400, "messages", None, "messages.0.content: field"),
        ({"messages": [{"role": "user", "content": "a " * 9999}]}, 400, None,
         "context_length_exceeded", "shorten the prompt"),
        ({"temperature": "hot"}, 400, "temperature", None, "temperature: input should be a"),
        ({"temperature": -1}, 400, "temperature", None, "must be a number from 0"),
        ({"n": 0}, 400, "n", None, "from 1 to 16"),
        ({"max_tokens": 0}, 400, "max_tokens", None, "at least 1"),
        ({"stop": [""]}, 400, None, None, "stop must hold texts"),
        ({"top_logprobs": 2}, 400, "top_logprobs", None, "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, 400, None, None, "from 0 to 20"),
        ({"extra": 1}, 400, "extra", None, "unknown field 'extra'"),
        ({"audio": {"voice": "x", "format": "wav"}}, 400, "audio", None, "writes text"),
        ({"tool_choice": "required"}, 400, "tool_choice", None, "needs tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, 400, "tools", None,
         "letters"),
        ({"response_format": {"type": "json_schema", "json_schema": {
            "name": "x", "schema": {"type": "strange"}}}}, 400, None, None, "cannot be used"),
        ({"chat_template_kwargs": {"messages": []}}, 400, None, None, "not a free variable"),
        ({"logit_bias": {"999999": 1}}, 400, None, None, "logit_bias names the token"),
    ],
)  # fmt: skip
def test_a_wrong_request_gets_a_sentence(
    client: openai.OpenAI,
    changes: dict[str, Any],
    status: int,
    param: str | None,
    code: str | None,
    words: str,
) -> None:
    body = {"model": NAME, "messages": CHAT, "max_tokens": 4, **changes}
    with pytest.raises(openai.APIStatusError) as caught:
        client.post("/chat/completions", body=body, cast_to=object)
    error: Any = caught.value.body
    assert caught.value.status_code == status
    assert words in error["message"] and error["message"].endswith(".")
    assert (error["param"], error["code"]) == (param, code)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/completions", {"model": NAME}, "prompt"),
        ("/completions", {"model": NAME, "prompt": "a", "suffix": "b"}, "cannot fill a gap"),
        ("/completions", {"model": NAME, "prompt": [5000000]}, "not a token id"),
        ("/completions", {"model": NAME, "prompt": "a", "echo": True, "logprobs": 1}, "echo"),
        ("/responses", {"model": NAME, "input": "a", "previous_response_id": "x"}, "stores no"),
        ("/responses", {"model": NAME, "input": "a", "tools": [{"type": "web_search"}]},
         "functions only"),
        ("/responses", {"model": NAME}, "input"),
        ("/responses", {"model": NAME, "input": "a", "background": True}, "stores no"),
    ],
)  # fmt: skip
def test_the_other_endpoints_refuse_what_they_cannot_do(
    client: openai.OpenAI, path: str, body: dict[str, Any], words: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        client.post(path, body=body, cast_to=object)


@pytest.mark.parametrize("content", [b"{", b"[1]", b'{"a": 1, "a": 2}', b"\xff", b"", b"1" * 99])
def test_a_body_that_is_no_request_is_refused(server: Running, content: bytes) -> None:
    response = post(server.url, content)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def post(url: str, content: bytes, **headers: str) -> Any:
    import httpx2

    return httpx2.post(
        f"{url}/v1/chat/completions",
        content=content,
        headers={"content-type": "application/json", **headers},
    )


# Models, health and figures


def test_the_models_are_listed(client: openai.OpenAI, server: Running) -> None:
    (found,) = client.models.list().data
    assert found.id == NAME == client.models.retrieve(NAME).id
    assert getattr(found, "max_model_len", None) == server.served.model.context_length
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("a/b")


def test_metrics_count_what_was_answered(client: openai.OpenAI, server: Running) -> None:
    def value(name: str) -> float:
        lines = server.served.metrics.text().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    names = (
        "vllm:generation_tokens_total",
        "vllm:prompt_tokens_total",
        "vllm:request_success_total",
    )
    before = [value(name) for name in names]
    answer = client.chat.completions.create(model=NAME, messages=CHAT, max_tokens=5, n=2)
    usage = answer.usage
    assert usage is not None
    after = [value(name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [10, 2 * usage.prompt_tokens, 2]
    assert value("vllm:num_requests_running") == 0


def test_a_client_that_leaves_frees_its_place(client: openai.OpenAI, server: Running) -> None:
    stream = client.chat.completions.create(
        model=NAME, messages=CHAT, max_tokens=400, stream=True, logit_bias={"2": -100}
    )
    next(iter(stream))
    assert server.served.places.taken == 1
    stream.close()
    deadline = time.monotonic() + 20
    while server.served.places.taken or server.served.engine.load().running:
        assert time.monotonic() < deadline, "the answer still has its place"
        time.sleep(0.01)


def test_a_full_server_says_when_to_return(package_fp32: Path) -> None:
    with running(package_fp32, Settings(name=NAME, most_waiting=0), rows=1) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        stream = client.chat.completions.create(
            model=NAME, messages=CHAT, max_tokens=400, stream=True, logit_bias={"2": -100}
        )
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model=NAME, messages=CHAT, max_tokens=4)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        with pytest.raises(openai.BadRequestError, match="more than the 1"):
            client.chat.completions.create(model=NAME, messages=CHAT, max_tokens=4, n=2)
        stream.close()


def test_a_key_is_asked_for(package_fp32: Path) -> None:
    import httpx2

    with running(package_fp32, api_key="sécret 1") as server:
        right = openai.OpenAI(base_url=f"{server.url}/v1", api_key="sécret 1")
        for key in ("wrong", "x", "sécret 1x"):
            answer = httpx2.get(
                f"{server.url}/v1/models", headers={b"authorization": f"Bearer {key}".encode()}
            )
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert httpx2.get(
            f"{server.url}/v1/models", headers={b"authorization": "Bearer sécret 1".encode()}
        ).json()["data"]
        for path in ("/", "/health", "/ready"):
            assert httpx2.get(server.url + path).status_code == 200
        for path in ("/metrics", "/about", "/openapi.json"):
            assert httpx2.get(server.url + path).status_code == 401
        assert right.api_key == "sécret 1"


def test_a_page_of_a_stranger_reaches_nothing(server: Running) -> None:
    import httpx2

    body = json.dumps({"model": NAME, "messages": CHAT}).encode()
    assert post(server.url, body, host="evil.example").status_code == 403
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        form = httpx2.post(
            f"{server.url}/v1/chat/completions", content=body, headers={"content-type": kind}
        )
        assert form.status_code == 415


def test_a_package_that_changes_is_not_served(package_fp32: Path, tmp_path: Path) -> None:
    import shutil

    import httpx2

    copy = Path(shutil.copytree(package_fp32, tmp_path / "päckage 1"))
    with running(copy, Settings(name=NAME)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        assert httpx2.get(f"{server.url}/ready").status_code == 200
        (copy / "tokenizer.json").write_bytes(b"{}")
        assert httpx2.get(f"{server.url}/ready").status_code == 503
        with pytest.raises(openai.InternalServerError, match="restart the server") as caught:
            client.chat.completions.create(model=NAME, messages=CHAT)
        assert str(tmp_path) not in str(caught.value.body)


def test_an_engine_that_ends_is_said(package_fp32: Path) -> None:
    import httpx2

    with running(package_fp32, Settings(name=NAME)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        stream = client.chat.completions.create(
            model=NAME, messages=CHAT, max_tokens=400, stream=True, logit_bias={"2": -100}
        )
        next(iter(stream))
        server.served.engine.close()
        with pytest.raises(openai.APIError, match="closed"):
            list(stream)
        assert httpx2.get(f"{server.url}/health").status_code == 503
        with pytest.raises(openai.InternalServerError, match="restart the server"):
            client.chat.completions.create(model=NAME, messages=CHAT)

"""Fields of requests: what is not of its type is a sentence, never guessed and never a failure."""

from __future__ import annotations

from typing import Any

import pytest

from llama_onnx.runtime.serving.requests.call import Call, chat_call, completion_call
from llama_onnx.runtime.serving.requests.response_input import response_call
from llama_onnx.runtime.serving.requests.schemas import CHAT, COMPLETION, RESPONSE, FieldError

_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
_FLAT_TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": None}


def chat(**fields: Any) -> Call:
    messages = [{"role": "user", "content": "x"}]
    return chat_call(CHAT.check({"model": "m", "messages": messages, **fields}))


def completion(**fields: Any) -> Call:
    return completion_call(COMPLETION.check({"model": "m", "prompt": "x", **fields}))


def response(**fields: Any) -> Call:
    return response_call(RESPONSE.check({"model": "m", "input": "x", **fields}))


@pytest.mark.parametrize(
    "fields",
    [
        {"n": "2"},
        {"n": True},
        {"max_tokens": 5.0},
        {"logprobs": "false"},
        {"parallel_tool_calls": "false"},
        {"stream": "true"},
        {"stream_options": {"include_usage": "no"}},
        {"temperature": "0.5"},
        {"logit_bias": {"5": "3"}},
        {
            "tools": [_TOOL],
            "tool_choice": {"type": "custom", "custom": {"name": "x"}, "function": "abc"},
        },
    ],
)
def test_a_chat_takes_no_text_for_a_number(fields: dict[str, Any]) -> None:
    name = "stream_options" if "stream_options" in fields else list(fields)[-1]
    with pytest.raises(FieldError, match=name):
        chat(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"echo": "false"},
        {"prompt": ["1", 2]},
        {"prompt": [1.0, 2.0]},
        {"prompt": [True]},
        {"prompt": [["1"]]},
        {"prompt": ["a", [1]]},
        {"prompt": []},
    ],
)
def test_a_completion_does_not_either(fields: dict[str, Any]) -> None:
    with pytest.raises(FieldError, match=next(iter(fields))):
        completion(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [_FLAT_TOOL], "tool_choice": {"type": "function", "name": "f", "function": "g"}},
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": {}, "json_schema": 5}}},
    ],
)
def test_fields_of_another_endpoint_are_no_failure(fields: dict[str, Any]) -> None:
    with pytest.raises(FieldError):
        response(**fields)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("x", ("x",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ],
)
def test_prompts_are_texts_or_token_ids_one_or_several(prompt: Any, expected: Any) -> None:
    assert completion(prompt=prompt).prompts == expected


def test_numbers_may_be_whole() -> None:
    assert chat(temperature=1, n=2).sampling.temperature == 1

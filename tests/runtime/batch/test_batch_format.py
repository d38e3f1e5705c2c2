"""Lines of a batch: which are requests, and what is said of the others."""

from __future__ import annotations

import json

import pytest
from openai.types.chat import ChatCompletion

from llama_onnx.runtime.batch.batch_format import (
    AnsweredLine,
    LineError,
    custom_id_of,
    not_asked,
    read_line,
    response_line,
)
from llama_onnx.runtime.serving.http.limits import MAX_BODY
from tests.support.batches import chat_line


def test_a_line_of_openai_is_read() -> None:
    request = read_line(chat_line("a", "the fox").encode())
    assert (request.custom_id, request.path) == ("a", "/v1/chat/completions")
    assert request.body["messages"] == [{"role": "user", "content": "the fox"}]


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ('{"prompt": "the", "seed": 3}', "/v1/completions"),
        ('{"messages": [], "seed": 3, "custom_id": "b"}', "/v1/chat/completions"),
    ],
)
def test_a_plain_line_is_a_request_by_itself(line: str, path: str) -> None:
    request = read_line(line.encode())
    assert request.path == path
    assert request.body == {k: v for k, v in json.loads(line).items() if k != "custom_id"}
    assert request.custom_id == json.loads(line).get("custom_id")


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (b"not json", "invalid_json_line", "not valid JSON (Expecting value)"),
        (b"\xff\xfe{}", "invalid_json_line", "not UTF-8"),
        (b"[1]", "invalid_json_line", "not a JSON object"),
        (b'{"prompt": "a", "prompt": "b"}', "invalid_json_line", "'prompt' twice"),
        (b'{"prompt": NaN}', "invalid_json_line", "NaN"),
        (b"[" * 5000, "invalid_json_line", "line"),
        (b'{"prompt": "' + b"a" * MAX_BODY + b'"}', "invalid_json_line", "more than 4,194,304"),
        (b"{}", "missing_required_parameter", "messages or prompt"),
        (b'{"prompt": "a", "messages": []}', "missing_required_parameter", "either"),
        (b'{"custom_id": 3, "prompt": "a"}', "invalid_request", "custom_id must be a text"),
        (b'{"url": "/v1/completions", "body": {}}', "missing_required_parameter", "custom_id"),
        (b'{"custom_id": "a", "url": "/v1/completions", "body": {}}', "invalid_method", "POST"),
        (
            b'{"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {}}',
            "invalid_url",
            "/v1/embeddings",
        ),
        (
            b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": "x"}',
            "missing_required_parameter",
            "body must be an object",
        ),
        (b'{"custom_id": "a", "body": {}, "bod": 1}', "unknown_parameter", "bod"),
    ],
)
def test_what_is_not_a_request_is_named(line: bytes, code: str, words: str) -> None:
    with pytest.raises(LineError) as caught:
        read_line(line)
    assert caught.value.code == code
    assert words in str(caught.value)


def test_an_answer_is_a_line_that_openais_library_reads() -> None:
    message = {"role": "assistant", "content": "hé\nho"}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    head = {"id": "x", "object": "chat.completion", "created": 1, "model": "m"}
    body = json.dumps({**head, "choices": [choice]}).encode()
    line = json.loads(response_line('a"b', 200, body))
    assert line["custom_id"] == 'a"b' and line["error"] is None
    assert line["response"]["status_code"] == 200
    read = ChatCompletion.model_validate(line["response"]["body"], strict=True)
    assert read.choices[0].message.content == "hé\nho"


def test_an_answer_survives_the_journal() -> None:
    for answered in (AnsweredLine(b'{"a b": 1}', 3, 4), not_asked("é", "code", "a\nb c")):
        content = answered.to_bytes()
        assert b"\n" not in content
        assert AnsweredLine.from_bytes(content) == answered


def test_the_id_of_a_line_is_found_where_there_is_one() -> None:
    assert custom_id_of(chat_line("a", "x").encode()) == "a"
    assert custom_id_of(b'{"custom_id": "b", "method": "GET", "url": "/", "body": {}}') == "b"
    assert custom_id_of(b"{") is None

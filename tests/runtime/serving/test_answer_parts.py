"""The calls of tools in a stream of text: what is shown, and when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_onnx.runtime.llama.generation import FinishEvent
from llama_onnx.runtime.llama.generation_stats import GenerationStats
from llama_onnx.runtime.llama.tools import parse_tool_calls
from llama_onnx.runtime.serving.replies.answer_parts import CallFilter, Part, merged
from llama_onnx.runtime.serving.requests.call import chat_call

CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from([CALL, "<tool_call>", "<tool", " ", "{", '{"name": "add"', "text"]),
        max_size=5,
    ).map("".join),
    st.just('{"name": "add", "parameters": {"a": 1}}'),
    st.just('<|python_tag|>{"name": "add", "parameters": {}}; {"name": "add", "parameters": {}}'),
)


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    places = sorted({cut % (len(text) + 1) for cut in cuts})
    bounds = [0, *places, len(text)]
    return [text[a:b] for a, b in pairwise(bounds)]


@given(TEXTS, st.lists(st.integers(0, 200), max_size=8))
def test_the_calls_do_not_depend_on_the_pieces(text: str, cuts: list[int]) -> None:
    calls = CallFilter(["add"])
    shown = "".join(calls.feed(piece) for piece in pieces_of(text, cuts))
    rest, found = calls.rest()
    whole = parse_tool_calls(text, ["add"])
    assert found == whole.calls
    if not found:
        assert shown + rest == text
    else:
        assert (shown + rest).strip() == whole.content.strip()
    assert "<tool_call>" not in shown


@given(st.text(), st.lists(st.integers(0, 200), max_size=8))
def test_without_tools_all_text_is_shown_at_once(text: str, cuts: list[int]) -> None:
    calls = CallFilter([])
    assert [calls.feed(piece) for piece in pieces_of(text, cuts)] == pieces_of(text, cuts)


def test_text_that_is_no_call_is_shown_at_once() -> None:
    calls = CallFilter(["add"])
    assert calls.feed("It is ") == "It is "
    assert calls.feed("1 < 2 <to") == "1 < 2 "
    assert calls.feed("day") == "<today"


@pytest.mark.parametrize(("most", "count"), [(None, 2), (1, 1)])
def test_an_answer_has_at_most_as_many_calls_as_asked_for(most: int | None, count: int) -> None:
    class Answer:
        async def events(self) -> AsyncIterator[FinishEvent]:
            yield FinishEvent(CALL + CALL, "stop", GenerationStats(1, 1, 0.1, 0.1, 0.0, "stop"))

        def cancel(self) -> None:
            pass

    async def last() -> Part:
        answers: Any = [Answer()]
        return [part async for part in merged(answers, ["add"], (), most)][-1]

    part = asyncio.run(last())
    assert len(part.calls) == count and part.finish == "tool_calls"


def test_parallel_tool_calls_false_is_one_call() -> None:
    fields = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    assert chat_call(fields).most_calls is None
    assert chat_call({**fields, "parallel_tool_calls": False}).most_calls == 1

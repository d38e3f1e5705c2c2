"""The calls of tools in a stream of text: what is shown, and when."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from llama_onnx.runtime.llama.tools import parse_tool_calls
from llama_onnx.runtime.serving.replies.answer_parts import CallFilter

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

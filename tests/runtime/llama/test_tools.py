"""Tools in a prompt as transformers writes them; calls in an answer as templates write them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_onnx.runtime.chat_template.render import ChatTemplate
from llama_onnx.runtime.llama.conversation import check_messages
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.llama.template import TEMPLATE, render_messages
from llama_onnx.runtime.llama.tools import (
    MOST_TOOLS,
    ToolAnswer,
    ToolCall,
    check_tools,
    parse_tool_calls,
    tool_names,
    with_template_calls,
)
from llama_onnx.targets.errors import UsageError
from tests.support import tiny
from tests.support.chat_templates import SPECIAL, TEMPLATES, transformers_prompt

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
NAMES = ["get_weather", "now"]
USER = {"role": "user", "content": "How is the weather in Köln?"}

QWEN = """{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}"""
"""How Qwen 2.5, and Hermes and SmolLM alike, write an assistant's calls."""


# Into the prompt


@pytest.mark.parametrize("name", ["llama 3.1", "mistral 3", "qwen 2.5", "granite"])
@pytest.mark.parametrize("tools", [[WEATHER], [WEATHER, NOW], []])
def test_the_template_gets_the_tools_as_from_transformers(
    tmp_path: Path, name: str, tools: list[dict[str, Any]]
) -> None:
    tiny.write_tokenizer(tmp_path, tiny.GQA.vocab_size)
    (tmp_path / TEMPLATE).write_bytes(TEMPLATES[name].encode())
    rendered = render_messages(tmp_path, [USER], check_tools(tools))
    special = json.loads((tmp_path / "tokenizer_config.json").read_text())
    texts = {key: value for key, value in special.items() if key in SPECIAL}
    expected = ChatTemplate(TEMPLATES[name], texts).render([USER], tools=tools or None)
    assert rendered == expected
    theirs = transformers_prompt(TEMPLATES[name], [USER], tools=tools or None)
    assert ChatTemplate(TEMPLATES[name], SPECIAL).render([USER], tools=tools or None) == theirs
    # This excerpt of Llama 3.1's template writes tools only where it is told to.
    assert name == "llama 3.1" or ("get_weather" in rendered) == bool(tools)


def test_a_model_encodes_what_the_template_makes_of_tools(tmp_path: Path, llama: Llama) -> None:
    plain = llama.encode_chat([USER])
    assert llama.encode_chat([USER], tools=[]).tolist() == plain.tolist()
    with pytest.raises(UsageError, match=r"tools\[0\] must be"):
        llama.encode_chat([USER], tools=[{}])


# Out of the answer


def written_by(template: str, calls: list[dict[str, Any]], content: str | None = None) -> str:
    """What transformers' rendering of an assistant's message has between its header and its end."""
    message = {"role": "assistant", "content": content, "tool_calls": calls}
    (checked,) = check_messages([with_template_calls(message)])
    prompt = transformers_prompt(template, [checked], add_generation_prompt=False)
    after = "assistant\n" if "im_start" in template else "<|eot_id|>"
    return str(prompt.rpartition(after)[2] if after in prompt else prompt)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
CALLS = st.builds(
    ToolCall,
    st.sampled_from(NAMES),
    st.dictionaries(st.text(max_size=6), VALUES, max_size=4).map(json.dumps),
)


def same(found: tuple[ToolCall, ...], calls: list[ToolCall]) -> bool:
    return [(call.name, json.loads(call.arguments)) for call in found] == [
        (call.name, json.loads(call.arguments)) for call in calls
    ]


@given(CALLS, st.sampled_from(["", "<|python_tag|>"]), st.sampled_from(["", "<|eom_id|>"]))
def test_a_call_of_llama_3_is_read_back(call: ToolCall, start: str, end: str) -> None:
    text = written_by(TEMPLATES["llama 3.1"], [call.to_json()])
    assert '"parameters": ' in text
    found = parse_tool_calls(start + text + end, NAMES)
    assert found.content == "" and same(found.calls, [call])


@given(st.lists(CALLS, min_size=1, max_size=3), st.sampled_from([None, "Let me see."]))
def test_calls_of_qwen_are_read_back(calls: list[ToolCall], content: str | None) -> None:
    text = written_by(QWEN, [call.to_json() for call in calls], content)
    assert text.count("<tool_call>\n") >= len(calls)
    if any("tool_call>" in call.arguments for call in calls):
        return
    found = parse_tool_calls(text.removesuffix("<|im_end|>\n"), NAMES)
    assert same(found.calls, calls) and found.content == (content or "")


def test_several_of_llama_3() -> None:
    text = '{"name": "now", "parameters": {}}; {"name": "get_weather", "parameters": {"city": ";"}}'
    assert parse_tool_calls(text, NAMES).calls == (
        ToolCall("now", "{}"),
        ToolCall("get_weather", '{"city": ";"}'),
    )


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "now", "arguments": {}}',  # the end was a stop text
        '<tool_call>{"name": "now", "arguments": {}}<|im_end|>',
        '<tool_call>{"name": "now", "arguments": "{}"}</tool_call>',
        '{"name": "now", "arguments": {}}',
        ' \n{"name": "now", "parameters": {}}\n',
        '{"type": "function", "name": "now", "parameters": {}}',
    ],
)
def test_a_call_in_another_spelling(text: str) -> None:
    assert parse_tool_calls(text, NAMES) == ToolAnswer("", (ToolCall("now", "{}"),))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "It is sunny.",
        '{"name": "now", "parameters": {}',
        '{"name": "now", "parameters": {}} and more',
        'I call {"name": "now", "parameters": {}}',
        '{"name": "now"}',
        '{"name": 5, "parameters": {}}',
        '{"name": "now", "parameters": []}',
        '{"name": "now", "parameters": {"a": NaN}}',
        '{"name": "now", "name": "get_weather", "parameters": {}}',
        '{"name": "rm", "parameters": {}}',
        '{"name": "now", "parameters": {}};',
        '{"name": "now", "parameters": {}}; no',
        '[{"name": "now", "parameters": {}}]',
        "<tool_call></tool_call>",
        "<tool_call>now()</tool_call>",
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "now", "arguments": {}}<tool_call>',
        '<tool_call>{"name": "now", "arguments": {}}</tool_call><tool_call>{',
        '<|python_tag|>brave_search.call(query="now")',
        "{" * 5000,
        '{"name": "now", "parameters": {"a": \ud800}}',
        '{"a":' * 3000,
    ],
)
def test_a_text_that_is_no_call_stays_as_it_is(text: str) -> None:
    assert parse_tool_calls(text, NAMES) == ToolAnswer(text)


def test_without_tools_nothing_is_a_call() -> None:
    text = '{"name": "now", "parameters": {}}'
    assert parse_tool_calls(text, []) == ToolAnswer(text)


@given(st.text() | st.text('{}[]":;,\\ <>/|name_toolcal', max_size=80))
def test_any_text_is_read(text: str) -> None:
    found = parse_tool_calls(text, NAMES)
    assert found.calls or found.content == text


@pytest.mark.parametrize(
    "piece",
    [
        "<tool_call>",
        "<tool_call></tool_call>",
        '{"name":"now","parameters":{}};',
        "{",
        "</tool_call>",
    ],
)
def test_a_long_text_takes_no_time(piece: str) -> None:
    text = piece * (1_000_000 // len(piece))
    started = time.monotonic()
    assert parse_tool_calls(text, NAMES) == ToolAnswer(text)
    assert time.monotonic() - started < 5


# What is refused


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ("x", "tools must be a list of"),
        ({}, "tools must be a list of"),
        (5, "tools must be a list of"),
        ([5], r"tools\[0\] must be"),
        ([{"type": "function"}], r"tools\[0\] must be"),
        ([{"type": "retrieval", "function": {"name": "a"}}], r"tools\[0\] must be"),
        ([NOW, {"type": "function", "function": {}}], r"tools\[1\]: 'name' must be 1 to 64"),
        ([{"type": "function", "function": {"name": "a b"}}], "'name' must be 1 to 64 letters"),
        ([{"type": "function", "function": {"name": "a" * 65}}], "'name' must be 1 to 64 letters"),
        ([{"type": "function", "function": {"name": "a", "description": 5}}], "'description'"),
        ([{"type": "function", "function": {"name": "a", "parameters": []}}], "'parameters'"),
        ([{"type": "function", "function": {"name": "a", "x": {1j}}}], "JSON cannot express"),
        ([{"type": "function", "function": {"name": "a", "x": float("nan")}}], "JSON cannot"),
        ([{"type": "function", "function": {"name": "a", "x": "\ud800"}}], "not UTF-8"),
        ([NOW, NOW], "two functions called 'now'"),
        ([NOW] * (MOST_TOOLS + 1), "has 129 tools, more than the 128 allowed"),
    ],
)
def test_tools_that_mean_nothing_are_refused(tools: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        check_tools(tools)


def test_checked_tools_are_the_callers() -> None:
    assert check_tools([WEATHER, NOW]) == [WEATHER, NOW]
    assert tool_names([WEATHER, NOW]) == NAMES


@pytest.mark.parametrize("arguments", [None, 5, "x", "[]", "{", '{"a": NaN}'])
def test_arguments_that_are_no_object_are_refused(arguments: Any) -> None:
    call = {"function": {"name": "now", "arguments": arguments}}
    with pytest.raises(UsageError, match=r"messages\[1\]\.tool_calls\[0\]: 'arguments' must be"):
        with_template_calls({"role": "assistant", "tool_calls": [call]}, "messages[1]")


def test_a_message_without_calls_stays_as_it_is() -> None:
    assert with_template_calls(USER) == USER
    with pytest.raises(UsageError, match=r"tool_calls\[0\] has no 'function'"):
        with_template_calls({"role": "assistant", "tool_calls": [5]})

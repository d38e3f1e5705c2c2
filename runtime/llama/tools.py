"""Tools that a caller offers to a model, and the calls that are in the text of its answer.

Nothing is called here. A template writes the tools into the prompt in the form that its model has
learned; the model asks for a call in its answer, as JSON. Which form a text has is seen from the
text itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_onnx.runtime.llama.conversation import check_expressible
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.printable import shown
from llama_onnx.targets.strict_json import JSONError, parse_json

Tool = Mapping[str, Any]
"""`{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}`"""

MOST_TOOLS = 128
"""Most tools of a request, as in OpenAI's API."""

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_FORM = '{"type": "function", "function": {"name": ...}}'
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_PYTHON_TAG = "<|python_tag|>"
_ENDS = ("<|eom_id|>", "<|eot_id|>", "<|im_end|>")
_JSON = json.JSONDecoder()


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for: the tool's name and its arguments, the text of an object."""

    name: str
    arguments: str

    def to_json(self) -> dict[str, Any]:
        """Return the call as OpenAI's messages have it, without an id."""
        return {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class ToolAnswer:
    """An answer's text without its calls, and the calls; there may be none of either."""

    content: str
    calls: tuple[ToolCall, ...] = ()


def check_tools(tools: Any, name: str = "tools") -> list[dict[str, Any]]:
    """Return tools in OpenAI's form for a chat template; raise `UsageError` for anything else.

    >>> check_tools([{"type": "function", "function": {"name": "now"}}])
    [{'type': 'function', 'function': {'name': 'now'}}]
    """
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise UsageError(f"{name} must be a list of {_FORM}, not {shown(tools)}.")
    if len(tools) > MOST_TOOLS:
        raise UsageError(f"{name} has {len(tools):,} tools, more than the {MOST_TOOLS} allowed.")
    checked = [_check_tool(tool, f"{name}[{i}]") for i, tool in enumerate(tools)]
    names = tool_names(checked)
    if twice := next((found for found in names if names.count(found) > 1), None):
        raise UsageError(f"{name} has two functions called {twice!r}: rename one.")
    return checked


def tool_names(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of checked tools, for `parse_tool_calls`."""
    return [str(tool["function"]["name"]) for tool in tools]


def _check_tool(tool: Any, where: str) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type") != "function":
        raise UsageError(f"{where} must be {_FORM}, not {shown(tool)}.")
    called = function.get("name")
    if not isinstance(called, str) or not _NAME.fullmatch(called):
        raise UsageError(
            f"{where}: 'name' must be 1 to 64 letters, digits, _, - or ., not {shown(called)}."
        )
    if not isinstance(function.get("description", ""), str):
        raise UsageError(f"{where}: 'description' must be a text.")
    if not isinstance(function.get("parameters", {}), Mapping):
        raise UsageError(f"{where}: 'parameters' must be a JSON schema, an object.")
    checked = {**tool, "function": dict(function)}
    check_expressible(checked, where)
    return checked


def with_template_calls(message: Mapping[str, Any], name: str = "message") -> dict[str, Any]:
    """Return an assistant's message with `tool_calls` in OpenAI's form as templates expect it.

    There `content` may be null, and each call's `arguments` is a text; templates write the content
    and turn an object into JSON themselves. Other messages stay as they are. Raises `UsageError`
    for arguments that are not the text of an object.
    """
    calls = message.get("tool_calls")
    if not isinstance(calls, (list, tuple)):
        return dict(message)
    read = []
    for number, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise UsageError(f"{name}.tool_calls[{number}] has no 'function', an object.")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _object(arguments)
        if not isinstance(arguments, Mapping):
            raise UsageError(
                f"{name}.tool_calls[{number}]: 'arguments' must be the JSON text of an object."
            )
        read.append({**call, "function": {**function, "arguments": dict(arguments)}})
    content = message.get("content")
    return {**message, "content": "" if content is None else content, "tool_calls": read}


def parse_tool_calls(text: str, names: Collection[str]) -> ToolAnswer:
    """Return the calls of the tools `names` in an answer, and its other text.

    Known are `<tool_call>{"name": ..., "arguments": ...}</tool_call>`, several too and with text
    around, as of Hermes, Qwen and SmolLM; and an answer that is one object `{"name": ...,
    "parameters": ...}` or several with `;` between, with or without `<|python_tag|>` first, as of
    Llama 3. An answer that has any other form, or calls what was not offered, is text alone.

    >>> parse_tool_calls('{"name": "add", "parameters": {"a": 1}}', ["add"]).calls
    (ToolCall(name='add', arguments='{"a": 1}'),)
    >>> parse_tool_calls("Hello", ["add"])
    ToolAnswer(content='Hello', calls=())
    """
    if not names:
        return ToolAnswer(text)
    found = _tagged(text) if _OPEN in text else _bare(text)
    if found is None or any(call.name not in names for call in found.calls):
        return ToolAnswer(text)
    return found


def _tagged(text: str) -> ToolAnswer | None:
    calls, around = [], []
    first, *blocks = text.split(_OPEN)
    around.append(first)
    for number, block in enumerate(blocks):
        inside, closed, after = block.partition(_CLOSE)
        if not closed:  # a stop text or an end token can take the last one away
            if number < len(blocks) - 1:
                return None
            inside = _without_end(inside)
        call = _call(_object(inside))
        if call is None:
            return None
        calls.append(call)
        around.append(after)
    return ToolAnswer("".join(around).strip(), tuple(calls))


def _bare(text: str) -> ToolAnswer | None:
    rest = _without_end(text).removeprefix(_PYTHON_TAG).strip()
    calls = []
    while rest.startswith("{"):
        try:
            _, end = _JSON.raw_decode(rest)
        except (ValueError, RecursionError):
            return None
        call = _call(_object(rest[:end]))
        if call is None:
            return None
        calls.append(call)
        rest = rest[end:].lstrip()
        if not rest:
            return ToolAnswer("", tuple(calls))
        if not rest.startswith(";") or len(calls) == MOST_TOOLS:
            return None
        rest = rest[1:].lstrip()
    return None


def _without_end(text: str) -> str:
    text = text.strip()
    for end in _ENDS:
        text = text.removesuffix(end)
    return text.strip()


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = parse_json(text.strip().encode("utf-8"), unique=True)
    except (JSONError, UnicodeEncodeError):
        return None
    return value if isinstance(value, dict) else None


def _call(value: dict[str, Any] | None) -> ToolCall | None:
    if value is None or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("parameters", value.get("arguments"))
    if isinstance(arguments, str):  # an object, written as a text
        arguments = _object(arguments)
    if not isinstance(arguments, dict):
        return None
    return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))

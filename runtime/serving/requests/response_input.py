"""The input of /v1/responses as a conversation, and its tools in the other endpoint's form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llama_onnx.runtime.llama.conversation import Overflow
from llama_onnx.runtime.serving.requests.call import Call, chat_call
from llama_onnx.runtime.serving.requests.schemas import FieldError

_SAME = (
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "ignore_eos",
    "structured_outputs",
    "chat_template_kwargs",
    "continue_final_message",
    "stream",
)
_LOGPROBS = "message.output_text.logprobs"


def response_call(fields: Mapping[str, Any]) -> Call:
    """Read a checked request to /v1/responses; raises `UsageError`."""
    for name in ("model", "input"):
        if name not in fields:
            raise FieldError(name, f"the request has no {name!r}.")
    chat: dict[str, Any] = {name: fields[name] for name in _SAME if name in fields}
    chat["messages"] = _messages(fields.get("instructions"), fields["input"])
    if "max_output_tokens" in fields:
        chat["max_completion_tokens"] = fields["max_output_tokens"]
    include = fields.get("include", ())
    if wrong := [name for name in include if name != _LOGPROBS]:
        raise FieldError("include", f"include: there is no {wrong[0]!r} here.")
    if include or "top_logprobs" in fields:
        chat |= {"logprobs": True, "top_logprobs": fields.get("top_logprobs", 0)}
    if answer_format := fields.get("text", {}).get("format"):
        chat["response_format"] = answer_format
    if "tools" in fields:
        chat["tools"] = [_tool(tool, number) for number, tool in enumerate(fields["tools"])]
    if "tool_choice" in fields:
        chat["tool_choice"] = fields["tool_choice"]
    overflow: Overflow = "drop_oldest" if fields.get("truncation") == "auto" else "error"
    return replace(chat_call(chat), overflow=overflow)


def _tool(tool: Any, number: int) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        raise FieldError(f"tools[{number}]", "tools: this server knows functions only.")
    function = {key: tool[key] for key in ("name", "description", "parameters") if tool.get(key)}
    return {"type": "function", "function": function}


def _messages(instructions: str | None, given: Any) -> list[Any]:
    messages: list[Any] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    for number, item in enumerate(given):
        kind = item.get("type", "message") if isinstance(item, Mapping) else None
        if kind == "message":
            messages.append({"role": item.get("role"), "content": _content(item.get("content"))})
        elif kind == "function_call":
            _add_call(messages, item)
        elif kind == "function_call_output":
            output = _content(item.get("output"))
            messages.append(
                {"role": "tool", "tool_call_id": item.get("call_id"), "content": output}
            )
        elif kind != "reasoning":  # which models of this kind do not read
            raise FieldError(f"input[{number}]", f"input[{number}]: {kind!r} is not text.")
    return messages


def _add_call(messages: list[Any], item: Mapping[str, Any]) -> None:
    """Add a call to the assistant's message, which several calls share."""
    call = {
        "id": item.get("call_id"),
        "type": "function",
        "function": {"name": item.get("name"), "arguments": item.get("arguments")},
    }
    if messages and messages[-1]["role"] == "assistant":
        messages[-1].setdefault("tool_calls", []).append(call)
    else:
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})


def _content(content: Any) -> Any:
    if isinstance(content, str) or not isinstance(content, Sequence):
        return content
    known = ("input_text", "output_text", "text")
    return [
        {"type": "text", "text": part.get("text")}
        if isinstance(part, Mapping) and part.get("type") in known
        else part
        for part in content
    ]

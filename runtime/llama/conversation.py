"""A conversation: what it may hold, the same for Python, the command line, C and servers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, get_args

from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.printable import printable, shown

Message = Mapping[str, Any]
"""`{"role": "system" | "user" | "assistant", "content": ...}`"""

Overflow = Literal["error", "drop_oldest"]
"""What to do with what does not fit the context: refuse it, or leave the oldest turns out."""

OVERFLOWS: tuple[Overflow, ...] = get_args(Overflow)

MAX_MESSAGES = 10_000
"""Most messages of a conversation: a template takes time for each of them."""

_FORM = 'a list of {"role": ..., "content": ...}'


def check_messages(messages: Any, name: str = "messages") -> list[dict[str, Any]]:
    """Return the conversation with each content as one text, for a chat template.

    The rule, which the C library applies too:

    - a conversation is a list (in Python any iterable, but no text and no mapping) of 1 to 10,000
      objects;
    - `role` is a text that is not empty;
    - `content` is a text, or a list of one or more `{"type": "text", "text": ...}`, whose texts are
      joined by line feeds, as llama.cpp and vLLM join them. Missing, null (also beside
      `tool_calls`), a number or a part of another type is refused;
    - other entries, such as `name`, go to the template as they are, if they are JSON;
    - every text is valid Unicode: half of a surrogate pair is refused. A NUL is a character
      like any other, except in the C library, whose strings end at a NUL and which refuses it.

    Raises `UsageError`, which calls the conversation `name`.

    >>> check_messages([{"role": "user", "content": [{"type": "text", "text": "hi"}]}])
    [{'role': 'user', 'content': 'hi'}]
    >>> check_messages([{"role": "user", "content": None}])
    Traceback (most recent call last):
    llama_onnx.targets.errors.UsageError: messages[0]: 'content' must be a text, not None.
    """
    if isinstance(messages, (str, bytes, bytearray, Mapping)):
        raise UsageError(f"{name} must be {_FORM}, not {_kind(messages)}.")
    try:
        listed = list(messages)
    except TypeError:
        raise UsageError(f"{name} must be {_FORM}, not {_kind(messages)}.") from None
    if not listed:
        raise UsageError(f"{name} must have at least one message.")
    if len(listed) > MAX_MESSAGES:
        raise UsageError(
            f"{name} has {len(listed):,} messages, more than the {MAX_MESSAGES:,} allowed."
        )
    return [_check_message(message, f"{name}[{i}]") for i, message in enumerate(listed)]


def _check_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UsageError(
            f'{where} must be an object such as {{"role": "user", "content": "Hello"}}, not '
            f"{_kind(message)}."
        )
    for entry in ("role", "content"):
        if entry not in message:
            raise UsageError(f"{where} has no {entry!r}.")
    role = message["role"]
    if not isinstance(role, str) or not role:
        raise UsageError(f"{where}: 'role' must be a text that is not empty, not {shown(role)}.")
    checked = {**message, "content": _text(message["content"], where)}
    check_expressible(checked, where)
    return checked


def check_expressible(value: Mapping[str, Any], where: str) -> None:
    """Raise `UsageError` unless JSON in UTF-8 can express `value`, which a message calls `where`.

    >>> check_expressible({"content": float("nan")}, "messages[0]")
    Traceback (most recent call last):
    llama_onnx.targets.errors.UsageError: messages[0] has an entry that JSON cannot express.
    """
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"{where} has bytes that are not UTF-8: convert them first.") from None
    except (TypeError, ValueError, RecursionError):
        raise UsageError(f"{where} has an entry that JSON cannot express.") from None


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise UsageError(f"{where}: 'content' must be a text, not {_kind(content)}.")
    if not content:
        raise UsageError(f"{where}: 'content' is an empty list: give it a text.")
    return "\n".join(_part(part, where) for part in content)


def _part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise UsageError(f'{where}: a part of \'content\' must be {{"type": "text", "text": ...}}.')
    if part["type"] != "text":
        kind = printable(part["type"][:40])
        raise UsageError(f"{where}: 'content' has a part of type '{kind}': this model takes text.")
    if not isinstance(part.get("text"), str):
        raise UsageError(f"{where}: a part of type 'text' needs 'text', a text.")
    return str(part["text"])


def _kind(value: Any) -> str:
    """What a value is, without what it holds, which can be long or private."""
    names = {str: "a text", bytes: "bytes", dict: "an object", type(None): "None"}
    return names.get(type(value)) or (
        shown(value) if isinstance(value, (bool, int, float)) else f"a {type(value).__name__}"
    )


def check_overflow(value: Any) -> Overflow:
    """Return `value`; raise `UsageError` unless it is the name of a policy."""
    for name in OVERFLOWS:
        if value == name:
            return name
    raise UsageError(f"overflow must be {' or '.join(OVERFLOWS)}, not {shown(value)}.")

"""The conversations that a chat template is tried with, by what is special about each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Conversation = list[dict[str, str]]


def _turns(*contents: str, system: str | None = None) -> Conversation:
    roles: Iterable[str] = ("user", "assistant") * len(contents)
    first = [{"role": "system", "content": system}] if system is not None else []
    turns = zip(roles, contents, strict=False)
    return [*first, *({"role": role, "content": content} for role, content in turns)]


CONVERSATIONS: dict[str, Conversation] = {
    "one turn": _turns("hello"),
    "a system message": _turns("What is 2 + 2?", system="You are terse."),
    "several turns": _turns("Hello!", "Hello. How are you?", "Well.", "Good.", "Bye."),
    "several turns after a system message": _turns("Hello!", "Hello.", "Bye.", system="Be\nkind."),
    "an answer with </think>": _turns("Think.", "<think>\none\n</think>\n\nTwo.", "And </think>?"),
    "Windows line ends": _turns("one\r\ntwo\r\n\r\nthree", "four\r\n", "five"),
    "spaces at both ends": _turns("  one \n", "\n\ttwo  ", " \n three "),
    "letters beyond ASCII": _turns("“é” 日本 🎉 ß", "Ça va.", "Да\u00a0!", system="Réponds à ça."),
}
"""Those that onnxruntime-genai's prompts are compared for."""

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Says how the weather is.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
]

WITH_TOOLS: list[dict[str, Any]] = [
    {"role": "user", "content": "Is it warm in Oslo?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "type": "function",
                "id": "123456789",
                "function": {"name": "weather", "arguments": {"place": "Oslo"}},
            }
        ],
    },
    {"role": "tool", "name": "weather", "tool_call_id": "123456789", "content": "-3"},
]
"""A conversation that only users of transformers can have."""

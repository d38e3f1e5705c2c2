"""Shorten a conversation until it fits into a context."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llama_onnx.runtime.llama.model import Message


def trim_history(
    messages: Sequence[Message], fits: Callable[[Sequence[Message]], bool]
) -> list[Message]:
    """Return `messages` without the oldest exchanges, dropping as many as needed until it `fits`.

    A system message at the start and the last message always stay.
    """
    kept = list(messages)
    first = 1 if kept and kept[0]["role"] == "system" else 0
    while len(kept) > first + 1 and not fits(kept):
        del kept[first : first + 2]
    return kept

"""What becomes of a conversation that is longer than the model's context."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_onnx.runtime.engine.sampling.parameters import read_value
from llama_onnx.runtime.llama.conversation import Message, Overflow
from llama_onnx.runtime.llama.prompt import Tokens
from llama_onnx.targets.errors import ContextLengthError

_SYSTEM = ("system", "developer")


@dataclass(frozen=True)
class Fitted:
    """The messages that are left, their tokens, and the messages that were left out."""

    messages: tuple[Message, ...]
    tokens: Tokens
    dropped: tuple[Message, ...]


def fit_messages(
    messages: Sequence[Message],
    encode: Callable[[Sequence[Message]], Tokens],
    context_length: int,
    max_new_tokens: Any,
    overflow: Overflow,
) -> Fitted:
    """Return what of a conversation fits the context, with room for the answer.

    With "drop_oldest", as few of the oldest turns are left out as possible. A turn is a user's
    message and all that follows up to the next, so that the calls of tools stay with their answers.
    The system messages at the start and the last turn always stay. An answer has room if
    `max_new_tokens` fit, or a quarter of the context if that is less: a large limit must not
    displace the whole conversation.

    `encode` returns the tokens of messages. Raises what it raises, and `ContextLengthError` if what
    must stay leaves no room for a single token; with "error" also if the whole does not.
    """
    room = min(read_value("max_new_tokens", max_new_tokens), context_length // 4)
    head, turns = _turns(messages)

    def without(oldest: int) -> list[Message]:
        return [*head, *(message for turn in turns[oldest:] for message in turn)]

    def count(oldest: int) -> int:
        try:
            return len(encode(without(oldest)))
        except ContextLengthError:
            return context_length + 1

    oldest, last = 0, len(turns) - 1
    if overflow == "drop_oldest" and last > 0 and count(0) + room > context_length:
        oldest = bisect_left(range(1, last), True, key=lambda n: count(n) + room <= context_length)
        oldest += 1
    kept = without(oldest)
    tokens = np.asarray(encode(kept))
    if len(tokens) >= context_length:
        raise ContextLengthError(
            f"the {'last message' if oldest else 'conversation'} has {len(tokens):,} tokens, but "
            f"this model's maximum context length is {context_length:,}, and an answer needs room "
            "too: "
            + ("shorten it." if oldest or last < 1 else 'shorten it, or choose "drop_oldest".')
        )
    dropped = tuple(message for turn in turns[:oldest] for message in turn)
    return Fitted(tuple(kept), tokens, dropped)


def _turns(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """Return the system messages at the start, and the turns after them."""
    start = 0
    while start < len(messages) and messages[start].get("role") in _SYSTEM:
        start += 1
    turns: list[list[Message]] = []
    for message in messages[start:]:
        if not turns or message.get("role") == "user":
            turns.append([])
        turns[-1].append(message)
    return list(messages[:start]), turns

"""Log probabilities as OpenAI's endpoints have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llama_onnx.runtime.llama.generation import TextEvent

TokenBytes = Callable[[int], bytes]

LEAST = -9999.0
"""What stands for the logarithm of 0, which JSON cannot express; OpenAI's API does so too."""


def chat_logprobs(tokens: Sequence[TextEvent], token_bytes: TokenBytes) -> list[dict[str, Any]]:
    """Return an entry for each token, with its alternatives."""
    return [
        {
            **_entry(event.token, event.logprobs.logprob, token_bytes),
            "top_logprobs": [
                _entry(token, logprob, token_bytes) for token, logprob in event.logprobs.top
            ],
        }
        for event in tokens
        if event.logprobs is not None
    ]


def _entry(token: int, logprob: float, token_bytes: TokenBytes) -> dict[str, Any]:
    content = token_bytes(token)
    return {
        "token": content.decode("utf-8", "replace"),
        "bytes": list(content),
        "logprob": max(logprob, LEAST),
    }


def completion_logprobs(
    tokens: Sequence[TextEvent], token_bytes: TokenBytes, offset: int
) -> dict[str, Any]:
    """Return the four lists of the older endpoint; `offset` is where the tokens' text starts."""
    entries = chat_logprobs(tokens, token_bytes)
    offsets = []
    for event in tokens:
        offsets.append(offset)
        offset += len(event.text)
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [
            {top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries
        ],
        "text_offset": offsets,
    }

"""The responses of /v1/completions."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from openai.types import Completion

from llama_onnx.runtime.serving.replies.answer_parts import Part, Usage, gathered
from llama_onnx.runtime.serving.replies.head import Head, dumps
from llama_onnx.runtime.serving.replies.logprobs import TokenBytes, completion_logprobs
from llama_onnx.runtime.serving.requests.call import Call


def completion(
    call: Call, head: Head, parts: Sequence[Part], token_bytes: TokenBytes, echoes: Sequence[str]
) -> bytes:
    """Return the whole response; `echoes` has a text for each answer to start with."""
    choices = []
    for index, answer in enumerate(gathered(parts, call.places)):
        logprobs = None
        if call.sampling.logprobs is not None:
            logprobs = completion_logprobs(answer.tokens, token_bytes, len(echoes[index]))
        choices.append(
            {
                "index": index,
                "text": echoes[index] + answer.text,
                "logprobs": logprobs,
                "finish_reason": answer.last.finish,
            }
        )
    usage = Usage.of(parts, call.choices).to_json()
    content = head.to_json("text_completion") | {"choices": choices, "usage": usage}
    return dumps(Completion.model_validate(content))


async def completion_chunks(
    call: Call,
    head: Head,
    parts: AsyncIterator[Part],
    token_bytes: TokenBytes,
    echoes: Sequence[str],
) -> AsyncIterator[bytes]:
    """Yield the data of each event of a streamed response."""
    lasts: list[Part] = []
    offsets = [len(echo) for echo in echoes]
    for index, echo in enumerate(echoes):
        if echo:
            yield _chunk(call, head, index, echo)
    async for part in parts:
        logprobs = None
        if call.sampling.logprobs is not None and part.tokens:
            logprobs = completion_logprobs(part.tokens, token_bytes, offsets[part.index])
        offsets[part.index] += len(part.text)
        if part.text or logprobs:
            yield _chunk(call, head, part.index, part.text, logprobs=logprobs)
        if part.finish:
            lasts.append(part)
            yield _chunk(call, head, part.index, "", finish=part.finish)
    if call.include_usage:
        usage = Usage.of(lasts, call.choices).to_json()
        content = head.to_json("text_completion") | {"choices": [], "usage": usage}
        yield dumps(Completion.model_validate(content))


def _chunk(
    call: Call,
    head: Head,
    index: int,
    text: str,
    *,
    logprobs: dict[str, Any] | None = None,
    finish: str | None = None,
) -> bytes:
    choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
    content: dict[str, Any] = head.to_json("text_completion") | {"choices": [choice]}
    if call.include_usage:
        content["usage"] = None
    # The library's type has no chunk, whose finish_reason may be null.
    return json.dumps(content).encode()

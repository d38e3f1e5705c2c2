"""The responses of /v1/chat/completions."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

from openai.types.chat import ChatCompletion, ChatCompletionChunk

from llama_onnx.runtime.llama.tools import ToolCall
from llama_onnx.runtime.serving.replies.answer_parts import Part, Usage, gathered
from llama_onnx.runtime.serving.replies.head import Head, dumps
from llama_onnx.runtime.serving.replies.logprobs import TokenBytes, chat_logprobs
from llama_onnx.runtime.serving.requests.call import Call


def chat_completion(
    call: Call, head: Head, parts: Sequence[Part], token_bytes: TokenBytes
) -> bytes:
    """Return the whole response, for all `parts` of all answers."""
    choices = []
    for index, answer in enumerate(gathered(parts, call.choices)):
        calls = answer.last.calls
        message: dict[str, Any] = {
            "role": "assistant",
            "content": answer.text if answer.text or not calls else None,
            "refusal": None,
        }
        if calls:
            message["tool_calls"] = [_tool_call(found) for found in calls]
        logprobs = {"content": chat_logprobs(answer.tokens, token_bytes), "refusal": None}
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": None if call.sampling.logprobs is None else logprobs,
                "finish_reason": answer.last.finish,
            }
        )
    usage = Usage.of(parts, call.choices).to_json()
    whole = head.to_json("chat.completion") | {"choices": choices, "usage": usage}
    return dumps(ChatCompletion.model_validate(whole))


async def chat_chunks(
    call: Call, head: Head, parts: AsyncIterator[Part], token_bytes: TokenBytes
) -> AsyncIterator[bytes]:
    """Yield the data of each event of a streamed response."""
    lasts: list[Part] = []
    for index in range(call.choices):
        yield _chunk(call, head, index, {"role": "assistant", "content": ""})
    async for part in parts:
        logprobs = None
        if call.sampling.logprobs is not None and part.tokens:
            logprobs = {"content": chat_logprobs(part.tokens, token_bytes), "refusal": None}
        if part.text or logprobs:
            yield _chunk(call, head, part.index, {"content": part.text}, logprobs=logprobs)
        if part.calls:
            calls = [_tool_call(found) | {"index": i} for i, found in enumerate(part.calls)]
            yield _chunk(call, head, part.index, {"tool_calls": calls})
        if part.finish:
            lasts.append(part)
            yield _chunk(call, head, part.index, {}, finish=part.finish)
    if call.include_usage:
        usage = Usage.of(lasts, call.choices).to_json()
        content = head.to_json("chat.completion.chunk") | {"choices": [], "usage": usage}
        yield dumps(ChatCompletionChunk.model_validate(content))


def _chunk(
    call: Call,
    head: Head,
    index: int,
    delta: dict[str, Any],
    *,
    logprobs: dict[str, Any] | None = None,
    finish: str | None = None,
) -> bytes:
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
    content = head.to_json("chat.completion.chunk") | {"choices": [choice]}
    if call.include_usage:
        content["usage"] = None
    return dumps(ChatCompletionChunk.model_validate(content))


def _tool_call(call: ToolCall) -> dict[str, Any]:
    return {"id": f"call_{secrets.token_hex(12)}", **call.to_json()}

"""The responses of /v1/responses, which are texts and calls of functions."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from openai.types.responses import Response

from llama_onnx.runtime.llama.generation_stats import GenerationStats
from llama_onnx.runtime.llama.tools import ToolCall
from llama_onnx.runtime.serving.replies.answer_parts import Part
from llama_onnx.runtime.serving.replies.head import Head, dumps
from llama_onnx.runtime.serving.replies.logprobs import TokenBytes, chat_logprobs
from llama_onnx.runtime.serving.requests.call import Call

_ECHOED = (
    "instructions",
    "max_output_tokens",
    "metadata",
    "parallel_tool_calls",
    "reasoning",
    "safety_identifier",
    "text",
    "tool_choice",
    "tools",
    "top_logprobs",
    "truncation",
    "user",
)
"""Fields of the request that the response repeats."""


@dataclass
class _Answer:
    """What has come of the answer so far."""

    call: Call
    head: Head
    fields: Mapping[str, Any]
    token_bytes: TokenBytes
    text: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    calls: tuple[ToolCall, ...] = ()
    finish: str | None = None
    stats: GenerationStats | None = None
    message_id: str = field(default_factory=lambda: f"msg_{secrets.token_hex(16)}")
    call_ids: tuple[str, ...] = ()

    def add(self, part: Part) -> list[dict[str, Any]]:
        """Take a part, and return its log probabilities."""
        found = []
        if self.call.sampling.logprobs is not None:
            found = chat_logprobs(part.tokens, self.token_bytes)
        self.text += part.text
        self.logprobs += found
        if part.finish:
            self.calls, self.finish, self.stats = part.calls, part.finish, part.stats
            self.call_ids = tuple(secrets.token_hex(12) for _ in part.calls)
        return found

    def content(self) -> dict[str, Any]:
        """Return the text as a part of the message."""
        found: dict[str, Any] = {"type": "output_text", "text": self.text, "annotations": []}
        return found | {"logprobs": self.logprobs}

    def message(self, status: str) -> dict[str, Any]:
        """Return the message."""
        return {
            "id": self.message_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [] if status == "in_progress" else [self.content()],
        }

    def function_calls(self) -> list[dict[str, Any]]:
        """Return the calls of functions."""
        return [
            {
                "id": f"fc_{identity}",
                "call_id": f"call_{identity}",
                "type": "function_call",
                "name": call.name,
                "arguments": call.arguments,
                "status": "completed",
            }
            for identity, call in zip(self.call_ids, self.calls, strict=True)
        ]

    def has_message(self) -> bool:
        """Return whether there is a message, beside or instead of calls."""
        return bool(self.text) or not self.calls

    def to_json(self) -> dict[str, Any]:
        """Return the response object."""
        status = "in_progress"
        if self.finish:
            status = "incomplete" if self.finish == "length" else "completed"
        output = [self.message(status)] if self.finish and self.has_message() else []
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        sampling = self.call.sampling
        found = {
            "id": self.head.id,
            "object": "response",
            "created_at": self.head.created,
            "model": self.head.model,
            "status": status,
            "error": None,
            "incomplete_details": cut,
            "output": output + self.function_calls(),
            "parallel_tool_calls": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "tool_choice": "auto",
            "tools": [],
            "store": False,
        }
        found |= {name: self.fields[name] for name in _ECHOED if name in self.fields}
        return found | ({"usage": _usage(self.stats)} if self.stats else {})


def _usage(stats: GenerationStats) -> dict[str, Any]:
    return {
        "input_tokens": stats.prompt_tokens,
        "input_tokens_details": {"cached_tokens": stats.reused_tokens, "cache_write_tokens": 0},
        "output_tokens": stats.new_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": stats.prompt_tokens + stats.new_tokens,
    }


def response(
    call: Call,
    head: Head,
    parts: Sequence[Part],
    token_bytes: TokenBytes,
    fields: Mapping[str, Any],
) -> bytes:
    """Return the whole response; `fields` are the request's."""
    answer = _Answer(call, head, fields, token_bytes)
    for part in parts:
        answer.add(part)
    return dumps(Response.model_validate(answer.to_json()))


async def response_events(
    call: Call,
    head: Head,
    parts: AsyncIterator[Part],
    token_bytes: TokenBytes,
    fields: Mapping[str, Any],
) -> AsyncIterator[tuple[str, bytes]]:
    """Yield the name and the data of each event of a streamed response."""
    answer, number = _Answer(call, head, fields, token_bytes), 0
    async for event in _events(answer, parts):
        yield event["type"], json.dumps({**event, "sequence_number": number}).encode()
        number += 1


async def _events(answer: _Answer, parts: AsyncIterator[Part]) -> AsyncIterator[dict[str, Any]]:
    for name in ("created", "in_progress"):
        yield {"type": f"response.{name}", "response": answer.to_json()}
    where = {"item_id": answer.message_id, "output_index": 0, "content_index": 0}
    begun = False
    async for part in parts:
        logprobs = answer.add(part)
        if not begun and (answer.text or (part.finish and answer.has_message())):
            begun = True
            for event in _beginning(answer, where):
                yield event
        if part.text or (logprobs and begun):
            yield {
                "type": "response.output_text.delta",
                **where,
                "delta": part.text,
                "logprobs": logprobs,
            }
    for event in _ending(answer, where, begun):
        yield event


def _beginning(answer: _Answer, where: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield {
        "type": "response.output_item.added",
        "output_index": 0,
        "item": answer.message("in_progress"),
    }
    empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    yield {"type": "response.content_part.added", **where, "part": empty}


def _ending(answer: _Answer, where: Mapping[str, Any], begun: bool) -> Iterator[dict[str, Any]]:
    final = answer.to_json()
    if begun:
        yield {
            "type": "response.output_text.done",
            **where,
            "text": answer.text,
            "logprobs": answer.logprobs,
        }
        yield {"type": "response.content_part.done", **where, "part": answer.content()}
        yield {
            "type": "response.output_item.done",
            "output_index": 0,
            "item": answer.message(final["status"]),
        }
    for index, item in enumerate(answer.function_calls(), start=int(begun)):
        place = {"item_id": item["id"], "output_index": index}
        begins = {**item, "arguments": "", "status": "in_progress"}
        yield {"type": "response.output_item.added", "output_index": index, "item": begins}
        arguments = item["arguments"]
        yield {"type": "response.function_call_arguments.delta", **place, "delta": arguments}
        yield {
            "type": "response.function_call_arguments.done",
            **place,
            "arguments": arguments,
            "name": item["name"],
        }
        yield {"type": "response.output_item.done", "output_index": index, "item": item}
    yield {"type": f"response.{final['status']}", "response": final}

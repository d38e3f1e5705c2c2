"""OpenAI's endpoints: how each reads a request, and how answers become its response.

A web server and a batch answer by the same code; it needs no web framework.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from llama_onnx.runtime.llama.async_generation import AsyncGeneration
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.serving.openai_errors import UnknownModelError
from llama_onnx.runtime.serving.replies.answer_parts import Part, merged
from llama_onnx.runtime.serving.replies.chat_reply import chat_chunks, chat_completion
from llama_onnx.runtime.serving.replies.completion_reply import completion, completion_chunks
from llama_onnx.runtime.serving.replies.head import Head
from llama_onnx.runtime.serving.replies.response_reply import response, response_events
from llama_onnx.runtime.serving.requests.call import Call, chat_call, completion_call
from llama_onnx.runtime.serving.requests.response_input import response_call
from llama_onnx.runtime.serving.requests.schemas import CHAT, COMPLETION, RESPONSE, Schema
from llama_onnx.targets.listing import hash_file
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.printable import shown

Fields = Mapping[str, Any]
Event = tuple[str | None, bytes]


@dataclass(frozen=True)
class Asked:
    """A request that was read, and how its answers become its response.

    `whole` turns all parts of all answers into the body of the response, `events` the parts as they
    come into the name and the data of each event of a stream. `last` is the data that ends it, and
    `named` says whether its events have names.
    """

    call: Call
    whole: Callable[[Sequence[Part]], bytes]
    events: Callable[[AsyncIterator[Part]], AsyncIterator[Event]]
    last: bytes | None = b"[DONE]"
    named: bool = False

    def parts(self, model: Llama, answers: Sequence[AsyncGeneration]) -> AsyncIterator[Part]:
        """Yield the parts of `answers`, which have started."""
        ends = () if self.call.ignore_eos else model.codec.end_tokens
        return merged(answers, self.call.calls_named, ends, self.call.most_calls)


@dataclass(frozen=True)
class Endpoint:
    """One of OpenAI's endpoints: the `schema` of its requests, and `ask`, which reads one that the
    schema has checked. Its other arguments are the model and the fingerprint of the package."""

    schema: Schema
    ask: Callable[[Fields, Llama, str], Asked]


@dataclass(frozen=True)
class Names:
    """The names of a model for clients: its `own`, and those of its adapters."""

    own: str
    adapters: Collection[str]

    @classmethod
    def of(cls, package: ModelPackage, own: str | None) -> Names:
        """Return the names of `package`; `own` None is the name of its folder."""
        return cls(own or package.path.resolve().name, tuple(package.adapters))

    def all(self) -> tuple[str, ...]:
        """Return all of them."""
        return (self.own, *self.adapters)

    def adapter(self, name: str) -> str | None:
        """Return the adapter that a name means, None for the package itself."""
        if name not in self.all():
            known = ", ".join(self.all())
            raise UnknownModelError(f"there is no model {shown(name)} here, but {known}.")
        return None if name == self.own else name


def fingerprint(package: ModelPackage) -> str:
    """Return what responses call the state of `package`."""
    return f"fp_{hash_file(package.index)[:12]}"


def _ask_chat(fields: Fields, model: Llama, state: str) -> Asked:
    call = chat_call(fields)
    head, of = Head.new("chatcmpl", call.model, state), model.codec.token_bytes
    return Asked(
        call,
        lambda parts: chat_completion(call, head, parts, of),
        lambda parts: _unnamed(chat_chunks(call, head, parts, of)),
    )


def _ask_completion(fields: Fields, model: Llama, state: str) -> Asked:
    call = completion_call(fields)
    head, of = Head.new("cmpl", call.model, state), model.codec.token_bytes

    def echoes() -> list[str]:
        return [
            (prompt if isinstance(prompt, str) else model.decode(prompt)) if call.echo else ""
            for prompt in call.prompts
            for _ in range(call.choices)
        ]

    return Asked(
        call,
        lambda parts: completion(call, head, parts, of, echoes()),
        lambda parts: _unnamed(completion_chunks(call, head, parts, of, echoes())),
    )


def _ask_response(fields: Fields, model: Llama, state: str) -> Asked:
    call = response_call(fields)
    head, of = Head.new("resp", call.model, state), model.codec.token_bytes
    return Asked(
        call,
        lambda parts: response(call, head, parts, of, fields),
        lambda parts: response_events(call, head, parts, of, fields),
        last=None,
        named=True,
    )


async def _unnamed(chunks: AsyncIterator[bytes]) -> AsyncIterator[Event]:
    async with aclosing(chunks) as found:  # type: ignore[type-var]
        async for chunk in found:
            yield None, chunk


CHAT_PATH, COMPLETION_PATH = "/v1/chat/completions", "/v1/completions"

ENDPOINTS: Mapping[str, Endpoint] = {
    CHAT_PATH: Endpoint(CHAT, _ask_chat),
    COMPLETION_PATH: Endpoint(COMPLETION, _ask_completion),
    "/v1/responses": Endpoint(RESPONSE, _ask_response),
}
"""The endpoints by their paths."""

"""A caller's request as JSON, checked before the model runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama_onnx.runtime.llama.sampling import PARAMETERS, Sampling
from llama_onnx.targets.errors import UsageError

if TYPE_CHECKING:
    from llama_onnx.runtime.llama.generation import Generation
    from llama_onnx.runtime.llama.model import Llama

MAX_NEW_TOKENS = 256
"""The default of a request."""

_LARGEST = 2**31 - 1  # onnxruntime-genai's options are 32-bit integers


@dataclass(frozen=True)
class Request:
    """A `prompt` to continue, or `messages`, a conversation whose last message is to be answered.

    `stream` asks for the answer in pieces; the other fields are arguments of `Llama.generate` and
    `Llama.chat`.
    """

    prompt: str | None
    messages: tuple[Mapping[str, str], ...]
    sampling: Sampling
    max_new_tokens: int = MAX_NEW_TOKENS
    stop: tuple[str, ...] = ()
    adapter: str | None = None
    stream: bool = False

    @classmethod
    def parse(cls, body: str | bytes) -> Request:
        """Read a request's body; raise `UsageError` with a message for the caller."""
        try:
            content = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"the request is not valid JSON: {error}.") from None
        return cls.from_json(content)

    @classmethod
    def from_json(cls, content: Any) -> Request:
        """Check decoded JSON; raise `UsageError` with a message for the caller."""
        if not isinstance(content, dict):
            raise UsageError('the request must be a JSON object, such as {"prompt": "Once"}.')
        for name, value in content.items():
            if name not in _FIELDS:
                raise UsageError(f"unknown field {name!r}: use {', '.join(_FIELDS)}.")
            holds, meaning = _FIELDS[name]
            if not holds(value):
                raise UsageError(f"{name!r} must be {meaning}.")
        if ("prompt" in content) == ("messages" in content):
            raise UsageError("the request needs either 'prompt' or 'messages'.")
        return cls(
            prompt=content.get("prompt"),
            messages=tuple(content.get("messages", ())),
            sampling=Sampling(**{name: content.get(name) for name in PARAMETERS}),
            max_new_tokens=content.get("max_new_tokens", MAX_NEW_TOKENS),
            stop=tuple(content.get("stop", ())),
            adapter=content.get("adapter"),
            stream=content.get("stream", False),
        )

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return {
            **({"messages": list(self.messages)} if self.messages else {"prompt": self.prompt}),
            **self.sampling.to_json(),
            "max_new_tokens": self.max_new_tokens,
            "stop": list(self.stop),
            **({} if self.adapter is None else {"adapter": self.adapter}),
            "stream": self.stream,
        }

    def start(self, model: Llama) -> Generation:
        """Start an answer of `model`; raise `UsageError` for what this model cannot do."""
        options: dict[str, Any] = {
            name: getattr(self, name) for name in ("sampling", "max_new_tokens", "stop", "adapter")
        }
        if self.prompt is None:
            return model.chat(self.messages, **options)
        return model.generate(self.prompt, **options)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"role", "content"}
        and all(isinstance(text, str) for text in value.values())
    )


_WHOLE = f"a whole number of at most {_LARGEST}"

_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "prompt": (_is_text, "a text"),
    "messages": (_is_conversation, 'a list of {"role": "user", "content": "..."}'),
    "max_new_tokens": (_is_whole, _WHOLE),
    **{
        name: (_is_whole, _WHOLE) if known["type"] is int else (_is_number, "a number")
        for name, known in PARAMETERS.items()
    },
    "stop": (_is_texts, "a list of texts"),
    "adapter": (_is_text, "the name of an adapter"),
    "stream": (lambda value: isinstance(value, bool), "true or false"),
}
"""Field -> a check of its value, and what the value must be."""

"""What a caller may ask of a model, as JSON; checked before it costs anything."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama_onnx.runtime.llama.sampling import search_options
from llama_onnx.targets.errors import UsageError

if TYPE_CHECKING:
    from llama_onnx.runtime.llama.generation import Generation
    from llama_onnx.runtime.llama.model import Llama

MAX_NEW_TOKENS = 256
"""Where a request does not say."""

_SAMPLING = ("temperature", "top_k", "top_p", "seed")
_LARGEST = 2**31 - 1  # onnxruntime-genai's options are 32-bit integers


@dataclass(frozen=True)
class Request:
    """Either `prompt`, a text to continue, or `messages`, a conversation whose last one to answer.

    `options` are the other arguments of `Llama.generate` and `Llama.chat`; `stream` asks for the
    answer in pieces.
    """

    prompt: str | None
    messages: tuple[Mapping[str, str], ...]
    options: Mapping[str, Any]
    stream: bool = False

    @classmethod
    def parse(cls, body: str | bytes) -> Request:
        """Read a request's body; raises `UsageError`, one sentence for whoever sent it."""
        try:
            content = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"The request is not valid JSON: {error}.") from None
        return cls.from_json(content)

    @classmethod
    def from_json(cls, content: Any) -> Request:
        """Check what JSON held; raises `UsageError`."""
        if not isinstance(content, dict):
            raise UsageError('The request must be an object, such as {"prompt": "Once"}.')
        for name, value in content.items():
            if name not in _FIELDS:
                raise UsageError(f"There is no field {name!r}; there are {', '.join(_FIELDS)}.")
            holds, meaning = _FIELDS[name]
            if not holds(value):
                raise UsageError(f"{name!r} must be {meaning}.")
        if ("prompt" in content) == ("messages" in content):
            raise UsageError("The request needs either 'prompt' or 'messages'.")
        search_options(**{name: content.get(name) for name in _SAMPLING})
        own = ("prompt", "messages", "stream")
        options = {name: value for name, value in content.items() if name not in own}
        return cls(
            prompt=content.get("prompt"),
            messages=tuple(content.get("messages", ())),
            options={"max_new_tokens": MAX_NEW_TOKENS, **options},
            stream=content.get("stream", False),
        )

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        asked = {"messages": list(self.messages)} if self.messages else {"prompt": self.prompt}
        return {**asked, **self.options, "stream": self.stream}

    def start(self, model: Llama) -> Generation:
        """Have `model` begin; raises `UsageError` for what this model cannot do."""
        if self.prompt is None:
            return model.chat(self.messages, **self.options)
        return model.generate(self.prompt, **self.options)


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
    "temperature": (_is_number, "a number"),
    "top_k": (_is_whole, _WHOLE),
    "top_p": (_is_number, "a number"),
    "seed": (_is_whole, _WHOLE),
    "stop": (_is_texts, "a list of texts"),
    "adapter": (_is_text, "the name of an adapter"),
    "stream": (lambda value: isinstance(value, bool), "true or false"),
}
"""Field -> whether a value is one, and what it must be."""

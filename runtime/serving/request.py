"""A caller's request as JSON, checked before the model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama_onnx.runtime.engine.sampling.parameters import PARAMETERS, Sampling, read_value
from llama_onnx.runtime.llama.conversation import Message, check_messages
from llama_onnx.runtime.llama.stops import check_stops
from llama_onnx.runtime.serving.http.limits import MAX_BODY, too_large
from llama_onnx.targets.errors import TooLargeError, UsageError
from llama_onnx.targets.printable import shown
from llama_onnx.targets.strict_json import JSONError, parse_json

if TYPE_CHECKING:
    from llama_onnx.runtime.llama.generation import Generation
    from llama_onnx.runtime.llama.model import Llama

MAX_NEW_TOKENS = 256
"""The default of a request."""


@dataclass(frozen=True)
class Request:
    """A `prompt` to continue, or `messages`, a conversation whose last message is to be answered.

    `stream` asks for the answer in pieces; the other fields are arguments of `Llama.generate` and
    `Llama.chat`.
    """

    prompt: str | None
    messages: tuple[Message, ...]
    sampling: Sampling
    max_new_tokens: int = MAX_NEW_TOKENS
    stop: tuple[str, ...] = ()
    adapter: str | None = None
    stream: bool = False

    @classmethod
    def parse(cls, body: str | bytes) -> Request:
        """Read a request's body; raise `UsageError` with a message for the caller."""
        if len(body) > MAX_BODY:  # before a copy is made
            raise TooLargeError(too_large(len(body), MAX_BODY))
        try:
            encoded = body.encode("utf-8") if isinstance(body, str) else body
        except UnicodeEncodeError:
            raise UsageError("the request is not UTF-8 text.") from None
        try:
            content = parse_json(encoded, unique=True, max_bytes=MAX_BODY * 4)
        except JSONError as error:
            raise UsageError(f"the request {error}.") from None
        return cls.from_json(content)

    @classmethod
    def from_json(cls, content: Any) -> Request:
        """Check decoded JSON; raise `UsageError` with a message for the caller."""
        if not isinstance(content, dict):
            raise UsageError('the request must be a JSON object, such as {"prompt": "Once"}.')
        for name in content:
            if name not in _FIELDS:
                raise UsageError(f"unknown field {shown(name)}: use {', '.join(_FIELDS)}.")
        if ("prompt" in content) == ("messages" in content):
            raise UsageError("the request needs either 'prompt' or 'messages'.")
        read = {name: _FIELDS[name](value, f"'{name}'") for name, value in content.items()}
        sampling = Sampling(**{name: read.pop(name, None) for name in PARAMETERS})
        return cls(sampling=sampling, **{"prompt": None, "messages": (), **read})

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


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{name} must be a text.")
    return value


def _switch(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{name} must be true or false.")
    return value


def _number(option: str) -> Callable[[Any, str], Any]:
    return lambda value, name: read_value(option, value, name)


_FIELDS: Mapping[str, Callable[[Any, str], Any]] = {
    "prompt": _text,
    "messages": lambda value, name: tuple(check_messages(value, name)),
    "max_new_tokens": _number("max_new_tokens"),
    **{name: _number(name) for name in PARAMETERS},
    "stop": check_stops,
    "adapter": _text,
    "stream": _switch,
}
"""Field -> what reads its value, and refuses it by the field's name."""

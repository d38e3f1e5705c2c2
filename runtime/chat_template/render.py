"""Renders a conversation with a chat template, to the text that transformers makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateSyntaxError, nodes

from llama_onnx.runtime.chat_template.meter import TooMuchError, metered
from llama_onnx.runtime.chat_template.sandbox import Sandbox

MOST_SOURCE = 128 * 1024
"""Characters in a template. The longest known ones have about 30,000."""

_REASONING = ("reasoning_content", "thinking", "reasoning")
_TOO_DEEP = TooMuchError("it nests or calls itself too deeply")


class TemplateError(Exception):
    """A template that cannot be read, or exceeds a bound; the text says why."""


class BoundError(TemplateError):
    """A template that exceeds a bound."""


class RejectedError(Exception):
    """A template that raises an error for these messages; the text is the error's."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template's `text`, and the `special` tokens it may write, by variable (`bos_token`)."""

    text: str
    special: Mapping[str, str]

    def check(self) -> None:
        """Raise `TemplateError` if the text cannot be read as a template."""
        _compile(self.text)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt for `messages`; `variables` are more of the template's own.

        Raises `TemplateError` for a template that cannot be read or exceeds a bound,
        `RejectedError` for one that rejects the messages.
        """
        template = _compile(self.text)
        values = {
            "documents": None,
            **_plain(variables or {}),
            "messages": [_message(message) for message in messages],
            "tools": _plain(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            with metered([self.special, values]):
                context = template.new_context({**values, **self.special})
                return Sandbox.concat(template.root_render_func(context))
        except TooMuchError as error:
            raise BoundError(str(error)) from None
        except RecursionError:
            raise BoundError(str(_TOO_DEEP)) from None
        except MemoryError:
            raise
        except Exception as error:  # whatever a stranger's expressions raise
            raise RejectedError(_first_line(error)) from None


@lru_cache(maxsize=8)
def _compile(text: str) -> Template:
    with _reading(text):
        return Sandbox().from_string(text)


def parse_template(text: str, *, as_written: bool = False) -> nodes.Template:
    """Return the tree of a template, with the white space that transformers keeps, or `as_written`
    with all. Raises `TemplateError` if it cannot be read."""
    with _reading(text):
        sandbox = Sandbox()
        if as_written:
            sandbox.trim_blocks = sandbox.lstrip_blocks = False
            sandbox.keep_trailing_newline = True
        return sandbox.parse(text)


@contextmanager
def _reading(text: str) -> Iterator[None]:
    if len(text) > MOST_SOURCE:
        raise BoundError(f"it has {len(text):,} characters, more than {MOST_SOURCE:,}")
    try:
        with metered():
            yield
    except TemplateSyntaxError as error:
        raise TemplateError(f"line {error.lineno}: {_first_line(error)}") from None
    except TooMuchError as error:
        raise BoundError(str(error)) from None
    except (RecursionError, MemoryError):  # Python's parser reports deep nesting as either
        raise BoundError(str(_TOO_DEEP)) from None
    except Exception as error:  # of Python's compiler
        raise TemplateError(_first_line(error)) from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")[:500]


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a template gets for a message: no None, and reasoning under each known name."""
    plain = {key: _plain(value) for key, value in message.items() if value is not None}
    found = [plain[key] for key in _REASONING if plain.get(key) is not None]
    if found:
        plain = {"thinking": found[0], **plain, "reasoning_content": found[0]}
    return plain


def _plain(value: Any) -> Any:
    """Return `value` as JSON's types, whose methods the sandbox knows."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return f"<{type(value).__name__}>"

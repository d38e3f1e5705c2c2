"""Render the templates of tasks: lm-eval's texts, in the bounded sandbox of chat templates."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, Template

from llama_onnx.runtime.chat_template.meter import TooMuchError, metered
from llama_onnx.runtime.chat_template.sandbox import Sandbox
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.printable import shown

_MOST_SOURCE = 128 << 10


def render(text: str, row: Mapping[str, Any]) -> str:
    """Return a template with the values of a row; raise `UsageError` if that fails.

    What differs from lm-eval: the filter `regex_replace` is missing.
    """
    try:
        template = _compile(text)
        with metered([row]):
            return Sandbox.concat(template.root_render_func(template.new_context(dict(row))))
    except TooMuchError as error:
        reason = str(error)
    except (RecursionError, MemoryError):
        reason = "it nests or calls itself too deeply"
    except Exception as error:  # whatever a stranger's expressions raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    raise UsageError(f"the template {shown(text)} of a task fails: {reason.rstrip('.')[:200]}.")


@lru_cache(maxsize=64)
def _compile(text: str) -> Template:
    if len(text) > _MOST_SOURCE:
        raise TooMuchError(f"it has more than {_MOST_SOURCE:,} characters")
    with metered():
        sandbox = Sandbox()
        sandbox.trim_blocks = sandbox.lstrip_blocks = False
        sandbox.keep_trailing_newline = True
        sandbox.undefined = StrictUndefined
        return sandbox.from_string(text)

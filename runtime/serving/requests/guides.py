"""What an answer must be, from the fields of a request."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llama_onnx.runtime.engine.sampling.guidance import Guide
from llama_onnx.runtime.serving.requests.schemas import FieldError
from llama_onnx.targets.errors import UsageError


def answer_guide(
    answer_format: Mapping[str, Any] | None, structured: Mapping[str, Any] | None
) -> Guide | None:
    """Return the guide for `response_format` and `structured_outputs`; None for free text.

    The second is vLLM's: an object with one of `json`, `regex`, `grammar` and `choice`.
    """
    found = [
        guide
        for guide in (_of_format(answer_format or {}), _of_structured(structured))
        if guide is not None
    ]
    if len(found) > 1:
        raise FieldError("response_format", "give response_format or structured_outputs, not both.")
    return found[0] if found else None


def tool_guide(tools: Sequence[Mapping[str, Any]]) -> Guide:
    """Return the guide for a call of one of `tools`: `{"name": ..., "arguments": {...}}`."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                "arguments": tool["function"].get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return _schema(calls[0] if len(calls) == 1 else {"anyOf": calls}, "tools")


def _of_format(answer_format: Mapping[str, Any]) -> Guide | None:
    kind = answer_format.get("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        return Guide("json_schema", '{"type": "object"}')
    if kind != "json_schema":
        raise FieldError(
            "response_format",
            'response_format.type must be "text", "json_object" or "json_schema".',
        )
    # In /v1/responses the schema is in the format itself.
    inner = answer_format.get("json_schema", answer_format)
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    if not isinstance(schema, Mapping):
        raise FieldError("response_format", "response_format has no schema, a JSON object.")
    return _schema(schema, "response_format")


def _of_structured(structured: Any) -> Guide | None:
    name = "structured_outputs"
    if structured is None:
        return None
    kinds = ("json", "regex", "grammar", "choice")
    if (
        not isinstance(structured, Mapping)
        or len(structured) != 1
        or not structured.keys() <= {*kinds}
    ):
        raise FieldError(name, f"{name} must be an object with one of {', '.join(kinds)}.")
    ((kind, value),) = structured.items()
    if kind == "json" and isinstance(value, Mapping):
        return _schema(value, name)
    if kind == "choice" and isinstance(value, list) and value and all(map(_is_text, value)):
        return _guide("regex", "|".join(map(re.escape, value)), name)
    if kind in ("regex", "grammar") and _is_text(value):
        return _guide(kind, value, name)
    raise FieldError(name, f"{name}.{kind} has the wrong type: see /openapi.json.")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _schema(schema: Mapping[str, Any], field: str) -> Guide:
    return _guide("json_schema", json.dumps(schema), field)


def _guide(kind: Any, text: str, field: str) -> Guide:
    try:
        return Guide(kind, text)
    except UsageError as error:
        raise FieldError(field, str(error)) from None

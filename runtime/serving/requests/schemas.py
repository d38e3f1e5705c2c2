"""The requests of OpenAI's API, as the types of the library `openai` have them, checked.

The library's own types decide what a field may be. Added are the fields that other servers of this
API have (vLLM's names): `EXTRAS`. A field that is neither is refused, never dropped in silence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from openai.types import completion_create_params as completion
from openai.types.chat import completion_create_params as chat
from openai.types.responses import response_create_params as responses
from pydantic import TypeAdapter, ValidationError

from llama_onnx.runtime.serving.http.limits import MAX_BODY, too_large
from llama_onnx.targets.errors import TooLargeError, UsageError
from llama_onnx.targets.printable import printable, shown
from llama_onnx.targets.strict_json import JSONError, parse_json

_SAMPLING_EXTRAS: dict[str, dict[str, Any]] = {
    "top_k": {"type": "integer"},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "repetition_penalty": {"type": "number", "exclusiveMinimum": 0},
    "ignore_eos": {"type": "boolean"},
    "structured_outputs": {
        "type": "object",
        "properties": {
            "json": {"type": "object"},
            "regex": {"type": "string"},
            "grammar": {"type": "string"},
            "choice": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        },
        "minProperties": 1,
        "maxProperties": 1,
        "additionalProperties": False,
    },
}
_CHAT_EXTRAS: dict[str, dict[str, Any]] = {
    "chat_template_kwargs": {"type": "object"},
    "continue_final_message": {"type": "boolean"},
}


@dataclass(frozen=True)
class Schema:
    """A kind of request: its fields in OpenAI's library, ours besides, and what is refused.

    `refused` says why a field cannot be had here, whatever its value. `exact` has the types of
    fields which the library checks wrongly.
    """

    name: str
    types: TypeAdapter[Any]
    extras: Mapping[str, Mapping[str, Any]]
    refused: Mapping[str, str]
    exact: Mapping[str, TypeAdapter[Any]] = field(default_factory=dict)

    def read(self, body: bytes) -> dict[str, Any]:
        """Return the fields of a request's body that are not null; raise `UsageError` otherwise."""
        return self.check(read_object(body))

    def check(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields that are not null; raise `UsageError` for one that cannot be taken."""
        fields = {name: value for name, value in content.items() if value is not None}
        self._check_names(fields)
        known = {name: value for name, value in fields.items() if name not in self.extras}
        for name in self.exact.keys() & known.keys():
            _validate(self.exact[name], known[name], (name,), fields)
            known[name] = ""
        _walk(_validate(self.types, known, (), fields), (), fields)
        return fields

    def _check_names(self, fields: Mapping[str, Any]) -> None:
        for name in fields:
            if name in self.refused:
                raise FieldError(name, f"{name!r} cannot be used here: {self.refused[name]}.")
            if name not in self._names:
                raise FieldError(name, f"unknown field {shown(name)}: see /openapi.json.")

    @cached_property
    def _names(self) -> frozenset[str]:
        """The names of all fields; to find them takes as long as many requests."""
        schema = self.types.json_schema()
        names = set(self.extras)
        for part in schema.get("anyOf", [schema]):
            if "$ref" in part:
                part = schema["$defs"][part["$ref"].rsplit("/", 1)[-1]]
            names |= part.get("properties", {}).keys()
        return frozenset(names)

    def openapi(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the request's JSON schema and the schemas it refers to, for an OpenAPI document.

        A fresh copy: FastAPI changes what it gets.
        """
        schema = self.types.json_schema(ref_template="#/components/schemas/{model}")
        schema = json.loads(json.dumps(schema))
        shared = schema.pop("$defs", {})
        parts = [
            shared.pop(part["$ref"].rsplit("/", 1)[-1]) if "$ref" in part else part
            for part in schema.get("anyOf", [schema])
        ]
        whole = parts[0]
        for part in parts[1:]:
            whole["properties"] |= part["properties"]
            needed = set(part.get("required", ()))
            whole["required"] = [name for name in whole.get("required", ()) if name in needed]
        whole["properties"]["stream"] = {"anyOf": [{"type": "boolean"}, {"type": "null"}]}
        whole["properties"] |= {name: dict(extra) for name, extra in self.extras.items()}
        for name in self.refused:
            whole["properties"].pop(name, None)
        whole["additionalProperties"] = False
        return whole, shared


class FieldError(UsageError):
    """A field of a request that cannot be taken; `param` is its name."""

    def __init__(self, param: str, text: str) -> None:
        super().__init__(text)
        self.param = param


def read_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a request's body; raise `UsageError` otherwise."""
    if len(body) > MAX_BODY:
        raise TooLargeError(too_large(len(body), MAX_BODY))
    try:
        content = parse_json(body, unique=True, max_bytes=MAX_BODY * 4)
    except JSONError as error:
        raise UsageError(f"the request {error}.") from None
    if not isinstance(content, dict):
        raise UsageError('the request must be a JSON object, such as {"model": ...}.')
    return content


def _validate(
    types: TypeAdapter[Any], value: Any, place: tuple[int | str, ...], fields: Any
) -> Any:
    try:
        # Strictly: what is used are the fields as they came, so "2" must not pass for 2.
        return types.validate_python(value, strict=True)
    except ValidationError as error:
        raise _field_error(error, place, fields) from None


def _walk(value: Any, place: tuple[int | str, ...], fields: Any) -> None:
    """Go through a validated value: pydantic checks the items of an `Iterable` only then."""
    if isinstance(value, (str, bytes, int, float)) or value is None:
        return
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    try:
        for key, item in items:
            _walk(item, (*place, key), fields)
    except ValidationError as error:
        raise _field_error(error, place, fields) from None


def _field_error(error: ValidationError, place: tuple[int | str, ...], fields: Any) -> UsageError:
    """Return what is wrong and where: the error that is deepest in the request."""
    found = [(_path((*place, *part["loc"]), fields), part["msg"]) for part in error.errors()]
    path, reason = max(found, key=lambda entry: len(entry[0]))
    where = ".".join(map(str, path)) or "the request"
    text = f"{where}: {printable(reason[:1].lower() + reason[1:])[:300].rstrip('.')}."
    return FieldError(str(path[0]), text) if path else UsageError(text)


def _path(loc: tuple[int | str, ...], fields: Any) -> list[int | str]:
    """Return the parts of pydantic's location that are in the request: it has types too."""
    path: list[int | str] = []
    for part in loc:
        children = _children(fields)
        if part in children:
            fields = children[part]
        elif not (isinstance(fields, Mapping) and isinstance(part, str) and part.islower()):
            continue
        path.append(part)
    return path


def _children(value: Any) -> Mapping[Any, Any]:
    if isinstance(value, list):
        return dict(enumerate(value))
    return value if isinstance(value, Mapping) else {}


_NO_SEARCH = "this server runs a model and nothing else"
_NO_STORE = "this server stores no conversation: send the whole of it"

CHAT = Schema(
    "chat",
    TypeAdapter(chat.CompletionCreateParams),
    _SAMPLING_EXTRAS | _CHAT_EXTRAS,
    {
        "audio": "the model writes text",
        "functions": "use tools",
        "function_call": "use tool_choice",
        "moderation": _NO_SEARCH,
        "prediction": "the engine drafts by itself",
        "web_search_options": _NO_SEARCH,
    },
)
COMPLETION = Schema(
    "completion",
    TypeAdapter(completion.CompletionCreateParams),
    _SAMPLING_EXTRAS,
    {"best_of": "use n", "suffix": "the model continues a text and cannot fill a gap"},
    # The library's own type takes any list for token ids, which several prompts of such are not.
    {"prompt": TypeAdapter(str | list[str] | list[int] | list[list[int]])},
)
RESPONSE = Schema(
    "response",
    TypeAdapter(responses.ResponseCreateParams),
    _SAMPLING_EXTRAS | {"seed": {"type": "integer"}} | _CHAT_EXTRAS,
    {
        "background": _NO_STORE,
        "background_options": _NO_STORE,
        "context_management": "use truncation",
        "conversation": _NO_STORE,
        "image": "the model writes text",
        "access_programs": _NO_SEARCH,
        "max_tool_calls": "this server calls no tools",
        "moderation": _NO_SEARCH,
        "previous_response_id": _NO_STORE,
        "prompt": "prompts are not kept here: send the input",
    },
)

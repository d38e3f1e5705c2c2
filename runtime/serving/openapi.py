"""The OpenAPI document of the server, with the requests that its endpoints read themselves."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from openai.types import Completion
from openai.types.chat import ChatCompletion
from openai.types.responses import Response
from pydantic import BaseModel

from llama_onnx.runtime.serving.requests.schemas import CHAT, COMPLETION, RESPONSE, Schema

_ENDPOINTS: dict[str, tuple[Schema, type[BaseModel]]] = {
    "/v1/chat/completions": (CHAT, ChatCompletion),
    "/v1/completions": (COMPLETION, Completion),
    "/v1/responses": (RESPONSE, Response),
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_STATUSES = {
    "400": "The request cannot be answered as it is.",
    "401": "The API key is missing or wrong.",
    "403": "The server was called by another name than its own.",
    "404": "There is no such model.",
    "413": "The request is too large.",
    "415": "The request is not JSON.",
    "429": "Too many requests are waiting; Retry-After says when to come back.",
    "503": "There is not enough memory, or the package has changed.",
}


def describe(app: FastAPI) -> dict[str, Any]:
    """Return the document; it is made once."""
    if app.openapi_schema:
        return app.openapi_schema
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas.pop("HTTPValidationError", None)
    schemas.pop("ValidationError", None)
    schemas["Error"] = _ERROR
    for path, item in document["paths"].items():
        for operation in item.values():
            operation["responses"].pop("422", None)
            for status, text in _STATUSES.items():
                operation["responses"][status] = _response(text, "Error")
        if path in _ENDPOINTS:
            _add_body(item["post"], schemas, *_ENDPOINTS[path])
    app.openapi_schema = document
    return document


def _add_body(
    operation: dict[str, Any], schemas: dict[str, Any], schema: Schema, answer: type[BaseModel]
) -> None:
    body, shared = schema.openapi()
    name = f"{schema.name.capitalize()}Request"
    schemas |= shared | {name: body}
    answered = answer.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= answered.pop("$defs", {}) | {answer.__name__: answered}
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    operation["requestBody"] = {"required": True, "content": content}
    operation["responses"]["200"] = _response("The answer.", answer.__name__)
    operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}


def _response(text: str, schema: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"description": text, "content": content}

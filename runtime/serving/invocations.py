"""The two routes that Amazon SageMaker asks of a container, over those of OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.responses import Response

from llama_onnx.runtime.serving.app import Served, answer, bounded, health
from llama_onnx.runtime.serving.endpoints import CHAT_PATH, COMPLETION_PATH, ENDPOINTS
from llama_onnx.runtime.serving.requests.schemas import CHAT, COMPLETION, read_object
from llama_onnx.targets.errors import UsageError


def add_invocations(app: FastAPI) -> None:
    """Add GET /ping and POST /invocations to the application that `create_app` returned.

    /invocations takes what /v1/chat/completions takes, or /v1/completions if it has a `prompt`.
    `model` may be left out there, or be empty, for the package itself.
    """
    served: Served = app.state.served
    ping, invoke = (
        partial(health, served),
        bounded(served, _answer, partial(read_invocation, served.name)),
    )
    app.add_api_route("/ping", ping, methods=["GET"], include_in_schema=False)
    app.add_api_route("/invocations", invoke, methods=["POST"], include_in_schema=False)


def read_invocation(name: str, body: bytes) -> dict[str, Any]:
    """Return the checked fields of a request; `name` is the model that it means by none.

    Raises `UsageError`.
    """
    content = read_object(body)
    given = [field for field in ("messages", "prompt") if content.get(field) is not None]
    if len(given) != 1:
        raise UsageError("the request needs either 'messages' or 'prompt'.")
    if content.get("model") in (None, ""):
        content["model"] = name
    return (CHAT if given == ["messages"] else COMPLETION).check(content)


async def _answer(served: Served, fields: Mapping[str, Any], stack: ExitStack) -> Response:
    path = COMPLETION_PATH if "prompt" in fields else CHAT_PATH
    return await answer(ENDPOINTS[path], served, fields, stack)

"""The web server of a SageMaker container: GET /ping and POST /invocations on port 8080."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from anyio import CancelScope
from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse

from llama_onnx.runtime.serving.request import Request
from llama_onnx.runtime.serving.service import Service, find_package, http_status
from llama_onnx.targets.errors import LlamaOnnxError

logger = logging.getLogger("uvicorn.error")


class PiecesResponse(StreamingResponse):
    """Lines of JSON, each a message; however it ends, the answer ends with it."""

    def __init__(self, messages: Generator[dict[str, Any], None, None]) -> None:
        self._messages = messages
        super().__init__(_lines(messages), media_type="application/jsonlines")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it. A caller who hangs up must not keep the others waiting."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            with CancelScope(shield=True):
                await run_in_threadpool(self._messages.close)


def create_app(service: Service) -> FastAPI:
    """The two routes of SageMaker's contract, in front of `service`."""

    async def ping() -> Response:
        return Response()

    async def invocations(request: HttpRequest) -> Response:
        asked = Request.parse(await request.body())
        if not asked.stream:
            return JSONResponse(await run_in_threadpool(service.answer, asked))
        # Begun here, so that what is refused has a status of its own.
        messages = await run_in_threadpool(service.stream, asked)
        return PiecesResponse(messages)

    app = FastAPI(title="llama-onnx")
    app.add_api_route("/ping", ping, methods=["GET"])
    app.add_api_route("/invocations", invocations, methods=["POST"])
    app.add_exception_handler(LlamaOnnxError, refuse)
    return app


async def refuse(_: HttpRequest, error: Any) -> Response:
    """400 where the caller is wrong, 503 where too many wait, otherwise 500."""
    logger.warning("refused or failed: %s", error)
    return JSONResponse({"error": str(error)}, http_status(error))


def _lines(messages: Iterator[dict[str, Any]]) -> Iterator[str]:
    try:
        for message in messages:
            yield json.dumps(message) + "\n"
    except LlamaOnnxError as error:  # the status is sent already
        logger.warning("failed in the middle: %s", error)
        yield json.dumps({"error": str(error)}) + "\n"


def main() -> None:
    """Open the package, then listen; exit status 1 and a sentence if it does not open."""
    model = Path(os.environ.get("LLAMA_ONNX_MODEL", "/opt/ml/model"))
    try:
        service = Service(find_package(model))
    except LlamaOnnxError as error:
        sys.exit(str(error))
    print(f"runs {service}", flush=True)
    port = int(os.environ.get("SAGEMAKER_BIND_TO_PORT", "8080"))
    try:
        uvicorn.run(create_app(service), host="0.0.0.0", port=port)
    finally:
        service.close()


if __name__ == "__main__":
    main()

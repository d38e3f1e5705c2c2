"""The web application: OpenAI's endpoints over one open package."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from llama_onnx.runtime.llama.async_generation import AsyncGeneration
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.measure.verify import VerifyReport
from llama_onnx.runtime.serving.about import about
from llama_onnx.runtime.serving.admission import Places
from llama_onnx.runtime.serving.endpoints import ENDPOINTS, Asked, Endpoint, Names, fingerprint
from llama_onnx.runtime.serving.http.event_stream import EventStream
from llama_onnx.runtime.serving.http.failure import Failure, error_event, failure_of_status
from llama_onnx.runtime.serving.openai_errors import NotReadyError, failure_of
from llama_onnx.runtime.serving.openapi import describe
from llama_onnx.runtime.serving.package_watch import PackageWatch
from llama_onnx.runtime.serving.pages import add_page
from llama_onnx.runtime.serving.prometheus import CONTENT_TYPE, Metrics
from llama_onnx.runtime.serving.replies.answer_parts import Part
from llama_onnx.runtime.serving.requests.call import Call, call_text
from llama_onnx.targets.errors import BusyError, LlamaOnnxError
from llama_onnx.targets.printable import printable_line

logger = logging.getLogger("llama_onnx.serve")

MOST_WAITING = 64


@dataclass(frozen=True)
class Settings:
    """How a package is served.

    `name` is the model's name for clients, None for the package's folder. `most_waiting` answers
    may wait for a row. `log_prompts` writes prompts to the log, which has none otherwise.
    """

    name: str | None = None
    most_waiting: int = MOST_WAITING
    log_prompts: bool = False


class Served:
    """An open package, and what its server knows about it."""

    def __init__(self, model: Llama, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self._names = Names.of(model.package, settings.name)
        self.name, self.names = self._names.own, self._names.all()
        self.engine = engine = model.backend.require_engine()
        self.places = Places(engine.capacity.rows, settings.most_waiting)
        self.metrics = Metrics(self.name, engine.load)
        self.watch = PackageWatch(model.package)
        self.fingerprint = fingerprint(model.package)
        self.created = int(model.package.index.stat().st_mtime)

    def adapter(self, name: str) -> str | None:
        """Return the adapter that a model's name means, None for the package itself."""
        return self._names.adapter(name)

    def check(self) -> None:
        """Raise `NotReadyError` if the engine has ended or the package has changed."""
        if not self.engine.is_alive():
            raise NotReadyError("the engine has ended: restart the server.")
        self.watch.check()

    async def parts(self, asked: Asked, answers: list[AsyncGeneration]) -> AsyncIterator[Part]:
        """Yield the parts of the answers to a request, and count them."""
        async with aclosing(asked.parts(self.model, answers)) as parts:  # type: ignore[type-var]
            async for part in parts:
                self.metrics.count(part)
                yield part


def create_app(
    model: Llama, settings: Settings | None = None, verification: VerifyReport | None = None
) -> FastAPI:
    """Return the application that serves `model`, opened with the engine "onnxruntime".

    `verification` is what `verify` found here, for the page. The application closes the model when
    it ends.
    """
    served = Served(model, settings or Settings())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        model.close()

    app = FastAPI(title="llama-onnx", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.served = served
    for path, endpoint in ENDPOINTS.items():
        route = bounded(served, partial(answer, endpoint), endpoint.schema.read)
        app.add_api_route(path, route, methods=["POST"], name=path)
    app.add_api_route("/v1/models", partial(_models, served), methods=["GET"])
    app.add_api_route("/v1/models/{model:path}", partial(_model, served), methods=["GET"])
    app.add_api_route("/health", partial(health, served), methods=["GET"])
    app.add_api_route("/ready", partial(_ready, served), methods=["GET"])
    app.add_api_route("/metrics", partial(_metrics, served), methods=["GET"])
    facts = about(
        model.package, model.opened, verification, context_length=model.context_length
    ) | {"name": served.name}

    async def describe_package() -> dict[str, Any]:
        return facts

    app.add_api_route("/about", describe_package, methods=["GET"])
    add_page(app)
    app.add_exception_handler(LlamaOnnxError, partial(_refuse, served))
    app.add_exception_handler(HTTPException, _refuse_status)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _fail)
    app.openapi = partial(describe, app)  # type: ignore[method-assign]
    return app


Answer = Callable[[Served, Mapping[str, Any], ExitStack], Awaitable[Response]]


def bounded(
    served: Served, answer: Answer, read: Callable[[bytes], Mapping[str, Any]]
) -> Callable[..., Any]:
    """Return the route that reads a request with `read` and holds its places until it is over."""

    async def route(request: Request) -> Response:
        served.check()
        body = await request.body()
        fields = await asyncio.to_thread(read, body)
        with ExitStack() as stack:
            response = await answer(served, fields, stack)
            if isinstance(response, EventStream):
                response.closing(stack.pop_all())
            return response

    return route


async def answer(
    endpoint: Endpoint, served: Served, fields: Mapping[str, Any], stack: ExitStack
) -> Response:
    """Answer a checked request to `endpoint`."""
    asked = endpoint.ask(fields, served.model, served.fingerprint)
    answers = await _start(served, asked.call, stack)
    if asked.call.stream:
        return _stream(served, asked, asked.events(served.parts(asked, answers)))
    parts = [part async for part in served.parts(asked, answers)]
    return Response(asked.whole(parts), media_type="application/json")


async def _start(served: Served, call: Call, stack: ExitStack) -> list[AsyncGeneration]:
    """Take places for the answers to `call`, and start them."""
    adapter = served.adapter(call.model)
    stack.enter_context(served.places.take(call.places))
    if served.settings.log_prompts:
        logger.info("prompt: %s", call_text(call))
    answers = await asyncio.to_thread(call.prepare, served.model, adapter)
    for answer in answers:
        stack.callback(answer.cancel)
        answer.start()
    return answers


def _stream(served: Served, asked: Asked, events: AsyncIterator[Any]) -> EventStream:
    def failed(error: LlamaOnnxError) -> tuple[str | None, bytes]:
        logger.warning("failed while streaming: %s", error)
        return error_event(failure_of(error, served.model.package.path), named=asked.named)

    return EventStream(events, failed, asked.last)


async def _models(served: Served) -> dict[str, Any]:
    return {"object": "list", "data": [_describe(served, name) for name in served.names]}


async def _model(served: Served, model: str) -> dict[str, Any]:
    served.adapter(model)
    return _describe(served, model)


def _describe(served: Served, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "llama-onnx",
        "parent": None if name == served.name else served.name,
        "max_model_len": served.model.context_length,
    }


async def health(served: Served) -> Response:
    """Whether the process answers and its engine runs."""
    alive = served.engine.is_alive()
    return JSONResponse(
        {"status": "ok" if alive else "the engine has ended"}, 200 if alive else 503
    )


async def _ready(served: Served) -> Response:
    """Whether a request would be taken now."""
    try:
        served.check()
    except NotReadyError as error:
        return JSONResponse({"status": failure_of(error, served.model.package.path).message}, 503)
    return JSONResponse({"status": "ok"})


async def _metrics(served: Served) -> Response:
    return Response(served.metrics.text(), media_type=CONTENT_TYPE)


async def _refuse(served: Served, request: Request, error: LlamaOnnxError) -> Response:
    failure = failure_of(error, served.model.package.path)
    where = printable_line(f"{request.method} {request.url.path}")
    logger.warning("%s: %d %s", where, failure.status, failure.message)
    headers = {}
    if isinstance(error, BusyError):
        headers["Retry-After"] = str(served.places.retry_after())
    return _failure(failure, headers)


async def _refuse_status(request: Request, error: HTTPException) -> Response:
    text = f"{request.method} {request.url.path}: {str(error.detail).lower()}."
    return _failure(failure_of_status(error.status_code, text), dict(error.headers or {}))


async def _fail(request: Request, error: Exception) -> Response:
    """Answer where our own code has a mistake; the log gets the error from the web server."""
    return _failure(failure_of_status(500, "the server failed: see its log."), {})


def _failure(failure: Failure, headers: Mapping[str, str]) -> Response:
    return JSONResponse(failure.to_json(), failure.status, headers=headers)

"""One open package that answers lines: the same in a local process and in a cluster."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path

from llama_onnx.runtime.batch.batch_format import (
    AnsweredLine,
    LineError,
    Request,
    not_asked,
    read_line,
    refused,
    response_line,
)
from llama_onnx.runtime.engine.engine import Limits
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.serving.endpoints import ENDPOINTS, Asked, Names, fingerprint
from llama_onnx.runtime.serving.http.failure import Failure
from llama_onnx.runtime.serving.openai_errors import failure_of
from llama_onnx.runtime.serving.replies.answer_parts import Usage
from llama_onnx.runtime.serving.requests.schemas import FieldError
from llama_onnx.targets.errors import LlamaOnnxError, PackageError, ResourceError, describe_reason
from llama_onnx.targets.listing import hash_file
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.provider import Provider

AHEAD = 4
"""Lines that wait in a worker beside those in work, so that a free row never waits for one."""


@dataclass(frozen=True)
class Opening:
    """What a worker opens, and how; `sha256` is that of the manifest, which lists every file.

    `name` is the model's name in the requests, None for the package's folder. `rows` answers are in
    work at once. The other fields are those of `Llama.load`; `cache_bytes` is in its `limits`.
    """

    package: str
    sha256: str
    name: str | None = None
    rows: int = Limits().rows
    cache_bytes: int | None = None
    max_length: int | None = None
    threads: int | None = None
    provider: Provider | None = None
    allow_fallback: bool = False

    def share(self, workers: int, cache_bytes: int | None, threads: int | None) -> Opening:
        """Return the same for one of several workers, with its part of the caches."""
        part = None if cache_bytes is None else cache_bytes // workers
        return replace(self, cache_bytes=part, threads=threads)


class EndedError(LlamaOnnxError):
    """A worker whose engine has ended: its lines must be answered elsewhere."""


class Worker:
    """An open package that answers lines; it never raises for a line, only if it cannot go on."""

    def __init__(self, opening: Opening) -> None:
        """Open the package; raises what `Llama.load` raises, and `PackageError` for another one."""
        package = Path(opening.package)
        check_same(ModelPackage.open(package), opening.sha256)
        self.model = Llama.load(
            package,
            max_length=opening.max_length,
            threads=opening.threads,
            provider=opening.provider,
            allow_fallback=opening.allow_fallback,
            engine="onnxruntime",
            limits=Limits(opening.cache_bytes, opening.rows),
        )
        self._names = Names.of(self.model.package, opening.name)
        self._state = fingerprint(self.model.package)

    async def answer(self, text: bytes) -> AnsweredLine:
        """Return the answer to a line; raise `EndedError` if nobody here can answer any more."""
        try:
            request = read_line(text)
        except LineError as error:
            return not_asked(error.custom_id, error.code, str(error))
        try:
            return await self._answered(request)
        except LlamaOnnxError as error:
            if not self.model.backend.require_engine().is_alive():
                raise EndedError(str(error)) from None
            return refused(request.custom_id, failure_of(error, self.model.package.path))
        except Exception as error:  # a mistake in this code must not cost the other lines
            reason = f"answering failed: {type(error).__name__}: {describe_reason(error)}."
            return refused(request.custom_id, Failure(500, reason, "server_error"))

    async def _answered(self, request: Request) -> AnsweredLine:
        try:
            return await self._answer(request)
        except ResourceError:
            # A step without memory ends all answers in it, and what was kept of earlier texts is
            # given up: there may be room now.
            return await self._answer(request)

    async def _answer(self, request: Request) -> AnsweredLine:
        asked, adapter = await asyncio.to_thread(self._read, request)
        answers = await asyncio.to_thread(asked.call.prepare, self.model, adapter)
        try:
            for answer in answers:
                answer.start()
            parts = [part async for part in asked.parts(self.model, answers)]
        finally:
            for answer in answers:
                answer.cancel()
        usage = Usage.of([part for part in parts if part.finish], asked.call.choices)
        body = response_line(request.custom_id, 200, asked.whole(parts))
        return AnsweredLine(body, usage.prompt, usage.completion)

    def _read(self, request: Request) -> tuple[Asked, str | None]:
        endpoint = ENDPOINTS[request.path]
        body = dict(request.body)
        if body.get("model") in (None, ""):
            body["model"] = self._names.own
        asked = endpoint.ask(endpoint.schema.check(body), self.model, self._state)
        if asked.call.stream:
            raise FieldError("stream", "stream: a batch has whole responses: leave it out.")
        return asked, self._names.adapter(asked.call.model)


def check_same(package: ModelPackage, sha256: str, *, contents: bool = False) -> None:
    """Raise `PackageError` unless `package` has the manifest with this hash, and with `contents`
    every file is what the manifest says."""
    if hash_file(package.index) != sha256:
        raise PackageError(f"{package.path} differs from the package that the batch began with.")
    if contents and (altered := package.verify()):
        raise PackageError(f"{package.path} is damaged: {', '.join(altered)} changed.")

"""An answer for one HTTP client, read by a thread so that a slow client holds up nobody."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from threading import Thread
from typing import Any

from llama_onnx.runtime.serving.request import Request
from llama_onnx.runtime.serving.service import Handle, Service
from llama_onnx.targets.errors import LlamaOnnxError

logger = logging.getLogger("uvicorn.error")


class Answer:
    """The messages of `Service.stream`, for asyncio. Use it in an `async with` block.

    A thread reads them as fast as the model makes them: the next client's turn comes when the model
    is done, not when this client has read everything. What waits is at most one context of text.
    Leaving the block ends the answer, if it is not over.
    """

    def __init__(self, service: Service, request: Request) -> None:
        self._service, self._request = service, request
        self._handle = Handle()
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.Queue[dict[str, Any] | LlamaOnnxError | None] = asyncio.Queue()

    async def __aenter__(self) -> Answer:
        """Wait until the model has started; raises what `Service.stream` raises."""
        Thread(target=self._read, daemon=True).start()
        try:
            first = await self._waiting.get()
            if isinstance(first, LlamaOnnxError):
                raise first
        except BaseException:
            self._handle.end()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """End the answer."""
        self._handle.end()

    async def messages(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the pieces and the statistics; raises `LlamaOnnxError` if the answer fails."""
        while (message := await self._waiting.get()) is not None:
            if isinstance(message, LlamaOnnxError):
                raise message
            yield message

    async def whole(self) -> dict[str, Any]:
        """Return `text` and `stats`, as `Service.answer` does."""
        messages = [message async for message in self.messages()]
        return {"text": "".join(message["text"] for message in messages[:-1]), **messages[-1]}

    def _read(self) -> None:
        try:
            messages = self._service.stream(self._request, self._handle)
            self._put({"started": True})
            for message in messages:
                self._put(message)
            self._put(None)
        except LlamaOnnxError as error:
            self._put(error)
        except Exception:  # the thread is the last place that can tell
            logger.exception("an answer failed")
            self._put(LlamaOnnxError("the server failed: see its log."))

    def _put(self, message: dict[str, Any] | LlamaOnnxError | None) -> None:
        # A loop that has closed has nobody who waits.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._waiting.put_nowait, message)

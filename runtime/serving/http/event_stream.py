"""A response whose events are sent as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack, aclosing
from typing import Any

from starlette.responses import Response

from llama_onnx.targets.errors import LlamaOnnxError


class EventStream(Response):
    """Server-sent events. When the response ends, for any reason, the iterator is closed.

    `lines` yields (name or None, data). An error in the middle is the last event: the status has
    been sent by then. `failed` returns its data; `last` is what the stream ends with otherwise.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        lines: AsyncIterator[tuple[str | None, bytes]],
        failed: Any,
        last: bytes | None,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._lines, self._failed, self._last = lines, failed, last
        self._stack = ExitStack()

    def closing(self, stack: ExitStack) -> None:
        """Close `stack` when the response ends."""
        self._stack = stack

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events as they come."""
        with self._stack:
            await self._send(send)

    async def _send(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

        async def event(name: str | None, data: bytes) -> None:
            head = b"" if name is None else b"event: " + name.encode() + b"\n"
            body = head + b"data: " + data + b"\n\n"
            await send({"type": "http.response.body", "body": body, "more_body": True})

        try:
            async with aclosing(self._lines) as lines:  # type: ignore[type-var]
                async for name, data in lines:
                    await event(name, data)
        except LlamaOnnxError as error:
            await event(*self._failed(error))
        else:
            if self._last is not None:
                await event(None, self._last)
        await send({"type": "http.response.body", "body": b""})

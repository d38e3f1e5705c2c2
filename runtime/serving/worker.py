"""The process that holds the model: `python -m llama_onnx.runtime.serving.worker PACKAGE`.

onnxruntime-genai 0.18 holds Python's global lock while it reads a prompt, so nothing else in its
process can answer, not even a health check. It therefore runs in a separate process, which
exchanges JSON lines with the server:

    out  {"ready": {...}}                      once; or an error, then it exits
    in   a request                             null ends the current answer
    out  {"started": true}  {"text": ...}*     the pieces
    out  {"stats": {...}}  or  {"error": ..., "usage": ...}    the end of an answer
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import IO, TYPE_CHECKING, Any

from llama_onnx.runtime.serving.request import Request
from llama_onnx.targets.errors import LlamaOnnxError, UsageError, describe_reason

if TYPE_CHECKING:
    from llama_onnx.runtime.llama.generation import Generation
    from llama_onnx.runtime.llama.model import Llama

Send = Callable[[dict[str, Any]], None]


class Inbox:
    """Lines from the server; "" is their end.

    The server sends nothing before the end of an answer, except to stop it: a line that comes
    meanwhile ends the answer, also while its prompt is read.
    """

    def __init__(self) -> None:
        self._lines: SimpleQueue[str] = SimpleQueue()
        self._current: Generation | None = None

    def put(self, line: str) -> None:
        """Add a line, from the thread that reads them."""
        self._lines.put(line)
        if (answer := self._current) is not None:
            answer.close()

    def get(self) -> str:
        """Wait for the next line."""
        return self._lines.get()

    @contextmanager
    def ending(self, answer: Generation) -> Iterator[None]:
        """Let a line end `answer` while the block runs, or now if one has come already."""
        self._current = answer
        try:
            if not self._lines.empty():
                answer.close()
            yield
        finally:
            self._current = None


def work(package: Path, lines: IO[str], send: Send) -> int:
    """Open `package`, answer `lines` until they end, and return the exit status."""
    from llama_onnx.runtime.llama.model import Llama

    try:
        model = Llama.load(package)
        model.package.require_tokenizer()
    except LlamaOnnxError as error:
        send(_describe(error))
        return error.exit_code
    send({"ready": {"model": str(model), "provider": model.opened.to_json()}})
    inbox = Inbox()
    Thread(target=_read, args=(lines, inbox), daemon=True).start()
    while line := inbox.get():
        if (content := json.loads(line)) is not None:
            for message in _answer(model, content, inbox):
                send(message)
    return 0


def _answer(model: Llama, content: Any, inbox: Inbox) -> Iterator[dict[str, Any]]:
    try:
        answer = Request.from_json(content).start(model)
        yield {"started": True}
        with answer, inbox.ending(answer):
            for piece in answer:
                yield {"text": piece}
        yield {"stats": answer.stats.to_json()}
    except LlamaOnnxError as error:
        yield _describe(error)
    except Exception as error:  # a library's error ends this answer, not the service
        traceback.print_exc()
        yield {"error": f"the answer failed: {describe_reason(error)}.", "usage": False}


def _describe(error: LlamaOnnxError) -> dict[str, Any]:
    return {"error": str(error), "usage": isinstance(error, UsageError)}


def _read(lines: IO[str], inbox: Inbox) -> None:
    for line in lines:
        inbox.put(line)
    inbox.put("")


def main() -> int:
    """Answer requests from stdin on stdout."""
    # What libraries print goes to stderr; only answers go to the real stdout.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    return work(Path(sys.argv[1]), sys.stdin, send)


if __name__ == "__main__":
    sys.exit(main())

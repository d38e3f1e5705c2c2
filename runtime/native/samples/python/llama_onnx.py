"""Generate text with a llama-onnx package through the C library; needs no Python packages.

python llama_onnx.py PACKAGE "The capital of France is"
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

OK, FAILED, CANCELLED, BUSY = range(4)
LIBRARY = (
    Path(__file__)
    .resolve()
    .parents[3]
    .joinpath("bin", "llama_onnx.dll" if os.name == "nt" else "libllama_onnx.so")
)
"""The path of the library in a bundle."""

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class _Options(ctypes.Structure):
    _fields_ = (
        ("libraries", ctypes.c_char_p),
        ("provider", ctypes.c_char_p),
        ("check_hashes", ctypes.c_int),
    )


class Model:
    """An opened package. `provider` is "DirectML" or "CPU", `provider_reason` says why."""

    def __init__(
        self,
        package: str | Path,
        *,
        library: str | Path = LIBRARY,
        libraries: str | Path | None = None,
        provider: str = "auto",
        check_hashes: bool = False,
    ) -> None:
        """Open `package`; llama_onnx.h describes the options. Raises RuntimeError."""
        self._api = _load(library)
        self._handle = ctypes.c_void_p()
        folder = _utf8(libraries) if libraries is not None else None
        options = _Options(folder, provider.encode(), check_hashes)
        status = self._api.llama_onnx_open(
            _utf8(package), ctypes.byref(options), ctypes.byref(self._handle)
        )
        if status != OK:
            error = self.error
            self.close()
            raise RuntimeError(error)
        self.provider: str = self._api.llama_onnx_provider(self._handle).decode()
        self.provider_reason: str = self._api.llama_onnx_provider_reason(self._handle).decode()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def error(self) -> str:
        """The reason for the last failure, as a sentence."""
        return str(self._api.llama_onnx_error(self._handle).decode(errors="replace"))

    def generate(self, prompt: str, max_new_tokens: int = 256) -> Iterator[str]:
        """Continue `prompt`, piece by piece. Stop iterating to cancel."""
        return self._stream(self._api.llama_onnx_generate, prompt, max_new_tokens)

    def chat(
        self, messages: Sequence[Mapping[str, str]], max_new_tokens: int = 256
    ) -> Iterator[str]:
        """Answer messages such as `[{"role": "user", "content": "Hello"}]`, piece by piece."""
        text = json.dumps([dict(message) for message in messages])
        return self._stream(self._api.llama_onnx_chat, text, max_new_tokens)

    def generate_ids(self, prompt: Sequence[int], max_new_tokens: int = 256) -> list[int]:
        """Continue the tokens `prompt` with at most `max_new_tokens` tokens."""
        ids = (ctypes.c_int32 * max_new_tokens)()
        count = ctypes.c_size_t(max_new_tokens)
        given = (ctypes.c_int32 * len(prompt))(*prompt)
        status = self._api.llama_onnx_generate_ids(
            self._handle, given, ctypes.c_size_t(len(prompt)), ids, ctypes.byref(count)
        )
        self._check(status)
        return ids[: count.value]

    def cancel(self) -> None:
        """Stop the answer in progress; may be called from any thread."""
        self._api.llama_onnx_cancel(self._handle)

    def close(self) -> None:
        """Free the model."""
        self._api.llama_onnx_close(self._handle)
        self._handle = ctypes.c_void_p()

    def _stream(self, call: Callable[..., int], text: str, max_new_tokens: int) -> Iterator[str]:
        # The C call returns when the answer ends, so it runs in a thread that queues the pieces.
        pieces: queue.SimpleQueue[str | int] = queue.SimpleQueue()
        stop = threading.Event()

        def receive(piece: bytes, user: object) -> int:
            pieces.put(piece.decode())
            return int(stop.is_set())

        def run() -> None:
            pieces.put(call(self._handle, text.encode(), max_new_tokens, _Callback(receive), None))

        thread = threading.Thread(target=run)
        thread.start()
        try:
            while isinstance(item := pieces.get(), str):
                yield item
            self._check(item)
        finally:
            stop.set()
            self.cancel()
            thread.join()

    def _check(self, status: int) -> None:
        if status in (FAILED, BUSY):
            raise RuntimeError(self.error if status == FAILED else "the model is busy.")


def _utf8(path: str | Path) -> bytes:
    return str(path).encode()


def _load(library: str | Path) -> ctypes.CDLL:
    api = ctypes.CDLL(str(library))
    for name in ("error", "provider", "provider_reason"):
        getattr(api, f"llama_onnx_{name}").restype = ctypes.c_char_p
    return api


if __name__ == "__main__":
    with Model(sys.argv[1]) as model:
        print(f"{model.provider}: {model.provider_reason}", file=sys.stderr)
        for piece in model.generate(sys.argv[2]):
            # A terminal obeys control characters; in a pipe or a file the text is data.
            shown = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in piece)
            print(shown if sys.stdout.isatty() else piece, end="", flush=True)
    print()

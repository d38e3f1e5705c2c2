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
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

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


class Sampling(ctypes.Structure):
    """How an answer is chosen; `Model.sampling` makes one. See llama_onnx.h."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("max_new_tokens", ctypes.c_int),
        ("temperature", ctypes.c_double),
        ("top_k", ctypes.c_int),
        ("top_p", ctypes.c_double),
        ("min_p", ctypes.c_double),
        ("repetition_penalty", ctypes.c_double),
        ("no_repeat_ngram_size", ctypes.c_int),
        ("seed", ctypes.c_int64),
        ("stop", ctypes.POINTER(ctypes.c_char_p)),
        ("stop_count", ctypes.c_size_t),
        ("guide", ctypes.c_char_p),
        ("guide_kind", ctypes.c_char_p),
    )


class Stats(ctypes.Structure):
    """Of a session and its last answer; see llama_onnx.h."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("tokens", ctypes.c_size_t),
        ("prompt_tokens", ctypes.c_size_t),
        ("cached_tokens", ctypes.c_size_t),
        ("generated_tokens", ctypes.c_size_t),
        ("prompt_seconds", ctypes.c_double),
        ("first_token_seconds", ctypes.c_double),
        ("answer_seconds", ctypes.c_double),
        ("tokens_per_second", ctypes.c_double),
        ("finish", ctypes.c_int),
    )


class _SessionOptions(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("max_tokens", ctypes.c_size_t),
        ("adapter", ctypes.c_char_p),
    )


_Opened = TypeVar("_Opened", bound="_Handle")


class _Handle(ABC):
    """What the library opened; a `with` block closes it."""

    _name: str

    def __enter__(self: _Opened) -> _Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    @abstractmethod
    def error(self) -> str:
        """The reason for the last failure, as a sentence."""

    @abstractmethod
    def close(self) -> None:
        """Free it."""

    def _opened(self, status: int) -> None:
        if status != OK:
            error = self.error
            self.close()
            raise RuntimeError(error)

    def _check(self, status: int) -> None:
        if status in (FAILED, BUSY):
            raise RuntimeError(self.error if status == FAILED else f"the {self._name} is busy.")


class Model(_Handle):
    """An opened package. `provider` is "DirectML" or "CPU", `provider_reason` says why."""

    _name = "model"

    def __init__(
        self,
        package: str | Path,
        *,
        library: str | Path = LIBRARY,
        libraries: str | Path | None = None,
        provider: str = "auto",
        check_hashes: bool = False,
        verify: Callable[[str], object] | None = None,
    ) -> None:
        """Open `package`; llama_onnx.h describes the options. Raises RuntimeError.

        With `verify`, its certificate is replayed first; `verify` gets a line for each check.
        """
        self._api = _load(library)
        self._handle = ctypes.c_void_p()
        folder = _utf8(libraries) if libraries is not None else None
        options = _Options(folder, provider.encode(), check_hashes)
        out = ctypes.byref(self._handle)
        if verify is None:
            status = self._api.llama_onnx_open(_utf8(package), ctypes.byref(options), out)
        else:
            report = _Callback(lambda line, user: int(verify(line.decode()) is True))
            status = self._api.llama_onnx_verify(
                _utf8(package), ctypes.byref(options), report, None, out
            )
        self._opened(status)
        self.provider: str = self._api.llama_onnx_provider(self._handle).decode()
        self.provider_reason: str = self._api.llama_onnx_provider_reason(self._handle).decode()
        self.tokenizer: str = self._api.llama_onnx_tokenizer(self._handle).decode()

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

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the tokens of a text."""
        data = text.encode()
        ids = (ctypes.c_int32 * (2 * len(data) + 16))()
        count = ctypes.c_size_t(len(ids))
        self._check(
            self._api.llama_onnx_encode(
                self._handle, data, ctypes.c_size_t(len(data)), special, ids, ctypes.byref(count)
            )
        )
        return ids[: count.value]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens."""
        given = (ctypes.c_int32 * len(ids))(*ids)
        size = ctypes.c_size_t(0)
        arguments = (self._handle, given, ctypes.c_size_t(len(ids)))
        self._check(self._api.llama_onnx_decode(*arguments, None, ctypes.byref(size)))
        size.value += 1
        text = ctypes.create_string_buffer(size.value)
        self._check(self._api.llama_onnx_decode(*arguments, text, ctypes.byref(size)))
        return text.value.decode()

    def sampling(
        self,
        *,
        stop: Sequence[str] = (),
        json_schema: str | None = None,
        regex: str | None = None,
        **values: float | bytes,
    ) -> Sampling:
        """Return the package's options with `values` changed."""
        made = Sampling()
        self._api.llama_onnx_sampling_defaults(
            self._handle, ctypes.byref(made), ctypes.c_size_t(ctypes.sizeof(made))
        )
        made.stop = (ctypes.c_char_p * len(stop))(*(text.encode() for text in stop))
        made.stop_count = len(stop)
        guide, kind = (json_schema, b"json_schema") if json_schema else (regex, b"regex")
        if guide is not None:
            made.guide, made.guide_kind = guide.encode(), kind
        for name, value in values.items():
            setattr(made, name, value)
        return made

    def session(self, *, max_tokens: int = 0, adapter: str | None = None) -> Session:
        """Begin a session."""
        return Session(self, max_tokens, adapter)

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


class Session(_Handle):
    """A conversation, or another text that grows. Raises RuntimeError, as `Model` does."""

    _name = "session"

    def __init__(self, model: Model, max_tokens: int, adapter: str | None) -> None:
        """`Model.session` makes one."""
        self._api, self._model = model._api, model
        self._handle = ctypes.c_void_p()
        options = _SessionOptions(
            ctypes.sizeof(_SessionOptions), max_tokens, adapter.encode() if adapter else None
        )
        status = self._api.llama_onnx_session_open(
            model._handle, ctypes.byref(options), ctypes.byref(self._handle)
        )
        self._opened(status)

    @property
    def error(self) -> str:
        """The reason for the last failure, as a sentence."""
        return str(self._api.llama_onnx_session_error(self._handle).decode(errors="replace"))

    @property
    def ids(self) -> list[int]:
        """The tokens so far."""
        count = ctypes.c_size_t(0)
        self._call("ids", None, ctypes.byref(count))
        ids = (ctypes.c_int32 * count.value)()
        self._call("ids", ids, ctypes.byref(count))
        return ids[: count.value]

    @property
    def stats(self) -> Stats:
        """Numbers and times of the last answer."""
        found = Stats()
        self._call("stats", ctypes.byref(found), ctypes.c_size_t(ctypes.sizeof(found)))
        return found

    def append(self, text: str | Sequence[int]) -> None:
        """Add a text, or tokens."""
        if isinstance(text, str):
            data = text.encode()
            self._call("append_text", data, ctypes.c_size_t(len(data)))
        else:
            self._call(
                "append_ids", (ctypes.c_int32 * len(text))(*text), ctypes.c_size_t(len(text))
            )

    def say(self, content: str, role: str = "user") -> None:
        """Add a message."""
        self.append_messages([{"role": role, "content": content}])

    def append_messages(self, messages: Sequence[Mapping[str, str]]) -> None:
        """Add messages."""
        self._call("append_messages", json.dumps([dict(message) for message in messages]).encode())

    def generate(
        self,
        sampling: Sampling | None = None,
        receive: Callable[[str], object] = lambda piece: None,
    ) -> str:
        """Return an answer, each piece of which `receive` gets first; its True ends the answer."""
        pieces: list[str] = []

        def take(piece: bytes, user: object) -> int:
            pieces.append(piece.decode())
            return int(receive(pieces[-1]) is True)

        how = ctypes.byref(sampling) if sampling else None
        status = self._api.llama_onnx_session_generate(self._handle, how, _Callback(take), None)
        self._check(status)
        return "".join(pieces)

    def rewind(self, position: int) -> None:
        """Drop the tokens from `position` on."""
        self._call("rewind", ctypes.c_size_t(position))

    def save(self, path: str | Path) -> None:
        """Write tokens and messages to a file."""
        self._call("save", _utf8(path))

    def load(self, path: str | Path) -> None:
        """Read what `save` wrote, in place of what the session has."""
        self._call("load", _utf8(path))

    def cancel(self) -> None:
        """Stop the answer in progress; may be called from any thread."""
        self._api.llama_onnx_session_cancel(self._handle)

    def close(self) -> None:
        """Free the session."""
        self._api.llama_onnx_session_close(self._handle)
        self._handle = ctypes.c_void_p()

    def _call(self, name: str, *arguments: object) -> None:
        self._check(getattr(self._api, f"llama_onnx_session_{name}")(self._handle, *arguments))


def _utf8(path: str | Path) -> bytes:
    return str(path).encode()


def _load(library: str | Path) -> ctypes.CDLL:
    api = ctypes.CDLL(str(library))
    for name in ("error", "provider", "provider_reason", "tokenizer", "session_error"):
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

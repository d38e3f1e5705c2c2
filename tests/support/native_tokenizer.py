"""The C library's tokenizer, without a model."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence


class NativeTokenizer:
    """A tokenizer.json as the C library reads it."""

    def __init__(self, checks: ctypes.CDLL, content: bytes) -> None:
        """Read `content`; raises `ValueError` with the reason if it is not supported."""
        self._checks = checks
        checks.open_tokenizer.restype = ctypes.c_void_p
        checks.encode_text.restype = ctypes.c_int64
        checks.decode_tokens.restype = ctypes.c_size_t
        why = ctypes.create_string_buffer(512)
        found = checks.open_tokenizer(content, ctypes.c_size_t(len(content)), why)
        if not found:
            raise ValueError(why.value.decode(errors="replace"))
        self._words = ctypes.c_void_p(found)

    def __enter__(self) -> NativeTokenizer:
        return self

    def __exit__(self, *_: object) -> None:
        self._checks.close_tokenizer(self._words)

    def encode(self, text: str | bytes, *, around: bool = False) -> list[int]:
        """Return the ids of a text."""
        data = text.encode() if isinstance(text, str) else text
        room = 4 * len(data) + 64
        out = (ctypes.c_int32 * room)()
        count = self._checks.encode_text(
            self._words, data, ctypes.c_size_t(len(data)), around, out, ctypes.c_size_t(room)
        )
        assert 0 <= count <= room
        return out[:count]

    def decode(self, ids: Sequence[int], *, start: bool = True, flush: bool = True) -> bytes:
        """Return the text of `ids`, decoded one by one."""
        return self._decode(ids, start, False, flush)

    def pieces(self, ids: Sequence[int], *, start: bool = True) -> list[bytes]:
        """Return the text that each of `ids` adds."""
        return self._decode(ids, start, True, False).split(b"\0")[: len(ids)]

    def _decode(self, ids: Sequence[int], start: bool, pieces: bool, flush: bool) -> bytes:
        out = ctypes.create_string_buffer(4096 + 2048 * len(ids))
        size = self._checks.decode_tokens(
            self._words,
            (ctypes.c_int32 * len(ids))(*ids),
            ctypes.c_size_t(len(ids)),
            start,
            pieces,
            flush,
            out,
            ctypes.c_size_t(len(out)),
        )
        return out.raw[:size]

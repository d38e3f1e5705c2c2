"""Decode tokens to text one by one, with a package's tokenizer.json.

The decoders of Llama's tokenizers only: bytes in GPT-2's writing, and SentencePiece's pieces. Bytes
that form no character become U+FFFD where they are, as in SentencePiece and `tokenizers`, but that
`tokenizers` makes U+FFFD of the sound bytes beside them too.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_UNKNOWN = "\ufffd"
_SPACE = "\u2581"
"""How SentencePiece writes one."""


class TextStream(Protocol):
    """Decodes the tokens of one text."""

    def decode(self, token: int) -> str:
        """Return the text that is known with this token; it may be empty."""

    def finish(self) -> str:
        """Return what is left when no token follows."""


class Decoder(Protocol):
    """Makes streams.

    Attributes:
        eos_token_ids: The tokens that end an answer.
    """

    eos_token_ids: Collection[int]

    def create_stream(self) -> TextStream:
        """Return a stream for a text that continues another one."""


class PieceDecoder:
    """Makes streams for a tokenizer whose tokens stand for bytes.

    Attributes:
        eos_token_ids: The tokens that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, kind: Kind, eos_token_ids: Collection[int]) -> None:
        self.eos_token_ids = eos_token_ids
        self._tokenizer, self._kind = tokenizer, kind
        added = tokenizer.get_added_tokens_decoder()
        self._special = frozenset(number for number, token in added.items() if token.special)
        self._known: dict[int, bytes | None] = {}

    def create_stream(self) -> PieceStream:
        """Return a stream for a text that continues another one."""
        return PieceStream(self, self._kind)

    def bytes_of(self, token: int) -> bytes | None:
        """Return the bytes of a token within a text; None for a special one."""
        try:
            return self._known[token]
        except KeyError:
            piece = self.piece_of(token)
            self._known[token] = None if piece is None else self._kind.read(piece)
        return self._known[token]

    def piece_of(self, token: int) -> str | None:
        """Return how a token is written; None for a special one."""
        return None if token in self._special else self._tokenizer.id_to_token(token) or ""


class PieceStream:
    """Joins the bytes of tokens to characters."""

    def __init__(self, decoder: PieceDecoder, kind: Kind) -> None:
        self._decoder, self._kind = decoder, kind
        self._characters = codecs.getincrementaldecoder("utf-8")(kind.errors)
        self._spaces = 0  # that are still taken from the start of a text

    def decode(self, token: int) -> str:
        """Return the text that is known with this token: none for a special one, after which a new
        text starts."""
        written = self._decoder.bytes_of(token)
        if written is None:
            rest = self.finish()
            self._spaces = self._kind.spaces
            return rest
        if self._spaces:
            piece = self._decoder.piece_of(token) or ""
            written = self._kind.read(self._without_spaces(piece))
        return self._characters.decode(written)

    def finish(self) -> str:
        """Return U+FFFD for what waits for the rest of a character."""
        return self._characters.decode(b"", final=True)

    def _without_spaces(self, piece: str) -> str:
        """Return a piece without the spaces that only mark the start of a text. One that is
        written as a byte is not a mark."""
        while self._spaces and piece:
            self._spaces = self._spaces - 1 if piece[0] == _SPACE else 0
            piece = piece.removeprefix(_SPACE) if piece[0] == _SPACE else piece
        return piece


@dataclass(frozen=True)
class Kind:
    """How tokens are written: `read` returns the bytes of one.

    `spaces` are taken from the start of a text, and `errors` says how `codecs` decodes damage.
    """

    read: Callable[[str], bytes]
    spaces: int
    errors: str


def _read_sentencepiece(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        with suppress(ValueError):
            return bytes([int(piece[3:5], 16)])
    return _read_characters(piece)


def _read_characters(piece: str) -> bytes:
    return piece.replace(_SPACE, " ").encode("utf-8", "replace")


def _read_bytelevel(piece: str) -> bytes:
    if all(character in _BYTES for character in piece):
        return bytes(_BYTES[character] for character in piece)
    return piece.encode("utf-8", "replace")  # an added token


def _bytelevel_table() -> dict[str, int]:
    """Return GPT-2's characters for bytes: https://github.com/openai/gpt-2, encoder.py."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }


_BYTES = _bytelevel_table()


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    """Replace each damaged byte, as SentencePiece does."""
    assert isinstance(error, UnicodeDecodeError)
    return _UNKNOWN * (error.end - error.start), error.end


_EACH = "llama-onnx-each-byte"
codecs.register_error(_EACH, _each_byte)


class GenaiDecoder:
    """The tokenizer of onnxruntime-genai, whose streams drop what follows a damaged character."""

    def __init__(self, native: Any) -> None:
        self._native = native
        self.eos_token_ids: Collection[int] = [int(token) for token in native.eos_token_ids]

    def create_stream(self) -> GenaiStream:
        """Return a stream for a text that continues another one."""
        return GenaiStream(self._native.create_stream())


class GenaiStream:
    """A stream of onnxruntime-genai."""

    def __init__(self, native: Any) -> None:
        self._native = native

    def decode(self, token: int) -> str:
        """Return the text that is known with this token."""
        text: str = self._native.decode(token)
        return text

    def finish(self) -> str:
        """Return nothing: what waits cannot be asked for."""
        return ""


def open_decoder(tokenizer: Tokenizer, eos_token_ids: Collection[int]) -> PieceDecoder | None:
    """Return what decodes the tokens of `tokenizer`; None if it has a decoder of another kind."""
    if tokenizer.decoder is None:
        return None
    kind = _kind(json.loads(tokenizer.decoder.__getstate__()))
    return None if kind is None else PieceDecoder(tokenizer, kind, eos_token_ids)


def _kind(decoder: Mapping[str, Any]) -> Kind | None:
    """Return how the decoder of a tokenizer.json reads tokens, if it is one of Llama's."""
    steps = decoder.get("decoders", [decoder])
    names = [step["type"] for step in steps]
    if names == ["ByteLevel"]:
        return Kind(_read_bytelevel, 0, "replace")
    if names == ["Metaspace"] and steps[0].get("replacement") == _SPACE:
        return Kind(_read_characters, int(steps[0].get("prepend_scheme") != "never"), "replace")
    spaces = 0
    if names[-1:] == ["Strip"]:
        strip = steps[-1]
        if strip.get("content") != " " or strip.get("stop") != 0:
            return None
        spaces, names = int(strip["start"]), names[:-1]
    if names != ["Replace", "ByteFallback", "Fuse"]:
        return None
    replaces = steps[0].get("pattern") == {"String": _SPACE} and steps[0].get("content") == " "
    return Kind(_read_sentencepiece, spaces, _EACH) if replaces else None

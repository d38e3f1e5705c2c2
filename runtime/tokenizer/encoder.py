"""Encode texts with a package's tokenizer.json: in bounded time, and to ids of its vocabulary."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llama_onnx.runtime.tokenizer.deadline import within
from llama_onnx.runtime.tokenizer.json_limits import exceeded_limit
from llama_onnx.runtime.tokenizer.text_stream import PieceDecoder, open_decoder
from llama_onnx.targets.errors import LlamaOnnxError, PackageError
from llama_onnx.targets.folder_files import read_inside
from llama_onnx.targets.printable import printable
from llama_onnx.targets.strict_json import MAX_BYTES, JSONError, parse_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NAME = "tokenizer.json"
_SECONDS = 10.0
_CHARACTERS_A_SECOND = 20_000  # a busy, slow machine does ten times as many


class Encoder:
    """The tokenizer of a package; `open_encoder` opens one."""

    def __init__(self, tokenizer: Tokenizer, file: Path, rows: int | None) -> None:
        self._tokenizer, self._file, self._rows = tokenizer, file, rows
        self._gave_up: PackageError | None = None

    def get_vocab_size(self) -> int:
        """Return the number of tokens, added ones included."""
        return self._tokenizer.get_vocab_size()

    def open_decoder(self, ends: Collection[int]) -> PieceDecoder | None:
        """Return what decodes with the same tokenizer; None if its decoder is not of a Llama."""
        return open_decoder(self._tokenizer, ends)

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Return the ids of each text.

        Raises `PackageError` where the tokenizer takes far too long, fails, or returns ids without
        a row in the embedding; `TypeError` or `UnicodeEncodeError` for what is not a text.
        """
        for text in texts:
            text.encode("utf-8")  # lone surrogates
        if self._gave_up:  # its thread still runs: do not start another
            raise self._gave_up
        try:
            found = encode_texts(self._tokenizer, texts, add_special_tokens=add_special_tokens)
        except TimeoutError as error:
            self._gave_up = PackageError(
                f"{self._file} took more than {error.args[0]:g} s for a text: no sound tokenizer "
                "does; export the package again."
            )
            raise self._gave_up from None
        except ValueError as error:
            raise PackageError(_cannot("encode a text", self._file, error)) from None
        largest = max((max(ids, default=0) for ids in found), default=0)
        if self._rows is not None and largest >= self._rows:
            raise PackageError(
                f"{self._file} encodes a text to the id {largest:,}, but the model has "
                f"{self._rows:,} tokens: export the package again."
            )
        return found


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str], *, add_special_tokens: bool = True
) -> list[list[int]]:
    """Return the ids of each text, with any tokenizer: a stranger's may hang or panic.

    Raises `ValueError` with the library's reason if it fails, and `TimeoutError`, which holds the
    seconds, if it takes far longer than a sound one.
    """
    seconds = _SECONDS + sum(map(len, texts)) // _CHARACTERS_A_SECOND
    # `Tokenizer.encode` holds Python's lock, so that no time limit could end the wait; a batch does
    # not.
    batch = partial(tokenizer.encode_batch, list(texts), add_special_tokens=add_special_tokens)
    try:
        return [encoding.ids for encoding in within(seconds, batch)]
    except TimeoutError:
        raise TimeoutError(seconds) from None
    except BaseException as error:
        if not _is_of_library(error):
            raise
        raise ValueError(str(error)) from None


def open_encoder(folder: Path, rows: int | None = None) -> Encoder:
    """Open tokenizer.json in `folder`; raises `PackageError`. With `rows`, ids must be below it."""
    tokenizer = open_tokenizer(folder)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return Encoder(tokenizer, folder / _NAME, rows)


def open_tokenizer(folder: Path, error: type[LlamaOnnxError] = PackageError) -> Tokenizer:
    """Read tokenizer.json in `folder` within its limits; raises `error` if it cannot be read."""
    file = folder / _NAME
    content = read_inside(folder, _NAME, error, max_bytes=MAX_BYTES)
    try:
        limit = exceeded_limit(parse_json(content))
        if limit:
            raise error(f"{file} is too large: {limit}.")
        return tokenizer_from(content)
    except JSONError as problem:
        raise error(f"{file} cannot be read: it {problem}.") from None
    except ValueError as problem:
        raise error(_cannot("be read", file, problem)) from None


def tokenizer_from(content: bytes) -> Tokenizer:
    """Return the tokenizer with the content of a tokenizer.json; raises `ValueError` if the library
    `tokenizers` cannot read it."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_buffer(content.removeprefix(codecs.BOM_UTF8))
    except BaseException as error:
        if not _is_of_library(error):
            raise
        # Pieces that do not fit together end in a panic.
        text = str(error) if isinstance(error, Exception) else "its parts do not fit together"
        raise ValueError(text) from None


def _is_of_library(error: BaseException) -> bool:
    # The library raises bare Exception, or panics: a regular expression that backtracks for ever
    # ends so.
    return isinstance(error, Exception) or is_panic(error)


def is_panic(error: BaseException) -> bool:
    """Return whether a library in Rust panicked, which is not even an Exception."""
    return type(error).__name__ == "PanicException"


def _cannot(what: str, file: Path, error: BaseException) -> str:
    return f"{file} cannot {what}: {printable(str(error)).rstrip('.')}."

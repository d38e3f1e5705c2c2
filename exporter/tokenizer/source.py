"""The tokenizer that a checkpoint came with, read by its own library."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_onnx.exporter.tokenizer.files import SpecialTokens, TokenType
from llama_onnx.runtime.tokenizer.encoder import open_tokenizer, tokenizer_from
from llama_onnx.targets.errors import CheckpointError
from llama_onnx.targets.folder_files import file_inside, read_inside

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """All tokens in both directions: `pieces` from id to piece, `ids` from piece to id, as the
    library looks each of them up. `special` are the ids that a decoded text leaves out."""

    pieces: Mapping[int, str]
    ids: Mapping[str, int]
    special: frozenset[int]


@dataclass(frozen=True)
class Codec:
    """A tokenizer: `encode` returns the ids of a text, with the BOS and EOS that the model expects;
    `decode` the text of ids, without special tokens; `vocabulary` all tokens."""

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    vocabulary: Callable[[], Vocabulary]


JSON, MODEL, GGUF = "tokenizer.json", "tokenizer.model", "GGUF metadata"


def tokenizer_kind(path: Path) -> str | None:
    """Return where the checkpoint at `path`, a folder or a GGUF file, has its tokenizer: `JSON`,
    `MODEL`, `GGUF`, or None."""
    if path.is_file():
        from llama_onnx.exporter.formats.gguf import read_header

        kind = read_header(path).metadata.get("tokenizer.ggml.model", "none")
        return None if kind in ("no_vocab", "none") else GGUF
    folder = _tokenizer_folder(path)
    return next((name for name in (JSON, MODEL) if file_inside(folder, name)), None)


def _tokenizer_folder(path: Path) -> Path:
    """Return `path`, or the folder above, where Meta's download of several models has it."""
    above = path.resolve().parent
    meta = (path / "params.json").exists() and not (path / MODEL).exists()
    return above if meta and file_inside(above, MODEL) else path


def has_chat_template(path: Path) -> bool:
    """Return whether the checkpoint at `path`, a folder or a GGUF file, has a chat template."""
    if path.is_file():
        from llama_onnx.exporter.formats.gguf import read_header

        return bool(read_header(path).metadata.get("tokenizer.chat_template"))
    from llama_onnx.exporter.tokenizer.huggingface import read_chat_template

    return bool(read_chat_template(path))


def source_codec(path: Path, vocab_size: int | None = None) -> Codec | None:
    """Return the tokenizer of the checkpoint at `path`, None when it has none: tokenizer.json read
    by `tokenizers`, tokenizer.model by SentencePiece itself, a GGUF file's built from its metadata.
    Added tokens whose ids are not below `vocab_size` are left out.

    Raises `CheckpointError` for a tokenizer that cannot be read.
    """
    kind = tokenizer_kind(path)
    if kind == JSON:
        return _folder_codec(_tokenizer_folder(path), vocab_size)
    if kind == MODEL:
        return _sentencepiece_codec(_tokenizer_folder(path), vocab_size)
    if kind == GGUF:
        from llama_onnx.exporter.formats.gguf import read_header
        from llama_onnx.exporter.tokenizer.gguf import tokenizer_from_gguf

        metadata = read_header(path).metadata
        codec = _codec(tokenizer_from_gguf(metadata, str(path)).tokenizer, path)
        return replace(codec, vocabulary=lambda: _listed_vocabulary(metadata))
    return None


def _folder_codec(folder: Path, vocab_size: int | None) -> Codec:
    from llama_onnx.exporter.tokenizer.json_file import read_json_tokenizer
    from llama_onnx.exporter.tokenizer.rows import without_rows

    text = read_json_tokenizer(folder, spelled=False).text.encode("utf-8")
    if vocab_size is not None:
        text, _ = without_rows(text, vocab_size)
    return _codec(tokenizer_from(text), folder / JSON)


def json_codec(path: Path) -> Codec:
    """Read the tokenizer.json at `path`; raises `CheckpointError` when it cannot be read."""
    return _codec(open_tokenizer(path.parent, CheckpointError), path)


def _codec(tokenizer: Tokenizer, path: Path) -> Codec:
    from llama_onnx.exporter.tokenizer.encoded import encoded

    return Codec(
        lambda text: encoded(tokenizer, text, str(path)),
        tokenizer.decode,
        lambda: _vocabulary(tokenizer),
    )


def _vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    ids = tokenizer.get_vocab(with_added_tokens=True)
    pieces = {index: tokenizer.id_to_token(index) for index in ids.values()}
    added = tokenizer.get_added_tokens_decoder()
    special = frozenset(index for index, token in added.items() if token.special)
    return Vocabulary({i: p for i, p in pieces.items() if p is not None}, ids, special)


def _listed_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """Return the lists of a GGUF file, not what was made of them; a piece's index is its id."""
    pieces: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata.get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(pieces))
    hidden = (TokenType.UNKNOWN, TokenType.CONTROL)
    return Vocabulary(
        dict(enumerate(pieces)),
        {piece: index for index, piece in enumerate(pieces)},
        frozenset(i for i, kind in enumerate(types) if kind in hidden and pieces[i]),
    )


def _sentencepiece_codec(folder: Path, vocab_size: int | None) -> Codec:
    """Return SentencePiece with what transformers' LlamaTokenizer adds: special tokens split a text
    into parts that are encoded separately; BOS and EOS follow the settings. With `"legacy": false`,
    only a part at the start of the text gets a space in front, unless it has one."""
    from llama_onnx.exporter.tokenizer.huggingface import (
        is_legacy,
        read_settings,
        special_tokens,
    )

    settings = read_settings(folder)
    processor, encode_part = _processor(folder, legacy=is_legacy(settings))
    found = [m for m in _marks(folder, processor) if vocab_size is None or m.id < vocab_size]
    marks = sorted(found, key=lambda mark: -len(mark.text))
    ids = {mark.text: mark.id for mark in marks}
    hidden = {mark.id for mark in marks if mark.special}
    splitter = re.compile("|".join(f"({mark.pattern})" for mark in marks) or "(?!)")
    special = special_tokens(_own_tokens(processor), settings)
    first = [ids[special.bos]] if special.add_bos and special.bos in ids else []
    last = [ids[special.eos]] if special.add_eos and special.eos in ids else []

    def encode(text: str) -> list[int]:
        found, position = list(first), 0
        for match in splitter.finditer(text):
            assert match.lastindex is not None, "every alternative is a group"
            found += encode_part(text[position : match.start()], first=position == 0)
            found.append(marks[match.lastindex - 1].id)
            position = match.end()
        return [*found, *encode_part(text[position:], first=position == 0), *last]

    def decode(ids: Sequence[int]) -> str:
        # As pieces, since SentencePiece does not know tokens added after its vocabulary.
        pieces = {mark.id: mark.text for mark in marks}
        shown = [index for index in ids if index not in hidden]
        text: str = processor.decode([pieces.get(i) or processor.id_to_piece(i) for i in shown])
        return text

    def vocabulary() -> Vocabulary:
        pieces = {index: processor.id_to_piece(index) for index in range(len(processor))}
        own = {piece: processor.piece_to_id(piece) for piece in pieces.values()}
        return Vocabulary(
            pieces | {mark.id: mark.text for mark in marks},
            own | {mark.text: mark.id for mark in marks},
            frozenset(hidden),
        )

    return Codec(encode, decode, vocabulary)


def _processor(
    folder: Path, *, legacy: bool
) -> tuple[SentencePieceProcessor, Callable[..., list[int]]]:
    """Return SentencePiece, and what encodes a part of a text, `first` or not."""
    from sentencepiece import SentencePieceProcessor

    from llama_onnx.exporter.tokenizer.model_file import MAX_BYTES, without_prefix

    content = read_inside(folder, MODEL, max_bytes=MAX_BYTES)
    try:
        processor = SentencePieceProcessor(model_proto=content)
        bare = SentencePieceProcessor(model_proto=without_prefix(content))
    except (RuntimeError, ValueError):  # a piece may not be UTF-8
        raise CheckpointError(
            f"{folder / MODEL} is not a SentencePiece model: download it again."
        ) from None
    adds_prefix = processor.encode("a") != bare.encode("a")

    def encode(text: str, *, first: bool) -> list[int]:
        encoder = processor
        if adds_prefix and not legacy:
            encoder = bare
            if first and text and text[0] not in (" ", "▁"):
                text = " " + text
        ids: list[int] = encoder.encode(text)
        return ids

    return processor, encode


@dataclass(frozen=True)
class _Mark:
    """A token that is never split, wherever it is in a text. `pattern` matches the text it
    replaces; `special` tokens are left out of a decoded text."""

    text: str
    id: int
    pattern: str
    special: bool


def _marks(folder: Path, processor: SentencePieceProcessor) -> Iterator[_Mark]:
    from llama_onnx.exporter.tokenizer.huggingface import read_added_tokens

    added = read_added_tokens(folder)
    for index, token in added.items():
        before, after = (r"\s*" if strips else "" for strips in (token.lstrip, token.rstrip))
        pattern = before + re.escape(token.content) + after
        yield _Mark(token.content, index, pattern, token.special)
    for index in range(len(processor)):
        if index not in added and (processor.is_control(index) or processor.is_unknown(index)):
            piece = processor.id_to_piece(index)
            yield _Mark(piece, index, re.escape(piece), special=True)


def _own_tokens(processor: SentencePieceProcessor) -> SpecialTokens:
    ends = (processor.bos_id(), processor.eos_id())
    bos, eos = (processor.id_to_piece(index) if index >= 0 else None for index in ends)
    return SpecialTokens(bos, eos, add_bos=bos is not None)

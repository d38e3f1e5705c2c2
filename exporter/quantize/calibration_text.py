"""The token sequences that a calibration runs through the model: from the text that is shipped, or
from a file of the user's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.quantize.documents import Document, Documents, read_documents
from llama_onnx.runtime.llama.template import read_template
from llama_onnx.runtime.tokenizer.encoder import Encoder, open_encoder, open_tokenizer
from llama_onnx.targets.errors import PackageError, UsageError
from llama_onnx.targets.printable import printable

if TYPE_CHECKING:
    from llama_onnx.runtime.chat_template.render import ChatTemplate

Ids = npt.NDArray[np.int64]

SHIPPED = Path(__file__).parent / "texts" / "calibration.jsonl"
"""Written for this project and dedicated to the public domain (CC0 1.0); see texts/README.md."""

SHIPPED_NAME = "the text that llama-onnx ships"
LENGTH = 512
LEAST = 1024
"""Fewest tokens: from fewer, the statistics of most channels are noise."""

_MOST_NATS = 1.2
"""Between what SmolLM2-135M takes for a letter of English and code (0.4 to 1.0), and of languages
that it does not know (1.4 to 2.5), random words and digits (2.1)."""
_FIRST_CJK = "\u2e80"

_USUAL = 16 * LENGTH
_FEWER = 8 * LENGTH
_LARGE = 2_000_000_000
"""Parameters of a model for which means of squares are taken over fewer tokens: they need fewer
than products of channels do, and each costs time. With 2,048, 4,096 and 8,192 tokens awq's packages
of SmolLM2-135M have a mean KL of 0.097, 0.102 and 0.099."""

_CHARACTERS = 16  # Llama's vocabularies have 2 to 5 characters a token


@dataclass(frozen=True)
class Calibration:
    """Token ids [S] of each sequence, the name and sha256 of the file they are from, and warnings
    for people. `letters_per_token` is None for a text that needs no look at its perplexity: ours,
    and token ids."""

    sequences: tuple[Ids, ...]
    name: str
    sha256: str
    warnings: tuple[str, ...] = ()
    letters_per_token: float | None = None

    @property
    def tokens(self) -> int:
        """The number of tokens in all sequences."""
        return sum(map(len, self.sequences))


def default_tokens(config: LlamaConfig, *, correlates: bool = True) -> int:
    """Return how many tokens a calibration reads by default: 16 sequences of 512; where it collects
    how channels correlate, as many as the widest matrix has input channels, if these are more; else
    8 sequences for a model of more than 2 billion parameters.

    A Hessian of more channels than tokens has no inverse.
    """
    if not correlates:
        return _FEWER if config.num_parameters() > _LARGE else _USUAL
    widest = max(config.hidden_size, config.intermediate_size)
    return LENGTH * math.ceil(max(_USUAL, widest) / LENGTH)


def wanted_tokens(config: LlamaConfig, given: int | None, *, correlates: bool) -> int:
    """Return how many tokens are read: those `given`, or the usual number.

    Raises `UsageError` for fewer than `LEAST`.
    """
    if given is None:
        return default_tokens(config, correlates=correlates)
    if given < LEAST:
        raise UsageError(
            f"--calibration-tokens {given:,} is too few: a calibration needs at least {LEAST:,}."
        )
    return given


def calibration_tokens(
    folder: Path,
    config: LlamaConfig,
    source: Path | None = None,
    *,
    tokens: int | None = None,
    length: int = LENGTH,
) -> Calibration:
    """Return about `tokens` token ids in sequences of `length`, from the file `source` or, without
    one, from the text that is shipped. The same arguments give the same sequences.

    `folder` is the package, or one in the making: its tokenizer encodes a text as the runtime does,
    with a start token if it adds one, and its chat template writes the conversations. The sequences
    are spread evenly over the file. There are fewer, and a warning, if the file is short.

    Raises `UsageError` for a file that cannot be used, or that has fewer than `LEAST` tokens.
    """
    file = source or SHIPPED
    found = read_documents(file)
    length = min(length, config.max_position_embeddings)
    count = math.ceil((tokens or default_tokens(config)) / length)
    reader = _Reader.of(folder, config, found, shipped=source is None)
    if found.plain:
        text = found.documents[0].text or ""
        rows = text_rows(text, reader.plain, reader.start, count, length)
    else:
        rows = document_rows(found.documents, reader.encode, reader.start, count, length)
    name = SHIPPED_NAME if source is None else str(source)
    available = sum(map(len, rows))
    if available < LEAST:
        raise UsageError(
            f"{name} has {available:,} tokens in sequences of {length:,}, but a calibration needs "
            f"at least {LEAST:,} and reads {count * length:,} by default: use a longer text."
        )
    warnings = reader.warnings()
    if len(rows) < count:
        warnings += (_short(name, available, count * length, config),)
    letters = None if source is None or reader.encoder is None else _letters(folder, rows)
    return Calibration(tuple(rows), name, found.sha256, warnings, letters)


def perplexity_warnings(calibration: Calibration, nll: float | None) -> tuple[str, ...]:
    """Return a warning if the model hardly predicts the text of `calibration`: `nll` is the mean
    negative log-likelihood of a token, in nats; None if it is not known."""
    letters = calibration.letters_per_token
    if nll is None or letters is None or not nll > _MOST_NATS * letters:
        return ()
    return (
        f"{calibration.name}: the model predicts this text badly ({nll / letters:.1f} nats a "
        f"letter; up to {_MOST_NATS:g} are usual), as if it were in a language or of a kind that "
        "it does not know: calibrate on text like that which it will read.",
    )


def _letters(folder: Path, rows: Sequence[Ids]) -> float:
    """Return how many letters a token has. One of Chinese, Japanese or Korean counts as three,
    since it says as much."""
    tokenizer, some = open_tokenizer(folder), rows[:: max(1, len(rows) // 4)]
    text = "".join(tokenizer.decode(row.tolist(), skip_special_tokens=False) for row in some)
    letters = len(text) + 2 * sum(letter >= _FIRST_CJK for letter in text)
    return max(letters, 1) / sum(map(len, some))


def _short(name: str, available: int, wanted: int, config: LlamaConfig) -> str:
    widest = max(config.hidden_size, config.intermediate_size)
    few = ""
    if available < widest:
        few = f", fewer than the {widest:,} channels of the widest matrix, which harms gptq"
    return (
        f"{name} gives {available:,} tokens to calibrate on instead of {wanted:,}{few}: pass a "
        "longer text with --calibration."
    )


@dataclass(frozen=True)
class _Reader:
    """Turns documents into token ids. `start` are the ids that encoding puts before a text."""

    encoder: Encoder | None
    template: ChatTemplate | None
    start: Ids
    rows: int
    documents: Documents
    shipped: bool

    @classmethod
    def of(cls, folder: Path, config: LlamaConfig, found: Documents, *, shipped: bool) -> _Reader:
        make = partial(cls, rows=config.vocab_size, documents=found, shipped=shipped)
        if all(document.ids is not None for document in found.documents):
            return make(encoder=None, template=None, start=_ids([]))
        if not (folder / "tokenizer.json").exists():
            raise UsageError(
                "a calibration text needs the model's tokenizer, which this package does not have: "
                'use --quantizer rtn, or --calibration with a .jsonl file of {"ids": [...]}.'
            )
        encoder = open_encoder(folder, rows=config.vocab_size)
        bare, full = (encoder.encode(["a"], add_special_tokens=x)[0] for x in (False, True))
        start = full[: max(len(full) - len(bare), 0)]
        start = start if full[len(start) :] == bare else []
        chats = any(document.messages is not None for document in found.documents)
        template = read_template(folder) if chats else None
        return make(encoder=encoder, template=template, start=_ids(start))

    def warnings(self) -> tuple[str, ...]:
        """Return what is done in another way than the file asks for."""
        chats = [one for one in self.documents.documents if one.messages is not None]
        if self.shipped or not chats or self.template is not None:
            return ()
        return (
            f"{chats[0].where}: the model has no chat template, so the {len(chats):,} "
            "conversations are calibrated on as plain text.",
        )

    def plain(self, text: str) -> Ids:
        """Return the ids of a part of a text, without start token."""
        assert self.encoder is not None, "a text needs a tokenizer"
        return _ids(self.encoder.encode([text], add_special_tokens=False)[0])

    def encode(self, document: Document, characters: int) -> tuple[Ids, bool]:
        """Return the ids of the first `characters` of `document`, and whether that is all of it."""
        if document.ids is not None:
            return self._checked(document), True
        text, templated = document.text, False
        if document.messages is not None:
            text, templated = self._conversation(document, document.messages)
        assert text is not None, "a document has ids, messages or a text"
        part = text[:characters]
        if templated:  # which writes the special tokens itself
            return self.plain(part), part == text
        # What separates two texts is the start token, or an empty line.
        separator = self.plain("\n\n") if not len(self.start) and part == text else _ids([])
        return np.concatenate([self.start, self.plain(part), separator]), part == text

    def _checked(self, document: Document) -> Ids:
        largest = max(document.ids or (0,))
        if largest >= self.rows:
            raise UsageError(
                f"{document.where} has the token id {largest:,}, but the model has "
                f"{self.rows:,} tokens."
            )
        return _ids(document.ids or ())

    def _conversation(
        self, document: Document, messages: Sequence[dict[str, Any]]
    ) -> tuple[str, bool]:
        """Return the text of a conversation, and whether the chat template has written it."""
        from llama_onnx.runtime.chat_template.render import RejectedError, TemplateError

        if self.template is not None:
            unanswered = messages[-1]["role"] == "user"
            try:
                return self.template.render(messages, add_generation_prompt=unanswered), True
            except RejectedError as error:
                if not self.shipped:
                    raise UsageError(
                        f"{document.where}: the model's chat template rejects the conversation: "
                        f"{printable(str(error))}."
                    ) from None
            except TemplateError as error:
                raise PackageError(
                    f"the model's chat template cannot be used: {printable(str(error))}."
                ) from None
        turns = (f"{one['role'].capitalize()}: {one['content']}" for one in messages)
        return "\n\n".join(turns), False


def text_rows(
    text: str, encode: Callable[[str], Ids], start: Ids, count: int, length: int
) -> list[Ids]:
    """Return up to `count` sequences of `length` ids, each a stretch of `text` after `start`. They
    are spread evenly over the text, of which only those parts are encoded if it is long."""
    size = length - len(start)
    for characters in (_CHARACTERS, 8 * _CHARACTERS):
        if len(text) <= count * characters * size:
            break
        begins = [_word(text, i * len(text) // count) for i in range(count)]
        rows = [encode(text[begin : begin + characters * size])[:size] for begin in begins]
        if all(len(row) == size for row in rows):
            return [np.concatenate([start, row]) for row in rows]
    ids = encode(text)
    count = min(count, len(ids) // size)
    begins = [i * (len(ids) - size) // max(count - 1, 1) for i in range(count)]
    return [np.concatenate([start, ids[begin : begin + size]]) for begin in begins]


def document_rows(
    documents: Sequence[Document],
    encode: Callable[[Document, int], tuple[Ids, bool]],
    start: Ids,
    count: int,
    length: int,
) -> list[Ids]:
    """Return up to `count` sequences of `length` ids: documents joined one after another, in an
    order that is spread evenly over the file. `start` begins a sequence that begins inside one.

    Of a long document only the first `length` tokens are taken, more only if the others are short.
    """
    most = length
    while True:
        parts: list[Ids] = []
        whole = True
        for index in spread_order(len(documents)):
            ids, complete = encode(documents[index], most * _CHARACTERS)
            whole = whole and complete and len(ids) <= most
            parts.append(ids[:most])
            if sum(map(len, parts)) >= count * length:
                break
        rows = _cut(np.concatenate(parts), start, length)
        if whole or len(rows) >= count:
            return rows[:count]
        most *= 4


def spread_order(count: int) -> list[int]:
    """Return the numbers below `count` in an order whose every beginning is spread evenly over
    them.

    >>> spread_order(8)
    [0, 5, 2, 7, 4, 1, 6, 3]
    """
    golden = (math.sqrt(5) - 1) / 2  # whose multiples fill the unit interval most evenly
    return sorted(range(count), key=lambda index: index * golden % 1)


def _cut(ids: Ids, start: Ids, length: int) -> list[Ids]:
    """Return `ids` in sequences of `length`, each with `start`; what is left over is dropped."""
    rows: list[Ids] = []
    position = 0
    while True:
        begun = np.array_equal(ids[position : position + len(start)], start)
        head = start[:0] if begun else start
        part = ids[position : position + length - len(head)]
        row = np.concatenate([head, part])
        if len(row) < length:
            return rows
        rows.append(row)
        position += len(part)


def _word(text: str, position: int) -> int:
    """Return where the first word after `position` begins, `position` itself in a text without
    spaces."""
    if position == 0:
        return 0
    near = text[position : position + 1000]
    offset = next((i for i, letter in enumerate(near) if letter.isspace()), -1)
    return position + offset + 1


def _ids(values: Sequence[int]) -> Ids:
    return np.asarray(values, dtype=np.int64)

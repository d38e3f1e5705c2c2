"""Compares a package's tokenizer with its source's: the whole vocabulary, and some texts.

Every token must have the same id and every id the same token, added tokens included, and the same
tokens must be special. Some texts are encoded and decoded again too, because the vocabulary does
not show merges, normalization and templates.

The model may have more rows of the embedding than the tokenizer has tokens (a padded vocabulary):
such rows are in neither tokenizer, so they do not count. Steps that cut text may be written in
another way (see `tokenizer.digits`) as long as ids and texts are the same.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from llama_onnx.exporter.checkpoints.lora import tokenizer_home
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.exporter.parity.measure.prompts import TEXTS
from llama_onnx.exporter.tokenizer.source import (
    JSON,
    Codec,
    Vocabulary,
    json_codec,
    source_codec,
    tokenizer_kind,
)
from llama_onnx.exporter.tokenizer.texts import HARD_TEXTS
from llama_onnx.targets.errors import CheckpointError, PackageError
from llama_onnx.targets.package import ModelPackage

FIXED_TEXTS = (*TEXTS, *HARD_TEXTS)


@dataclass(frozen=True)
class Difference:
    """The first text whose ids are not the source's, or whose ids decode to another text: then
    `expected_text` and `found_text` are the two texts. `found` is None without a tokenizer."""

    text: str
    expected: tuple[int, ...]
    found: tuple[int, ...] | None
    expected_text: str | None = None
    found_text: str | None = None

    @property
    def position(self) -> int:
        """Index of the first id that differs."""
        pairs = enumerate(zip_longest(self.expected, self.found or ()))
        return next(index for index, (there, here) in pairs if there != here)


@dataclass(frozen=True)
class VocabularyDifference:
    """The number of differences between two vocabularies, and the first of them.

    `direction` is "id to piece", "piece to id" or "id to special"; `key` is the id or piece looked
    up, `expected` and `found` are the answers, None where there is no such token.
    """

    count: int
    direction: str
    key: int | str
    expected: str | int | None
    found: str | int | None


@dataclass(frozen=True)
class TokenizerCheck:
    """The package's tokenizer.json compared with the source's tokenizer, of the kind `source`.

    `tokens` and `texts` are the numbers of those compared. None means no difference."""

    source: str
    texts: int
    tokens: int
    difference: Difference | None
    vocabulary: VocabularyDifference | None

    @property
    def differences(self) -> int:
        """Number of differences: all in the vocabulary, and the first in a text."""
        in_vocabulary = self.vocabulary.count if self.vocabulary else 0
        return in_vocabulary + (self.difference is not None)

    @property
    def passed(self) -> bool:
        """Whether the vocabulary is the same, and every text has the same ids, which decode to
        the same text."""
        return not self.differences


def check_tokenizer(
    package: Path, original: Checkpoint, texts: Sequence[str] = ()
) -> TokenizerCheck | None:
    """Compare the tokenizers of `package` and `original`; None when either has none.

    The texts are `FIXED_TEXTS` and `texts`. Raises `CheckpointError` or `PackageError` for a
    tokenizer that cannot be read.
    """
    opened = ModelPackage.unchecked(package)
    if opened and not opened.has_tokenizer:
        return None
    home = tokenizer_home(original)
    kind, expected = tokenizer_kind(home), source_codec(home, original.config.vocab_size)
    if kind is None or expected is None:
        return None
    chosen = tuple(dict.fromkeys((*FIXED_TEXTS, *texts)))
    found, vocabulary = _package_codec(package), expected.vocabulary()
    return TokenizerCheck(
        kind,
        len(chosen),
        len(vocabulary.pieces),
        _first_difference(chosen, expected, found),
        compare_vocabularies(vocabulary, found.vocabulary()) if found else None,
    )


def compare_vocabularies(expected: Vocabulary, found: Vocabulary) -> VocabularyDifference | None:
    """Compare two vocabularies in both directions; None if they are the same."""
    special, found_special = (
        dict.fromkeys(sorted(one.special), "special") for one in (expected, found)
    )
    differences = [
        *_differing("id to piece", expected.pieces, found.pieces),
        *_differing("piece to id", expected.ids, found.ids),
        *_differing("id to special", special, found_special),
    ]
    return VocabularyDifference(len(differences), *differences[0]) if differences else None


def _differing(
    direction: str, expected: Mapping[Any, Hashable], found: Mapping[Any, Hashable]
) -> Iterator[tuple[Any, ...]]:
    for key in dict.fromkeys((*expected, *found)):
        if expected.get(key) != found.get(key):
            yield direction, key, expected.get(key), found.get(key)


def _first_difference(
    texts: Sequence[str], expected: Codec, found: Codec | None
) -> Difference | None:
    for text in texts:
        ids = tuple(expected.encode(text))
        if found is None:
            return Difference(text, ids, None)
        if ids != tuple(found.encode(text)):
            return Difference(text, ids, tuple(found.encode(text)))
        there, here = expected.decode(ids), found.decode(ids)
        if there != here:
            return Difference(text, ids, ids, there, here)
    return None


def _package_codec(package: Path) -> Codec | None:
    if not (package / JSON).exists():
        return None
    try:
        return json_codec(package / JSON)
    except CheckpointError as error:
        raise PackageError(str(error)) from None

"""Does a package cut text into the tokens that its source does, and put them together again?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.exporter.parity.measure.prompts import TEXTS
from llama_onnx.exporter.tokenizer.source import (
    JSON,
    Codec,
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
    """The first text whose ids are not the source's, or that these give back in another way: then
    `expected_text` and `found_text` say how. `found` is None without a tokenizer."""

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
class TokenizerCheck:
    """The package's tokenizer.json held against the source's tokenizer, which is a `source`."""

    source: str
    texts: int
    difference: Difference | None

    @property
    def passed(self) -> bool:
        """Whether every text has the same ids, and these the same text."""
        return self.difference is None


def check_tokenizer(
    package: Path, reference: Checkpoint, texts: Sequence[str] = ()
) -> TokenizerCheck | None:
    """Encode `FIXED_TEXTS` and `texts` with both tokenizers and decode the ids again; None when the
    source has none, or the package was exported without one.

    Raises `CheckpointError` or `PackageError` for one that cannot be read.
    """
    opened = ModelPackage.unchecked(package)
    if opened and not opened.has_tokenizer:
        return None
    kind, expected = tokenizer_kind(reference.path), source_codec(reference.path)
    if kind is None or expected is None:
        return None
    chosen = tuple(dict.fromkeys((*FIXED_TEXTS, *texts)))
    found = _package_codec(package)
    return TokenizerCheck(kind, len(chosen), _first_difference(chosen, expected, found))


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

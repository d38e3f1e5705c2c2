"""Byte-level BPE (GPT-2's kind), with the pre-tokenizer that the vocabulary was trained with."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from llama_onnx.exporter.tokenizer.files import SpecialTokens, add_special_tokens


@dataclass(frozen=True)
class Splitting:
    """How a family of models splits text into words before any merge.

    The `patterns` are applied in order. With `ignore_merges`, a word that is a token becomes that
    token, even if its merges give others. `add_bos`: encoding adds BOS by default.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


# Spelled exactly as their authors did: onnxruntime-genai recognizes patterns by their text. Single
# digits are a pattern too, because with the Digits step it splits spaces before a number wrongly.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_gpt2 = Splitting((GPT2,))
_single_digits = Splitting((r"\p{N}", GPT2))
_llama3 = Splitting((_LLAMA3,), ignore_merges=True, add_bos=True)

SPLITTINGS = {
    "gpt-2": _gpt2,
    "smollm": _single_digits,
    "starcoder": _single_digits,
    "refact": _single_digits,
    "llama-bpe": _llama3,
    "llama3": _llama3,
    "llama-v3": _llama3,
    "tekken": Splitting((_TEKKEN,), ignore_merges=True, add_bos=True),
}
"""By the name in `tokenizer.ggml.pre`."""


def bytelevel_tokenizer(
    pieces: abc.Sequence[str],
    merges: abc.Sequence[tuple[str, str]],
    types: abc.Sequence[int],
    special: SpecialTokens,
    splitting: Splitting,
) -> Tokenizer:
    """Build the tokenizer of a byte-level vocabulary; a piece's index is its id."""
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(BPE(vocabulary, list(merges), ignore_merges=splitting.ignore_merges))
    splits = [Split(Regex(pattern), "isolated") for pattern in splitting.patterns]
    tokenizer.pre_tokenizer = Sequence(
        [*splits, ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    add_special_tokens(tokenizer, pieces, types, special)
    return tokenizer

"""Vocabularies like Llama's, trained by SentencePiece itself, and texts to test them with."""

from __future__ import annotations

import importlib
import io
import json
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
from gguf import TokenType
from hypothesis import strategies as st

from tests.support import tiny

# Generated code whose messages exist only at run time.
proto: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")

CORPUS = (
    """The quick brown fox jumps over the lazy dog, and the capital of France is Paris.
Numbers: 1, 23, 456, 7890; it's don't we're I'll. def f(x):    return x ** 2  # code
Der schnelle braune Fuchs springt über den faulen Hund. Le cœur déçu mais l'âme plutôt naïve.
吾輩は猫である。名前はまだ無い。 中文字符的測試。 한국어 시험. Съешь же ещё этих булок. 🎉🎉 👍
banana bananas anagram abababab aaaa aaaaa abaaba 'hello' "world" (a) [b] {c} <d>
"""
    * 8
)

TEXTS = [
    "",
    " ",
    "  ",
    "   leading",
    "trailing   ",
    "a  b   c    d          e                                   f",
    "The capital of France is",
    "it's don't I'LL 1234567890 3.14",
    "line\nbreak\n\n  x\r\n\ttab",
    "中文字符 吾輩は猫である 한국어",
    "🎉👩‍👩‍👧 👍🏽 ½ ² Ⅷ ٣",
    "unseen: ξ ж ش ก ∮ \u200b\u00a0\u3000",
    "▁ literal ▁▁ <0x41> <s> is text",
    "abababa banananana aaaaaaaaaaa",
]

TEXT = st.text() | st.text("ab an▁ \n🎉中é1", max_size=60)


def trained(
    *,
    byte_fallback: bool = True,
    spaces: bool = False,
    prefix: bool = True,
    digits: bool = True,
    symbols: Sequence[str] = (),
) -> bytes:
    """Train a vocabulary like Llama's; `digits`: one piece each, `symbols`: user-defined pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=520,
        byte_fallback=byte_fallback,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        split_digits=digits,
        allow_whitespace_only_pieces=spaces,
        user_defined_symbols=list(symbols),
        minloglevel=2,
    )
    return model.getvalue()


def with_llama_runs(model: bytes) -> bytes:
    """Add runs of 2 to 16 spaces with the same score, as in Llama 2's vocabulary."""
    parsed = proto.ModelProto.FromString(model)
    for length in (2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11, 15):
        parsed.pieces.add(piece="▁" * length, score=-1e9)
    result: bytes = parsed.SerializeToString()
    return result


MAKERS: dict[str, Callable[[], bytes]] = {
    "plain": trained,
    "llama-runs": lambda: with_llama_runs(trained()),
    "trained-runs": lambda: trained(spaces=True),
    "no-prefix": lambda: trained(prefix=False),
    "no-bytes": lambda: trained(byte_fallback=False),
}


@cache
def model_named(name: str) -> bytes:
    return MAKERS[name]()


def spm_metadata(model: bytes, **keys: Any) -> dict[str, Any]:
    parsed = proto.ModelProto.FromString(model)
    values = {
        "model": "llama",
        "tokens": [piece.piece for piece in parsed.pieces],
        "scores": [piece.score for piece in parsed.pieces],
        "token_type": [piece.type for piece in parsed.pieces],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_space_prefix": parsed.normalizer_spec.add_dummy_prefix,
    }
    values |= keys
    return {f"tokenizer.ggml.{k}": v for k, v in values.items() if v is not None}


def bytelevel_metadata(**keys: Any) -> dict[str, Any]:
    """Return the vocabulary of tests/support/tiny.py, with a control and a user-defined token."""
    folder = Path(os.fspath(keys.pop("folder")))
    tiny.write_tokenizer(folder, 320)
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].__getitem__), "<|im_end|>", "[mine]"]
    types = [TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 5)
    types += [TokenType.CONTROL, TokenType.USER_DEFINED]
    values = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [int(kind) for kind in types],
        "merges": [" ".join(pair) for pair in model["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    values |= keys
    return {f"tokenizer.ggml.{k}": v for k, v in values.items() if v is not None}

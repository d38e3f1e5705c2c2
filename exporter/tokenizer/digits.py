"""A tokenizer.json that cuts single digits, in the words that every reader understands alike.

SmolLM's asks for the step `Digits`, then for GPT-2's pattern. onnxruntime-genai 0.18 mistakes
spaces before a number under the first; the same cuts as two patterns it makes right.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer

from llama_onnx.exporter.tokenizer.bytelevel import GPT2
from llama_onnx.exporter.tokenizer.texts import HARD_TEXTS


def spell_out_digits(original: bytes) -> bytes:
    """The content of a tokenizer.json with its `Digits` step as patterns: `original` itself when it
    has no such step, or when the two do not encode `HARD_TEXTS` alike."""
    try:
        content = json.loads(original)
        digits, words = content["pre_tokenizer"]["pretokenizers"]
    except (ValueError, KeyError, TypeError):
        return original
    if not (_is_digits(digits) and _is_gpt2(words)):
        return original
    patterns = [_split(r"\p{N}"), _split(GPT2), words | {"use_regex": False}]
    content["pre_tokenizer"]["pretokenizers"] = patterns
    spelled = json.dumps(content, ensure_ascii=False, indent=2).encode("utf-8")
    return spelled if _alike(original, spelled) else original


def _is_digits(step: Any) -> bool:
    return isinstance(step, dict) and step == {"type": "Digits", "individual_digits": True}


def _is_gpt2(step: Any) -> bool:
    if not isinstance(step, dict) or step.get("type") != "ByteLevel":
        return False
    return step.get("add_prefix_space") is False and step.get("use_regex", True) is True


def _split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def _alike(first: bytes, second: bytes) -> bool:
    try:
        one, other = Tokenizer.from_buffer(first), Tokenizer.from_buffer(second)
    except Exception:  # the library raises bare Exception; whoever uses the file will say so
        return False
    return all(one.encode(text).ids == other.encode(text).ids for text in HARD_TEXTS)

"""A tokenizer.json that splits single digits, written so that all readers agree.

SmolLM's has the step `Digits` before GPT-2's pattern. With that step onnxruntime-genai 0.18 splits
spaces before a number wrongly; with two patterns that split the same way it is right.
"""

from __future__ import annotations

import json
from typing import Any

from llama_onnx.exporter.tokenizer.bytelevel import GPT2
from llama_onnx.exporter.tokenizer.encoded import encoded
from llama_onnx.exporter.tokenizer.texts import HARD_TEXTS
from llama_onnx.runtime.tokenizer.encoder import tokenizer_from
from llama_onnx.targets.strict_json import parse_json


def spell_out_digits(original: bytes) -> bytes:
    """Return the content of a tokenizer.json with its `Digits` step as patterns, or `original` when
    it has no such step or the two encode one of `HARD_TEXTS` differently."""
    try:
        content = parse_json(original)
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
        one, other = tokenizer_from(first), tokenizer_from(second)
    except ValueError:  # the user of the file reports it
        return False
    where = "tokenizer.json"
    return all(encoded(one, text, where) == encoded(other, text, where) for text in HARD_TEXTS)

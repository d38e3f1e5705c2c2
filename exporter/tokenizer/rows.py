"""Tokens that were added to a tokenizer only: the model's embedding has no row for them."""

from __future__ import annotations

import json
from typing import Any

from llama_onnx.targets.strict_json import parse_json


def without_rows(text: bytes, vocab_size: int) -> tuple[bytes, list[str]]:
    """Return the tokenizer.json `text` without the added tokens whose ids are not below
    `vocab_size`, and those tokens.

    Those in the model's own vocabulary stay: such a tokenizer is another model's.
    """
    content: dict[str, Any] = parse_json(text)
    added = content.get("added_tokens") or []
    own = _own_ids(content)
    left_out = [
        token["content"]
        for token in added
        if token["id"] >= vocab_size and own.get(token["content"]) != token["id"]
    ]
    if not left_out:
        return text, []
    content["added_tokens"] = [token for token in added if token["content"] not in left_out]
    padding = content.get("padding")
    if isinstance(padding, dict) and padding.get("pad_token") in left_out:
        content["padding"] = None
    return json.dumps(content, ensure_ascii=False, indent=2).encode("utf-8"), left_out


def _own_ids(content: dict[str, Any]) -> dict[str, int]:
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    return vocabulary if isinstance(vocabulary, dict) else {}

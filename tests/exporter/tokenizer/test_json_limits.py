"""A tokenizer.json that would take the library's memory or time is refused before it is read."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from llama_onnx.exporter.tokenizer.json_file import read_json_tokenizer
from llama_onnx.exporter.tokenizer.source import json_codec, source_codec
from llama_onnx.targets.errors import CheckpointError
from tests.support import tiny

TEN_TIMES = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def sequence(steps: list[dict[str, Any]], key: str) -> dict[str, Any]:
    return {"type": "Sequence", key: steps}


BOMBS: dict[str, dict[str, Any]] = {
    "twelve times ten": {"normalizer": sequence([TEN_TIMES] * 12, "normalizers")},
    "nested": {
        "normalizer": sequence([sequence([TEN_TIMES] * 6, "normalizers")] * 2, "normalizers")
    },
    "a long prefix": {"normalizer": {"type": "Prepend", "prepend": "a" * 100_000}},
    "in the decoder": {"decoder": sequence([TEN_TIMES] * 12, "decoders")},
    "200 steps": {"pre_tokenizer": sequence([{"type": "Whitespace"}] * 200, "pretokenizers")},
    "600,000 tokens": {"model": {"type": "BPE", "vocab": {f"{n}": n for n in range(600_000)}}},
    "1,100,000 merges": {"model": {"type": "BPE", "vocab": {}, "merges": ["a b"] * 1_100_000}},
    "30,000 added tokens": {
        "added_tokens": [
            {"id": n, "content": f"<{n}>", "special": True, **ADDED} for n in range(30_000)
        ]
    },
    "an id of 2^31": {"model": {"type": "BPE", "vocab": {"a": 2**31}, "merges": []}},
    "an added id of 2^31": {"added_tokens": [{"id": 2**31, "content": "<a>", **ADDED}]},
    "a token of 20,000 characters": {"model": {"type": "BPE", "vocab": {"a" * 20_000: 0}}},
}


SLOW = {"600,000 tokens", "1,100,000 merges"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in BOMBS]
)
def test_a_bomb_is_refused_at_once(name: str, tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path, 288)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | BOMBS[name]), "utf-8")
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match="too large"):
        read_json_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="too large"):
        json_codec(file)
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize("pattern", ["(a+)+$", "(?:a|a)*$b"])
def test_an_expression_that_backtracks_for_ever_is_a_sentence(pattern: str, tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path, 288)
    file = tmp_path / "tokenizer.json"
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"pre_tokenizer": step}))
    codec = source_codec(tmp_path)
    assert codec is not None
    assert codec.encode("a")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: the tokenizer cannot encode"):
        codec.encode("a" * 60 + " b")


def test_a_panic_of_the_library_is_a_sentence(tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path, 288)
    file = tmp_path / "tokenizer.json"
    nothing = {"type": "Replace", "pattern": {"Regex": ""}, "content": "bbbb"}
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"normalizer": nothing}))
    with pytest.raises(CheckpointError, match=r"cannot encode 'a' \(index out of bounds"):
        read_json_tokenizer(tmp_path)

"""`export` warns where onnxruntime-genai encodes texts to other tokens than `tokenizers` does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime_genai as og
import pytest
from tokenizers import Tokenizer

from llama_onnx.exporter.tokenizer.genai_ids import genai_differences
from llama_onnx.runtime.llama.text_files import open_genai_tokenizer

IGNORED = {
    "lower case": {"type": "Lowercase"},
    "NFKC": {"type": "NFKC"},
    "replaced": {"type": "Replace", "pattern": {"String": "e"}, "content": "a"},
}
"""Normalizers that genai 0.18 does not apply."""


def changed(package: Path, folder: Path, normalizer: dict[str, Any] | None) -> Path:
    """Return a copy of the tokenizer's files of `package` with another normalizer."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "genai_config.json"):
        (folder / name).write_bytes((package / name).read_bytes())
    content = json.loads((folder / "tokenizer.json").read_bytes())
    content["normalizer"] = normalizer
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize("normalizer", IGNORED.values(), ids=IGNORED)
def test_a_normalizer_that_genai_leaves_out_is_a_warning(
    package: Path, tmp_path: Path, normalizer: dict[str, Any]
) -> None:
    folder = changed(package, tmp_path / "ä ü", normalizer)
    # The two libraries themselves: this text shows that they differ.
    text = "THE ﬁne e"
    theirs = [int(index) for index in og.Tokenizer(og.Config(str(folder))).encode(text)]
    encoding = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text)
    assert theirs != encoding.ids
    (warning,) = genai_differences(open_genai_tokenizer(folder), folder, "source")
    assert warning.startswith("source: onnxruntime-genai,")
    assert "test texts to other tokens" in warning


def test_alike_is_no_warning(package: Path) -> None:
    assert genai_differences(open_genai_tokenizer(package), package, "source") == []

"""A corpus is cut where its text allows, and nothing is lost or read twice."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_onnx.exporter.evaluate import corpus
from llama_onnx.exporter.evaluate.corpus import open_corpus
from llama_onnx.targets.errors import UsageError


@given(text=st.text(alphabet="a é€😀\n", min_size=1, max_size=120))
def test_the_shards_are_the_text(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "corpus.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "SHARD_BYTES", 12)
        patch.setattr(corpus, "_LONGEST_LINE", 8)
        found = open_corpus(path)
    parts = [shard.read(path) for shard in found.shards]
    assert "".join(parts) == text
    assert all(len(part.encode()) <= 12 + 8 for part in parts)
    assert found.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_what_is_no_text_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"")
    with pytest.raises(UsageError, match="is empty"):
        open_corpus(path)
    path.write_bytes(b"the fox\nb\xff\xfe\x80\xc3")
    (shard,) = open_corpus(path).shards
    with pytest.raises(UsageError, match="not UTF-8 text at byte 9"):
        shard.read(path)
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        open_corpus(tmp_path / "none.txt")

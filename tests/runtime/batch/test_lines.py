"""Files of requests, cut into pieces that can be read alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_onnx.runtime.batch import lines
from llama_onnx.runtime.batch.lines import open_source, row_text
from llama_onnx.runtime.serving.http.limits import MAX_BODY
from llama_onnx.targets.errors import LlamaOnnxError, UsageError


@given(
    parts=st.lists(st.sampled_from([b"{}", b"", b"  ", b'{"a": 1}\r', b"\xff", b"\x00" * 9])),
    ended=st.booleans(),
    data=st.data(),
)
def test_lines_are_numbered_without_blank_ones(
    tmp_path_factory: pytest.TempPathFactory,
    parts: list[bytes],
    ended: bool,
    data: st.DataObject,
) -> None:
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_bytes(b"\n".join(parts) + b"\n" * ended)
    wanted = [part for part in path.read_bytes().split(b"\n") if part.strip()]
    if not wanted:
        with pytest.raises(UsageError, match="has no lines"):
            open_source(path)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "PIECE", 3)
        source = open_source(path)
    assert source.count == len(wanted)
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    done = bytearray(data.draw(st.sampled_from([0, 1])) for _ in wanted)
    found = [(number, text.rstrip(b"\n")) for number, text in source.read(done)]
    assert found == [(n, text) for n, text in enumerate(wanted) if not done[n]]


def test_a_line_of_any_length_takes_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_bytes(b'{"prompt": "' + b"a" * (3 * MAX_BODY) + b'"}\n{"prompt": "b"}\n')
    (_, long), (_, short) = open_source(path).read(bytes(2))
    assert len(long) == MAX_BODY + 1
    assert short == b'{"prompt": "b"}\n'


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no\.jsonl cannot be read: No such file"):
        open_source(tmp_path / "no.jsonl")
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        open_source(tmp_path)


def test_parquet_without_its_library_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(LlamaOnnxError, match=r"pip install \"\.\[cpu,ray\]\""):
        open_source(tmp_path / "x.parquet")


def test_a_row_is_a_line() -> None:
    row = {"messages": [{"role": "user", "content": "é", "name": None}], "seed": None, "n": 2}
    text = row_text(row)
    assert json.loads(text) == {"messages": [{"role": "user", "content": "é"}], "n": 2}
    body = json.dumps({"prompt": "x"})
    assert json.loads(row_text({"body": body})) == {"body": {"prompt": "x"}}
    assert json.loads(row_text({"body": "{"})) == {"body": "{"}


def test_a_text_that_no_json_reader_takes_stays_for_the_answer_to_refuse() -> None:
    deep = "[" * 3000 + "]" * 3000
    for text in (deep, "[1e999]", '"\\ud800"'):
        assert json.loads(row_text({"body": text})) == {"body": text}

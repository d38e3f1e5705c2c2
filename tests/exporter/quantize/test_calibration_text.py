"""What a calibration reads: the token ids against `tokenizers`, the conversations against
transformers, and every file that cannot be used."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, LlamaForCausalLM

from llama_onnx.exporter.calibration.calibrate import mean_nll
from llama_onnx.exporter.quantize import calibration_text
from llama_onnx.exporter.quantize.calibration_text import (
    LEAST,
    SHIPPED,
    Calibration,
    calibration_tokens,
    default_tokens,
    document_rows,
    perplexity_warnings,
    spread_order,
    text_rows,
)
from llama_onnx.exporter.quantize.documents import Document, read_documents
from llama_onnx.exporter.reference.walk import walk_layers
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.targets.errors import LlamaOnnxError, UsageError
from tests.support import tiny

CONFIG = replace(tiny.GQA, max_position_embeddings=4096)
CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": f"{n} foxes?"}, {"role": "assistant", "content": f"{n} dogs."}]
    for n in range(60)
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tokenizer and a chat template, whose name has a space and an umlaut."""
    made = tmp_path / "ein Päckchen"
    made.mkdir()
    tiny.write_tokenizer(made, CONFIG.vocab_size)
    return made


def add_start(folder: Path) -> None:
    file = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    tokenizer.save(file)


def calibrate(folder: Path, file: Path | None, **options: Any) -> Calibration:
    return calibration_tokens(folder, CONFIG, file, **options)


def lines(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def prose(words: int) -> str:
    return " ".join(f"word{n}" for n in range(words))


def decode(folder: Path, row: Any) -> str:
    text: str = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(
        [int(i) for i in row], skip_special_tokens=False
    )
    return text


def test_the_shipped_text_is_read_by_default(folder: Path) -> None:
    found, again = (calibrate(folder, None) for _ in range(2))
    assert [len(row) for row in found.sequences] == [512] * 16
    assert found.tokens == default_tokens(CONFIG) == 8192
    assert found.warnings == () and found.name == "the text that llama-onnx ships"
    assert found.sha256 == hashlib.sha256(SHIPPED.read_bytes()).hexdigest()
    assert all(np.array_equal(a, b) for a, b in zip(found.sequences, again.sequences, strict=True))
    assert all(row.dtype == np.int64 for row in found.sequences)


def test_the_shipped_text_is_long_and_varied() -> None:
    assert 70_000 < SHIPPED.stat().st_size < 90_000
    documents = read_documents(SHIPPED).documents
    kinds = ["chat" if document.messages else "text" for document in documents]
    # In every tenth of the file: the beginning of any stretch is not of one kind.
    tenths = [kinds[i * len(kinds) // 10 : (i + 1) * len(kinds) // 10] for i in range(10)]
    assert all({"chat", "text"} == set(part) for part in tenths)
    texts = "".join(document.text or "" for document in documents)
    for letters in ("ة", "ж", "茶", "の", "é", "ß", "ñ", "ã", "def ", "SELECT", "#include", "∫"):
        assert letters in texts


def test_a_short_context_gives_short_sequences(folder: Path) -> None:
    found = calibration_tokens(folder, replace(CONFIG, max_position_embeddings=100))
    assert {len(row) for row in found.sequences} == {100}
    assert 8192 <= found.tokens < 8292


def test_a_wide_model_reads_more() -> None:
    wide = replace(CONFIG, hidden_size=4096, intermediate_size=11008)
    assert default_tokens(wide) == 11264
    assert default_tokens(wide, correlates=False) == 8192
    large = replace(wide, num_hidden_layers=32)  # 6.5 billion parameters
    assert default_tokens(large, correlates=False) == 4096


def test_a_plain_text_is_read_at_evenly_spread_places(folder: Path) -> None:
    file = folder / "ein Text.txt"
    file.write_text(prose(3000), encoding="utf-8")
    found = calibrate(folder, file, tokens=4 * 512)
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(prose(3000)).ids
    starts = [i * (len(ids) - 512) // 3 for i in range(4)]
    assert [list(row) for row in found.sequences] == [ids[s : s + 512] for s in starts]
    assert list(found.sequences[-1]) == ids[-512:]
    assert found.name == str(file)


def test_of_a_long_text_only_parts_are_encoded(folder: Path) -> None:
    encoded: list[int] = []

    def encode(text: str) -> Any:
        encoded.append(len(text))
        return np.array([ord(letter) for letter in text])

    text = "ab cd " * 1_000_000
    rows = text_rows(text, encode, np.array([7]), 5, 100)
    assert [len(row) for row in rows] == [100] * 5
    assert sum(encoded) < len(text) / 100
    for row in rows:
        assert row[0] == 7 and "".join(map(chr, row[1:3])) in ("ab", "cd")


@settings(max_examples=40)
@given(
    st.text("ab \n", min_size=200, max_size=3000),
    st.integers(1, 6),
    st.integers(2, 40),
    st.integers(0, 1),
)
def test_every_row_is_a_stretch_of_the_text(text: str, count: int, length: int, bos: int) -> None:
    start = np.full(bos, 5)
    rows = text_rows(text, lambda part: np.array([ord(c) for c in part]), start, count, length)
    assert len(rows) == min(count, len(text) // (length - bos))
    for row in rows:
        assert len(row) == length and list(row[:bos]) == [5] * bos
        assert "".join(map(chr, row[bos:])) in text


@settings(max_examples=40)
@given(st.integers(1, 3000))
def test_the_order_is_spread_from_its_beginning(count: int) -> None:
    order = spread_order(count)
    assert sorted(order) == list(range(count))
    for taken in (count // 10, count // 2):
        if taken > 5:
            gaps = np.diff([0, *sorted(order[:taken]), count])
            assert max(gaps) <= 3 * count / taken + 1


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=30), st.integers(1, 8), st.integers(2, 30)
)
def test_documents_fill_as_many_rows_as_they_have_tokens_for(
    sizes: list[int], count: int, length: int
) -> None:
    documents = [Document("", ids=(i + 1,) * size) for i, size in enumerate(sizes)]

    def encode(document: Document, characters: int) -> Any:
        assert document.ids is not None
        return np.array(document.ids[:characters], np.int64), len(document.ids) <= characters

    rows = document_rows(documents, encode, np.array([0]), count, length)
    # Each row takes one place for the start token.
    assert len(rows) == min(count, sum(sizes) // (length - 1))
    assert all(len(row) == length and row[0] == 0 for row in rows)
    for number, size in enumerate(sizes):
        assert sum(int((row == number + 1).sum()) for row in rows) <= size


def test_conversations_are_those_that_transformers_renders(folder: Path) -> None:
    file = lines(folder / "chats.jsonl", *({"messages": chat} for chat in CHATS))
    found = calibrate(folder, file, tokens=1024)
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    expected: list[int] = []
    for index in spread_order(len(CHATS)):
        expected += theirs.apply_chat_template(CHATS[index], tokenize=True)["input_ids"]
    assert list(np.concatenate(found.sequences)) == expected[:1024]


def test_a_bare_list_is_a_conversation_too(folder: Path) -> None:
    bare = calibrate(folder, lines(folder / "a.jsonl", *CHATS), tokens=1024)
    named = lines(folder / "b.jsonl", *({"messages": chat, "id": 1} for chat in CHATS))
    assert same(bare, calibrate(folder, named, tokens=1024))


def same(one: Calibration, other: Calibration) -> bool:
    return np.array_equal(np.concatenate(one.sequences), np.concatenate(other.sequences))


def test_an_unanswered_question_ends_where_the_answer_begins(folder: Path) -> None:
    chats = [chat[:1] for chat in CHATS]
    found = calibrate(folder, lines(folder / "chats.jsonl", *chats), tokens=1024)
    assert "0 foxes?\n<|assistant|><|user|>" in decode(folder, np.concatenate(found.sequences))


def test_each_sequence_has_the_start_token_that_the_tokenizer_adds(folder: Path) -> None:
    add_start(folder)
    file = folder / "text.txt"
    file.write_text(prose(3000), encoding="utf-8")
    for found in (calibrate(folder, None), calibrate(folder, file)):
        assert all(row[0] == 1 and row[1] != 1 for row in found.sequences)


def test_a_start_token_that_the_template_writes_is_not_doubled(folder: Path) -> None:
    add_start(folder)
    template = "<s>{% for m in messages %}{{ m['content'] }}{% endfor %}"
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    chats = [[{"role": "user", "content": prose(200)}] for _ in range(8)]
    found = calibrate(folder, lines(folder / "chats.jsonl", *chats), tokens=1024)
    joined = np.concatenate(found.sequences)
    assert found.sequences[0][0] == 1
    assert not ((joined[1:] == 1) & (joined[:-1] == 1)).any()


def test_texts_are_apart(folder: Path) -> None:
    texts = [{"text": f"the fox {n}"} for n in range(300)]
    found = calibrate(folder, lines(folder / "texts.jsonl", *texts), tokens=1024)
    assert "the fox 0\n\nthe fox " in decode(folder, found.sequences[0])
    add_start(folder)
    found = calibrate(folder, lines(folder / "texts.jsonl", *texts), tokens=1024)
    assert "<s>the fox 0<s>the fox " in decode(folder, found.sequences[0]).replace("<s> ", "<s>")


def test_a_long_document_does_not_take_all_the_places(folder: Path) -> None:
    texts = [{"text": "z" * 20_000}, *({"text": prose(100)} for _ in range(40))]
    found = calibrate(folder, lines(folder / "texts.jsonl", *texts), tokens=2048)
    assert decode(folder, np.concatenate(found.sequences)).count("z") <= 512
    alone = calibrate(folder, lines(folder / "one.jsonl", texts[0]), tokens=2048)
    assert alone.tokens == 2048


def test_token_ids_need_no_tokenizer(tmp_path: Path) -> None:
    rows = [{"ids": [(7 * n + i) % 288 for i in range(400)]} for n in range(5)]
    found = calibrate(tmp_path, lines(tmp_path / "ids.jsonl", *rows), tokens=1024)
    expected = [i for index in spread_order(5) for i in rows[index]["ids"]]
    assert list(np.concatenate(found.sequences)) == expected[:1024]


def test_line_ends_and_byte_order_mark_make_no_difference(folder: Path) -> None:
    text = "\n".join(prose(30) for _ in range(60)) + "\n"
    found = []
    for name, content in {
        "lf.txt": text.encode(),
        "crlf.txt": text.replace("\n", "\r\n").encode(),
        "bom.txt": codecs.BOM_UTF8 + text.encode(),
    }.items():
        (folder / name).write_bytes(content)
        found.append(calibrate(folder, folder / name, tokens=1024))
    assert same(found[0], found[1]) and same(found[0], found[2])
    chats = lines(folder / "a.jsonl", *CHATS)
    other = folder / "b.JSONL"
    other.write_bytes(codecs.BOM_UTF8 + chats.read_bytes().replace(b"\n", b"\r\n\r\n"))
    assert same(*(calibrate(folder, file, tokens=1024) for file in (chats, other)))


def test_a_separator_inside_a_json_text_is_no_line_end(folder: Path) -> None:
    texts = [{"text": f"one\u2028two\u0085three {n}"} for n in range(200)]
    file = folder / "texts.jsonl"
    file.write_text("\n".join(json.dumps(t, ensure_ascii=False) for t in texts), encoding="utf-8")
    assert calibrate(folder, file, tokens=1024).tokens == 1024


def test_a_huge_line_is_read(folder: Path) -> None:
    text = "the quick brown fox " * 60_000
    (folder / "a.txt").write_text(text, encoding="utf-8")
    lines(folder / "a.jsonl", {"text": text})
    for name in ("a.txt", "a.jsonl"):
        assert calibrate(folder, folder / name).tokens == 8192


def test_a_short_text_is_a_warning_and_a_shorter_one_an_error(folder: Path) -> None:
    file = folder / "text.txt"
    file.write_text(prose(500), encoding="utf-8")
    config = replace(CONFIG, intermediate_size=8000)
    found = calibration_tokens(folder, config, file)
    assert found.tokens < 8000 and found.warnings == (
        f"{file} gives {found.tokens:,} tokens to calibrate on instead of 8,192, fewer than the "
        "8,000 channels of the widest matrix, which harms gptq: pass a longer text with "
        "--calibration.",
    )
    file.write_text(prose(100), encoding="utf-8")
    with pytest.raises(UsageError, match=rf"has 512 tokens in .* at least {LEAST:,} and reads 8,1"):
        calibrate(folder, file)


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.txt", b"", "is empty"),
    "white space": ("a.jsonl", b"\xef\xbb\xbf \r\n\n", "is empty"),
    "latin-1": ("a.txt", b"one\ntwo caf\xe9 x", "byte 11, in line 2, is 0xe9"),
    "latin-1 after a mark": ("a.txt", b"\xef\xbb\xbfcaf\xe9 x", "byte 6, in line 1, is 0xe9"),
    "UTF-16": ("a.txt", "text".encode("utf-16"), "is UTF-16 text"),
    "no JSON": ("a.jsonl", b'{"text": "a"}\n\nhello\n', r"line 3 is not JSON: each line must be"),
    "pretty JSON": ("a.json", b'[\n  {"role": "user"}\n]', "line 1 is not JSON"),
    "NaN": ("a.jsonl", b'{"text": NaN}', "line 1 has NaN"),
    "a lone surrogate": ("a.jsonl", b'{"text": "\\ud800"}', "line 1 has half of a surrogate"),
    "deep": ("a.jsonl", b"[" * 3000 + b"]" * 3000, "line 1 is nested too deeply"),
    "other keys": ("a.jsonl", b'{"prompt": "a"}', "line 1 has no conversation and no text"),
    "a number": ("a.jsonl", b"7", "line 1 has no conversation and no text"),
    "a text that is a number": ("a.jsonl", b'{"text": 7}', "line 1 has no conversation"),
    "ids that are not": ("a.jsonl", b'{"ids": [1, true]}', "line 1 has no conversation"),
    "an id too large": ("a.jsonl", b'{"ids": [1, 288]}', "line 1 has the token id 288"),
    "no messages": ("a.jsonl", b'{"messages": []}', "line 1: messages must have at least one"),
    "no content": ("a.jsonl", b'\n[{"role": "user"}]', r"line 2: messages\[0\] has no 'content'"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_cannot_be_used_is_refused(folder: Path, case: str) -> None:
    name, content, message = BAD_FILES[case]
    file = folder / name
    file.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        calibrate(folder, file)
    assert str(caught.value).startswith(str(file))


def test_what_is_not_a_file_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="is not a regular file"):
        calibrate(folder, folder)
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        calibrate(folder, folder / "none.txt")
    monkeypatch.setattr("llama_onnx.exporter.quantize.documents.MAX_BYTES", 1 << 20)
    (folder / "large.txt").write_bytes(b"a" * (1 << 20) + b"a")
    with pytest.raises(UsageError, match="has more than 1 MiB"):
        calibrate(folder, folder / "large.txt")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_is_refused(folder: Path) -> None:
    os.mkfifo(folder / "pipe.txt")
    with pytest.raises(UsageError, match="is not a regular file"):
        calibrate(folder, folder / "pipe.txt")


def set_template(folder: Path, template: str | None) -> None:
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) | {"chat_template": template}
    file.write_text(json.dumps(settings), encoding="utf-8")


def test_a_conversation_that_the_template_rejects_is_named(folder: Path) -> None:
    set_template(folder, "{{ raise_exception('no ' + messages[0]['role'] + '\\x1b[31m') }}")
    with pytest.raises(UsageError, match=r"line 1: .* rejects the conversation: no user") as caught:
        calibrate(folder, lines(folder / "chats.jsonl", *CHATS))
    assert "\x1b" not in str(caught.value)
    # The shipped conversations are then read as text.
    assert calibrate(folder, None).tokens == 8192


def test_a_template_that_cannot_be_read_is_an_error(folder: Path) -> None:
    set_template(folder, "{% for m in messages %}")
    for file in (None, lines(folder / "chats.jsonl", *CHATS)):
        with pytest.raises(LlamaOnnxError, match="chat template cannot be used"):
            calibrate(folder, file)


def test_conversations_for_a_model_without_template_are_plain_text(folder: Path) -> None:
    set_template(folder, None)
    found = calibrate(folder, lines(folder / "chats.jsonl", *CHATS), tokens=1024)
    assert "User: 0 foxes?\n\nAssistant: 0 dogs.\n\n" in decode(folder, found.sequences[0])
    (warning,) = found.warnings
    assert "line 1: the model has no chat template, so the 60 conversations" in warning
    assert calibrate(folder, None).warnings == ()


def test_a_model_without_tokenizer_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"needs the model's tokenizer, .* --quantizer rtn"):
        calibration_tokens(tmp_path, CONFIG)


def test_ids_beyond_the_vocabulary_are_refused(folder: Path) -> None:
    with pytest.raises(LlamaOnnxError, match="encodes a text to the id"):
        calibration_tokens(folder, replace(CONFIG, vocab_size=200))


def test_the_letters_of_a_token_are_counted(folder: Path) -> None:
    for text, weight in ((prose(2000), 1), ("茶" * 3000, 3)):
        (folder / "text.txt").write_text(text, encoding="utf-8")
        found = calibrate(folder, folder / "text.txt")
        read = "".join(decode(folder, row) for row in found.sequences)
        assert found.letters_per_token == pytest.approx(weight * len(read) / found.tokens, rel=0.02)
    assert calibrate(folder, None).letters_per_token is None


def test_a_text_that_the_model_predicts_badly_is_a_warning() -> None:
    english = Calibration((), "a.txt", "", letters_per_token=4.0)
    assert perplexity_warnings(english, 3.5) == perplexity_warnings(english, None) == ()
    (warning,) = perplexity_warnings(english, 6.0)
    assert warning.startswith("a.txt: the model predicts this text badly (1.5 nats a letter")
    assert perplexity_warnings(replace(english, letters_per_token=None), 6.0) == ()


def test_the_likelihood_is_that_of_transformers(tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "source")
    ids = [np.arange(3 + n, 83 + n) for n in range(4)]
    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    checkpoint = open_checkpoint(source)
    *_, (_, hidden), _ = walk_layers(checkpoint, ids)
    losses = []
    for row in ids:
        labels = torch.from_numpy(row)[None].clone()
        labels[:, :-64] = -100  # the last 64 tokens are predicted
        with torch.inference_mode():
            losses.append(model(torch.from_numpy(row)[None], labels=labels).loss.item())
    states = [torch.from_numpy(state)[None] for state in hidden]
    assert mean_nll(checkpoint, ids, states) == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_text_is_in_the_wheel() -> None:
    settings = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    assert '"llama_onnx.exporter" = ["quantize/texts/*"]' in settings
    assert SHIPPED.is_file() and SHIPPED.is_relative_to(Path(calibration_text.__file__).parent)

"""Hugging Face folders with tokenizer.model alone: SentencePiece's ids, the folder's settings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from llama_onnx.exporter.parity.measure.tokenizers import FIXED_TEXTS, check_tokenizer
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.exporter.tokenizer.huggingface import read_chat_template, tokenizer_from_folder
from llama_onnx.targets.errors import CheckpointError
from tests.support import tiny
from tests.support.vocabularies import TEXT, TEXTS, model_named


def put(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with tokenizer.model alone."""
    # Rows for the vocabulary of 535 pieces, and for tokens added to it.
    tiny.write_huggingface(tmp_path, replace(tiny.GQA, vocab_size=540))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(model_named("llama-runs"))
    return tmp_path


def sentencepiece_ids(text: str) -> list[int]:
    ids: list[int] = sentencepiece.SentencePieceProcessor(
        model_proto=model_named("llama-runs")
    ).encode(text)
    return ids


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=TEXT | st.sampled_from(TEXTS))
def test_the_ids_are_those_of_sentencepiece(folder: Path, text: str) -> None:
    out = folder / "out"
    if not out.exists():
        out.mkdir()
        open_checkpoint(folder).write_tokenizer(out)
    text = text.replace("<s>", "")  # a control token in a text: SentencePiece knows none
    loaded = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert loaded.encode(text).ids == [1, *sentencepiece_ids(text)]


def test_the_settings_beside_it_are_honoured(folder: Path, tmp_path: Path) -> None:
    size = len(sentencepiece.SentencePieceProcessor(model_proto=model_named("llama-runs")))
    put(folder, "added_tokens.json", {"<|end|>": size + 1, "<pad>": size})
    put(folder, "special_tokens_map.json", {"pad_token": {"content": "<pad>"}, "eos_token": ""})
    config = {
        "add_bos_token": False,
        "add_eos_token": True,
        "eos_token": "<|end|>",
        "added_tokens_decoder": {
            "1": {"content": "<s>", "special": True},
            str(size + 2): {"content": "[x]", "special": False, "lstrip": True},
        },
        "chat_template": tiny.CHAT_TEMPLATE,
    }
    put(folder, "tokenizer_config.json", config)
    out = tmp_path / "out"
    out.mkdir()
    written = open_checkpoint(folder).write_tokenizer(out)
    assert written == ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    loaded = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert loaded.encode("hello").ids == [*sentencepiece_ids("hello"), size + 1]
    assert loaded.encode("a  [x]<pad>").ids == [
        *sentencepiece_ids("a"),
        size + 2,
        size,
        size + 1,
    ]
    assert loaded.decode([size, size + 2], skip_special_tokens=True) == "[x]"
    made = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert [made[f"{role}_token"] for role in ("bos", "eos", "pad")] == ["<s>", "<|end|>", "<pad>"]
    assert (out / "chat_template.jinja").read_text(encoding="utf-8") == tiny.CHAT_TEMPLATE


def test_no_token_is_added_when_the_settings_say_so(folder: Path) -> None:
    put(folder, "tokenizer_config.json", {"add_bos_token": False})
    made = tokenizer_from_folder(folder).tokenizer
    assert made.encode("hello").ids == sentencepiece_ids("hello")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("added_tokens.json", {"<pad>": 9999}, "'<pad>' has the id 9999"),
        ("added_tokens.json", {"<s>": 5}, "'<s>' has the id 5"),
        ("added_tokens.json", {"<pad>": "last"}, "added_tokens.json .* are damaged"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": "x"}}, "are damaged"),
        ("tokenizer_config.json", {"pad_token": "[PAD]"}, r"pad_token '\[PAD\]' is not a token"),
    ],
)
def test_settings_of_another_model(folder: Path, name: str, content: Any, message: str) -> None:
    put(folder, name, content)
    with pytest.raises(CheckpointError, match=message):
        tokenizer_from_folder(folder)


def test_no_tokenizer_at_all(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"neither a tokenizer\.json nor a tokenizer\.model"):
        open_checkpoint(folder).write_tokenizer(tmp_path)


def test_tokenizer_json_wins(folder: Path, tmp_path: Path) -> None:
    tiny.write_tokenizer(folder, 288)
    original = (folder / "tokenizer.json").read_bytes()
    (tmp_path / "out").mkdir()
    open_checkpoint(folder).write_tokenizer(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == original


@pytest.mark.parametrize(
    ("inside", "file", "expected"),
    [
        (None, None, None),
        ("in {{ x }}", None, "in {{ x }}"),
        ("in", "own\nfile", "own\nfile"),
        ([{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}], None, "d"),
        ([{"name": "tool", "template": "t"}], None, None),
        (["junk"], None, None),
    ],
)
def test_where_the_chat_template_comes_from(
    tmp_path: Path, inside: Any, file: str | None, expected: str | None
) -> None:
    put(tmp_path, "tokenizer_config.json", {"chat_template": inside})
    if file is not None:
        (tmp_path / "chat_template.jinja").write_bytes(file.encode())
    assert read_chat_template(tmp_path) == expected


def settings_of_a_chat_model(folder: Path) -> None:
    """Tokens behind the vocabulary, one of which takes the spaces before it, and an end token."""
    size = len(sentencepiece.SentencePieceProcessor(model_proto=model_named("llama-runs")))
    put(folder, "added_tokens.json", {"<|im_end|>": size, "[INST]": size + 1})
    decoder = {str(size + 1): {"content": "[INST]", "lstrip": True}}
    config = {"add_eos_token": True, "eos_token": "<|im_end|>", "added_tokens_decoder": decoder}
    put(folder, "tokenizer_config.json", config)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("text", [*FIXED_TEXTS, *TEXTS, "a<s>  b</s> [INST] [INST]c"])
def test_the_check_finds_sentencepiece_itself_in_agreement(
    folder: Path, tmp_path: Path, chat: bool, text: str
) -> None:
    if chat:
        settings_of_a_chat_model(folder)
    (tmp_path / "out").mkdir()
    checkpoint = open_checkpoint(folder)
    checkpoint.write_tokenizer(tmp_path / "out")
    found = check_tokenizer(tmp_path / "out", checkpoint, [text])
    assert found is not None
    assert found.source == "tokenizer.model"
    assert found.difference is None


def test_the_check_finds_transformers_conversion_wrong(folder: Path, tmp_path: Path) -> None:
    """Its tokenizer.json for such a folder leaves out the space before the first word."""
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "out")
    found = check_tokenizer(tmp_path / "out", open_checkpoint(folder))
    assert found is not None and found.difference is not None
    assert found.difference.expected[:1] == (1,)


def test_the_check_decodes_too(folder: Path, tmp_path: Path) -> None:
    """A tokenizer.json with the right ids that leaves the space in front of a text."""
    (tmp_path / "out").mkdir()
    checkpoint = open_checkpoint(folder)
    checkpoint.write_tokenizer(tmp_path / "out")
    made = tmp_path / "out" / "tokenizer.json"
    content = json.loads(made.read_text(encoding="utf-8"))
    assert content["decoder"]["decoders"].pop()["type"] == "Strip"
    put(tmp_path / "out", "tokenizer.json", content)
    found = check_tokenizer(tmp_path / "out", checkpoint)
    assert found and found.difference and not found.passed
    assert found.difference.expected == found.difference.found
    assert found.difference.found_text == " " + (found.difference.expected_text or "")


def test_a_piece_that_is_listed_as_added_is_a_token_of_its_own(
    folder: Path, tmp_path: Path
) -> None:
    piece = Tokenizer.from_str(tokenizer_from_folder(folder).tokenizer.to_str()).id_to_token(400)
    assert piece is not None and len(piece.strip("▁")) > 1
    put(folder, "tokenizer_config.json", {"added_tokens_decoder": {"400": {"content": piece}}})
    (tmp_path / "out").mkdir()
    checkpoint = open_checkpoint(folder)
    checkpoint.write_tokenizer(tmp_path / "out")
    text = f"x{piece}y {piece}{piece}"
    assert 400 in tokenizer_from_folder(folder).tokenizer.encode(text).ids
    found = check_tokenizer(tmp_path / "out", checkpoint, [text])
    assert found is not None and found.difference is None

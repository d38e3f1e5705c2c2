"""The C library's tokenizer against SentencePiece and the library `tokenizers`."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from llama_onnx.exporter.tokenizer.bytelevel import SPLITTINGS
from llama_onnx.exporter.tokenizer.model_file import tokenizer_from_model_file
from tests.support import vocabularies
from tests.support.native import compile_checks
from tests.support.native_tokenizer import NativeTokenizer
from tests.support.strings import sequences, strings

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="built with gcc for Linux"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
]

CORPUS = vocabularies.CORPUS.splitlines()
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    **{name: SPLITTINGS[name].patterns for name in ("gpt-2", "smollm", "llama3", "tekken")},
    "qwen2": (QWEN2,),
}
FEW, MANY = 1500, 100_000
"""Strings for each vocabulary in the quick tests, and for all of them together in the slow one."""


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compile_checks(tmp_path_factory.mktemp("checks"))


@cache
def byte_level(name: str) -> str:
    """A byte-level tokenizer.json with the pre-tokenizer `name`, and added tokens of each kind."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama3"))
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[name]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


@cache
def pieces(name: str, folder: Path) -> str:
    """The tokenizer.json that the exporter makes from a tokenizer.model."""
    file = folder / f"{name}.model"
    file.write_bytes(vocabularies.model_named(name))
    return tokenizer_from_model_file(file).tokenizer.to_str()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vocabularies")


def contents(folder: Path) -> Iterator[str]:
    yield from (byte_level(name) for name in SPLITS)
    yield from (pieces(name, folder) for name in vocabularies.MAKERS)


def compare(checks: Any, content: str, count: int, seed: int = 0) -> None:
    """Encode and decode `count` strings, a third with the texts of special tokens inside."""
    library = Tokenizer.from_str(content)
    texts = [
        *strings(count - count // 3, CORPUS, special=False, seed=seed),
        *strings(count // 3, CORPUS, special=True, seed=seed + 1),
    ]
    with NativeTokenizer(checks, content.encode()) as ours:
        for around in (False, True):
            expected = [e.ids for e in library.encode_batch(texts, add_special_tokens=around)]
            for text, ids in zip(texts, expected, strict=True):
                assert ours.encode(text, around=around) == ids, text
        for ids, text in zip(expected, library.decode_batch(expected), strict=True):
            assert ours.decode(ids).decode() == text, ids


@pytest.mark.parametrize("name", SPLITS)
def test_byte_level_tokens_are_those_of_the_library(checks: Any, name: str) -> None:
    compare(checks, byte_level(name), FEW)


@pytest.mark.parametrize("name", vocabularies.MAKERS)
def test_tokens_are_those_of_sentencepiece(checks: Any, folder: Path, name: str) -> None:
    content = pieces(name, folder)
    compare(checks, content, FEW)
    original = sentencepiece.SentencePieceProcessor(model_proto=vocabularies.model_named(name))
    with NativeTokenizer(checks, content.encode()) as ours:
        for text in strings(FEW, CORPUS, special=False, seed=5):
            assert ours.encode(text) == original.encode(text), text


@pytest.mark.slow
def test_a_hundred_thousand_strings(checks: Any, folder: Path) -> None:
    every = list(contents(folder))
    for seed, content in enumerate(every):
        compare(checks, content, MANY // len(every), seed=1000 + seed)


def with_keys(content: str, **keys: Any) -> str:
    return json.dumps({**json.loads(content), **keys})


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
@pytest.mark.parametrize("split", [True, False])
def test_marks_as_a_pre_tokenizer(checks: Any, folder: Path, scheme: str, split: bool) -> None:
    step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}
    compare(checks, with_keys(pieces("plain", folder), normalizer=None, pre_tokenizer=step), 400)


def test_added_tokens_of_each_kind(checks: Any, folder: Path) -> None:
    for content in (byte_level("llama3"), pieces("plain", folder)):
        tokenizer = json.loads(content)
        first = Tokenizer.from_str(content).get_vocab_size()
        for number, (text, left, right, normalized) in enumerate(
            [
                ("<a>", True, False, False),
                ("<a>b", False, True, False),
                ("zq", False, False, True),
                ("é b", False, False, True),
                ("日本", True, True, False),
            ]
        ):
            tokenizer["added_tokens"].append(
                {
                    "id": first + number,
                    "content": text,
                    "single_word": False,
                    "lstrip": left,
                    "rstrip": right,
                    "normalized": normalized,
                    "special": number == 0,
                }
            )
        changed = json.dumps(tokenizer)
        library = Tokenizer.from_str(changed)
        parts = ["<a>", "<a>b", " zq ", "zq", "é b", "日本", "  \u3000", " x", "<a", "\n\t"]
        texts = ["".join(parts[i // 10**k % 10] for k in range(4)) for i in range(0, 10_000, 7)]
        with NativeTokenizer(checks, changed.encode()) as ours:
            for text, encoding in zip(texts, library.encode_batch(texts), strict=True):
                assert ours.encode(text, around=True) == encoding.ids, text
                assert ours.decode(encoding.ids).decode() == library.decode(encoding.ids)


def test_every_character_has_the_class_that_the_library_gives_it(checks: Any) -> None:
    """Around each character, patterns decide differently by its class."""
    blocks = ((0, 0x3100), (0xA490, 0xABFF), (0xF900, 0x10800), (0x1D400, 0x1D800))
    text = "".join(
        f"a{chr(code)}1{chr(code)} " for first, end in blocks for code in range(first, end)
    )
    for name in ("llama3", "tekken"):
        content = byte_level(name)
        with NativeTokenizer(checks, content.encode()) as ours:
            assert ours.encode(text) == Tokenizer.from_str(content).encode(text).ids


def test_a_piece_is_never_half_a_character(checks: Any, folder: Path) -> None:
    text = "añ 日本語 🎉👩\u200d👩\u200d👧 ξ"
    for content in contents(folder):
        with NativeTokenizer(checks, content.encode()) as ours:
            ids = ours.encode(text)
            found = ours.pieces(ids)
            assert len(found) == len(ids)
            assert "".join(piece.decode() for piece in found) == Tokenizer.from_str(content).decode(
                ids
            )


def test_any_tokens_decode_to_whole_characters(checks: Any, folder: Path) -> None:
    for name in SPLITS:
        content = byte_level(name)
        library = Tokenizer.from_str(content)
        texts = [library.encode(text).ids for text in vocabularies.TEXTS]
        vocabulary = library.get_vocab()
        letters = [vocabulary[letter] for letter in pre_tokenizers.ByteLevel.alphabet()]
        with NativeTokenizer(checks, content.encode()) as ours:
            for ids in sequences(500, texts, letters, library.get_vocab_size()):
                assert ours.decode(ids).decode() == library.decode(ids)
    content = pieces("plain", folder)
    original = sentencepiece.SentencePieceProcessor(model_proto=vocabularies.model_named("plain"))
    numbers = [i for i in range(len(original)) if original.is_byte(i)]
    texts = [original.encode(text) for text in vocabularies.TEXTS]
    with NativeTokenizer(checks, content.encode()) as ours:
        for ids in sequences(1500, texts, numbers, len(original)):
            # SentencePiece writes the unknown token as a sign of its own, we write nothing; and it
            # does not take the byte 0x20 for the space before a text.
            visible = [i for i in ids if i > 2]
            if 0 in ids or visible[:1] == [numbers[0x20]]:
                continue
            assert ours.decode(ids).decode() == original.decode(ids), ids


@pytest.mark.slow
def test_ten_megabytes_of_one_letter(checks: Any, folder: Path) -> None:
    """A quadratic search would take hours."""
    text = "a" * 10_000_000
    content = pieces("plain", folder)
    with NativeTokenizer(checks, content.encode()) as ours:
        ids = ours.encode(text)
        # What the merges do in the middle of a run does not depend on its length.
        assert (
            ids[:100]
            == Tokenizer.from_str(content).encode(text[:10_000], add_special_tokens=False).ids[:100]
        )
        assert 1000 < len(ids) < len(text)


PLAIN: dict[str, Any] = {
    "added_tokens": [],
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
}


def changed(**model: Any) -> str:
    return json.dumps({**PLAIN, "model": {**PLAIN["model"], **model}})


def test_the_smallest_vocabulary(checks: Any) -> None:
    with NativeTokenizer(checks, json.dumps(PLAIN).encode()) as ours:
        assert ours.encode("aab") == [0, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not valid JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "has no model"),
        (changed()[:-20], "is not valid JSON"),
        (changed(type="Unigram"), "is not of the kind BPE"),
        (changed(vocab={}), "has no vocabulary"),
        (changed(vocab={"a": -1}), "whose id is not a number"),
        (changed(vocab={"a": 1 << 40}), "whose id is not a number that fits"),
        (changed(vocab={"a": "b"}), "whose id is not a number"),
        (changed(vocab={"a" * 10_001: 0}), "a token of 10001 bytes"),
        (changed()[:-1] + ', "model": {"vocab": {}}}', "has the key 'model' twice"),
        (changed().replace('"b": 1', '"a": 1'), "has a token twice"),
        (changed(merges=["a c"]), "has a merge of tokens that are not in its vocabulary"),
        (changed(merges=["a b c"]), "has a merge that is not of two tokens"),
        (changed(merges=[["a"]]), "has a merge that is not of two tokens"),
        (changed(dropout=0.1), "sets dropout"),
        (changed(unk_token="?"), "has an unk_token that is no token"),
        (with_keys(changed(), normalizer={"type": "NFC"}), "has the normalizer NFC"),
        (with_keys(changed(), decoder=None), "has the decoder"),
        (with_keys(changed(), pre_tokenizer={"type": "Digits"}), "has the pre-tokenizer Digits"),
        (with_keys(changed(), post_processor={"type": "Bert"}), "has the post-processor Bert"),
        (
            with_keys(changed(), added_tokens=[{"id": 0, "content": "z"}]),
            "another id than its place",
        ),
        (
            with_keys(changed(), added_tokens=[{"id": 9, "content": "a"}]),
            "another id than its place",
        ),
        (with_keys(changed(), added_tokens=[5]), "has a damaged added token"),
    ],
)
def test_what_is_refused(checks: Any, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NativeTokenizer(checks, content.encode())

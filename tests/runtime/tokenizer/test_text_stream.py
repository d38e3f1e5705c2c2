"""Streams of tokens become the text that `tokenizers` makes of all tokens at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from llama_onnx.exporter.tokenizer.model_file import tokenizer_from_model_file
from llama_onnx.runtime.tokenizer.text_stream import PieceDecoder, open_decoder
from tests.support.vocabularies import trained

IDS = st.lists(st.integers(0, 2**16), max_size=40)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    """Returns a tokenizer of a kind: a vocabulary of SentencePiece with bytes, or bytes alone."""
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    file.write_bytes(trained())
    made = {
        "sentencepiece": tokenizer_from_model_file(file).tokenizer,
        "bytes": Tokenizer(BPE({c: i for i, c in enumerate(sorted(ALPHABET))}, [])),
    }
    made["bytes"].decoder = decoders.ByteLevel()
    made["bytes"].pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made["bytes"].add_special_tokens(["<end>"])
    return made.__getitem__


ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def opened(tokenizer: Tokenizer) -> PieceDecoder:
    decoder = open_decoder(tokenizer, [0])
    assert decoder is not None
    return decoder


def special(tokenizer: Tokenizer) -> int:
    added = tokenizer.get_added_tokens_decoder()
    return next(number for number, token in added.items() if token.special)


@given(ids=IDS)
def test_an_answers_pieces_are_the_librarys_text(
    make: Callable[[str], Tokenizer], ids: list[int]
) -> None:
    """Bytes that form no character included: nothing after them is lost."""
    tokenizer = make("bytes")
    ids = [number % 256 for number in ids]
    stream = opened(tokenizer).create_stream()
    pieces = [stream.decode(number) for number in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


@example(ids=[32])  # a space that is written as a byte
@given(ids=IDS)
def test_an_answers_pieces_are_sentencepieces_text(
    make: Callable[[str], Tokenizer], ids: list[int]
) -> None:
    """`tokenizers` is no oracle: it makes U+FFFD of sound bytes too, beside damaged ones."""
    tokenizer = make("sentencepiece")
    oracle: Any = sentencepiece.SentencePieceProcessor(model_proto=trained())
    ids = [3 + number % (oracle.vocab_size() - 3) for number in ids]  # neither unknown nor ends
    stream = opened(tokenizer).create_stream()
    assert stream.decode(1) == ""  # an answer starts a new text
    pieces = [stream.decode(number) for number in ids]
    assert "".join(pieces) + stream.finish() == oracle.decode(ids)


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
@given(text=st.text(max_size=30))
def test_a_text_is_its_own_pieces(make: Callable[[str], Tokenizer], kind: str, text: str) -> None:
    """Each piece is whole characters, and comes with the token that completes it."""
    tokenizer = make(kind)
    stream = opened(tokenizer).create_stream()
    stream.decode(special(tokenizer))
    shown = ""
    for number in tokenizer.encode(text, add_special_tokens=False).ids:
        shown += stream.decode(number)
        assert text.startswith(shown)
    assert shown == text


def test_a_text_that_goes_on_keeps_its_first_space(make: Callable[[str], Tokenizer]) -> None:
    tokenizer = make("sentencepiece")
    ids = tokenizer.encode("The fox", add_special_tokens=False).ids
    stream = opened(tokenizer).create_stream()
    assert "".join(map(stream.decode, ids)) == " The fox"


def test_a_letter_after_damaged_bytes_is_there(make: Callable[[str], Tokenizer]) -> None:
    tokenizer = make("bytes")
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[c] for c in ("¹", "Á", "j", "H")]  # the bytes B9 C1 6A 48
    stream = opened(tokenizer).create_stream()
    assert "".join(map(stream.decode, ids)) == "\ufffd\ufffdjH"


def test_endless_damage_is_shown_as_it_comes(make: Callable[[str], Tokenizer]) -> None:
    tokenizer = make("bytes")
    stream = opened(tokenizer).create_stream()
    damaged = tokenizer.get_vocab()["¹"]
    assert "".join(stream.decode(damaged) for _ in range(40)) == 40 * "\ufffd"


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.Replace(Regex("(a+)+$"), ""),
        decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex("(a+)+$"), "")]),
        decoders.Sequence([]),
        decoders.CTC(),
    ],
    ids=["none", "pattern", "pattern within", "empty", "another"],
)
def test_a_decoder_of_another_kind_is_not_used(tmp_path: Path, decoder: object) -> None:
    tokenizer = Tokenizer(BPE({"a": 0}, []))
    if decoder is not None:
        tokenizer.decoder = decoder  # type: ignore[assignment]
    assert open_decoder(tokenizer, [0]) is None

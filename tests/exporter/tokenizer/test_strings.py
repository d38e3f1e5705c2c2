"""Thousands of strings, both directions: tokenizer.json made from tokenizer.model, against
SentencePiece and transformers. benchmarks/tokenizer_proof.py does it with Llama 2's vocabulary and
a hundred thousand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer
from transformers import LlamaTokenizer
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from llama_onnx.exporter.tokenizer.model_file import tokenizer_from_model_file
from llama_onnx.targets.errors import UnsupportedError
from tests.support import strings
from tests.support.vocabularies import CORPUS, model_named, proto, trained

SYMBOLS = ["[x]", "[xx]", "▁<PRE>", "ab", "\n", "é"]


class Vocabulary:
    """One model as its own library, transformers and the exporter read it."""

    def __init__(self, path: Path, model: bytes) -> None:
        path.write_bytes(model)
        self.spm = sentencepiece.SentencePieceProcessor(model_proto=model)
        backend: Any = SentencePieceBackend  # untyped
        names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        self.slow = backend(vocab_file=str(path), legacy=True, **names)
        self.ours: Tokenizer = tokenizer_from_model_file(path).tokenizer

    def encode(self, text: str) -> list[int]:
        return list(self.ours.encode(text, add_special_tokens=False).ids)


@pytest.fixture(scope="module", params=["llama-runs", "no-prefix", "symbols", "symbols-no-prefix"])
def vocabulary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    name = request.param
    made = "symbols" in name
    model = (
        trained(digits=False, symbols=SYMBOLS, prefix="no" not in name)
        if made
        else model_named(name)
    )
    return Vocabulary(tmp_path_factory.mktemp(name) / "tokenizer.model", model)


def test_sentencepiece_gives_the_same_ids_for_thousands_of_strings(vocabulary: Vocabulary) -> None:
    for text in strings.strings(3000, [CORPUS], special=False):
        ids = vocabulary.spm.encode(text)
        assert vocabulary.encode(text) == ids, text
        assert vocabulary.ours.decode(ids) == vocabulary.spm.decode(ids), text


def test_transformers_gives_the_same_ids_around_special_tokens(vocabulary: Vocabulary) -> None:
    for text in strings.strings(500, [CORPUS], special=True):
        expected = vocabulary.slow.encode(text, add_special_tokens=False)
        assert vocabulary.encode(text) == expected, text


def test_any_ids_give_the_same_text(vocabulary: Vocabulary) -> None:
    """Bytes cut anywhere too, which SentencePiece puts together in another way than transformers:
    there, transformers is followed."""
    spm, ours = vocabulary.spm, vocabulary.ours
    pieces = {spm.id_to_piece(index): index for index in range(len(spm))}
    prefix = ours.encode("a", add_special_tokens=False).tokens[0].startswith("▁")
    theirs = LlamaTokenizer(vocab=pieces, merges=[], add_prefix_space=prefix)
    texts = [spm.encode(text) for text in strings.strings(300, [CORPUS], special=False)]
    byte_ids = [index for index in range(len(spm)) if spm.is_byte(index)]
    assert len(byte_ids) == 256
    broken = 0
    for ids in strings.sequences(3000, texts, byte_ids, len(spm)):
        found = ours.decode(ids)
        assert found == theirs.decode(ids, skip_special_tokens=True), ids
        broken += "\ufffd" in found
    assert broken > 300, "too few bytes that are no UTF-8 to speak of"


def test_user_defined_pieces_stand_in_a_text_as_they_are(tmp_path: Path) -> None:
    vocabulary = Vocabulary(
        tmp_path / "tokenizer.model", trained(digits=False, symbols=SYMBOLS, prefix=True)
    )
    encoding = vocabulary.ours.encode("ab[xx]b", add_special_tokens=False)
    assert encoding.tokens == ["▁", "ab", "[xx]", "b"]
    for text in ("[x]<0x0A>[x]", "<0x0A>", "é<0x0A>", "[x][xx][xxx]", "▁<PRE> ▁<PRE>", "\n\n ab"):
        assert vocabulary.encode(text) == vocabulary.spm.encode(text)


def test_a_piece_out_of_reach_is_refused_beside_user_defined_ones(tmp_path: Path) -> None:
    model = proto.ModelProto.FromString(trained(digits=False, symbols=SYMBOLS, prefix=True))
    # WX + YZ, but X and Y come together first.
    letters = dict.fromkeys("WXYZ", -100.0)
    for piece, score in {**letters, "XY": 9.0, "WX": 8.0, "YZ": 7.0, "WXYZ": 6.0}.items():
        model.pieces.add(piece=piece, score=score)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedError, match=r"no merge leads to the piece 'WXYZ'"):
        tokenizer_from_model_file(path)

"""Two tokens of the package's vocabulary swapped, which no text of the check uses: found for every
kind of source."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer

from llama_onnx.exporter.cli import main
from llama_onnx.exporter.parity.measure.tokenizers import (
    FIXED_TEXTS,
    check_tokenizer,
    compare_vocabularies,
)
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.exporter.tokenizer.source import Vocabulary
from tests.support import tiny
from tests.support.gguf_files import write as write_gguf
from tests.support.meta_files import write_meta
from tests.support.packages import renew_hashes
from tests.support.parity import Make
from tests.support.vocabularies import (
    bytelevel_metadata,
    model_named,
    spm_metadata,
)


def huggingface(folder: Path) -> Path:
    return tiny.write_huggingface(folder)


def sentencepiece(folder: Path) -> Path:
    tiny.write_huggingface(folder, replace(tiny.GQA, vocab_size=540))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.model").write_bytes(model_named("llama-runs"))
    added = {"<|im_end|>": 536, "[INST]": 535}
    (folder / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
    return folder


def gguf_sentencepiece(folder: Path) -> Path:
    folder.mkdir()
    return write_gguf(folder / "m.gguf", keys=spm_metadata(model_named("llama-runs")))


def gguf_bytelevel(folder: Path) -> Path:
    folder.mkdir()
    return write_gguf(folder / "m.gguf", keys=bytelevel_metadata(folder=folder))


KINDS = {
    "tokenizer.json": huggingface,
    "tokenizer.model": sentencepiece,
    "gguf of SentencePiece": gguf_sentencepiece,
    "gguf of bytes": gguf_bytelevel,
}


def swap_unused(file: Path) -> tuple[str, str]:
    """Swap the ids of two tokens that none of the fixed texts has."""
    tokenizer = Tokenizer.from_file(str(file))
    used = {token for text in FIXED_TEXTS for token in tokenizer.encode(text).ids}
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    added = {token["id"] for token in content["added_tokens"]}
    first, second = [p for p, i in vocabulary.items() if i not in used | added][-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content), encoding="utf-8")
    return first, second


@pytest.mark.parametrize("kind", KINDS)
def test_two_swapped_tokens_are_found(tmp_path: Path, kind: str) -> None:
    checkpoint = open_checkpoint(KINDS[kind](tmp_path / "source"))
    (tmp_path / "out").mkdir()
    checkpoint.write_tokenizer(tmp_path / "out")
    sound = check_tokenizer(tmp_path / "out", checkpoint)
    assert sound and sound.passed, sound
    first, second = swap_unused(tmp_path / "out" / "tokenizer.json")
    found = check_tokenizer(tmp_path / "out", checkpoint)
    assert found and not found.passed
    assert found.difference is None  # no text shows it
    assert found.vocabulary and found.vocabulary.count == 4  # two ids, two pieces
    assert {found.vocabulary.expected, found.vocabulary.found} == {first, second}


def test_metas_download_too(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_meta(tmp_path / "source", model_named("plain")))
    (tmp_path / "out").mkdir()
    checkpoint.write_tokenizer(tmp_path / "out")
    sound = check_tokenizer(tmp_path / "out", checkpoint)
    assert sound and sound.passed and sound.source == "tokenizer.model"
    swap_unused(tmp_path / "out" / "tokenizer.json")
    found = check_tokenizer(tmp_path / "out", checkpoint)
    assert found and found.vocabulary and found.vocabulary.count == 4


def test_vocabularies_by_hand() -> None:
    here = Vocabulary({0: "<s>", 1: "a", 2: "b"}, {"<s>": 0, "a": 1, "b": 2}, frozenset({0}))
    assert compare_vocabularies(here, here) is None
    one_way = replace(here, ids={"<s>": 0, "a": 1, "b": 1})
    found = compare_vocabularies(here, one_way)
    assert found and (found.count, found.direction, found.key) == (1, "piece to id", "b")
    assert (found.expected, found.found) == (2, 1)
    longer = replace(here, pieces={**here.pieces, 3: "c"}, ids={**here.ids, "c": 3})
    found = compare_vocabularies(here, longer)
    assert found and (found.count, found.key, found.expected, found.found) == (2, 3, None, "c")
    shown = compare_vocabularies(here, replace(here, special=frozenset()))
    assert shown and (shown.direction, shown.key) == ("id to special", 0)


def test_validate_fails_and_names_the_tokens(copied: Make) -> None:
    package, source = copied("fp32")
    first, second = swap_unused(package / "tokenizer.json")
    renew_hashes(package)  # as an export that swapped them would have written it
    arguments = (package, "--reference", source, "--tokens", 2, "--prompt-tokens", 4)
    result = CliRunner().invoke(main, ["validate", *map(str, arguments)])
    assert result.exit_code == 1
    assert "DIFFERS from the source's tokenizer.json in 4 entries of the vocabulary" in (
        result.stdout
    )
    assert repr(first) in result.stdout and repr(second) in result.stdout
    assert "failed: the tokenizer is not the source's." in result.stdout

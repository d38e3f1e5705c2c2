"""A package's tokenizer is a stranger's too: whatever it says, `Llama` ends with a sentence."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.tokenizer import encoder
from llama_onnx.runtime.tokenizer.encoder import open_encoder
from llama_onnx.targets.errors import PackageError, UsageError
from tests.support.packages import alter_package, make_package


def split(pattern: str) -> dict[str, Any]:
    step = {"type": "Split", "pattern": {"Regex": pattern}}
    return {"pre_tokenizer": step | {"behavior": "Isolated", "invert": False}}


def start(ids: list[int]) -> dict[str, Any]:
    first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    tokens = {"id": "<s>", "ids": ids, "tokens": ["<s>"] * len(ids)}
    step = {"single": [first, text], "pair": [first, text], "special_tokens": {"<s>": tokens}}
    return {"post_processor": {"type": "TemplateProcessing"} | step}


TENFOLD = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
NOTHING = {"type": "Replace", "pattern": {"Regex": ""}, "content": "bbbb"}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_package(tmp_path_factory.mktemp("encoder"), "int4")


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        (split("(a+)+b"), r"cannot encode a text: Onig: .*[^.]\.$"),
        ({"normalizer": NOTHING}, "cannot encode a text: index out of bounds"),
        (start([288]), "to the id 288, but the model has 288 tokens"),
        (start([4_000_000_000]), "to the id 4,000,000,000"),
        (start([1] * 3000), "is too large: its post_processor puts 6,000 tokens around a text"),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [TENFOLD] * 12}},
            "is too large: its steps make a text 10,000 times as long",
        ),
    ],
)
def test_a_hostile_tokenizer(tmp_path: Path, package: Path, tokenizer: Any, said: str) -> None:
    altered = alter_package(package, tmp_path / "altered", tokenizer=tokenizer)
    with pytest.raises(PackageError, match=f"tokenizer.json.* {said}"):
        Llama.load(altered).generate("a" * 60)


def test_a_chat_with_a_hostile_tokenizer(tmp_path: Path, package: Path) -> None:
    altered = alter_package(package, tmp_path / "altered", tokenizer=split("(a+)+b"))
    with pytest.raises(PackageError, match="cannot encode a text"):
        Llama.load(altered).chat([{"role": "user", "content": "a" * 60}])


def test_a_tokenizer_that_takes_hours(
    tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every attempt stays below the library's own limit. The second prompt starts no thread."""
    slow = split(r"(?:a{1,90}a{1,90}a{1,90}\w\b)+d")
    altered = alter_package(package, tmp_path / "altered", tokenizer=slow)
    monkeypatch.setattr(encoder, "_SECONDS", 0.2)
    model = Llama.load(altered)
    for _ in range(2):
        with pytest.raises(PackageError, match=r"took more than 0\.2 s for a text"):
            model.generate("a" * 180)
        threads = threading.active_count()
    assert threading.active_count() == threads


def test_a_sound_tokenizer_gives_the_library_s_tokens(package: Path) -> None:
    texts = ["", "the quick brown fox", "日本 \U0001f600\0", "a" * 2000]
    library = Tokenizer.from_file(str(package / "tokenizer.json"))
    for special in (False, True):
        expected = [library.encode(text, add_special_tokens=special).ids for text in texts]
        assert open_encoder(package, 288).encode(texts, add_special_tokens=special) == expected


def test_half_a_character_is_the_text_s_fault(package: Path) -> None:
    with pytest.raises(UsageError, match="not UTF-8"):
        Llama.load(package).encode("a\ud800")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", json.dumps({"model": None}).encode()])
def test_a_tokenizer_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(PackageError, match=r"tokenizer\.json cannot be read: .*[^.]\.$"):
        open_encoder(tmp_path)

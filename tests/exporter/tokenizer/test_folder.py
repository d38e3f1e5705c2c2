"""Tokenizers of Hugging Face folders as they are in the field: each against transformers."""

from __future__ import annotations

import base64
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from llama_onnx.exporter.commands.inspect import checkpoint_facts
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.parity.measure.tokenizers import FIXED_TEXTS, check_tokenizer
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.exporter.tokenizer.finish import finish_tokenizer
from llama_onnx.runtime.tokenizer.encoder import tokenizer_from
from llama_onnx.targets.errors import CheckpointError, UnsupportedError
from llama_onnx.targets.registry import get_target
from tests.support import tiny
from tests.support.vocabularies import TEXTS, model_named

LLAMA = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
MORE_TEXTS = (
    "USER: hello ASSISTANT: a reply</s>USER: hello",
    "</s> a",
    "<s>",
    "▁x",
    "a <pad>[x] b",
)


def put(folder: Path, settings: dict[str, Any], name: str = "tokenizer_config.json") -> None:
    (folder / name).write_text(json.dumps(settings), encoding="utf-8")


def change(folder: Path, edit: Any) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    edit(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.write_huggingface(tmp_path / "source")


def export(source: Path, *adapters: Path) -> tuple[Path, tuple[str, ...]]:
    result = export_package(
        source,
        source.parent / "out",
        get_target("cpu"),
        Options(precision="int4", quantizer="rtn"),
        adapters=adapters,
        force=True,
    )
    return result.package, result.warnings


def written(source: Path) -> Path:
    out = source.parent / "written"
    out.mkdir()
    open_checkpoint(source).write_tokenizer(out)
    return out


def finished(source: Path, package: Path) -> tuple[Path, list[str]]:
    """The tokenizer as an export writes it, and its warnings, beside the settings of `package`."""
    out = written(source)
    shutil.copy(package / "genai_config.json", out)
    return out, finish_tokenizer(out, source, tiny.GQA.vocab_size)


def assert_same_ids(found: Any, expected: Any) -> None:
    for text in (*FIXED_TEXTS, *TEXTS, *MORE_TEXTS):
        for special in (True, False):
            ids = [one(text, add_special_tokens=special)["input_ids"] for one in (found, expected)]
            assert ids[0] == ids[1], (text, special)


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"},
        {"tokenizer_class": "LLaMATokenizer", "bos_token": None, "pad_token": "</s>"},
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": {"content": "<s>", "lstrip": False, "__type": "AddedToken"},
            "mask_token": "the",
            "additional_special_tokens": ["</s>"],
            "chat_template": [{"name": "default", "template": "{{ 1 }}"}],
            "model_max_length": 10**30,
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",
        },
        {"tokenizer_class": None, "added_tokens_decoder": {"2": {"content": "</s>"}}},
        {},
    ],
)
def test_the_ids_are_those_of_the_source(source: Path, settings: dict[str, Any]) -> None:
    put(source, settings)
    out = written(source)
    content = json.loads((out / "tokenizer_config.json").read_text())
    assert content["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not [value for value in content.values() if value is None or isinstance(value, list)]
    assert not [value for value in content.values() if isinstance(value, dict)]
    assert_same_ids(AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(source))


@pytest.mark.parametrize("add_eos", [None, False, True])
@pytest.mark.parametrize("add_bos", [None, False, True])
@pytest.mark.parametrize("post", [None, "bos", "bytes"])
def test_start_and_end_are_added_as_the_settings_say(
    source: Path, package: Path, post: str | None, add_bos: bool | None, add_eos: bool | None
) -> None:
    """transformers 4 follows the settings, where there are any; a setter of 5 does so too."""
    steps = {
        None: None,
        "bos": processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)]),
        "bytes": processors.ByteLevel(trim_offsets=False),
    }
    if post is not None:
        change(source, lambda tokenizer: setattr(tokenizer, "post_processor", steps[post]))
    said = {"add_bos_token": add_bos, "add_eos_token": add_eos}
    put(source, LLAMA | {key: value for key, value in said.items() if value is not None})
    expected = AutoTokenizer.from_pretrained(source)
    before = expected("a b")["input_ids"]
    if add_bos is not None or add_eos is not None:
        # transformers 4's default of add_bos_token is True.
        setattr(expected, "add_bos_token", add_bos is not False)  # noqa: B010 - read-only for mypy
        setattr(expected, "add_eos_token", bool(add_eos))  # noqa: B010
    out, warnings = finished(source, package)
    assert_same_ids(AutoTokenizer.from_pretrained(out), expected)
    differs = expected("a b")["input_ids"] != before
    assert bool([w for w in warnings if "as in transformers 4" in w]) == differs
    checked = check_tokenizer(out, open_checkpoint(source))
    assert checked is not None and checked.passed


def test_an_export_writes_that_tokenizer(source: Path) -> None:
    put(source, LLAMA | {"add_bos_token": True, "add_eos_token": True})
    exported, warnings = export(source)
    out, expected = finished(source, exported)
    assert set(expected) <= set(warnings)
    assert any("as in transformers 4" in warning for warning in expected)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (exported / name).read_bytes() == (out / name).read_bytes()


def test_a_token_without_a_row_is_left_out(source: Path) -> None:
    expected = Tokenizer.from_file(str(source / "tokenizer.json"))
    change(source, lambda tokenizer: tokenizer.add_special_tokens(["<pad>"]))
    put(source, {"<pad>": 288}, "added_tokens.json")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    put(source, settings | {"pad_token": "<pad>"})
    package, warnings = export(source)
    assert (
        f"{source}: the token <pad> has no row in the embedding, which has 288, and is left out."
    ) in warnings
    found = Tokenizer.from_file(str(package / "tokenizer.json"))
    assert found.get_vocab() == expected.get_vocab()
    assert "pad_token" not in json.loads((package / "tokenizer_config.json").read_text())
    checked = check_tokenizer(package, open_checkpoint(source))
    assert checked is not None and checked.passed


def test_tokens_added_to_a_model_file_are_left_out_too(tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "source", replace(tiny.GQA, vocab_size=536))
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.model").write_bytes(model_named("llama-runs"))
    put(source, {"<|x|>": 535, "[PAD]": 536, "[A]": 537}, "added_tokens.json")
    put(source, {"pad_token": "[PAD]"})
    package, warnings = export(source)
    assert any("the tokens [PAD], [A] have no row" in warning for warning in warnings)
    found = Tokenizer.from_file(str(package / "tokenizer.json"))
    assert (found.token_to_id("<|x|>"), found.token_to_id("[PAD]")) == (535, None)
    checked = check_tokenizer(package, open_checkpoint(source), ["a [PAD] b<|x|>"])
    assert checked is not None and checked.passed


def test_another_models_tokenizer_is_refused(source: Path) -> None:
    tiny.write_tokenizer(source, 300)
    with pytest.raises(CheckpointError, match=r"source: the tokenizer gives the token .* 288 rows"):
        export(source)


def test_a_role_without_a_token_is_left_out(source: Path) -> None:
    put(source, {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"})
    package, warnings = export(source)
    assert any("the pad_token '[PAD]' is not a token" in warning for warning in warnings)
    assert "pad_token" not in json.loads((package / "tokenizer_config.json").read_text())


def test_tokens_that_only_the_settings_describe(tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "source", replace(tiny.GQA, vocab_size=292))
    tiny.write_tokenizer(source, 288)
    decoder = {
        "288": {"content": "<pad>", "special": True, "normalized": False},
        "289": {"content": "[x]", "special": False, "normalized": False, "lstrip": True},
    }
    put(source, {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": decoder})
    out = written(source)
    assert_same_ids(AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(source))
    assert Tokenizer.from_file(str(out / "tokenizer.json")).token_to_id("[x]") == 289


def vicuna(folder: Path, **settings: Any) -> Path:
    source = tiny.write_huggingface(folder / "source", replace(tiny.GQA, vocab_size=540))
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.model").write_bytes(model_named("llama-runs"))
    put(source, LLAMA | {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>"} | settings)
    return source


def test_without_legacy_only_the_start_gets_a_space(tmp_path: Path) -> None:
    source = vicuna(tmp_path, legacy=False)
    expected = AutoTokenizer.from_pretrained(source)
    out = written(source)
    found = AutoTokenizer.from_pretrained(out)
    for text in (*FIXED_TEXTS, *TEXTS, *MORE_TEXTS):
        plain = expected(text, add_special_tokens=False)["input_ids"]
        assert found(text, add_special_tokens=False)["input_ids"] == plain, text
        assert found(text)["input_ids"] == [1, *plain]
    checked = check_tokenizer(out, open_checkpoint(source), [*TEXTS, *MORE_TEXTS])
    assert checked is not None and checked.passed


def test_legacy_is_the_default(tmp_path: Path) -> None:
    for settings in ({}, {"legacy": True}, {"legacy": None}):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        found = Tokenizer.from_file(str(written(vicuna(folder, **settings)) / "tokenizer.json"))
        text = "hello</s>hello"
        half = len(found.encode("hello").ids) - 1
        assert found.encode(text).ids == [
            1,
            *found.encode("hello").ids[1:],
            2,
            *found.encode("hello").ids[-half:],
        ]


def test_a_kind_that_onnxruntime_genai_does_not_read_is_refused(source: Path) -> None:
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("b", -2.0)], unk_id=0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.save(str(source / "tokenizer.json"))
    with pytest.raises(UnsupportedError, match=r"has a Unigram model.*pass --no-tokenizer"):
        export(source)
    assert "Unigram" in checkpoint_facts(source)["problem"]
    assert not (source.parent / "out").exists()


def test_a_tokenizer_that_onnxruntime_genai_does_not_open_is_refused(source: Path) -> None:
    def look_behind(tokenizer: Tokenizer) -> None:
        from tokenizers import Regex

        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?<!a)b"), "isolated")

    change(source, look_behind)
    with pytest.raises(UnsupportedError, match=r"cannot open the tokenizer of .*source: Invalid"):
        export(source)


@pytest.mark.parametrize("content", [b"{", b"[1]", b'{"model": 1}', b"[" * 2000, b"\xff"])
def test_a_damaged_file_is_named(source: Path, content: bytes) -> None:
    (source / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        export(source)
    assert "tokenizer.json cannot be read" in checkpoint_facts(source)["problem"]


def test_parts_that_do_not_fit_are_no_panic(source: Path) -> None:
    content = json.loads((source / "tokenizer.json").read_bytes())
    content["model"] |= {"continuing_subword_prefix": "####"}
    (source / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="do not fit together"):  # the library panics
        tokenizer_from((source / "tokenizer.json").read_bytes())
    with pytest.raises(UnsupportedError, match="has a continuing_subword_prefix"):
        export(source)


def test_a_byte_order_mark_is_ignored(source: Path) -> None:
    expected = Tokenizer.from_file(str(source / "tokenizer.json")).encode(TEXTS[0]).ids
    file = source / "tokenizer.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    package, _ = export(source)
    assert Tokenizer.from_file(str(package / "tokenizer.json")).encode(TEXTS[0]).ids == expected


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_pointer_of_git_lfs_is_called_so(source: Path, name: str) -> None:
    (source / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match=rf"{name} is a pointer of Git LFS.*git lfs pull"):
        export(source)


def test_tiktokens_file_is_called_so(source: Path) -> None:
    (source / "tokenizer.json").unlink()
    lines = (f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256))
    (source / "tokenizer.model").write_text("".join(lines))
    with pytest.raises(UnsupportedError, match=r"tokenizer\.model is a vocabulary for tiktoken"):
        export(source)


def test_which_template_a_package_gets(source: Path) -> None:
    settings = json.loads((source / "tokenizer_config.json").read_text())
    several = [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "2"}]
    put(source, settings | {"chat_template": several})
    package, warnings = export(source)
    assert (package / "chat_template.jinja").read_text() == "{{ 1 }}"
    assert any("left out: tool_use." in warning for warning in warnings)

    put(source, settings | {"chat_template": several[1:]})
    package, warnings = export(source)
    assert not (package / "chat_template.jinja").exists()
    assert any("none is the default" in warning for warning in warnings)

    put(source, settings | {"chat_template": "old"})
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    package, warnings = export(source)
    assert (package / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert "chat_template" not in json.loads((package / "tokenizer_config.json").read_text())
    assert any("its chat template differs" in warning for warning in warnings)


def test_special_tokens_that_match_in_a_text(source: Path) -> None:
    """A role makes a token of the vocabulary special, as transformers does."""
    put(source, {"tokenizer_class": "PreTrainedTokenizerFast", "sep_token": "the"})
    out = written(source)
    found = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert found.encode("othere").ids == AutoTokenizer.from_pretrained(source)("othere").input_ids
    assert AddedToken("the", special=True).content in found.get_vocab()

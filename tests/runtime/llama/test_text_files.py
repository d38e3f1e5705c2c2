"""The tokenizer of a package opens in every reader, or that is said in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llama_onnx.runtime.llama.template import read_template
from llama_onnx.runtime.llama.text_files import open_genai_tokenizer
from llama_onnx.targets.errors import PackageError
from tests.support.chat_templates import write_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer_class": "LLaMATokenizer"},
        {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": [{"name": "default"}]},
        None,
    ],
)
def test_a_tokenizer_that_genai_does_not_open(folder: Path, settings: Any) -> None:
    open_genai_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(PackageError, match=r"cannot open the tokenizer of .*[^.]\.$"):
        open_genai_tokenizer(folder)


def test_special_tokens_of_earlier_packages(folder: Path) -> None:
    """They copied special_tokens_map.json."""
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<e>", "sep_token": "<sep>"}')
    (folder / "chat_template.jinja").write_text("{{ eos_token }}{{ sep_token }}{{ mask_token }}")
    template = read_template(folder)
    assert template is not None
    assert template.render([{"role": "user", "content": "hi"}]) == "</s><sep>"


def test_a_template_that_nests_too_deeply_is_refused_at_once(tmp_path: Path) -> None:
    """onnxruntime-genai reads it with the tokenizer, and needs minutes."""
    write_tokenizer(tmp_path)
    nested = "{% if 1 %}" * 3000 + "{% endif %}" * 3000
    (tmp_path / "chat_template.jinja").write_text(nested)
    with pytest.raises(PackageError, match=r"cannot be used: it nests or calls itself too deeply"):
        open_genai_tokenizer(tmp_path)


def test_a_template_that_cannot_be_read_keeps_no_tokenizer_closed(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    open_genai_tokenizer(tmp_path)

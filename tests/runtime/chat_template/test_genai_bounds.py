"""Templates that onnxruntime-genai's parser may not survive are found before it sees them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from llama_onnx.runtime.chat_template import genai_bounds
from llama_onnx.runtime.chat_template.genai_bounds import exceeded_bound
from llama_onnx.runtime.llama.text_files import open_genai_tokenizer
from llama_onnx.targets.errors import PackageError
from tests.support import chat_templates
from tests.support.native_templates import KILLING_WHEN_OPENED
from tests.support.packages import alter_package

REAL = {
    name: text
    for name, text in vars(chat_templates).items()
    if isinstance(text, str) and "{%" in text
}


@pytest.mark.parametrize("name", KILLING_WHEN_OPENED)
def test_it_is_found(name: str) -> None:
    assert exceeded_bound(KILLING_WHEN_OPENED[name]) is not None


@pytest.mark.parametrize("name", REAL)
def test_templates_of_models_are_within_the_bounds(name: str) -> None:
    assert exceeded_bound(REAL[name]) is None


def test_the_bounds_are_those_of_the_c_library() -> None:
    source = (Path(__file__).parents[3] / "runtime/native/template.h").read_text("utf-8")
    (found,) = re.findall(r"enum \{ (MOST_RUN = .*) \};", source)
    names = {name: int(value) for name, value in (one.split(" = ") for one in found.split(", "))}
    assert names == {name: getattr(genai_bounds, name) for name in names} and len(names) == 5


def test_marks_in_quotes_end_no_tag() -> None:
    text = "{{ '}}' ~ \"%}\" }}{% if a == '{% b %}' %}{% endif %}{# {{ #}"
    assert exceeded_bound(text) is None
    assert exceeded_bound("{{ '" + "x y " * 5000 + "' }}") is None


def test_a_package_is_refused_before_its_tokenizer_is_opened(
    package_fp32: Path, tmp_path: Path
) -> None:
    template = KILLING_WHEN_OPENED["a name of 30,000 letters"]
    package = alter_package(package_fp32, tmp_path / "copy", chat_template=template)
    with pytest.raises(PackageError, match="may not survive that"):
        open_genai_tokenizer(package)
    config = {"chat_template": [{"name": "tool_use", "template": template}]}
    package = alter_package(package_fp32, tmp_path / "other", tokenizer_config=config)
    with pytest.raises(PackageError, match="may not survive that"):
        open_genai_tokenizer(package)


@pytest.mark.skipif(sys.platform == "win32", reason="ends the process in another way there")
def test_without_the_check_the_process_would_end(package_fp32: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    template = KILLING_WHEN_OPENED["a name of 30,000 letters"]
    package = alter_package(package_fp32, tmp_path / "copy", chat_template=template)
    code = f"import onnxruntime_genai as og; og.Tokenizer(og.Config({str(package)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.returncode < 0

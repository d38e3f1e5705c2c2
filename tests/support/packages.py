"""Packages made from the tiny checkpoints by the real exporter, and altered copies of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.parity.prove import prove
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.targets.package import MANIFEST, write_manifest
from llama_onnx.targets.progress import Silent, Unit
from llama_onnx.targets.registry import get_target
from tests.support import tiny

START, END = 1, 2
"""The token ids of <s> and </s> in the tiny tokenizer."""


class Stop(Silent):
    """Raises after `count` pieces, like Ctrl-C or a kill at that moment."""

    def __init__(self, count: int, error: BaseException) -> None:
        self.left, self.error = count, error

    def update(self, what: str, done: int, total: int, unit: Unit = "steps") -> None:
        self.left -= 1
        if self.left <= 0:
            raise self.error


def make_package(folder: Path, precision: str, target: str = "cpu") -> Path:
    """Export a tiny model to `folder`/tiny-`precision`."""
    source = tiny.write_huggingface(folder / "checkpoint")
    out = folder / f"tiny-{precision}"
    # Rounding to nearest is quick, and what most tests are about is not the choice of codes.
    options = Options(precision=precision, quantizer="rtn" if precision == "int4" else None)
    return export_package(source, out, get_target(target), options).package


def make_certified(folder: Path) -> Path:
    """Export a tiny model in int4 and add its certificate."""
    package = make_package(folder, "int4")
    source = open_checkpoint(folder / "checkpoint")
    assert prove(package, source, tokens=4, longest=16, certify=True).passed
    return package


def alter_package(
    package: Path,
    out: Path,
    *,
    tokenizer: Mapping[str, Any] | None = None,
    tokenizer_config: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    search: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
) -> Path:
    """Copy a package with keys of its settings replaced. `chat_template` "" removes it."""
    shutil.copytree(package, out)
    _update(out / "tokenizer.json", tokenizer)
    _update(out / "tokenizer_config.json", tokenizer_config)
    settings = json.loads((out / "genai_config.json").read_text(encoding="utf-8"))
    settings["model"] |= model or {}
    settings["search"] |= search or {}
    _update(out / "genai_config.json", settings)
    if chat_template is not None:
        _replace_template(out, chat_template)
    renew_hashes(out)
    return out


def renew_hashes(package: Path) -> None:
    """Write the manifest again for the current files."""
    write_manifest(package, json.loads((package / MANIFEST).read_text(encoding="utf-8")))


def _replace_template(out: Path, chat_template: str) -> None:
    _update(out / "tokenizer_config.json", {"chat_template": None})
    (out / "chat_template.jinja").unlink()
    if chat_template:
        (out / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def _update(file: Path, values: Mapping[str, Any] | None) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) | dict(values or {})
    content = {key: value for key, value in content.items() if value is not None}
    file.write_text(json.dumps(content), encoding="utf-8")


def greedy(package: Path, prompt: Sequence[int], count: int) -> list[int]:
    """Return the greedy continuation of `prompt` by onnxruntime-genai's own Python API, on the CPU
    for every target."""
    from llama_onnx.runtime.genai import og  # not at the top: no genai fits WebGPU's wheel

    config = og.Config(str(package))
    config.clear_providers()
    model = og.Model(config)
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(list(prompt))
    ids = []
    while not generator.is_done():
        generator.generate_next_token()
        ids.append(int(generator.get_next_tokens()[0]))
    return ids


def decode(package: Path, tokens: list[int]) -> str:
    """Return the text that the library `tokenizers` makes of tokens."""
    return Tokenizer.from_file(str(package / "tokenizer.json")).decode(tokens)

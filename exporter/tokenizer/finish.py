"""The last steps on a package's tokenizer, wherever it is from: what no reader could use is left
out, and onnxruntime-genai opens the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llama_onnx.exporter.chat_template.write import prepare_template, template_differences
from llama_onnx.exporter.tokenizer.files import check_tokenizer
from llama_onnx.exporter.tokenizer.genai_ids import genai_differences
from llama_onnx.exporter.tokenizer.rows import without_rows
from llama_onnx.runtime.llama.template import ROLES
from llama_onnx.runtime.llama.text_files import open_genai_tokenizer
from llama_onnx.targets.errors import PackageError, UnsupportedError
from llama_onnx.targets.printable import printable

_JSON, _SETTINGS = "tokenizer.json", "tokenizer_config.json"


def finish_tokenizer(folder: Path, source: Path, vocab_size: int) -> list[str]:
    """Finish the tokenizer that was written to the package in `folder`; return warnings.

    `source` is the folder or file that the tokenizer is from, which messages name. Raises
    `CheckpointError` for a tokenizer that is not this model's, `UnsupportedError` for one that
    onnxruntime-genai, where it is installed, cannot open.
    """
    warnings = [*_source_notes(source), *_leave_out(folder, source, vocab_size)]
    check_tokenizer(folder / _JSON, vocab_size, str(source))
    # First, since onnxruntime-genai reads the template when it opens the tokenizer.
    warnings += prepare_template(folder, str(source))
    warnings += _open(folder, source)
    return [*warnings, *template_differences(folder, str(source))]


def _source_notes(source: Path) -> list[str]:
    """Return what the source's files say in another way than they were read."""
    from llama_onnx.exporter.tokenizer.huggingface import template_notes
    from llama_onnx.exporter.tokenizer.json_file import read_json_tokenizer

    if not source.is_dir():
        return []
    json_notes = read_json_tokenizer(source).notes if (source / _JSON).exists() else ()
    return [*json_notes, *template_notes(source)]


def _leave_out(folder: Path, source: Path, vocab_size: int) -> list[str]:
    file = folder / _JSON
    text, left_out = without_rows(file.read_bytes(), vocab_size)
    if not left_out:
        return []
    file.write_bytes(text)
    settings: dict[str, Any] = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    for role in ROLES:
        if settings.get(f"{role}_token") in left_out:
            del settings[f"{role}_token"]
    (folder / _SETTINGS).write_text(
        json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8"
    )
    some = ", ".join(printable(token) for token in left_out[:5])
    if len(left_out) == 1:
        tokens, have, are = f"the token {some}", "has", "is"
    else:
        more = f" and {len(left_out) - 5:,} more" if len(left_out) > 5 else ""
        tokens, have, are = f"the tokens {some}{more}", "have", "are"
    return [
        f"{source}: {tokens} {have} no row in the embedding, which has {vocab_size:,}, and {are} "
        "left out."
    ]


def _open(folder: Path, source: Path) -> list[str]:
    """Open the tokenizer as onnxruntime-genai does; return a warning if it gives other ids."""
    try:
        tokenizer = open_genai_tokenizer(folder)
        return [] if tokenizer is None else genai_differences(tokenizer, folder, str(source))
    except PackageError as error:
        reason = str(error).replace(str(folder), str(source))
        raise UnsupportedError(reason) from None

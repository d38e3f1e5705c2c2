"""Whether the tokenizer of onnxruntime-genai, which some programs use, gives a package's ids.

It reads tokenizer.json with code of its own, which leaves out some normalizers and pre-tokenizers.
Python encodes with the library `tokenizers`, as transformers does.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_onnx.exporter.tokenizer.texts import HARD_TEXTS
from llama_onnx.runtime.tokenizer.encoder import open_encoder
from llama_onnx.targets.printable import printable_line

_TURNS = "Hello{end}Hello{end} Hello"
"""Texts after a special token, as in each chat of more than one turn."""


def genai_differences(tokenizer: Any, folder: Path, source: str) -> list[str]:
    """Return a warning if `tokenizer`, which onnxruntime-genai opened, encodes texts to other ids
    than tokenizer.json in `folder` says. `source` is named in the warning.

    A first BOS and a last EOS do not count: programs decide about these themselves. Raises
    `PackageError` where tokenizer.json takes too long for a text.
    """
    texts = [*HARD_TEXTS, *_turns(folder)]
    encoder = open_encoder(folder)
    plain, ended = (encoder.encode(texts, add_special_tokens=adds) for adds in (False, True))
    found = [[int(index) for index in tokenizer.encode(text)] for text in texts]
    rows = zip(texts, found, plain, ended, strict=True)
    wrong = [text for text, ids, *right in rows if ids not in right]
    if not wrong:
        return []
    return [
        f"{source}: onnxruntime-genai, whose tokenizer some programs use, encodes {len(wrong)} of "
        f"{len(texts)} test texts to other tokens than transformers, among them "
        f"{printable_line(wrong[-1])!r}: use Python, or pass token ids."
    ]


def _turns(folder: Path) -> Iterator[str]:
    from llama_onnx.exporter.tokenizer.huggingface import read_settings

    end = read_settings(folder).get("eos_token")
    if isinstance(end, str):
        yield _TURNS.format(end=end)

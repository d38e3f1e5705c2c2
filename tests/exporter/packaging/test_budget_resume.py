"""A budget's export that is killed while the model is surveyed continues, and ends with the same
bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_onnx import export
from llama_onnx.targets.progress import Silent, Unit
from tests.support import tiny

CONFIG = replace(tiny.GQA, tie_word_embeddings=True)


class KillWhen(Silent):
    """Raises what Ctrl+C raises when a step begins with `words`."""

    def __init__(self, words: str) -> None:
        self.words = words

    def update(self, step: str, done: int, total: int, unit: Unit = "steps") -> None:
        if step.startswith(self.words):
            raise KeyboardInterrupt


def content(package: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in package.iterdir() if file.is_file()}


@pytest.mark.slow
def test_killed_in_the_survey_and_in_the_calibration(tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "source", CONFIG)
    tiny.write_tokenizer(source, CONFIG.vocab_size)
    ids = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (8, 128)).tolist()
    text = tmp_path / "ids.jsonl"
    text.write_text("".join(f'{{"ids": {row}}}\n' for row in ids), "utf-8")
    options: dict[str, Any] = {"precision": "int4", "budget": "4.6bpw", "calibration": str(text)}
    export(source, tmp_path / "whole", **options)
    killed = tmp_path / "killed"
    for words in ("weighing the text, layer 1", "comparing storages", "calibrating layer 1"):
        with pytest.raises(KeyboardInterrupt):
            resume = killed.with_name("killed.partial").exists()
            export(source, killed, resume=resume, progress=KillWhen(words), **options)
    export(source, killed, resume=True, **options)
    assert content(killed) == content(tmp_path / "whole")

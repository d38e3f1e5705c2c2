"""Weights of tokens on disk: a pass that was killed continues, and ends with the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llama_onnx.exporter.calibration.token_weights import weigh
from llama_onnx.exporter.checkpoints.huggingface import HuggingFaceCheckpoint
from llama_onnx.targets.progress import Silent, Unit
from tests.support import tiny


class KilledError(Exception):
    """Stands for a kill."""


class KillAt(Silent):
    """Raises at the `number`th report."""

    def __init__(self, number: int) -> None:
        self.left = number

    def update(self, step: str, done: int, total: int, unit: Unit = "steps") -> None:
        self.left -= 1
        if self.left < 0:
            raise KilledError


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_killed_at_every_layer_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    checkpoint = HuggingFaceCheckpoint.open(tiny.write_huggingface(source, tiny.GQA))
    rng = np.random.default_rng(3)
    ids = [rng.integers(0, tiny.GQA.vocab_size, length) for length in (9, 16)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    weigh(checkpoint, ids, whole)
    kills = 0
    while True:
        try:
            weigh(checkpoint, ids, killed, KillAt(1))
            break
        except KilledError:
            kills += 1
            assert kills < 20
    assert kills >= 2 * tiny.GQA.num_hidden_layers - 1
    assert files(killed) == files(whole)
    assert not any(entry.is_dir() for entry in killed.iterdir())


def test_a_complete_pass_is_not_repeated(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    checkpoint = HuggingFaceCheckpoint.open(tiny.write_huggingface(source, tiny.GQA))
    ids = [np.arange(12)]
    weigh(checkpoint, ids, tmp_path / "folder")
    weigh(checkpoint, ids, tmp_path / "folder", KillAt(0))
    with pytest.raises(KilledError):
        weigh(checkpoint, ids, tmp_path / "other", KillAt(0))

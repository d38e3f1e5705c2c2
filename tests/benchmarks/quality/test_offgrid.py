"""Moving a model off its grid changes its weights and not its function."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.quality.offgrid import move_off_grid, write_folder, write_gguf
from llama_onnx.exporter.checkpoints.gguf import GGUFCheckpoint
from llama_onnx.exporter.sources import open_checkpoint
from tests.support import tiny
from tests.support.gguf_files import write as write_tiny
from tests.support.vocabularies import bytelevel_metadata

CONFIG = replace(tiny.GQA, tie_word_embeddings=True, vocab_size=322)


def original_file(folder: Path) -> GGUFCheckpoint:
    path = folder / "tiny.gguf"
    write_tiny(path, CONFIG, keys=bytelevel_metadata(folder=folder))
    return GGUFCheckpoint.open(path)


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(3, 60)[None]).logits
    return found


def test_the_logits_stay_and_every_matrix_moves(tmp_path: Path) -> None:
    tiny.write_huggingface(tmp_path / "plain", CONFIG)
    weights = tiny.weights(CONFIG)
    moved = move_off_grid(weights, CONFIG)
    original = original_file(tmp_path)
    write_folder(moved, original, tmp_path / "moved")
    before, after = logits(tmp_path / "plain"), logits(tmp_path / "moved")
    # The factors are rounded to float32 once, in each direction.
    assert float((before - after).abs().max() / before.std()) < 1e-5
    for name, value in moved.items():
        if "layers" in name and "layernorm" not in name:
            ratio = value / weights[name]
            assert ratio.std() > 0.01, f"{name} is where it was"
        elif "layernorm" in name:
            assert (value == 1).all()


def test_both_forms_hold_the_same_weights(tmp_path: Path) -> None:
    moved = move_off_grid(tiny.weights(CONFIG), CONFIG)
    original = original_file(tmp_path)
    write_folder(moved, original, tmp_path / "moved")
    write_gguf(moved, original, tmp_path / "moved.gguf")
    folder, file = open_checkpoint(tmp_path / "moved"), open_checkpoint(tmp_path / "moved.gguf")
    assert set(folder.names()) == set(file.names())
    for name in folder.names():
        first, second = folder.tensor(name), file.tensor(name)
        assert np.array_equal(first.rows(0, first.shape[0]), second.rows(0, second.shape[0])), name
    stored = gguf.GGUFReader(tmp_path / "moved.gguf")
    kept = gguf.GGUFReader(tmp_path / "tiny.gguf")
    assert {f for f in kept.fields if f.startswith("tokenizer.")} <= set(stored.fields)
    assert {tensor.tensor_type.name for tensor in stored.tensors} == {"F32"}

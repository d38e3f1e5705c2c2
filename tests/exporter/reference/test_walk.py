from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from llama_onnx.exporter.checkpoints.huggingface import HuggingFaceCheckpoint
from llama_onnx.exporter.formats.tensor import LazyTensor
from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.reference import walk as walk_module
from llama_onnx.exporter.reference.linear import multiply, multiply_with_onednn
from llama_onnx.exporter.reference.walk import decoder_layers, walk
from llama_onnx.targets.progress import Silent, Unit
from tests.support import tiny
from tests.support.pytorch import run_whole, whole_model

TIED = replace(tiny.GQA, tie_word_embeddings=True)
WIDE = replace(tiny.GQA, head_dim=32, num_key_value_heads=1, rope_theta=500000.0, rms_norm_eps=1e-3)
STORED = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def sequences(config: LlamaConfig) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, config.vocab_size, length) for length in (1, 7, 100)]


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("config", [tiny.GQA, TIED, WIDE], ids=["gqa", "tied", "wide"])
def test_walk_is_the_whole_model(tmp_path: Path, config: LlamaConfig, dtype: str) -> None:
    tensors = tiny.weights(config)
    rounded = {k: v.astype(STORED[dtype]).astype(np.float32) for k, v in tensors.items()}
    folder = tiny.write_huggingface(tmp_path, config, dtype=dtype, shards=2, tensors=tensors)
    model = whole_model(config, rounded)
    logits = walk(HuggingFaceCheckpoint.open(folder), sequences(config))
    for ids, found in zip(sequences(config), logits, strict=True):
        expected = run_whole(model, ids)
        assert found.shape == (len(ids), config.vocab_size)
        assert found.dtype == np.float32
        assert np.linalg.norm(found - expected) <= 2e-6 * np.linalg.norm(expected)


def test_a_half_rounded_rotary_would_be_seen() -> None:
    """The trap `walk` avoids is large enough for the test above to notice."""
    model = whole_model(tiny.GQA, tiny.weights(tiny.GQA))
    ids = sequences(tiny.GQA)[-1]
    expected = run_whole(model, ids)
    torch.nn.Module.half(model)
    torch.nn.Module.float(model)
    model.load_state_dict({k: torch.from_numpy(v) for k, v in tiny.weights(tiny.GQA).items()})
    trapped = run_whole(model, ids)  # every weight is exact again, the rotary frequencies are not
    assert np.linalg.norm(trapped - expected) > 1e-4 * np.linalg.norm(expected)


def test_reading_in_pieces_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = HuggingFaceCheckpoint.open(tiny.write_huggingface(tmp_path))
    whole = walk(checkpoint, sequences(tiny.GQA))
    monkeypatch.setattr(walk_module, "_CHUNK", 1000)
    for a, b in zip(whole, walk(checkpoint, sequences(tiny.GQA)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_every_layer_passes_through_one_module(tmp_path: Path) -> None:
    checkpoint = HuggingFaceCheckpoint.open(tiny.write_huggingface(tmp_path))
    expected = tiny.weights(tiny.GQA)
    modules: set[int] = set()
    for index, layer in enumerate(decoder_layers(checkpoint)):
        modules.add(id(layer))
        for name, parameter in layer.named_parameters():
            np.testing.assert_array_equal(parameter, expected[f"model.layers.{index}.{name}"])
    assert len(modules) == 1


def spied(
    checkpoint: HuggingFaceCheckpoint, read: list[tuple[str, int, int]]
) -> HuggingFaceCheckpoint:
    """The same checkpoint, which notes in `read` which rows are read."""

    def spy(tensor: LazyTensor) -> LazyTensor:
        def rows(start: int, stop: int) -> np.ndarray:
            read.append((tensor.name, start, stop))
            return tensor.rows(start, stop)

        return replace(tensor, rows=rows)

    return replace(checkpoint, tensors={k: spy(v) for k, v in checkpoint.tensors.items()})


def test_matrices_are_read_once_for_all_sequences_and_the_embedding_by_rows(
    tmp_path: Path,
) -> None:
    checkpoint = HuggingFaceCheckpoint.open(tiny.write_huggingface(tmp_path))
    read: list[tuple[str, int, int]] = []
    ids = np.array([5, 9, 5])
    walk(spied(checkpoint, read), [ids, ids[:1]])
    embedding = "model.embed_tokens.weight"
    assert [entry for entry in read if entry[0] == embedding] == [
        (embedding, 5, 6),
        (embedding, 9, 10),
    ]
    others = sorted(name for name, _, _ in read if name != embedding)
    assert others == sorted(tiny.GQA.tensor_shapes().keys() - {embedding})


class Seen(Silent):
    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []

    def update(self, what: str, done: int, total: int, unit: Unit = "steps") -> None:
        self.seen.append((what, done, total))


def test_progress_counts_embedding_layers_and_head(tmp_path: Path) -> None:
    progress = Seen()
    checkpoint = HuggingFaceCheckpoint.open(tiny.write_huggingface(tmp_path))
    walk(checkpoint, sequences(tiny.GQA)[:1], progress)
    stages = ["embedding", "layer 0", "layer 1", "layer 2", "head"]
    assert progress.seen == [(stage, done + 1, 5) for done, stage in enumerate(stages)]


def test_products_are_as_exact_as_those_of_pytorch() -> None:
    """Against float64, with rows and columns that fill no block."""
    random = np.random.default_rng(3)
    for rows, inputs, outputs in ((1, 300, 70), (33, 1024, 257), (129, 77, 1000)):
        x = random.standard_normal((rows, inputs), dtype=np.float32)
        weight = random.standard_normal((outputs, inputs), dtype=np.float32)
        exact = x.astype(np.float64) @ weight.T.astype(np.float64)
        with torch.inference_mode():
            ours = multiply(torch.from_numpy(x), torch.from_numpy(weight)).numpy()
            plain = torch.nn.functional.linear(torch.from_numpy(x), torch.from_numpy(weight))
        error, usual = (np.linalg.norm(y - exact) for y in (ours, plain.numpy()))
        assert ours.dtype == np.float32
        assert error <= max(2 * usual, 1e-6 * np.linalg.norm(exact))


def test_a_calibration_multiplies_as_before(tmp_path: Path) -> None:
    """Its layers are those of transformers, whose gradients it needs."""
    checkpoint = HuggingFaceCheckpoint.open(tiny.write_huggingface(tmp_path))
    walk(checkpoint, sequences(checkpoint.config))
    layer = next(decoder_layers(checkpoint))
    assert type(layer.mlp.up_proj) is torch.nn.Linear
    multiply_with_onednn(layer)
    assert type(layer.mlp.up_proj) is not torch.nn.Linear

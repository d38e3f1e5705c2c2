"""A calibration: the same codes however often it is killed, by what the model really reads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llama_onnx.exporter.calibration.calibrate import Task, calibrate
from llama_onnx.exporter.calibration.store import Calibrated
from llama_onnx.exporter.checkpoints.folded import FoldedCheckpoint
from llama_onnx.exporter.model.storage import RowBlocks
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.quantize.awq import ActivationAware
from llama_onnx.exporter.quantize.base import CalibratedQuantizer, Quantizer
from llama_onnx.exporter.quantize.gptq import Gptq
from llama_onnx.exporter.quantize.inputs import Inputs
from llama_onnx.exporter.reference.walk import walk
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.targets import cpu
from llama_onnx.targets.errors import CheckpointError
from llama_onnx.targets.progress import Silent
from tests.support import tiny
from tests.support.pytorch import oracle

STORAGE = RowBlocks(4, 32, zero_points=True, stored_scales="uint8")
SEQUENCES = [np.random.default_rng(seed).integers(3, 250, 64) for seed in range(4)]


def task_of(source: Path, quantizer: CalibratedQuantizer, *, rescales: bool = True) -> Task:
    checkpoint = open_checkpoint(source)
    shapes = checkpoint.config.tensor_shapes()
    storages = {
        name: STORAGE for name in shapes if name.endswith(("proj.weight", "lm_head.weight"))
    }
    return Task(checkpoint, quantizer, storages, rescales)


def everything(found: Calibrated) -> dict[str, bytes]:
    codes = {
        f"{name} {part}": stored.read().tobytes()
        for name, parts in found.codes.items()
        for part, stored in parts.items()
    }
    return codes | {name: part.tobytes() for name, part in found.scales.exponents.items()}


class Spy:
    """A quantizer that keeps the inputs it is given, and rounds everything to zero."""

    name, correlates, weighs = "spy", True, False

    def __init__(self) -> None:
        self.seen: list[Inputs] = []

    def with_inputs(self, inputs: Inputs) -> Quantizer:
        self.seen.append(inputs)
        return ActivationAware().with_inputs(inputs)


def test_inputs_are_what_transformers_feeds_to_each_matrix(tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "source")
    spy = Spy()
    calibrate(task_of(source, spy, rescales=False), SEQUENCES, tmp_path / "work", 2)
    model = oracle(tiny.GQA)
    read: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "o_proj", "gate_proj", "down_proj", "lm_head")):
            module.register_forward_pre_hook(
                lambda _, given, name=name: read.setdefault(name, []).append(given[0][0])
            )
    with torch.no_grad():
        for ids in SEQUENCES:
            model(torch.from_numpy(ids)[None])
    assert len(spy.seen) == len(read) == 4 * tiny.GQA.num_hidden_layers + 1
    for inputs, (name, rows) in zip(spy.seen, read.items(), strict=True):
        x = torch.cat(rows).double()
        expected = (x.T @ x / len(x)).numpy()
        assert inputs.products is not None
        np.testing.assert_allclose(inputs.products, expected, rtol=1e-3, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(inputs.squares, expected.diagonal(), rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("tied", [False, True])
def test_folding_leaves_the_function(tmp_path: Path, tied: bool) -> None:
    config = replace(tiny.GQA, tie_word_embeddings=tied)
    source = tiny.write_huggingface(tmp_path / "source", config)
    found = calibrate(task_of(source, ActivationAware()), SEQUENCES, tmp_path / "work", 1)
    checkpoint = open_checkpoint(source)
    folded = FoldedCheckpoint(checkpoint, found.scales)
    scaled = [name for name, exponents in found.scales.exponents.items() if exponents.any()]
    assert len(scaled) == 4 * config.num_hidden_layers + (not tied), "the test would prove nothing"
    name = "model.layers.0.mlp.up_proj.weight"
    assert not np.allclose(folded.tensor(name).rows(0, 8), checkpoint.tensor(name).rows(0, 8))
    expected = oracle(config)(torch.from_numpy(SEQUENCES[0])[None]).logits[0].detach().numpy()
    (logits,) = walk(folded, SEQUENCES[:1])
    np.testing.assert_allclose(logits, expected, atol=1e-4)


class Stop(Silent):
    """Raises at the stage called `at`."""

    def __init__(self, at: str) -> None:
        self.at = at

    def update(self, what: str, done: int, total: int, unit: str = "steps") -> None:
        if what == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("make", [ActivationAware, Gptq])
def test_killed_twice_and_resumed_it_is_the_same_to_the_byte(
    tmp_path: Path, make: Callable[[], CalibratedQuantizer]
) -> None:
    source = tiny.write_huggingface(tmp_path / "source")
    whole = calibrate(task_of(source, make()), SEQUENCES, tmp_path / "whole", 2)
    for stage in ("calibrating layer 1", "calibrating the head"):
        with pytest.raises(KeyboardInterrupt):
            calibrate(task_of(source, make()), SEQUENCES, tmp_path / "killed", 1, Stop(stage))
    resumed = calibrate(task_of(source, make()), SEQUENCES, tmp_path / "killed", 1)
    assert everything(resumed) == everything(whole)


def test_a_stage_whose_file_is_damaged_is_done_again(tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "source")
    task, folder = task_of(source, ActivationAware()), tmp_path / "work"
    whole = everything(calibrate(task, SEQUENCES, folder, 1))
    with (folder / "layer-1.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    assert everything(calibrate(task, SEQUENCES, folder, 1)) == whole
    (folder / "state.json").write_text("{", "utf-8")
    assert everything(calibrate(task, SEQUENCES, folder, 1)) == whole


def test_activations_that_are_not_finite_are_named_by_layer(tmp_path: Path) -> None:
    weights = tiny.weights(tiny.GQA)
    weights["model.layers.1.mlp.down_proj.weight"] = np.full_like(
        weights["model.layers.1.mlp.down_proj.weight"], 3e38
    )
    source = tiny.write_huggingface(tmp_path / "source")
    from safetensors.numpy import save_file

    for shard in source.glob("*.safetensors"):
        shard.unlink()
    (source / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(weights, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layer 2: self_attn\.q_proj reads NaN or infinity"):
        calibrate(task_of(source, ActivationAware()), SEQUENCES, tmp_path / "work", 1)


def written(source: Path, out: Path, **options: object) -> dict[str, bytes]:
    export_package(source, out, cpu.TARGET, Options("int4", **options))  # type: ignore[arg-type]
    names = ("model.onnx", "model.onnx.data", "channel_scales.safetensors")
    return {name: (out / name).read_bytes() for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", ["awq", "gptq"])
def test_the_same_source_and_options_give_the_same_bytes(tmp_path: Path, quantizer: str) -> None:
    source = tiny.write_huggingface(tmp_path / "source ä 日本")
    first = written(source, tmp_path / "a", quantizer=quantizer)
    assert first == written(source, tmp_path / "b ü", quantizer=quantizer)


def test_what_a_calibration_keeps_is_not_in_the_package(tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "source")
    written(source, tmp_path / "out", quantizer="awq")
    assert not (tmp_path / "out" / "calibration").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_an_export_killed_while_it_calibrates_resumes(tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "source")
    whole = written(source, tmp_path / "whole")
    out, options = tmp_path / "out", Options("int4")
    for stage in ("calibrating layer 1", "calibrating layer 2"):
        with pytest.raises(KeyboardInterrupt):
            export_package(source, out, cpu.TARGET, options, resume=True, progress=Stop(stage))
    kept = sorted(file.name for file in (tmp_path / "out.partial" / "calibration").iterdir())
    assert kept == [
        *("hidden-1.safetensors", "layer-0.safetensors", "layer-1.safetensors", "state.json")
    ]
    export_package(source, out, cpu.TARGET, options, resume=True)
    assert {name: (out / name).read_bytes() for name in whole} == whole
    shutil.rmtree(out)

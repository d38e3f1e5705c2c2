"""Weighs the tokens of a text for each matrix, and keeps the weights on disk, a file for each
layer.

Files appear whole or not at all, so a pass that was killed continues where it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from llama_onnx.exporter.calibration.backward import Backward, Seen
from llama_onnx.exporter.calibration.states import load_states, save_states
from llama_onnx.exporter.formats.safetensors import stored_tensors
from llama_onnx.exporter.formats.tensor import Float32
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.exporter.reference.walk import Ids
from llama_onnx.targets.durable import replace_file
from llama_onnx.targets.progress import SILENT, Progress

HEAD = "head"

_PARTS = ("tokens", "squares", "weighted")


def weigh(
    checkpoint: Checkpoint, sequences: Sequence[Ids], folder: Path, progress: Progress = SILENT
) -> None:
    """Put what each matrix of `checkpoint` sees of `sequences`, forward and backward, in `folder`.

    What is there already is kept. Raises `CheckpointError` for activations that are not finite.
    """
    count = checkpoint.config.num_hidden_layers
    if _file(folder, "embedding").exists():
        return
    passing = folder / "passing"
    passing.mkdir(parents=True, exist_ok=True)
    back = Backward(checkpoint, sequences, passing)
    done = [index for index in range(count) if _file(folder, str(index)).exists()]
    if done:
        gradients = load_states(_gradients(passing, min(done)), sequences)
    else:
        back.forward(progress)
        gradients, seen, chances = back.head()
        _write(folder, HEAD, {HEAD: seen})
        replace_file(_file(folder, "chances"), save({"chances": chances}))
    for index in reversed(range(min(done, default=count))):
        progress.update(f"weighing the text, layer {index}", count - index, count)
        gradients, members = back.layer(index, gradients)
        save_states(_gradients(passing, index), gradients)
        _write(folder, str(index), members)
        _gradients(passing, index + 1).unlink(missing_ok=True)
    energy = np.concatenate([x[0].square().sum(-1).numpy() for x in gradients])
    replace_file(_file(folder, "embedding"), save({"tokens": energy}))
    shutil.rmtree(passing)


def seen_by(folder: Path, stage: str) -> Mapping[str, Seen]:
    """Return what the matrices of `stage` saw: a layer's number, with its members, or `HEAD`."""
    stored = stored_tensors(_file(folder, stage))
    names = dict.fromkeys(key.rpartition(":")[0] for key in stored)
    return {name: Seen(*(stored[f"{name}:{part}"].read() for part in _PARTS)) for name in names}


def embedding_gradients(folder: Path) -> Float32:
    """Return the squares of the gradients with regard to each token's embedding, [T]."""
    return stored_tensors(_file(folder, "embedding"))["tokens"].read()


def chances_of_rows(folder: Path) -> Float32:
    """Return the mean over tokens of p (1 - p) for each row of the head, [V]."""
    return stored_tensors(_file(folder, "chances"))["chances"].read()


def _file(folder: Path, stage: str) -> Path:
    return folder / f"seen-{stage}.safetensors"


def _gradients(folder: Path, index: int) -> Path:
    """Return the file of the gradients with regard to the states before layer `index`."""
    return folder / f"gradients-{index}.npy"


def _write(folder: Path, stage: str, members: Mapping[str, Seen]) -> None:
    tensors = {
        f"{name}:{part}": np.ascontiguousarray(getattr(seen, part))
        for name, seen in members.items()
        for part in _PARTS
    }
    replace_file(_file(folder, stage), save(tensors))

"""Models of a real geometry with random weights: speed, load and memory depend on nothing else.

For models that are too large to come with a wheel. Every maker rounds plainly: a calibration
changes codes and scales, not their layout, on which speed depends.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from gguf import GGUFReader

from benchmarks.quality.model_process import REPOSITORY, BrokenPeerError, environment
from benchmarks.quality.rows import BUILDER, LLAMA, OPENVINO, OURS, ROOT, ROWS, Row
from benchmarks.quality.run import make_row
from benchmarks.quality.workspace import Workspace
from benchmarks.systems.layouts import write_recipe
from benchmarks.systems.systems import System

_INT4 = ("--precision", "int4", "--quantizer", "rtn")
_PLAIN = ("--bits", "4", "--group-size", "64", "--mode", "asym")


PRESETS = ("small", "fast")
"""Those whose layout on SmolLM2 is measured."""


@dataclass(frozen=True)
class Untied(System):
    """A system whose model has a head of its own."""

    def step_bytes(self, work: Workspace) -> int:
        """What a step reads: all weights but the embedding, of which it reads a row."""
        return self.bytes(work) - self._embedding_bytes(work)

    def _embedding_bytes(self, work: Workspace) -> int:
        assert self.row is not None
        if self.row.group == LLAMA:
            tensors = GGUFReader(self.path(work)).tensors
            return next(int(each.n_bytes) for each in tensors if each.name == "token_embd.weight")
        if self.row.group == OPENVINO:
            return sizes(work).embedding  # NNCF keeps the embedding in int8
        return _read_by_gathers(self.path(work) / "model.onnx")


_WITH_PACKAGES = tuple(
    Untied(row.name, f"{label}, {runtime}", "engine" if row.group == OURS else row.runtime, row)
    for row, label, runtime in (
        (Row("b32", OURS, "", _INT4), "llama-onnx block 32 (layout of awq, gptq)", "our engine"),
        (Row("b64", OURS, "", (*_INT4, "--block-size", "64")), "llama-onnx block 64", "our engine"),
        (
            Row("b128", OURS, "", (*_INT4, "--block-size", "128")),
            "llama-onnx block 128",
            "our engine",
        ),
        *(
            (
                Row(preset, OURS, "", ("--recipe", f"{ROOT}/{preset}.json")),
                f"llama-onnx layout of preset {preset}",
                "our engine",
            )
            for preset in PRESETS
        ),
        (Row("builder", BUILDER, ""), "genai builder default", "onnxruntime-genai"),
        (
            Row("builder-mixed", BUILDER, "", ("algo_config=k_quant_mixed",)),
            "genai builder k_quant mixed",
            "onnxruntime-genai",
        ),
        (Row("q4_0", LLAMA, "", ("Q4_0",)), "Q4_0", "llama.cpp"),
        (Row("q4_k_m", LLAMA, "", ("Q4_K_M",)), "Q4_K_M", "llama.cpp"),
        (Row("openvino", OPENVINO, "", _PLAIN), "int4 asym g64", "OpenVINO"),
    )
)

_FAST = 4
_INT8_PROMPTS = replace(
    _WITH_PACKAGES[_FAST],
    name="fast-int8-prompts",
    label=f"llama-onnx layout of preset {PRESETS[-1]}, int8 prompts, our engine",
    runtime="engine_int8_prompts",
)

SYSTEMS = (*_WITH_PACKAGES[: _FAST + 1], _INT8_PROMPTS, *_WITH_PACKAGES[_FAST + 1 :])
"""The first is what the others are compared with."""


@dataclass(frozen=True)
class Sizes:
    """Products for each token of a prompt, and values of the embedding."""

    token_products: int
    embedding: int


def prepare(work: Workspace, geometry: str, layers: int | None) -> None:
    """Make the checkpoint and its GGUF file in fp16, unless they are there."""
    work.root.mkdir(parents=True, exist_ok=True)
    work.texts.mkdir(exist_ok=True)
    # Where a maker asks for calibration texts, these are not read for plain rounding.
    np.save(work.texts / "c4.npy", np.zeros((1, 8), np.int64))
    fewer = () if layers is None else ("--layers", str(layers))
    source, gguf = str(work.source), str(work.gguf)
    makers: tuple[tuple[Path, str, tuple[str, ...]], ...] = (
        (work.source, "make_checkpoint.py", (geometry, source, *fewer)),
        (work.gguf, "make_gguf.py", (source, gguf, "--type", "F16")),
    )
    for out, script, arguments in makers:
        if not out.exists():
            command = [sys.executable, str(REPOSITORY / "benchmarks" / script), *arguments]
            subprocess.run(command, check=True, env=environment(work), cwd=REPOSITORY)


def make_recipe(name: str, work: Workspace, real: Workspace) -> str | None:
    """Write the recipe of system `name` if it is a preset's layout, from that preset's package in
    the workspace `real` of SmolLM2, which is made unless it is there; return why it could not be.
    A package of another recipe is removed."""
    if name not in PRESETS:
        return None
    row, file = ROWS[f"preset-{name}"], work.root / f"{name}.json"
    problem = make_row(row, real)
    if problem is not None:
        return problem
    before = file.read_bytes() if file.exists() else None
    try:
        write_recipe(row.path(real), work.source, file)
    except BrokenPeerError as error:
        return str(error)
    if file.read_bytes() != before and work.model(name).exists():
        shutil.rmtree(work.model(name))
    return None


def sizes(work: Workspace) -> Sizes:
    """Return the sizes of the checkpoint."""
    config = json.loads((work.source / "config.json").read_text("utf-8"))
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads, kept = config["num_attention_heads"], config["num_key_value_heads"]
    attention = width * width * 2 + 2 * width * (width // heads) * kept
    embedding = config["vocab_size"] * width
    return Sizes(config["num_hidden_layers"] * (attention + 3 * width * inner), embedding)


def _read_by_gathers(path: Path) -> int:
    """Return the bytes of the weights that only Gather nodes read."""
    graph = onnx.load(path, load_external_data=False).graph
    read = {n for node in graph.node if not node.op_type.startswith("Gather") for n in node.input}
    gathered = {n for node in graph.node if node.op_type.startswith("Gather") for n in node.input}
    only = gathered - read
    return sum(_stored(tensor) for tensor in graph.initializer if tensor.name in only)


def _stored(tensor: onnx.TensorProto) -> int:
    lengths = [int(each.value) for each in tensor.external_data if each.key == "length"]
    return lengths[0] if lengths else len(tensor.raw_data)

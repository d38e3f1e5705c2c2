"""GPTQ and AWQ checkpoints by name, and helpers shared by their tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy.typing as npt
from click.testing import CliRunner, Result

from llama_onnx.exporter.cli import main
from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.packaging.export import ExportResult, export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.targets.cpu import TARGET
from tests.support import tiny
from tests.support.quantized import Quantized, quantize_model, write

Array = npt.NDArray[Any]

EXACT = Options(embedding="fp32", head="fp32", accuracy_level=1)
"""Options that round only the source's own codes."""

PARTIAL = replace(tiny.GQA, hidden_size=80, intermediate_size=72)  # no multiples of 32
HEAD = "lm_head"
QKV = [f"model.layers.1.self_attn.{part}_proj" for part in "qkv"]
LAYER = "model.layers.1.mlp.down_proj"

# Arguments of quantize_model, arguments of write, and the model's configuration.
Case = tuple[dict[str, Any], dict[str, Any], LlamaConfig]
CASES: dict[str, Case] = {
    "gptq": ({}, {}, tiny.GQA),
    "gptq v2": ({}, {"v2": True}, tiny.GQA),
    "gptq symmetric": ({"symmetric": True}, {"quantization": {"sym": True}}, tiny.GQA),
    "gptq 8 bits": ({"bits": 8}, {}, tiny.GQA),
    "gptq act-order": ({"act_order": True}, {}, tiny.GQA),
    "gptq act-order 8 bits": ({"act_order": True, "bits": 8}, {}, tiny.GQA),
    "gptq act-order apart": ({"act_order": True, "apart": True}, {}, tiny.GQA),
    "gptq act-order partial": ({"act_order": True}, {}, PARTIAL),
    "gptq groups of 16": ({"group_size": 16}, {}, tiny.GQA),
    "gptq groups of 48": ({"group_size": 48}, {}, PARTIAL),
    "gptq whole rows": ({"group_size": -1}, {"quantization": {"group_size": -1}}, tiny.GQA),
    "gptq partial": ({}, {}, PARTIAL),
    "gptq head": ({"extra": (HEAD,)}, {}, tiny.GQA),
    "gptq bf16 scales": ({"scales": "bf16"}, {}, tiny.GQA),
    "gptq fp32 scales": ({"scales": "fp32"}, {}, tiny.GQA),
    "gptq tied": ({}, {}, replace(tiny.GQA, tie_word_embeddings=True)),
    "gptq mixed": (
        {"bits": {"": 4, "v_proj": 8}, "group_size": {"": 32, "down_proj": 16}, "skip": QKV[:1]},
        {"quantization": {"dynamic": {"-:.*1.self_attn.q_proj": {}}}},
        tiny.GQA,
    ),
    "awq": ({}, {"method": "awq"}, tiny.GQA),
    "awq whole rows": (
        {"group_size": -1},
        {"method": "awq", "quantization": {"group_size": -1}},
        tiny.GQA,
    ),
    "awq partly": (
        {"skip": tuple(QKV)},
        {"method": "awq", "quantization": {"modules_to_not_convert": QKV}},
        tiny.GQA,
    ),
}


def make(folder: Path, name: str) -> tuple[Path, dict[str, Quantized]]:
    """Write the checkpoint of a case to `folder`; return it and its matrices."""
    how, written, config = CASES[name]
    matrices = quantize_model(config, **how)
    return write(folder, matrices, config=config, **written), matrices


def export(source: Path, out: Path, options: Options = EXACT, **flags: Any) -> ExportResult:
    return export_package(source, out, TARGET, options, **flags)


def whole(checkpoint: Any, name: str) -> Array:
    tensor = checkpoint.tensor(name)
    rows: Array = tensor.rows(0, tensor.shape[0])
    return rows


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])

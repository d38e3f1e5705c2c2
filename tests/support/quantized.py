"""Tiny GPTQ and AWQ checkpoints, quantized and packed from the formats' definitions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from llama_onnx.exporter.model.config import MATRICES, LlamaConfig
from tests.support import tiny

Array = npt.NDArray[Any]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SCALES = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp32": np.float32}


@dataclass(frozen=True)
class Quantized:
    """weight[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g] with g = groups[k]."""

    codes: Array  # [N, K]
    zeros: Array  # [N, G]
    scales: Array  # [N, G]
    groups: Array  # [K]
    bits: int

    def weight(self) -> Array:
        """Dequantized in float64, then rounded to float32 (exact for half-precision scales)."""
        zeros, scales = self.zeros[:, self.groups], self.scales.astype(np.float64)[:, self.groups]
        values: Array = ((self.codes.astype(np.int64) - zeros) * scales).astype(np.float32)
        return values


def quantize(
    weight: Array,
    bits: int = 4,
    group_size: int = 32,
    *,
    order: Array | None = None,
    symmetric: bool = False,
    scales: str = "fp16",
) -> Quantized:
    """Round `weight` [N, K] to the nearest codes. `order` [K]: channels in the order in which they
    are grouped (act-order); -1 is one group per row."""
    inputs = weight.shape[1]
    size = inputs if group_size == -1 else group_size
    groups = np.arange(inputs) // size
    if order is not None:
        groups = groups[np.argsort(order)]
    top = (1 << bits) - 1
    count = groups.max() + 1
    low = np.stack([weight[:, groups == g].min(axis=1) for g in range(count)], axis=1)
    high = np.stack([weight[:, groups == g].max(axis=1) for g in range(count)], axis=1)
    if symmetric:
        high = np.maximum(np.abs(low), np.abs(high))
        low = -high
    step = ((high - low) / top).astype(SCALES[scales])
    wide = step.astype(np.float64)
    zeros = np.full(low.shape, 1 << (bits - 1)) if symmetric else np.rint(-low / wide)
    zeros = np.clip(zeros, 1, top).astype(np.int64)
    codes = np.clip(np.rint(weight / wide[:, groups]) + zeros[:, groups], 0, top)
    return Quantized(codes.astype(np.uint8), zeros, step, groups, bits)


def pack_words(codes: Array, bits: int) -> Array:
    """Pack codes [n, m] along the first axis, the first in the lowest bits: int32 [n bits/32, m].
    The last word may be padded with zeros."""
    fields = 32 // bits
    words = np.zeros((-(-len(codes) // fields), codes.shape[1]), np.uint32)
    for index, row in enumerate(codes.astype(np.uint32)):
        words[index // fields] |= row << np.uint32(bits * (index % fields))
    return words.view(np.int32)


def pack_awq(codes: Array) -> Array:
    """Pack codes [n, m] along the second axis in AWQ's order: int32 [n, m / 8]."""
    words = np.zeros((len(codes), codes.shape[1] // 8), np.uint32)
    for column in range(words.shape[1]):
        for place, output in enumerate(AWQ_ORDER):
            code = codes[:, 8 * column + output].astype(np.uint32)
            words[:, column] |= code << np.uint32(4 * place)
    return words.view(np.int32)


def gptq_tensors(module: str, matrix: Quantized, *, v2: bool = False) -> dict[str, Array]:
    """Return the tensors of one linear layer as GPTQ stores them."""
    zeros = matrix.zeros if v2 else matrix.zeros - 1
    return {
        f"{module}.qweight": pack_words(matrix.codes.T, matrix.bits),
        f"{module}.qzeros": pack_words(zeros, matrix.bits).T.copy(),
        f"{module}.scales": matrix.scales.T.copy(),
        f"{module}.g_idx": matrix.groups.astype(np.int32),
    }


def awq_tensors(module: str, matrix: Quantized) -> dict[str, Array]:
    """Return the tensors of one linear layer in AWQ's GEMM layout."""
    return {
        f"{module}.qweight": pack_awq(matrix.codes.T),
        f"{module}.qzeros": pack_awq(matrix.zeros.T),
        f"{module}.scales": matrix.scales.T.copy(),
    }


def modules(config: LlamaConfig) -> list[str]:
    """Return all linear layers of the decoder."""
    layers = range(config.num_hidden_layers)
    return [f"model.layers.{layer}.{name}" for layer in layers for name in MATRICES]


def quantize_model(
    config: LlamaConfig = tiny.GQA,
    *,
    bits: int | Mapping[str, int] = 4,
    group_size: int | Mapping[str, int] = 32,
    act_order: bool = False,
    apart: bool = False,
    skip: tuple[str, ...] = (),
    extra: tuple[str, ...] = (),
    symmetric: bool = False,
    scales: str = "fp16",
) -> dict[str, Quantized]:
    """Quantize the tiny model's linear layers except those in `skip`, and `extra` ones. `bits` and
    `group_size` by the last part of the name ("" for the others). With `act_order` the layers that
    read the same input have the same order, as GPTQ makes it; with `apart` each has its own."""
    weights = tiny.weights(config)
    found = {}
    for module in [name for name in modules(config) if name not in skip] + list(extra):
        weight, part = weights[f"{module}.weight"], module.rpartition(".")[2]
        reads = module if apart or part in ("o_proj", "down_proj") else module.rpartition(".")[0]
        rng = np.random.default_rng(sum(map(ord, reads)))
        found[module] = quantize(
            weight,
            bits if isinstance(bits, int) else bits.get(part, bits[""]),
            group_size if isinstance(group_size, int) else group_size.get(part, group_size[""]),
            order=rng.permutation(weight.shape[1]) if act_order else None,
            symmetric=symmetric,
            scales=scales,
        )
    return found


def write(
    folder: Path,
    matrices: Mapping[str, Quantized],
    *,
    method: str = "gptq",
    config: LlamaConfig = tiny.GQA,
    quantization: Mapping[str, Any] | None = None,
    extra: Mapping[str, Array | None] | None = None,
    v2: bool = False,
    file: str = "model.safetensors",
) -> Path:
    """Write a checkpoint; tensors not in `matrices` are stored as float16. `quantization` overrides
    keys of quantization_config (None removes); `extra` tensors are added, replaced, or with None
    removed."""
    first = next(iter(matrices.values()))
    reordered = any((np.diff(m.groups) < 0).any() for m in matrices.values())
    raw: dict[str, Any] = {
        "quant_method": method,
        "bits": first.bits,
        "group_size": int(np.bincount(first.groups)[0]),
    }
    if method == "gptq":
        layout = "gptq_v2" if v2 else "gptq"
        raw |= {"desc_act": reordered, "sym": False, "checkpoint_format": layout}
    else:
        raw |= {"zero_point": True, "version": "gemm", "modules_to_not_convert": None}
    raw = {k: v for k, v in (raw | dict(quantization or {})).items() if v is not None}
    tiny.write_huggingface(folder, config, config_json={"quantization_config": raw})
    tensors: dict[str, Array] = {}
    for name, weight in tiny.weights(config).items():
        module = name.removesuffix(".weight")
        if module not in matrices:
            tensors[name] = weight.astype(np.float16)
        elif method == "gptq":
            tensors |= gptq_tensors(module, matrices[module], v2=v2)
        else:
            tensors |= awq_tensors(module, matrices[module])
    for name, value in (extra or {}).items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return folder


def dequantized(
    matrices: Mapping[str, Quantized], config: LlamaConfig = tiny.GQA
) -> dict[str, Array]:
    """Return all weights of the model that `write` wrote, float32."""
    weights = {k: v.astype(np.float16).astype(np.float32) for k, v in tiny.weights(config).items()}
    return weights | {f"{module}.weight": matrix.weight() for module, matrix in matrices.items()}


def settings(folder: Path) -> dict[str, Any]:
    """Return the quantization_config of a folder."""
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = raw["quantization_config"]
    return found

"""Tiny checkpoints in compressed-tensors' format, quantized and packed by that library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

from llama_onnx.exporter.model.config import LlamaConfig
from tests.support import tiny
from tests.support.quantized import modules

Array = npt.NDArray[Any]
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Compressed:
    """The tensors of one linear layer by the last part of their names, and the weight that the
    library makes of them in float32, without rounding to the type of the scales."""

    tensors: State
    weight: Array


def compress(
    weight: Array, args: QuantizationArgs, kind: str, dtype: torch.dtype = torch.float16
) -> Compressed:
    """Quantize `weight` [N, K] to the nearest codes and store it in the format `kind`, with scales
    of the type `dtype`."""
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    values = torch.from_numpy(weight.copy())
    groups = values.reshape(-1) if args.strategy == "tensor" else values
    if args.strategy == "group":
        assert args.group_size is not None
        groups = values.reshape(len(values), -1, args.group_size)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    if args.strategy == "channel":
        scale, zero = scale[:, None], zero[:, None]
    scale = scale.reshape(1) if args.strategy == "tensor" else scale
    zero = zero.reshape(scale.shape)
    state = {"weight": values, "weight_scale": scale.to(dtype), "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(kind)
    stored: State = compressor.compress(state, scheme)
    wide = stored | {"weight_scale": stored["weight_scale"].float()}
    found = compressor.decompress(wide, scheme)["weight"]
    return Compressed(stored, found.numpy())


def reordered(matrix: Compressed, order: Array, group_size: int) -> Compressed:
    """Return `matrix` with its input channels in another order, as act-order by group leaves them:
    input k is column order[k] of what was quantized. The codes must be stored one in an int8."""
    stored = matrix.tensors | {
        "weight": matrix.tensors["weight"][:, order].contiguous(),
        "weight_g_idx": torch.from_numpy(order // group_size).to(torch.int32),
    }
    return Compressed(stored, matrix.weight[:, order])


def compress_model(
    args: QuantizationArgs | Mapping[str, QuantizationArgs],
    kind: str,
    config: LlamaConfig = tiny.GQA,
    *,
    skip: tuple[str, ...] = (),
    extra: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float16,
) -> dict[str, Compressed]:
    """Quantize the tiny model's linear layers except those in `skip`, and `extra` ones. `args` by
    the last part of the name ("" for the others)."""
    weights = tiny.weights(config)
    found = {}
    for module in [name for name in modules(config) if name not in skip] + list(extra):
        own = args
        if not isinstance(own, QuantizationArgs):
            own = own.get(module.rpartition(".")[2], own[""])
        found[module] = compress(weights[f"{module}.weight"], own, kind, dtype)
    return found


def group(args: QuantizationArgs, kind: str, *targets: str, **others: Any) -> dict[str, Any]:
    """Return an entry of config_groups, as the library writes it."""
    scheme = QuantizationScheme(targets=list(targets or ["Linear"]), weights=args, format=kind)
    return {**scheme.model_dump(mode="json"), **others}


def write(
    folder: Path,
    matrices: Mapping[str, Compressed],
    groups: Mapping[str, Any],
    *,
    config: LlamaConfig = tiny.GQA,
    settings: Mapping[str, Any] | None = None,
    extra: Mapping[str, torch.Tensor | None] | None = None,
) -> Path:
    """Write a checkpoint; tensors not in `matrices` are stored as float16. `settings` overrides
    keys of quantization_config (None removes); `extra` tensors are added, replaced, or with None
    removed."""
    raw: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "config_groups": dict(groups),
        "format": next(iter(groups.values()))["format"],
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.0",
    }
    raw = {k: v for k, v in (raw | dict(settings or {})).items() if v is not None}
    tiny.write_huggingface(folder, config, config_json={"quantization_config": raw})
    tensors: State = {}
    for name, weight in tiny.weights(config).items():
        module = name.removesuffix(".weight")
        if module in matrices:
            parts = matrices[module].tensors.items()
            tensors |= {f"{module}.{part}": tensor.contiguous() for part, tensor in parts}
        else:
            tensors[name] = torch.from_numpy(weight.astype(np.float16))
    for name, value in (extra or {}).items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def dequantized(
    matrices: Mapping[str, Compressed], config: LlamaConfig = tiny.GQA
) -> dict[str, Array]:
    """Return all weights of the model that `write` wrote, float32."""
    weights = {k: v.astype(np.float16).astype(np.float32) for k, v in tiny.weights(config).items()}
    return weights | {f"{module}.weight": matrix.weight for module, matrix in matrices.items()}

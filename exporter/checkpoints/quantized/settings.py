"""The quantization settings of a Hugging Face folder with GPTQ or AWQ codes.

They are in `quantization_config` in config.json, as transformers reads it. Before this key existed,
AutoGPTQ wrote quantize_config.json and AutoAWQ wrote quant_config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_onnx.exporter.formats.json import read_json
from llama_onnx.targets.errors import CheckpointError, UnsupportedError
from llama_onnx.targets.folder_files import file_inside
from llama_onnx.targets.printable import shown

WHOLE_ROW = -1
"""The group size that stands for one group per row."""

_SIDE_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_LAYOUTS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
"""Method -> layouts that can be read, the default first."""

_BITS = {"gptq": (4, 8), "awq": (4,)}

# Keys that change the model's results in ways that its codes do not show.
_MORE_THAN_CODES = ("is_marlin_format", "adapter", "rotation")


@dataclass(frozen=True)
class Quantization:
    """The quantization configuration; `where` names its file.

    `group_size` input channels share a scale and a zero point (`WHOLE_ROW`: all of them). With
    `act_order` the channels of a group need not be adjacent. `mixed`: some modules may have other
    bits and groups, or be unquantized. `shifted_zeros`: zero points are stored minus one, as in
    GPTQ's first layout. `borrows`: the one was subtracted from whole 32-bit words, so that a zero
    point of 0 borrows from the next field.
    """

    where: Path
    method: str
    layout: str
    bits: int
    group_size: int
    act_order: bool
    mixed: bool
    shifted_zeros: bool
    borrows: bool

    def describe(self) -> str:
        """Return method, bits, groups and layout, for display."""
        groups = (
            "one group per row" if self.group_size == WHOLE_ROW else f"groups of {self.group_size}"
        )
        order = "yes" if self.act_order else "no"
        kind = f"{self.method.upper()} {self.bits}-bit, {groups}"
        act_order = f", act-order {order}" if self.method == "gptq" else ""
        return f"{kind}{act_order}, layout {self.layout}{', mixed' if self.mixed else ''}"


def is_bitsandbytes(config: Mapping[str, Any]) -> bool:
    """Return whether the content of config.json names bitsandbytes as the quantization."""
    raw = config.get("quantization_config")
    if not isinstance(raw, dict):
        return False
    return raw.get("quant_method") == "bitsandbytes" or "load_in_4bit" in raw


def read_quantization(folder: Path, config: Mapping[str, Any]) -> Quantization | None:
    """Return the quantization of the checkpoint in `folder`, whose config.json holds `config`.

    Returns None if it is not quantized. Raises `UnsupportedError` for a method, layout or number of
    bits that is not supported, `CheckpointError` for an invalid value.
    """
    found = _find(folder, config)
    if found is None:
        return None
    where, raw = found
    method = raw.get("quant_method")
    if not isinstance(method, str) or method not in _LAYOUTS:
        raise UnsupportedError(
            f"{where}: the checkpoint is quantized with {shown(method)}, but only 'gptq', 'awq' "
            "and 'compressed-tensors' can be read: export the original weights."
        )
    layout = _layout(raw, method, where)
    for key in _MORE_THAN_CODES:
        if raw.get(key):
            raise UnsupportedError(
                f"{where}: {key} is {shown(raw[key])}, which is not supported: export the original "
                "weights."
            )
    return Quantization(
        where=where,
        method=method,
        layout=layout,
        bits=_bits(raw, method, where),
        group_size=_group_size(raw, where),
        act_order=raw.get("desc_act") is True,
        mixed=bool(raw.get("dynamic")),
        shifted_zeros=layout == "gptq",
        borrows="gptqmodel" in str(raw.get("meta")),
    )


def _find(folder: Path, config: Mapping[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    where = folder / "config.json"
    if raw := config.get("quantization_config"):
        return where, raw if isinstance(raw, dict) else {"quant_method": raw}
    for name, method in _SIDE_FILES.items():
        if file_inside(folder, name):
            return folder / name, {"quant_method": method, **read_json(folder / name)}
    return None


def _layout(raw: Mapping[str, Any], method: str, where: Path) -> str:
    known = _LAYOUTS[method]
    keys = ("checkpoint_format", "format") if method == "gptq" else ("version", "format")
    stated = [str(raw[key]).lower() for key in keys if raw.get(key)]
    layout = stated[0] if stated else known[0]
    if layout not in known:
        raise UnsupportedError(
            f"{where}: the {method.upper()} layout {shown(layout)} is not supported, only "
            f"{' and '.join(map(repr, known))}: convert it, or export the original weights."
        )
    return layout


def _bits(raw: Mapping[str, Any], method: str, where: Path) -> int:
    bits = raw.get("bits", raw.get("w_bit"))
    if not isinstance(bits, int) or isinstance(bits, bool):
        raise CheckpointError(f"{where}: bits must be a number, not {shown(bits)}.")
    if bits not in _BITS[method]:
        known = " and ".join(map(str, _BITS[method]))
        raise UnsupportedError(
            f"{where}: {method.upper()} with {bits} bits is not supported, only with {known}: "
            "export the original weights."
        )
    return bits


def _group_size(raw: Mapping[str, Any], where: Path) -> int:
    size = raw.get("group_size", raw.get("q_group_size"))
    if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != WHOLE_ROW):
        raise CheckpointError(
            f"{where}: group_size must be a positive number, or -1 for whole rows, not "
            f"{shown(size)}."
        )
    return size

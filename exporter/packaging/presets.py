"""Presets: names for sets of options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from llama_onnx.exporter.packaging.options import Options
from llama_onnx.targets.errors import UsageError

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "fast": {
        "precision": "int4",
        "quantizer": "best",
        "minimize": "time",
        "fuse_gate_up": True,
    },
    "small": {"precision": "int4", "quantizer": "best", "budget": "4.45bpw"},
    "default": {"precision": "int4", "quantizer": "awq"},
    "best": {"precision": "int4", "quantizer": "best", "budget": "5.25bpw"},
    "careful": {"precision": "int4", "quantizer": "best", "budget": "6.25bpw"},
}
"""The options that each sets, by the name in `--preset`. A budget is of the weights' file:
`model.onnx` adds 0.04 bits to a model of 135M parameters, and next to nothing to a large one."""


def with_preset(options: Options) -> Options:
    """Return `options` with what its preset sets.

    Raises `UsageError` if another value was chosen for one of them.

    >>> with_preset(Options(preset="small")).budget
    '4.45bpw'
    """
    if options.preset is None:
        return options
    defaults = {field.name: field.default for field in fields(Options)}
    sets = PRESETS[options.preset]
    for name, value in sets.items():
        chosen = getattr(options, name)
        if chosen not in (defaults[name], value):
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"--preset {options.preset} sets {flag} to {value}, not {chosen}: leave out {flag} "
                "or the preset."
            )
    return replace(options, **sets)

"""Figures of a package on a machine, as `llama-onnx bench --json` measured them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.strict_json import JSONError, parse_json


@dataclass(frozen=True)
class Figures:
    """What one replica does with `cores` processors.

    `prefill_rate` is in prompt tokens per second, `decode_rates` in tokens per second of all
    answers together, by how many there are at once: what is more than the first is the gain of
    batching. `position_bytes` is what a token takes in the cache, `resident` what the process takes
    after loading, without caches. `source` says where they come from.
    """

    source: str
    cores: int
    prefill_rate: float
    decode_rates: Mapping[int, float]
    load_seconds: float
    resident: int
    position_bytes: int


DEFAULTS = Figures(
    source="SmolLM2-135M in int4 (awq) on two vCPUs of an AMD EPYC (Zen 4, AVX512-VNNI), "
    "`llama-onnx bench --threads 2`",
    cores=2,
    prefill_rate=642.3,
    decode_rates={1: 94.0, 2: 134.6, 4: 171.9, 8: 204.2},
    load_seconds=0.89,
    resident=283_000_000,
    position_bytes=46_080,
)
"""For a first look: another model or machine has others."""


def read_figures(file: Path) -> Figures:
    """Return the figures in what `bench --json` printed. Raises `UsageError` for anything else."""
    try:
        content = parse_json(file.read_bytes())
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}.") from None
    except JSONError as error:
        raise UsageError(f"{file} is not what `llama-onnx bench --json` prints: {error}.") from None
    try:
        return _figures(content)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UsageError(
            f"{file} lacks figures: make it with `llama-onnx bench PACKAGE --json`, with our own "
            "engine, which measures several answers at once and the caches."
        ) from None


def _figures(content: Mapping[str, Any]) -> Figures:
    rates = {int(row["streams"]): _number(row["rate"]["median"]) for row in content["streams"]}
    if 1 not in rates:
        raise ValueError
    processor = content.get("processor") or "an unknown processor"
    return Figures(
        source=f"{Path(content['package']).name} on {processor}, measured by bench",
        cores=int(_number(content["threads"] or content["processors"])),
        prefill_rate=_number(content["prefill_rate"]["median"]),
        decode_rates=dict(sorted(rates.items())),
        load_seconds=_number(content["load_seconds"]),
        resident=int(_number(content["resident"])),
        position_bytes=int(_number(content["caches"]["position_bytes"])),
    )


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    if not (math.isfinite(value) and value > 0):
        raise ValueError
    return float(value)

"""The quantizers that can be chosen by name; each is imported when it is first used.

Importing this module imports neither numpy nor any quantizer, so the command line can list them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from llama_onnx.targets.errors import UsageError

if TYPE_CHECKING:
    from llama_onnx.exporter.quantize.base import CalibratedQuantizer, Quantizer


def _rtn() -> Quantizer:
    from llama_onnx.exporter.quantize.rtn import RoundToNearest

    return RoundToNearest()


def _awq() -> CalibratedQuantizer:
    from llama_onnx.exporter.quantize.awq import ActivationAware

    return ActivationAware()


def _gptq() -> CalibratedQuantizer:
    from llama_onnx.exporter.quantize.gptq import Gptq

    return Gptq()


def _best() -> CalibratedQuantizer:
    from llama_onnx.exporter.quantize.gptq import Gptq

    return Gptq("best", weighs=True, shrink=0.65)


QUANTIZERS: Mapping[str, Callable[[], Quantizer | CalibratedQuantizer]] = {
    "rtn": _rtn,
    "awq": _awq,
    "gptq": _gptq,
    "best": _best,
}
"""Name -> function that returns a new quantizer."""

DEFAULT_QUANTIZERS: Mapping[str, str] = {"int4": "awq"}
"""Precision -> quantizer, where it is not `rtn`."""

CORRELATING, WEIGHING = ("gptq", "best"), ("best",)
"""Those that look at how channels correlate, and those that also pass the text backward."""

CALIBRATED = ("awq", "gptq", "best")
"""Those that need tokens; they leave matrices whose inputs are not known to `rtn`."""


def get_quantizer(name: str) -> Quantizer | CalibratedQuantizer:
    """Return the quantizer called `name`; raises `UsageError` for an unknown one.

    >>> get_quantizer("rtn").name
    'rtn'
    """
    if name not in QUANTIZERS:
        raise UsageError(f"unknown quantizer {name!r}: use {', '.join(QUANTIZERS)}.")
    return QUANTIZERS[name]()


def plain_quantizer(name: str) -> Quantizer:
    """Return the quantizer called `name`, or for one that calibrates the one that does not."""
    from llama_onnx.exporter.quantize.base import CalibratedQuantizer

    found = get_quantizer(name)
    return _rtn() if isinstance(found, CalibratedQuantizer) else found

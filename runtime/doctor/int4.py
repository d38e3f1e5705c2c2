"""Determine which of ONNX Runtime's int4 kernels a processor runs, from its instruction sets.

MatMulNBits has kernels for each set of instructions below and uses the best that the processor has
(onnxruntime/core/mlas/lib/platform.cpp). They multiply in int8 where the package allows it
(`--accuracy-level 4`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from llama_onnx.runtime.doctor.facts import Int4Kernels, Processor
from llama_onnx.runtime.doctor.finding import Finding

_KERNELS: Mapping[str, tuple[str, ...]] = {
    "AVX512-VNNI": ("AVX2", "AVX512", "VNNI"),
    "AVX512": ("AVX2", "AVX512"),
    "AVX-VNNI": ("AVX2", "AVX-VNNI"),
    "AVX2": ("AVX2",),
    "NEON i8mm": ("dot product", "int8 matrix"),
    "NEON dot product": ("dot product",),
}
"""Kernels -> the features they need, the best of a processor's first."""


def int4_kernels(features: Mapping[str, bool | None]) -> Int4Kernels:
    """Return the kernels that a processor with `features` runs, and those it may run."""
    maybe: list[str] = []
    for name, needed in _KERNELS.items():
        if all(features.get(feature) for feature in needed):
            return Int4Kernels(name, tuple(maybe))
        if all(feature in features and features[feature] is not False for feature in needed):
            maybe.append(name)
    return Int4Kernels(None, tuple(maybe))


def judge_int4(processor: Processor) -> Finding:
    """Report the kernels that run int4 packages here, and which block size suits them."""
    kernels, features = processor.int4, processor.features
    if kernels.name is None and not features:
        return Finding("int4", "ok", "the kernels it runs on cannot be determined here")
    if kernels.name is None and not kernels.maybe:
        return _without_kernels(features)
    return Finding("int4", "ok", "".join(_describe(kernels)))


def _describe(kernels: Int4Kernels) -> Iterator[str]:
    yield f"runs on the {kernels.name or 'plain'} kernels, with products in int8"
    if kernels.maybe:
        yield f", or on {' or '.join(kernels.maybe)}: this system does not report it"
    elif kernels.name in ("AVX512-VNNI", "AVX-VNNI"):
        yield "; with VNNI, blocks of 128 are faster than blocks of 32"
    elif kernels.name in ("AVX512", "AVX2"):
        yield "; without VNNI, blocks of 128 are hardly faster than blocks of 32"


def _without_kernels(features: Mapping[str, bool | None]) -> Finding:
    x86 = "AVX2" in features
    lacking = "AVX2" if x86 else "the dot product instructions"
    found = f"has no fast kernels without {lacking}: weights are unpacked again at every step"
    remedy = "in a virtual machine, expose the host's processor, for QEMU with `-cpu host`"
    return Finding("int4", "warning", found, remedy if x86 else None)

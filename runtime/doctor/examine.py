"""Derive all findings about a machine from its facts."""

from __future__ import annotations

from collections.abc import Iterator

from llama_onnx.runtime.doctor.devices import judge_devices
from llama_onnx.runtime.doctor.facts import Facts
from llama_onnx.runtime.doctor.finding import Finding
from llama_onnx.runtime.doctor.hardware import judge_hardware
from llama_onnx.runtime.doctor.software import (
    judge_encodings,
    judge_export,
    judge_genai,
    judge_onnxruntime,
    judge_python,
    judge_telemetry,
)
from llama_onnx.runtime.doctor.windows import judge_windows


def examine(facts: Facts) -> Iterator[Finding]:
    """Yield all findings, those that others depend on first."""
    yield judge_python(facts.python)
    yield judge_export(facts.wheels)
    if facts.windows:
        yield from judge_windows(facts.windows)
    yield judge_onnxruntime(facts.wheels, facts.onnxruntime)
    yield judge_genai(facts.wheels, facts.genai)
    yield from judge_devices(facts)
    yield from judge_hardware(facts.processor, facts.memory, facts.disks, facts.platform)
    yield judge_encodings(facts.encodings, facts.platform)
    yield judge_telemetry(facts.telemetry)

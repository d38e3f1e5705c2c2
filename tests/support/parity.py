"""Tiny packages of every kind, and their reports by `validate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.parity.measure.open_subject import open_subject
from llama_onnx.exporter.parity.measure.prompts import make_prompts
from llama_onnx.exporter.parity.measure.report import ParityReport
from llama_onnx.exporter.parity.measure.shipped import PromptSet
from llama_onnx.exporter.parity.measure.validate import validate
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.targets import cpu
from tests.support import tiny
from tests.support.once import make_once

TIED = replace(tiny.GQA, tie_word_embeddings=True)
MHA = replace(tiny.GQA, num_key_value_heads=4)
PARTIAL = replace(tiny.GQA, hidden_size=80, intermediate_size=72)  # no multiples of a block of 32

EXPORTS = {
    "fp32": (tiny.GQA, Options("fp32")),
    "fp16": (tiny.GQA, Options("fp16")),
    "int8": (tiny.GQA, Options("int8")),
    "int4": (tiny.GQA, Options("int4", quantizer="rtn")),
    "int4-awq": (tiny.GQA, Options("int4", quantizer="awq")),
    "int4-awq-tied": (TIED, Options("int4", quantizer="awq", embedding="int4")),
    "int4-awq-partial-fused": (PARTIAL, Options("int4", quantizer="awq", fuse_gate_up=True)),
    "int4-gptq": (MHA, Options("int4", quantizer="gptq")),
    "fp32-tied": (TIED, Options("fp32")),
    "int4-tied": (TIED, Options("int4", quantizer="rtn")),
    "int4-partial-fused": (PARTIAL, Options("int4", quantizer="rtn", fuse_gate_up=True)),
    "fp32-mha": (MHA, Options("fp32")),
    "fp16-tied": (TIED, Options("fp16")),
    "int8-tied": (TIED, Options("int8")),
    "int8-partial": (PARTIAL, Options("int8")),
    "int4-mha-16": (MHA, Options("int4", quantizer="rtn", block_size=16)),
    "int4-exact": (tiny.GQA, Options("int4", quantizer="rtn", accuracy_level=1)),
    "int4-last": (tiny.GQA, Options("int4", quantizer="rtn", logits="last")),
    "fp32-llama3": (replace(tiny.GQA, rope_scaling=tiny.ROPE_SCALINGS["llama3"]), Options("fp32")),
    "fp32-dynamic": (
        replace(tiny.GQA, rope_scaling=tiny.ROPE_SCALINGS["dynamic"]), Options("fp32")
    ),
    "int8-linear": (replace(tiny.GQA, rope_scaling=tiny.ROPE_SCALINGS["linear"]), Options("int8")),
    "int4-yarn": (
        replace(tiny.GQA, rope_scaling=tiny.ROPE_SCALINGS["yarn"]), Options("int4", quantizer="rtn")
    ),
}  # fmt: skip
"""Sound packages: model and options by name, which begins with the precision."""


Make = Callable[[str], tuple[Path, Path]]
"""A function from a name in `EXPORTS` to a package and its source."""


def maker(root: Path) -> Make:
    """Return a function that makes each of `EXPORTS` in `root`, once."""

    def make(name: str) -> tuple[Path, Path]:
        config, options = EXPORTS[name]
        source = root / f"{name}-source"

        def export(package: Path) -> None:
            tiny.write_huggingface(source, config)
            export_package(source, package, cpu.TARGET, options)

        return make_once(root / name, export), source

    return make


def report_on(
    package: Path, source: Path, tokens: int = 12, longest: int = 32, **options: Any
) -> ParityReport:
    subject = open_subject(package, open_checkpoint(source))
    prompts = make_prompts(package, subject.weights.config, tokens=tokens, longest=longest)
    return validate(subject, PromptSet(prompts, tokens), **options)[0]


def figures(report: ParityReport) -> dict[str, dict[str, float]]:
    """Return the figures by error and situation, such as "graph prefill" or "quantization"."""
    return {f"{m.error} {m.situation}".strip(): asdict(m.figures) for m in report.measurements}


def missed(report: ParityReport) -> set[str]:
    return {check.threshold.measure for check in report.checks if not check.passed}


def missed_in(report: ParityReport, measure: str) -> set[str]:
    checks = [check for check in report.checks if check.threshold.measure == measure]
    return {check.situation for check in checks if not check.passed}

"""The whole proof of a package, as `validate` and `export --prove` want it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llama_onnx.exporter.checkpoints.package.package import PackageCheckpoint
from llama_onnx.exporter.checkpoints.package.same_model import check_same_model
from llama_onnx.exporter.model.checkpoint import Checkpoint, check_tensors
from llama_onnx.exporter.packaging.export import WITHOUT_KERNELS
from llama_onnx.exporter.parity.certify import certificate_prompts, write_certificate
from llama_onnx.exporter.parity.measure.prompts import TEXTS, make_prompts
from llama_onnx.exporter.parity.measure.shipped import NOTHING, Asked
from llama_onnx.exporter.parity.measure.validate import (
    ParityReport,
    Progress,
    validate,
)
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.package import ModelPackage, check_unsigned

TOKENS, PROMPT_TOKENS = 64, 128


def prove(
    package: Path,
    original: Checkpoint,
    *,
    texts: Sequence[str] = TEXTS,
    tokens: int = TOKENS,
    longest: int = PROMPT_TOKENS,
    swapped: tuple[str, Path] | None = None,
    max_kl: float | None = None,
    thorough: bool = False,
    certify: bool = False,
    progress: Progress | None = None,
) -> ParityReport:
    """Validate `package` on `texts`, prompts of at most `longest` tokens continued by `tokens`,
    and if `thorough` to the context's end; if it passes and `certify` is asked for, write its
    certificate into it. `swapped` is an adapter to be active, as in `validate`."""
    if certify and swapped:
        raise UsageError("A certificate is about the bare base: certify without --adapter.")
    if certify:
        check_unsigned(ModelPackage.open(package))
    weights = PackageCheckpoint.open(package)
    if weights.activations in WITHOUT_KERNELS:
        raise UsageError(
            f"{package} has activations in {weights.activations}, in which no CPU kernel computes: "
            "validate an export in fp16, whose graph is the same but for that."
        )
    check_same_model(weights, original)
    check_tensors(original)
    prompts = make_prompts(package, weights.config, texts, tokens=tokens, longest=longest)
    report, evidence = validate(
        package,
        original,
        Asked(prompts, tokens),
        short=certificate_prompts(package, weights.config) if certify else NOTHING,
        texts=texts,
        swapped=swapped,
        max_kl=max_kl,
        thorough=thorough,
        progress=progress,
    )
    if certify and report.passed:
        write_certificate(ModelPackage.open(package), report, evidence)
    return report

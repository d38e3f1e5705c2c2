"""Writes the certificate that a package carries; `runtime.measure.verify` replays it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from llama_onnx.exporter.formats.tensor import Float32
from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.parity.measure.evidence import Evidence
from llama_onnx.exporter.parity.measure.prompts import TEXTS, make_prompts
from llama_onnx.exporter.parity.measure.report import ParityReport
from llama_onnx.exporter.parity.measure.shipped import PromptSet
from llama_onnx.runtime.measure.certificate import (
    CERTIFICATE,
    COVERED_FILES,
    FOLDER,
    FORMAT_VERSION,
    MAX_BYTES,
    REFERENCE,
    Certificate,
    FullRows,
    next_tokens,
    to_arrays,
)
from llama_onnx.runtime.measure.jsontext import dumps
from llama_onnx.runtime.measure.metrics import TopK
from llama_onnx.runtime.measure.situations import Passage
from llama_onnx.runtime.measure.thresholds import all_thresholds
from llama_onnx.targets.durable import rename_folder
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.listing import hash_file
from llama_onnx.targets.package import ModelPackage, renew_manifest

PROMPT_TOKENS = (26, 18, 10, 2)
TOKENS = 8
"""Maximum tokens of each prompt, and of its continuation: a CPU replays them on a 7B model in half
a minute. The lengths differ, so that a batch is padded; the longest crosses the edge of a block."""

TOP_K = 128
_FULL_ROWS = 2  # positions of a passage whose logits are kept whole, if they fit
_PARTIAL = f"{FOLDER}.partial"


def certificate_prompts(package: Path, config: LlamaConfig) -> PromptSet:
    """Return the prompts of the certificate of `package`."""
    longest = max(PROMPT_TOKENS)
    prompts = make_prompts(package, config, TEXTS, tokens=TOKENS, longest=longest)
    cut = [prompt[:count] for prompt, count in zip(prompts, PROMPT_TOKENS, strict=False)]
    return PromptSet(cut, TOKENS)


def write_certificate(package: ModelPackage, report: ParityReport, evidence: Evidence) -> None:
    """Write the certificate of `package` into it, and renew its manifest.

    The certificate has the figures of `report`, and the logits of `evidence` on the
    `certificate_prompts`. Raises `PackageError` for a package that did not pass, and so for one
    with a changed file, and for one below its limits of fidelity unless the loss was accepted.
    """
    if not report.accepted:
        raise PackageError(f"{package.path} did not pass validation, so it cannot be certified.")
    _write(package, _certificate(package, report, evidence))


def _certificate(package: ModelPackage, report: ParityReport, evidence: Evidence) -> Certificate:
    passages = evidence.shipped.certificate_passages
    files = package.manifest["files"]
    texts = TEXTS if "tokenizer.json" in files else (None,) * len(passages)
    content = {
        "format_version": FORMAT_VERSION,
        "created_with": dict(report.about.versions),
        "precision": report.precision,
        "activations": report.activations,
        "vocab_size": evidence.certificate_original_logits[0].shape[1],
        "files": {name: files[name]["sha256"] for name in COVERED_FILES if name in files},
        "passages": [
            {"text": text, "prompt": passage.prompt}
            for text, passage in zip(texts, passages, strict=True)
        ],
        "validated": json.loads(report.to_json()),
        "thresholds": [row.to_json() for row in all_thresholds()],
    }
    # Curves and layers are only for the report: a device cannot measure them.
    for key in ("curves", "layers", "package", "reference", "about", "altered", "seconds"):
        del content["validated"][key]
    return Certificate(
        content,
        texts,
        passages,
        _cut(passages, evidence.certificate_package_logits),
        _cut(passages, evidence.certificate_original_logits),
        tuple(_full_rows(passages, evidence.certificate_package_logits)),
    )


def _cut(passages: Sequence[Passage], logits: Sequence[Float32]) -> tuple[TopK, ...]:
    return tuple(
        TopK.of(rows, next_tokens(passage), TOP_K)
        for passage, rows in zip(passages, logits, strict=True)
    )


def _full_rows(passages: Sequence[Passage], logits: Sequence[Float32]) -> Iterator[FullRows]:
    """Yield the last position of the prompt and of the passage, up to half of `MAX_BYTES`."""
    room = MAX_BYTES // 2
    for index, (passage, rows) in enumerate(zip(passages, logits, strict=True)):
        chosen = np.array([passage.prompt - 1, len(passage.ids) - 1][:_FULL_ROWS])
        chosen = chosen[: room // rows[0].nbytes]
        if not len(chosen):
            return
        room -= rows[chosen].nbytes
        yield FullRows(index, chosen, rows[chosen])


def _write(package: ModelPackage, certificate: Certificate) -> None:
    """Write both files to a temporary folder, then rename it and add them to the manifest."""
    from safetensors.numpy import save

    aside, folder = package.path / _PARTIAL, package.path / FOLDER
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        (aside / REFERENCE).write_bytes(save(to_arrays(certificate)))
        content = {**certificate.content, "reference": {"sha256": hash_file(aside / REFERENCE)}}
        (aside / CERTIFICATE).write_text(dumps(content) + "\n", "utf-8")
        size = sum(file.stat().st_size for file in aside.iterdir())
        assert size <= MAX_BYTES, f"the certificate takes {size:,} bytes"
        shutil.rmtree(folder, ignore_errors=True)
        rename_folder(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    renew_manifest(package, rewritten=[f"{FOLDER}/{CERTIFICATE}", f"{FOLDER}/{REFERENCE}"])

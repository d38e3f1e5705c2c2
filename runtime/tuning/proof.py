"""Whether what does not compute the same, bit for bit, keeps a certificate's limits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llama_onnx.runtime.measure.certificate import (
    CERTIFICATE,
    FOLDER,
    Certificate,
    read_certificate,
    stale_files,
)
from llama_onnx.runtime.measure.graph_session import GraphSession
from llama_onnx.runtime.measure.metrics import Comparison
from llama_onnx.runtime.measure.replay import replay
from llama_onnx.runtime.measure.situations import PREFILL
from llama_onnx.runtime.measure.thresholds import Check
from llama_onnx.runtime.measure.verify import checks_of
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.progress import SILENT
from llama_onnx.targets.providers import CPU


@dataclass(frozen=True)
class Proof:
    """What a replay of the certificate's passages found, each read at once: the `checks` are the
    distance from the package's weights, `figures` that from the original's."""

    checks: tuple[Check, ...]
    figures: Comparison | None

    @property
    def problem(self) -> str | None:
        """The first limit that does not hold, in words; None if all do."""
        for check in self.checks:
            if not check.passed:
                metric, limit = check.threshold.metric.replace("_", " "), check.threshold.limit
                nothing = check.value != check.value
                found = "is not a number" if nothing else f"is {check.value:.2g}"
                return f"on the certificate's passages the {metric} {found}, the limit {limit:g}"
        return None


def certificate_of(package: ModelPackage) -> Certificate:
    """Return the certificate of `package`; raises `PackageError` if it has none, or one for other
    files."""
    if not (package.path / FOLDER / CERTIFICATE).exists():
        raise PackageError(
            f"{package.path} has no certificate: make one with `llama-onnx validate {package.path} "
            "--reference SOURCE --certify`."
        )
    certificate = read_certificate(package.path)
    if stale_files(certificate, package):
        raise PackageError(
            f"the certificate of {package.path} is for other files: make a new one with "
            f"`llama-onnx validate {package.path} --reference SOURCE --certify`."
        )
    return certificate


def prove(folder: Path, certificate: Certificate, *, tiled_attention: bool = True) -> Proof:
    """Replay `certificate` on the graph in `folder`."""
    graph = GraphSession.open(folder, tiled_attention=tiled_attention)
    (figures,), _ = replay(certificate, graph, [PREFILL], SILENT)
    checks = checks_of(certificate, CPU, [figures], [])
    return Proof(tuple(c for c in checks if c.threshold.measure == "shipped"), figures.total)

"""Check a package's signature and files, and replay its certificate on this machine.

A replay needs onnxruntime and numpy, but neither PyTorch nor the original weights. Checking only
the files does not need onnxruntime either.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from llama_onnx.runtime import ort
from llama_onnx.runtime.llama.text_files import open_genai_tokenizer
from llama_onnx.runtime.measure.certificate import Certificate, read_certificate
from llama_onnx.runtime.measure.claims import (
    check_activations,
    check_claims,
    claimed_fidelity,
)
from llama_onnx.runtime.measure.fidelity import Fidelity
from llama_onnx.runtime.measure.graph_session import GraphSession
from llama_onnx.runtime.measure.integrity import Hashing, Integrity, package_of
from llama_onnx.runtime.measure.metrics import (
    NEAR_TIE,
    Comparison,
    Divergence,
)
from llama_onnx.runtime.measure.replay import (
    SituationFigures,
    divergences_of,
    full_rows,
    replay,
)
from llama_onnx.runtime.measure.situations import (
    DECODE,
    PREFILL,
    Situation,
    situations_of,
)
from llama_onnx.runtime.measure.thresholds import Check, check, strictest, thresholds
from llama_onnx.runtime.memory import bounded_memory, forgetting_pages
from llama_onnx.runtime.placement.session import OpenSession, open_session
from llama_onnx.targets.bundle import Bundle, open_shipped
from llama_onnx.targets.errors import (
    LlamaOnnxError,
    MissingDependencyError,
    PackageError,
    UsageError,
)
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.progress import SILENT, Progress
from llama_onnx.targets.provider import Provider
from llama_onnx.targets.registry import get_target
from llama_onnx.targets.signature import Signature, check_signature

_STEP_SECONDS = 60.0
_SLOWEST_DISK = 5e6  # bytes a second
_LARGE = 1 << 30  # bytes of weights from which less is replayed: a token takes 0.05 s or more
_MEMORY, _COPIES = 4 << 30, 4  # bytes, and times the weights: an honest replay takes half as much


@dataclass(frozen=True)
class VerifyReport:
    """The result of `verify`.

    Nothing is replayed if only the files are checked, or if files or signature are not valid: then
    there are no figures. `activations` and `provider` are None if only the files are checked.
    `fidelity` is what the certificate claims: without the original nobody can measure it here.
    `reduced` is whether batches, and two at once, had only the first tokens of each passage.

    Of the `seconds`, "opening" and "hashing" are at the same time.
    """

    package: str
    precision: str
    versions: dict[str, str]
    integrity: Integrity
    signature: Signature
    seconds: dict[str, float]
    activations: str | None = None
    provider: str | None = None
    placement: dict[str, Any] | None = None
    fallback: str | None = None
    situations: tuple[SituationFigures, ...] = ()
    divergences: tuple[Divergence | None, ...] = ()
    full: Comparison | None = None
    kl_difference: float | None = None
    checks: tuple[Check, ...] = ()
    fidelity: Fidelity | None = None
    reduced: bool = False

    @property
    def passed(self) -> bool:
        """Whether files and signature are valid, and every threshold holds."""
        return self.intact and all(check.passed for check in self.checks)

    @property
    def intact(self) -> bool:
        """Whether files and signature are valid."""
        return self.integrity.passed and self.signature.passed

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values, the verdict first."""
        content = asdict(self)
        content["integrity"]["passed"] = self.integrity.passed
        content["signature"]["passed"] = self.signature.passed
        content["checks"] = [check_.to_json() for check_ in self.checks]
        if self.fidelity:
            content["fidelity"] = {"claimed": True, **self.fidelity.to_json()}
        return {"passed": self.passed, **content}


def verify(
    path: Path,
    provider: Provider | None = None,
    *,
    key: Path | None = None,
    name: str | None = None,
    threads: int | None = None,
    allow_fallback: bool = False,
    situations: Sequence[Situation] | None = None,
    progress: Progress = SILENT,
) -> VerifyReport:
    """Check every file of the package at `path`, then replay its certificate.

    If `path` is a bundle, all its files are checked, and its package is replayed. `provider`
    replaces the target's; `allow_fallback` lets the CPU run what it cannot. `key` is a file with
    the signer's public key; with `name`, the signed model or its source must be called so.
    `situations` default to all that apply to the graph.

    Raises `PackageError` for a package that has no certificate or does not run, `ProviderError`
    if `provider` cannot run it, `UsageError` for a `key` that is not a public key.
    """
    shipped = open_shipped(path)
    package = package_of(shipped)
    certificate = read_certificate(package.path)
    report = _begin(shipped, certificate, key, name)
    provider = provider or get_target(package.target).session.provider
    report = replace(report, activations=certificate.content["activations"], provider=provider.name)
    with Hashing(shipped, certificate, progress) as hashing:
        if not (hashing.clean and report.signature.passed):
            return _finish(report, hashing)
        try:
            wanted = _Replay(package, certificate, provider, threads, allow_fallback, situations)
            return wanted.run(report, hashing, progress)
        except LlamaOnnxError:
            report = _finish(report, hashing)
            if report.intact:
                raise
            return report


@dataclass(frozen=True)
class _Replay:
    """What to replay, and how; see `verify`."""

    package: ModelPackage
    certificate: Certificate
    provider: Provider
    threads: int | None
    allow_fallback: bool
    situations: Sequence[Situation] | None

    def run(self, report: VerifyReport, hashing: Hashing, progress: Progress) -> VerifyReport:
        """Return the `report`, completed by opening the graph and replaying the certificate.

        The graph is opened while the data file is being hashed, and replayed only if that is
        intact.
        """
        _check_more(self.package, self.certificate)
        most = _MEMORY + _COPIES * self.package.data_path.stat().st_size
        with bounded_memory(most, f"the replay of {self.package.path}"):
            started = perf_counter()
            opened = self._open()
            ready = perf_counter()
            report = _finish(report, hashing)
            if not report.intact:
                return report
            fidelity = claimed_fidelity(self.package, self.certificate)
            seconds = {**report.seconds, "opening": ready - started}
            report = replace(report, fidelity=fidelity, seconds=seconds)
            return self._replayed(report, opened, progress)

    def _open(self) -> OpenSession:
        with forgetting_pages(self.package.data_path):
            opened = open_session(
                self.package.model_path,
                self.provider,
                threads=self.threads,
                allow_fallback=self.allow_fallback,
            )
        activations = self.certificate.content["activations"]
        check_activations(self.package, activations, opened.session)
        return opened

    def _replayed(
        self, report: VerifyReport, opened: OpenSession, progress: Progress
    ) -> VerifyReport:
        started, certificate = perf_counter(), self.certificate
        graph = GraphSession(
            opened.session,
            shares_buffer=opened.shares_buffer,
            step_seconds=_step_seconds(self.package),
        )
        reduced = self.situations is None and self.package.data_path.stat().st_size >= _LARGE
        situations = self.situations or situations_of(
            shared_buffer=opened.shares_buffer,
            continues=self.provider.continues,
            short=reduced,
        )
        figures, rows = replay(certificate, graph, situations, progress)
        full, difference = full_rows(certificate, rows.get(PREFILL.name, {}))
        divergences = divergences_of(certificate, rows.get(DECODE.name, {}))
        return replace(
            report,
            seconds={**report.seconds, "replay": perf_counter() - started},
            placement=opened.placement.to_json(),
            fallback=opened.fallback,
            situations=tuple(figures),
            divergences=divergences,
            full=full,
            kl_difference=difference,
            checks=checks_of(certificate, self.provider, figures, divergences),
            reduced=reduced,
        )


def _check_more(package: ModelPackage, certificate: Certificate) -> None:
    """Raise `PackageError` if the certificate claims too much, or genai cannot read texts."""
    check_claims(package, certificate)
    if package.has_tokenizer:
        open_genai_tokenizer(package.path)


def verify_files(
    path: Path,
    *,
    key: Path | None = None,
    name: str | None = None,
    progress: Progress = SILENT,
) -> VerifyReport:
    """Check every file of the package or bundle at `path`, and its signature if `key` is given.

    With `name`, the signed model or its source must be called so. Runs nothing and needs no
    certificate. Raises `PackageError` if `path` is neither a package nor a bundle, `UsageError` for
    a `key` that is not a public key.
    """
    shipped = open_shipped(path)
    report = _begin(shipped, None, key, name)
    with Hashing(shipped, None, progress) as hashing:
        return _finish(report, hashing)


def _begin(
    shipped: ModelPackage | Bundle,
    certificate: Certificate | None,
    key: Path | None,
    name: str | None,
) -> VerifyReport:
    """Return a report on the signature, before minutes of hashing."""
    if name is not None and key is None:
        raise UsageError("a name is that of a signed model: pass the signer's public key too.")
    return VerifyReport(
        package=str(shipped.path),
        precision=shipped.precision,
        versions=versions() if certificate else _versions_if_installed(),
        integrity=Integrity(len(shipped.files), (), (), None),
        signature=check_signature(shipped.index, shipped.listing, key, name),
        seconds={},
    )


def _finish(report: VerifyReport, hashing: Hashing) -> VerifyReport:
    """Return the `report` with the result of `hashing`, when that has ended."""
    integrity, seconds = hashing.finish()
    return replace(report, integrity=integrity, seconds={"hashing": seconds})


def _step_seconds(package: ModelPackage) -> float:
    """Return the most seconds that a step may take: more than a slow disk needs for the weights."""
    return _STEP_SECONDS + package.data_path.stat().st_size / _SLOWEST_DISK


def versions() -> dict[str, str]:
    """Return the versions of what runs here.

    Raises `MissingDependencyError` if onnxruntime is not installed.
    """
    return {"onnxruntime": ort.version(), **_other_versions()}


def _versions_if_installed() -> dict[str, str]:
    """Return the versions of what is installed here: checking files does not need onnxruntime."""
    try:
        return versions()
    except MissingDependencyError:
        return _other_versions()


def _other_versions() -> dict[str, str]:
    return {
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def checks_of(
    certificate: Certificate,
    provider: Provider,
    figures: Sequence[SituationFigures],
    divergences: Sequence[Divergence | None],
) -> tuple[Check, ...]:
    """Return what was replayed beside the limits that hold for it; raises `PackageError` if there
    are none."""
    precision, activations = certificate.content["precision"], certificate.content["activations"]
    # A package is not believed about itself: its certificate can only add to our own limits.
    own = thresholds(precision, activations, provider.name)
    rows = [
        row
        for row in strictest((*own, *certificate.thresholds))
        if row.measure in ("shipped", "replay")
        and row.applies(precision, activations, provider.name)
    ]
    values = {
        ("shipped", entry.situation, metric): value
        for entry in figures
        for metric, value in asdict(entry.shipped).items()
        if value is not None
    }
    clear = [d for d in divergences if d is not None and not abs(d.margin) <= NEAR_TIE]
    values["replay", "", "divergences"] = len(clear)
    checks = check(rows, values)
    if not any(entry.threshold.measure == "shipped" for entry in checks):
        raise PackageError(
            f"the certificate has no threshold for {precision} with {activations} activations on "
            f"{provider.name}: export the package with a newer llama-onnx."
        )
    return checks

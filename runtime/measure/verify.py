"""Check a package's signature and files, and replay its certificate on this machine.

A replay needs onnxruntime and numpy, but neither PyTorch nor the original weights. Checking only
the files does not need onnxruntime either.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from llama_onnx.runtime import ort
from llama_onnx.runtime.llama.text_files import open_genai_tokenizer
from llama_onnx.runtime.measure.certificate import Certificate, next_tokens, read_certificate
from llama_onnx.runtime.measure.claims import (
    check_activations,
    check_claims,
    claimed_fidelity,
)
from llama_onnx.runtime.measure.fidelity import Fidelity
from llama_onnx.runtime.measure.graph_session import GraphSession
from llama_onnx.runtime.measure.integrity import Integrity, check_integrity, package_of
from llama_onnx.runtime.measure.metrics import (
    NEAR_TIE,
    Comparison,
    Divergence,
    Logits,
    PositionFigures,
    TopK,
    figures_in_pieces,
    margin,
    position_figures,
    summarize,
)
from llama_onnx.runtime.measure.situations import (
    DECODE,
    PREFILL,
    Observation,
    Passage,
    Situation,
    looks_everywhere,
    situations_of,
    try_situation,
)
from llama_onnx.runtime.measure.thresholds import Check, check, strictest, thresholds
from llama_onnx.runtime.memory import bounded_memory, forgetting_pages
from llama_onnx.runtime.placement.session import open_session
from llama_onnx.targets.bundle import Bundle, open_shipped
from llama_onnx.targets.errors import MissingDependencyError, PackageError, UsageError
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.progress import SILENT, Progress
from llama_onnx.targets.provider import Provider
from llama_onnx.targets.registry import get_target
from llama_onnx.targets.signature import Signature, check_signature

_STEP_SECONDS = 60.0
_SLOWEST_DISK = 5e6  # bytes a second
_MEMORY, _COPIES = 4 << 30, 4  # bytes, and times the weights: an honest replay takes half as much

Rows = Mapping[tuple[int, int], Logits]
"""(passage number, position) -> logits [V], of one situation."""


@dataclass(frozen=True)
class SituationFigures:
    """The package as it runs here, compared with the references.

    `shipped` is against the package's weights, `total` against the original weights, which only the
    situations in `WHOLE` have; None elsewhere.
    """

    situation: str
    meaning: str
    shipped: Comparison
    total: Comparison | None


@dataclass(frozen=True)
class VerifyReport:
    """The result of `verify`.

    Nothing is replayed if only the files are checked, or if files or signature are not valid: then
    there are no figures. `activations` and `provider` are None if only the files are checked.
    `fidelity` is what the certificate claims: without the original nobody can measure it here.
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
    report = _check_files(shipped, certificate, key, name, progress)
    provider = provider or get_target(package.target).session.provider
    report = replace(report, activations=certificate.content["activations"], provider=provider.name)
    if not report.intact:
        return report
    _check_more(package, certificate)
    report = replace(report, fidelity=claimed_fidelity(package, certificate))
    most = _MEMORY + _COPIES * package.data_path.stat().st_size
    with bounded_memory(most, f"the replay of {package.path}"):
        opening = (provider, threads, allow_fallback)
        return _replayed(package, certificate, report, opening, situations, progress)


def _replayed(
    package: ModelPackage,
    certificate: Certificate,
    report: VerifyReport,
    opening: tuple[Provider, int | None, bool],
    situations: Sequence[Situation] | None,
    progress: Progress,
) -> VerifyReport:
    """Return the `report`, completed by opening the graph and replaying the certificate.

    `opening` is the provider, the number of threads, and whether the CPU may help.
    """
    provider, threads, allow_fallback = opening
    started = perf_counter()
    with forgetting_pages(package.data_path):
        opened = open_session(
            package.model_path, provider, threads=threads, allow_fallback=allow_fallback
        )
    check_activations(package, certificate.content["activations"], opened.session)
    graph = GraphSession(
        opened.session,
        shares_buffer=opened.shares_buffer,
        step_seconds=_step_seconds(package),
    )
    ready = perf_counter()
    if situations is None:
        situations = situations_of(shared_buffer=opened.shares_buffer, continues=provider.continues)
    figures, rows = _replay(certificate, graph, situations, progress)
    done = perf_counter()
    full, difference = _full_rows(certificate, rows.get(PREFILL.name, {}))
    divergences = _divergences(certificate, rows.get(DECODE.name, {}))
    return replace(
        report,
        seconds={**report.seconds, "opening": ready - started, "replay": done - ready},
        placement=opened.placement.to_json(),
        fallback=opened.fallback,
        situations=tuple(figures),
        divergences=divergences,
        full=full,
        kl_difference=difference,
        checks=_checks(certificate, provider, figures, divergences),
    )


def _check_more(package: ModelPackage, certificate: Certificate) -> None:
    """Raise `PackageError` if the certificate claims too much, or genai cannot read texts."""
    check_claims(package, certificate)
    if package.has_tokenizer:
        open_genai_tokenizer(package.path)


def _replay(
    certificate: Certificate,
    graph: GraphSession,
    situations: Sequence[Situation],
    progress: Progress,
) -> tuple[list[SituationFigures], dict[str, Rows]]:
    """Return the figures of each situation, and the rows of those that look at every position."""
    figures, rows = [], {}
    for index, situation in enumerate(situations):
        progress.update(situation.meaning, index, len(situations))
        found = list(try_situation(situation, graph, certificate.passages))
        figures.append(_situation_figures(certificate, situation, found))
        if looks_everywhere(situation):
            rows[situation.name] = _rows(found)
    return figures, rows


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
    return _check_files(open_shipped(path), None, key, name, progress)


def _check_files(
    shipped: ModelPackage | Bundle,
    certificate: Certificate | None,
    key: Path | None,
    name: str | None,
    progress: Progress,
) -> VerifyReport:
    if name is not None and key is None:
        raise UsageError("a name is that of a signed model: pass the signer's public key too.")
    # Check the key first, so that a wrong one is reported before minutes of hashing.
    signature = check_signature(shipped.index, shipped.listing, key, name)
    started = perf_counter()
    integrity = check_integrity(shipped, certificate, progress)
    return VerifyReport(
        package=str(shipped.path),
        precision=shipped.precision,
        versions=versions() if certificate else _versions_if_installed(),
        integrity=integrity,
        signature=signature,
        seconds={"hashing": perf_counter() - started},
    )


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


def _situation_figures(
    certificate: Certificate, situation: Situation, found: Sequence[Observation]
) -> SituationFigures:
    shipped = summarize(_figures(certificate, certificate.package, found))
    total = None
    if looks_everywhere(situation):
        total = summarize(_figures(certificate, certificate.original, found))
    return SituationFigures(situation.name, situation.meaning, shipped, total)


def _figures(
    certificate: Certificate, side: Sequence[Any], found: Sequence[Observation]
) -> Iterator[PositionFigures]:
    for entry in found:
        targets = next_tokens(certificate.passages[entry.passage])[entry.positions]
        yield from figures_in_pieces(side[entry.passage][entry.positions], entry.logits, targets)


def _rows(found: Sequence[Observation]) -> Rows:
    return {
        (entry.passage, int(position)): row
        for entry in found
        for position, row in zip(entry.positions, entry.logits, strict=True)
    }


def _full_rows(certificate: Certificate, found: Rows) -> tuple[Comparison | None, float | None]:
    """Return the figures at the positions with complete rows, and the error of the mean KL there.

    The error is the mean KL with all logits minus that with only the likeliest tokens.
    """
    whole: list[PositionFigures] = []
    cut: list[PositionFigures] = []
    for rows in certificate.full:
        kept = certificate.package[rows.passage][rows.positions]
        targets = next_tokens(certificate.passages[rows.passage])[rows.positions]
        seen = [(rows.passage, int(position)) in found for position in rows.positions]
        if any(seen):
            here = np.stack([found[rows.passage, int(p)] for p in rows.positions[seen]])
            whole.append(position_figures(rows.logits[seen], here, targets[seen]))
            cut.append(position_figures(kept[seen], here, targets[seen]))
    if not whole:
        return None, None
    compared = summarize(whole)
    return compared, compared.mean_kl - summarize(cut).mean_kl


def _divergences(certificate: Certificate, found: Rows) -> tuple[Divergence | None, ...]:
    """Return the first token of each passage that differs from the certificate's, or None."""
    return tuple(
        _first_difference(index, passage, kept, found)
        for index, (passage, kept) in enumerate(
            zip(certificate.passages, certificate.package, strict=True)
        )
    )


def _first_difference(index: int, passage: Passage, kept: TopK, found: Rows) -> Divergence | None:
    for step, written in enumerate(passage.ids[passage.prompt :].tolist()):
        position = passage.prompt - 1 + step
        row = found.get((index, position))
        if row is not None and (here := int(row.argmax())) != written:
            return Divergence(step, here, written, margin(kept[[position]], written, here))
    return None


def _checks(
    certificate: Certificate,
    provider: Provider,
    figures: Sequence[SituationFigures],
    divergences: Sequence[Divergence | None],
) -> tuple[Check, ...]:
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

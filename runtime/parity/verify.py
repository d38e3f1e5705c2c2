"""Replays a package's certificate here: is this the package that was made, and does it compute here
what its weights say? onnxruntime and numpy alone."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from llama_onnx.runtime.parity.certificate import (
    Certificate,
    next_tokens,
    read_certificate,
    stale_files,
)
from llama_onnx.runtime.parity.metrics import (
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
from llama_onnx.runtime.parity.session import GraphSession
from llama_onnx.runtime.parity.situations import (
    DECODE,
    PREFILL,
    Observation,
    Passage,
    Situation,
    looks_everywhere,
    situations_of,
    try_situation,
)
from llama_onnx.runtime.parity.thresholds import Check, check
from llama_onnx.runtime.session import open_session
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.provider import Provider

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done, and steps in all."""

Rows = Mapping[tuple[int, int], Logits]
"""The logits [V] of a situation, by passage number and position."""


@dataclass(frozen=True)
class Integrity:
    """Whether the files are those that were written.

    `altered` are not as the manifest says, `stale` are other ones than the certificate is about.
    `tokens` is whether tokenizer.json still cuts the certificate's texts into its ids; None where
    the `tokenizers` library is not installed.
    """

    files: int
    altered: tuple[str, ...]
    stale: tuple[str, ...]
    tokens: bool | None

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.altered and not self.stale and self.tokens is not False


@dataclass(frozen=True)
class SituationFigures:
    """`shipped` is what runs here against the package's own weights, `total` against the original
    ones (in one pass and token by token; None elsewhere); see `exporter.parity.validate`."""

    situation: str
    meaning: str
    shipped: Comparison
    total: Comparison | None


@dataclass(frozen=True)
class VerifyReport:
    """What a replay found. Without a session (integrity failed) there are no figures."""

    package: str
    precision: str
    activations: str
    provider: str
    versions: dict[str, str]
    integrity: Integrity
    seconds: dict[str, float]
    placement: dict[str, Any] | None = None
    fallback: str | None = None
    situations: tuple[SituationFigures, ...] = ()
    divergences: tuple[Divergence | None, ...] = ()
    full: Comparison | None = None
    kl_difference: float | None = None
    checks: tuple[Check, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the package is intact and every threshold holds."""
        return self.integrity.passed and all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Everything, the verdict first."""
        content = asdict(self)
        content["integrity"]["passed"] = self.integrity.passed
        content["checks"] = [check_.to_json() for check_ in self.checks]
        return {"passed": self.passed, **content}


def verify(
    path: Path,
    provider: Provider,
    *,
    threads: int | None = None,
    allow_fallback: bool = False,
    situations: Sequence[Situation] | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check every file of the package at `path`, then replay its certificate on `provider`, in all
    situations that mean something to its graph unless other ones are given.

    Raises `PackageError` for a package without a certificate or one that does not run,
    `ProviderError` when `provider` does not run it.
    """
    say = progress or (lambda *_: None)
    package = ModelPackage.open(path)
    certificate = read_certificate(path)
    started = perf_counter()
    integrity = _check_integrity(package, certificate, say)
    hashed = perf_counter()
    report = VerifyReport(
        package=str(package.path),
        precision=certificate.content["precision"],
        activations=certificate.content["activations"],
        provider=provider.name,
        versions=versions(),
        integrity=integrity,
        seconds={"hashing": hashed - started},
    )
    if not integrity.passed:
        return report
    opened = open_session(
        package.model_path, provider, threads=threads, allow_fallback=allow_fallback
    )
    graph = GraphSession(opened.session, shares_buffer=opened.shares_buffer)
    ready = perf_counter()
    rows: dict[str, Rows] = {}
    figures = []
    if situations is None:
        situations = situations_of(shared_buffer=opened.shares_buffer, continues=provider.continues)
    for index, situation in enumerate(situations):
        say(situation.meaning, index, len(situations))
        found = list(try_situation(situation, graph, certificate.passages))
        figures.append(_situation_figures(certificate, situation, found))
        if looks_everywhere(situation):
            rows[situation.name] = _rows(found)
    done = perf_counter()
    full, difference = _full_rows(certificate, rows.get(PREFILL.name, {}))
    divergences = _divergences(certificate, rows.get(DECODE.name, {}))
    return replace(
        report,
        seconds={**report.seconds, "opening": ready - hashed, "replay": done - ready},
        placement=opened.placement.to_json(),
        fallback=opened.fallback,
        situations=tuple(figures),
        divergences=divergences,
        full=full,
        kl_difference=difference,
        checks=_checks(certificate, provider, figures, divergences),
    )


def versions() -> dict[str, str]:
    """What runs here."""
    import onnxruntime as ort

    return {
        "onnxruntime": ort.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _check_integrity(package: ModelPackage, certificate: Certificate, say: Progress) -> Integrity:
    say("hashing", 0, 1)
    return Integrity(
        files=len(package.manifest["files"]),
        altered=tuple(package.verify()),
        stale=tuple(stale_files(certificate, package)),
        tokens=_same_tokens(package, certificate),
    )


def _same_tokens(package: ModelPackage, certificate: Certificate) -> bool | None:
    known = [(t, p) for t, p in zip(certificate.texts, certificate.passages, strict=True) if t]
    if not known:
        return None
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        return None
    try:
        tokenizer = Tokenizer.from_file(str(package.path / "tokenizer.json"))
    except Exception as error:  # the library raises nothing narrower
        raise PackageError(f"{package.path / 'tokenizer.json'} cannot be read: {error}.") from None
    return all(
        tokenizer.encode(text).ids[: p.prompt] == p.ids[: p.prompt].tolist() for text, p in known
    )


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
    """The figures at the positions of which all logits are known, and how far the mean KL from the
    likeliest tokens is from the true one there."""
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
    """Where the tokens chosen here first part from those the exporter's machine wrote."""
    return tuple(
        _first_parting(index, passage, kept, found)
        for index, (passage, kept) in enumerate(
            zip(certificate.passages, certificate.package, strict=True)
        )
    )


def _first_parting(index: int, passage: Passage, kept: TopK, found: Rows) -> Divergence | None:
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
    rows = [
        row
        for row in certificate.thresholds
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

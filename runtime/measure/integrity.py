"""Whether a package's files are those that it lists, and those that its certificate covers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llama_onnx.runtime.measure.certificate import Certificate, stale_files
from llama_onnx.runtime.tokenizer.encoder import open_encoder
from llama_onnx.targets.bundle import Bundle
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.progress import Progress


@dataclass(frozen=True)
class Integrity:
    """Whether the files are unchanged, and no others are there.

    `altered` are the files that differ from the manifest, `stale` those that differ from the
    certificate. `unknown` are files, links and folders that the manifest does not list, `tolerated`
    those among them that tools leave there by design and no program reads.
    `tokens` is whether tokenizer.json still encodes the certificate's texts to its ids; None where
    the library tokenizers is not installed or no certificate was read.
    """

    files: int
    altered: tuple[str, ...]
    stale: tuple[str, ...]
    tokens: bool | None
    unknown: tuple[str, ...] = ()
    tolerated: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the files are unchanged, and no others are there."""
        return not (self.altered or self.stale or self.unknown) and self.tokens is not False


def package_of(shipped: ModelPackage | Bundle) -> ModelPackage:
    """Return the package, or the one in a bundle."""
    return shipped.package if isinstance(shipped, Bundle) else shipped


def check_integrity(
    shipped: ModelPackage | Bundle, certificate: Certificate | None, progress: Progress
) -> Integrity:
    """Read every file of `shipped` and compare it with its hash, and with the certificate's."""
    progress.step("hashing")
    unlisted = shipped.unlisted()
    integrity = Integrity(
        len(shipped.files),
        tuple(shipped.verify()),
        stale=(),
        tokens=None,
        unknown=unlisted.unknown,
        tolerated=unlisted.tolerated,
    )
    # A tokenizer that is not the one that was made is not run.
    if certificate is None or integrity.altered or integrity.unknown:
        return integrity
    package = package_of(shipped)
    return replace(
        integrity,
        stale=tuple(stale_files(certificate, package)),
        tokens=_same_tokens(package, certificate),
    )


def _same_tokens(package: ModelPackage, certificate: Certificate) -> bool | None:
    known = [(t, p) for t, p in zip(certificate.texts, certificate.passages, strict=True) if t]
    if not known:
        return None
    try:
        encoder = open_encoder(package.path)
        found = encoder.encode([text for text, _ in known], add_special_tokens=True)
    except ModuleNotFoundError:
        return None
    return all(
        ids[: p.prompt] == p.ids[: p.prompt].tolist()
        for ids, (_, p) in zip(found, known, strict=True)
    )

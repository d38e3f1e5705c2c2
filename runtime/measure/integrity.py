"""Whether a package's files are those that it lists, and those that its certificate covers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llama_onnx.runtime.measure.certificate import Certificate, stale_files
from llama_onnx.runtime.measure.deadline import within
from llama_onnx.targets.bundle import Bundle
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.progress import Progress

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SECONDS = 10.0  # for the texts of a certificate, which take milliseconds


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
        found = _encode(package, [text for text, _ in known])
    except ModuleNotFoundError:
        return None
    return all(
        ids[: p.prompt] == p.ids[: p.prompt].tolist()
        for ids, (_, p) in zip(found, known, strict=True)
    )


def _encode(package: ModelPackage, texts: Sequence[str]) -> list[list[int]]:
    from tokenizers import Tokenizer

    file = package.path / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
        return within(_SECONDS, lambda: _batch(tokenizer, texts))
    except TimeoutError:
        raise PackageError(
            f"{file} took more than {_SECONDS:g} s for a few short texts: no sound one does."
        ) from None
    except Exception as error:  # the library raises nothing narrower
        raise PackageError(f"{file} cannot be read: {error}.") from None
    except BaseException as error:
        # A pattern that backtracks for ever ends in a panic of Rust, which is not an Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise PackageError(f"{file} cannot be used: {error}.") from None


def _batch(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    # `encode` holds Python's lock, so that no time limit could end the wait; a batch does not.
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]

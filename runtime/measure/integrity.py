"""Whether a package's files are those that it lists, and those that its certificate covers."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from time import perf_counter

from llama_onnx.runtime.measure.certificate import Certificate, stale_files
from llama_onnx.runtime.tokenizer.encoder import open_encoder
from llama_onnx.targets.bundle import Bundle
from llama_onnx.targets.package import DATA_FILE, ModelPackage
from llama_onnx.targets.progress import SILENT, Progress


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


class Hashing:
    """A check of all files of `shipped`: whether they have their hashes, and those that the
    certificate covers.

    The data file is hashed in a thread; `clean` is whether all the others are as they should be.
    Use it as a context, which ends with the thread.
    """

    def __init__(
        self,
        shipped: ModelPackage | Bundle,
        certificate: Certificate | None,
        progress: Progress = SILENT,
    ) -> None:
        progress.step("hashing")
        self._started = perf_counter()
        self._shipped, self._certificate = shipped, certificate
        unlisted = shipped.unlisted()
        self._pool = ThreadPoolExecutor(1)
        data = {name for name in shipped.files if name.rpartition("/")[2] == DATA_FILE}
        self._altered = self._pool.submit(self._hash, data)
        self._others = Integrity(
            len(shipped.files),
            tuple(shipped.verify(set(shipped.files) - data)),
            stale=(),
            tokens=None,
            unknown=unlisted.unknown,
            tolerated=unlisted.tolerated,
        )

    @property
    def clean(self) -> bool:
        """Whether all files but the data are unchanged, and no others are there."""
        return self._others.passed

    def finish(self) -> tuple[Integrity, float]:
        """Wait for the data file. Return the result, and the seconds that hashing took."""
        altered, ended = self._altered.result()
        found = {*self._others.altered, *altered}
        ordered = tuple(name for name in self._shipped.files if name in found)
        integrity = replace(self._others, altered=ordered)
        # A tokenizer that is not the one that was made is not run.
        if self._certificate is not None and not (integrity.altered or integrity.unknown):
            package = package_of(self._shipped)
            integrity = replace(
                integrity,
                stale=tuple(stale_files(self._certificate, package)),
                tokens=_same_tokens(package, self._certificate),
            )
        return integrity, ended - self._started

    def _hash(self, data: Collection[str]) -> tuple[list[str], float]:
        return self._shipped.verify(data), perf_counter()

    def __enter__(self) -> Hashing:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


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

"""Implementation of the public functions. Heavy: imported when one of them is called.

Each function here has the parameters of its namesake in `llama_onnx`, which documents them. The
options that decide what a package holds are passed to `Options` unchanged.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.progress import SILENT
from llama_onnx.targets.providers import get_provider
from llama_onnx.targets.registry import get_target

if TYPE_CHECKING:
    from llama_onnx.exporter.packaging.export import ExportResult
    from llama_onnx.exporter.packaging.plan import Plan
    from llama_onnx.exporter.parity.measure.report import ParityReport
    from llama_onnx.runtime.measure.verify import VerifyReport
    from llama_onnx.targets.progress import Progress

StrPath = str | os.PathLike[str]


def plan(
    checkpoint: StrPath,
    *,
    target: str,
    adapters: Sequence[StrPath],
    kept_adapters: Mapping[str, StrPath] | None,
    **options: Any,
) -> Plan:
    """Open the headers of `checkpoint` and plan its export."""
    from llama_onnx.exporter.checkpoints.hub import HubId, find_source
    from llama_onnx.exporter.packaging.adapters import open_kept
    from llama_onnx.exporter.packaging.deciding import make_decided_plan
    from llama_onnx.exporter.packaging.options import Options
    from llama_onnx.exporter.sources import open_checkpoint

    chosen, merged = Options(**options), _paths(adapters)
    with _headers(checkpoint) as folder:
        opened = open_checkpoint(folder, merged, context=chosen.context)
        kept = open_kept(opened, _named(kept_adapters))
        workers = os.cpu_count() or 1
        return make_decided_plan(
            opened,
            get_target(target),
            chosen,
            workers,
            kept,
            chosen.changed(),
            headers=isinstance(find_source(os.fspath(checkpoint)), HubId),
        )


def export(
    checkpoint: StrPath,
    out: StrPath,
    *,
    target: str,
    adapters: Sequence[StrPath],
    kept_adapters: Mapping[str, StrPath] | None,
    resume: bool,
    force: bool,
    checksum: bool,
    hash_source: bool,
    tokenizer: bool,
    workers: int | None,
    progress: Progress | None,
    **options: Any,
) -> ExportResult:
    """Export `checkpoint`, downloaded first if it is on the hub."""
    from llama_onnx.exporter.checkpoints.hub import find_source
    from llama_onnx.exporter.packaging.export import export_package
    from llama_onnx.exporter.packaging.options import Options

    chosen = Options(**options)
    return export_package(
        find_source(os.fspath(checkpoint)),
        Path(out),
        get_target(target),
        chosen,
        adapters=_paths(adapters),
        kept=_named(kept_adapters),
        resume=resume,
        force=force,
        checksum=checksum,
        hash_source=hash_source,
        tokenizer=tokenizer,
        workers=workers,
        explicit=chosen.changed(),
        progress=progress or SILENT,
    )


def validate(
    package: StrPath,
    reference: StrPath,
    *,
    adapters: Sequence[StrPath],
    kept_adapter: tuple[str, StrPath] | None,
    texts: Sequence[str] | None,
    tokens: int | None,
    prompt_tokens: int | None,
    max_kl: float | None,
    accept_loss: bool,
    thorough: bool,
    certify: bool,
    progress: Progress | None,
) -> ParityReport:
    """Open package and checkpoint, and compare them."""
    from llama_onnx.exporter.checkpoints.download import local_copy
    from llama_onnx.exporter.checkpoints.hub import find_source
    from llama_onnx.exporter.parity.measure.open_subject import open_subject
    from llama_onnx.exporter.parity.measure.prompts import TEXTS
    from llama_onnx.exporter.parity.prove import check_measurable, prove_subject
    from llama_onnx.exporter.sources import open_checkpoint

    if texts is not None and (opened := ModelPackage.unchecked(Path(package))):
        opened.require_tokenizer()
    texts = TEXTS if texts is None else texts
    check_measurable(texts, tokens, prompt_tokens)  # before a download
    merged = _paths(adapters)
    original = open_checkpoint(local_copy(find_source(os.fspath(reference))), merged)
    adapter = None if kept_adapter is None else (kept_adapter[0], Path(kept_adapter[1]))
    return prove_subject(
        open_subject(Path(package), original, adapter),
        texts=texts,
        tokens=tokens,
        longest=prompt_tokens,
        max_kl=max_kl,
        accept_loss=accept_loss,
        thorough=thorough,
        certify=certify,
        progress=progress or SILENT,
    )


def verify(
    package: StrPath,
    *,
    provider: str | None,
    key: StrPath | None,
    name: str | None,
    threads: int | None,
    allow_fallback: bool,
    files_only: bool,
    progress: Progress | None,
) -> VerifyReport:
    """Check the files of `package`, and replay its certificate unless `files_only`."""
    from llama_onnx.runtime.measure import verify as verifying

    public = None if key is None else Path(key)
    if files_only:
        if provider is not None or threads is not None or allow_fallback:
            raise UsageError(
                "files_only runs nothing: leave provider, threads and allow_fallback out."
            )
        return verifying.verify_files(
            Path(package), key=public, name=name, progress=progress or SILENT
        )
    return verifying.verify(
        Path(package),
        None if provider is None else get_provider(provider),
        key=public,
        name=name,
        threads=threads,
        allow_fallback=allow_fallback,
        progress=progress or SILENT,
    )


@contextmanager
def _headers(checkpoint: StrPath) -> Iterator[Path]:
    """Yield the path of the checkpoint, or of a temporary copy of its headers from the hub."""
    from llama_onnx.exporter.checkpoints.hub import find_source

    source = find_source(os.fspath(checkpoint))
    if isinstance(source, Path):
        yield source
        return
    from llama_onnx.exporter.checkpoints.download import fetch_headers

    with tempfile.TemporaryDirectory() as folder:
        yield fetch_headers(source, Path(folder))


def _paths(values: Sequence[StrPath]) -> list[Path]:
    # A str is a sequence of str, so type checkers accept it; its letters are not folders.
    if isinstance(values, (str, os.PathLike)):
        raise UsageError(
            f"adapters is one path, {os.fspath(values)!r}: pass a list of folders instead."
        )
    return [Path(value) for value in values]


def _named(values: Mapping[str, StrPath] | None) -> dict[str, Path]:
    return {name: Path(value) for name, value in (values or {}).items()}

"""Exports a checkpoint to a package, one matrix at a time.

Everything is written to `OUT.partial`, which is renamed to `OUT` only after the finished package
has been opened and has run a step.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llama_onnx.exporter.checkpoints.checklist import has_checklist, verify_checklists
from llama_onnx.exporter.checkpoints.download import local_copy
from llama_onnx.exporter.checkpoints.hub import HubId
from llama_onnx.exporter.packaging.adapters import open_kept
from llama_onnx.exporter.packaging.compile import compile_package
from llama_onnx.exporter.packaging.deciding import decided
from llama_onnx.exporter.packaging.destination import Destination
from llama_onnx.exporter.packaging.job import Job
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.packaging.plan import Plan, make_plan
from llama_onnx.exporter.packaging.provenance import source_hashes
from llama_onnx.exporter.packaging.trial import WITHOUT_KERNELS
from llama_onnx.exporter.packaging.unchanged import check_unchanged, source_state
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.progress import SILENT, Progress
from llama_onnx.targets.target import Target


@dataclass(frozen=True)
class ExportResult:
    """A finished package and the checkpoint it was made from. Times in seconds, sizes in bytes."""

    source: Path
    package: Path
    plan: Plan
    package_bytes: int
    resumed_bytes: int
    write_seconds: float
    total_seconds: float
    warnings: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Whether the trial step ran in float32, for want of CPU kernels for the activations."""
        return self.plan.recipe.activations in WITHOUT_KERNELS

    def to_json(self) -> dict[str, Any]:
        """Return the figures, for scripts."""
        return {
            "package": str(self.package),
            "package_bytes": self.package_bytes,
            "resumed_bytes": self.resumed_bytes,
            "write_seconds": round(self.write_seconds, 3),
            "total_seconds": round(self.total_seconds, 3),
            **self.plan.to_json(),
            "warnings": list(self.warnings),
        }


def export_package(
    source: Path | HubId,
    out: Path,
    target: Target,
    options: Options,
    *,
    adapters: Sequence[Path] = (),
    kept: Mapping[str, Path] | None = None,
    resume: bool = False,
    force: bool = False,
    checksum: bool = True,
    hash_source: bool = False,
    tokenizer: bool = True,
    explicit: Collection[str] = (),
    workers: int | None = None,
    progress: Progress = SILENT,
) -> ExportResult:
    """Export the checkpoint at `source`, with `adapters` merged, to a package at `out`.

    A source on the hub is downloaded first. The adapters in `kept` (folders by name) stay beside
    the base, to be swapped at run time. `checksum` compares the source's files with the md5
    checklist of Meta's download, if it has one; `hash_source` reads them all once more for
    their sha256 in the manifest. Without `tokenizer` the package takes token ids only, and
    the source needs no tokenizer. `explicit` names fields of `options` that must have an effect.
    `workers` is the number of threads that convert weights; None: one for each processor.

    Raises `UsageError` when `out` exists or the options do not fit, `CheckpointError` for a bad
    source, `ResourceError` when the disk is full. An export that was killed or ran out of disk
    leaves `out.partial`, which `resume` continues; any other failure leaves nothing.
    """
    started = time.perf_counter()
    folders = kept or {}
    destination = Destination.at(out, resume=resume, force=force)
    destination.check(p for p in (source, *adapters, *folders.values()) if isinstance(p, Path))
    workers = workers or os.cpu_count() or 1
    checkpoint = open_checkpoint(local_copy(source), adapters, context=options.context)
    swapped = open_kept(checkpoint, folders)
    state = source_state(checkpoint, swapped)
    planned = partial(make_plan, checkpoint, target, options, workers, swapped, explicit)
    planned = partial(planned, with_tokenizer=tokenizer)
    plan = planned()
    verified = _verified(checkpoint.path, checksum, progress)
    hashes = source_hashes(checkpoint, verified, read=hash_source, step=progress.step)
    resuming = destination.resuming
    with destination.writing() as folder:
        job = Job(checkpoint, swapped, hashes, target, plan, folder, workers, progress, tokenizer)
        job = decided(job, lambda chosen: planned(chosen=chosen))
        compiled = compile_package(job, resuming=resuming)
        check_unchanged(state)
    package = destination.out
    return ExportResult(
        source=checkpoint.path,
        package=package,
        plan=job.plan,
        package_bytes=sum(file.stat().st_size for file in package.rglob("*") if file.is_file()),
        resumed_bytes=compiled.resumed_bytes,
        write_seconds=compiled.write_seconds,
        total_seconds=time.perf_counter() - started,
        warnings=(*job.plan.warnings, *compiled.warnings),
    )


def _verified(source: Path, checksum: bool, progress: Progress) -> dict[str, str]:
    """Return the md5 sums of the files that a checklist names, checked if `checksum` is set."""
    listed = has_checklist(source)
    if not (checksum or listed):
        raise UsageError(
            f"{source} has no checklist.chk to skip: leave out --no-checksum "
            "(checksum=False in Python)."
        )
    return verify_checklists(source, progress.step) if checksum and listed else {}

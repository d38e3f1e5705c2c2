"""Checkpoint -> package, one matrix at a time.

Everything happens in `OUT.partial`. Only when the finished package has been opened and has run a
step does it take its name.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import onnxruntime

from llama_onnx.exporter.checkpoints.checklist import verify_checklists
from llama_onnx.exporter.checkpoints.download import local_copy
from llama_onnx.exporter.checkpoints.hub import HubId, hub_origin, source_name
from llama_onnx.exporter.checkpoints.lora import adapters_of
from llama_onnx.exporter.graph.costs import graph_costs
from llama_onnx.exporter.graph.layout import PlacedSlot
from llama_onnx.exporter.graph.model import BuiltModel
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.packaging.adapters import KeptAdapter, open_kept, read_parameters
from llama_onnx.exporter.packaging.genai_config import check_search, genai_config
from llama_onnx.exporter.packaging.journal import (
    JOURNAL_FILE,
    DataWriter,
    exclusive,
    read_journal,
    write_header,
)
from llama_onnx.exporter.packaging.licences import copy_licences
from llama_onnx.exporter.packaging.plan import Options, Plan, make_plan, require_disk
from llama_onnx.exporter.packaging.provenance import source_hashes
from llama_onnx.exporter.packaging.stream import slot_arrays
from llama_onnx.exporter.quantize.base import Quantizer
from llama_onnx.exporter.quantize.registry import get_quantizer
from llama_onnx.exporter.reference.segments import open_graph, run_segments
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.exporter.tokenizer.files import check_tokenizer
from llama_onnx.runtime.measure.situations import Passage, decode
from llama_onnx.targets.errors import LlamaOnnxError, PackageError, ResourceError, UsageError
from llama_onnx.targets.package import (
    DATA_FILE,
    MODEL_FILE,
    PARTIAL_SUFFIX,
    WORKING_FILES,
    is_package,
    remove_working_files,
    write_manifest,
)
from llama_onnx.targets.target import Target

WITHOUT_KERNELS = ("bf16",)
"""Activations that ONNX Runtime's CPU provider neither has kernels for nor casts to others."""


class Progress(Protocol):
    """Told what happens; the command line draws it."""

    def start(self, total_bytes: int) -> None:
        """The data file will have `total_bytes`."""

    def advance(self, what: str, num_bytes: int) -> None:
        """`num_bytes` more are there: `what` is the slot they belong to."""

    def step(self, text: str) -> None:
        """Something other than writing weights begins."""


class Silent:
    """A `Progress` that says nothing."""

    def start(self, total_bytes: int) -> None:
        """Say nothing."""

    def advance(self, what: str, num_bytes: int) -> None:
        """Say nothing."""

    def step(self, text: str) -> None:
        """Say nothing."""


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
        """Whether the step was run in float32, for want of kernels here."""
        return self.plan.recipe.activations in WITHOUT_KERNELS

    def to_json(self) -> dict[str, Any]:
        """The figures, for scripts."""
        return {
            "package": str(self.package),
            "package_bytes": self.package_bytes,
            "resumed_bytes": self.resumed_bytes,
            "write_seconds": round(self.write_seconds, 3),
            "total_seconds": round(self.total_seconds, 3),
            "warnings": list(self.warnings),
            **self.plan.to_json(),
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
    progress: Progress | None = None,
) -> ExportResult:
    """Export the checkpoint at `source`, with `adapters` merged, to a package at `out`.

    The adapters in `kept` (folders by name) stay beside it, to be swapped at run time.

    One on the hub is fetched first. The source's files are compared with the md5 checklist that
    Meta's download has, unless `checksum` is False; with `hash_source` all of them are read once
    more for their sha256 in the manifest.

    Raises `UsageError` when `out` is taken or the options do not fit, `CheckpointError` for a bad
    source, `ResourceError` when the disk is full. An export that was killed or ran out of disk
    leaves `out.partial`, which `resume` continues; any other failure leaves nothing.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    # A link stays one: what it points at is what is written.
    out = Path(os.path.realpath(out))
    partial = out.with_name(out.name + PARTIAL_SUFFIX) if out.name else out
    made_from = (source, *adapters, *(kept or {}).values())
    check_destination(made_from, out, partial, resume=resume, force=force)
    workers = os.cpu_count() or 1
    checkpoint = open_checkpoint(local_copy(source), adapters)
    swapped = open_kept(checkpoint, kept or {})
    plan = make_plan(checkpoint, target, options, workers, swapped)
    check = checksum and checkpoint.path.is_dir()
    verified = verify_checklists(checkpoint.path, progress.step) if check else {}
    hashes = source_hashes(checkpoint, verified, read=hash_source, step=progress.step)
    resuming = resume and (partial / JOURNAL_FILE).exists()
    ours = False
    try:
        _make_folder(partial, keep=resuming)
        with exclusive(partial):
            ours = True
            job = _Job(checkpoint, swapped, hashes, target, plan, partial, workers, progress)
            finished = _fill(job, resuming)
        _publish(partial, out)
    except OSError as error:
        raise _disk_error(error, partial) from error
    except Exception:
        if ours and not resuming:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return ExportResult(
        source=checkpoint.path,
        package=out,
        plan=plan,
        package_bytes=sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
        resumed_bytes=finished.resumed_bytes,
        write_seconds=finished.write_seconds,
        total_seconds=time.perf_counter() - started,
        warnings=finished.warnings,
    )


@dataclass(frozen=True)
class _Job:
    """What every step of one export needs to know."""

    checkpoint: Checkpoint
    kept: tuple[KeptAdapter, ...]
    hashes: dict[str, Any] | None
    target: Target
    plan: Plan
    folder: Path
    workers: int
    progress: Progress


@dataclass(frozen=True)
class _Finished:
    """What filling the folder took."""

    resumed_bytes: int
    write_seconds: float
    warnings: tuple[str, ...]


def _fill(job: _Job, resuming: bool) -> _Finished:
    """Make the folder a whole package, the journal still in it.

    Everything small comes first, so that a source without a usable tokenizer is refused at once and
    not behind hours of weights.
    """
    journal, progress = job.folder / JOURNAL_FILE, job.progress
    identity = _identity(job)
    require_disk(job.plan, job.folder, _size(job.folder / DATA_FILE))
    if not resuming:
        write_header(journal, identity)
    entries = read_journal(journal, identity)
    warnings = _write_small_files(job)
    started = time.perf_counter()
    with DataWriter(job.folder, DATA_FILE) as writer:
        progress.start(job.plan.data_bytes)
        writer.recover(entries, lambda count: progress.advance("checking what is there", count))
        resumed = writer.position
        _write_slots(writer, job)
        progress.step("flushing to disk")
        writer.sync()
        data_sha256 = writer.sha256()
    seconds = time.perf_counter() - started
    progress.step("running a step")
    kept = [adapter.file for adapter in job.kept]
    exact = job.plan.recipe.activations in WITHOUT_KERNELS
    try_package(job.folder, job.checkpoint.config, kept, exact=exact)
    _write_manifest(job, data_sha256)
    return _Finished(resumed, seconds, warnings)


def check_destination(
    made_from: Sequence[Path | HubId], out: Path, partial: Path, *, resume: bool, force: bool
) -> None:
    """Refuse an `out` that is taken, before anything is read. Raises `UsageError`."""
    if resume and force:
        raise UsageError("--resume continues an export and --force starts it over: give one.")
    if not out.name:
        raise UsageError(f"{out} cannot be a package: give a folder of its own.")
    for source in made_from:
        if isinstance(source, Path) and Path(os.path.realpath(source)).is_relative_to(out):
            raise UsageError(
                f"{out} holds the source {source}, which the package would replace: choose another "
                "name."
            )
    try:
        _check_taken(out, resume=resume, force=force)
        _check_partial(partial, resume=resume, force=force)
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror or error}.") from None


def _check_taken(out: Path, *, resume: bool, force: bool) -> None:
    if not out.exists():
        return
    if resume:
        if is_package(out):  # killed when all but the journal's removal was done
            remove_working_files(out)
        raise UsageError(f"{out} exists already: there is nothing to resume.")
    if not force:
        raise UsageError(f"{out} exists already: choose another name, or use --force.")
    if not (is_package(out) or (out.is_dir() and not any(out.iterdir()))):
        raise UsageError(
            f"{out} is not a package, so --force does not replace it: choose another name."
        )


def _check_partial(partial: Path, *, resume: bool, force: bool) -> None:
    if not partial.exists():
        return
    if not _is_unfinished_export(partial):
        raise UsageError(f"{partial} is in the way and no unfinished export: move it elsewhere.")
    if not (resume or force):
        raise UsageError(
            f"{partial} is an unfinished export: continue it with --resume, or start over with "
            "--force."
        )


def _is_unfinished_export(partial: Path) -> bool:
    """Whether the folder is ours to delete: it is empty, or has a journal."""
    if not partial.is_dir():
        return False
    names = {file.name for file in partial.iterdir()}
    return not names or bool(names.intersection(WORKING_FILES))


def _make_folder(partial: Path, *, keep: bool) -> None:
    try:
        if partial.exists() and not keep:
            with exclusive(partial):
                pass  # nobody else is writing there
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot write to {partial.parent}: {error.strerror or error}. Choose another place."
        ) from None


def _identity(job: _Job) -> dict[str, Any]:
    """What must be the same when an export is resumed; the keys stand in the message."""
    return {
        "version": version("llama-onnx"),
        "source": job.checkpoint.fingerprint(),
        "adapters": {adapter.name: adapter.fingerprint() for adapter in job.kept},
        "target": job.target.name,
        "options": job.plan.recipe.to_json(),
        "config": asdict(job.checkpoint.config),
    }


def _write_slots(writer: DataWriter, job: _Job) -> None:
    done = set(writer.finished)
    quantizer = get_quantizer(job.plan.recipe.quantizer)
    with ThreadPoolExecutor(job.workers) as pool:
        for placed in job.plan.placed:
            if placed.slot.name not in done:
                _write_slot(writer, placed, job, quantizer, pool)


def _write_slot(
    writer: DataWriter,
    placed: PlacedSlot,
    job: _Job,
    quantizer: Quantizer,
    pool: ThreadPoolExecutor,
) -> None:
    name = placed.slot.name
    arrays = slot_arrays(placed.slot, job.checkpoint, quantizer.quantize, pool, job.workers)
    for place, parts in zip(placed.places, arrays, strict=True):
        job.progress.advance(name, place.offset - writer.position)
        writer.pad_to(place.offset)
        for part in parts:
            # `<` because the file is little-endian whatever the machine is.
            data = np.ascontiguousarray(part, dtype=part.dtype.newbyteorder("<"))
            writer.write(data.view(np.uint8).data.cast("B"))
            job.progress.advance(name, data.nbytes)
        assert writer.position == place.end, f"{place.initializer.name} has the wrong size"
    writer.finish_slot(name)


def _write_small_files(job: _Job) -> tuple[str, ...]:
    """Write everything but the weights and the manifest; returns warnings for people."""
    folder, checkpoint = job.folder, job.checkpoint
    config = checkpoint.config
    (folder / MODEL_FILE).write_bytes(_serialize(job.plan.built))
    search = check_search(checkpoint.search_defaults(), str(checkpoint.path))
    activations = job.plan.recipe.activations
    settings = genai_config(config, search, job.target.session, MODEL_FILE, activations)
    _write_json(folder / "genai_config.json", settings)
    _write_json(folder / "config.json", config.to_huggingface())
    checkpoint.write_tokenizer(folder)
    check_tokenizer(folder / "tokenizer.json", config.vocab_size, str(checkpoint.path))
    licences = [file for adapter in job.kept for file in adapter.licence_files()]
    warnings = copy_licences(checkpoint, folder, licences)
    return (*warnings, *_write_adapters(job))


def _write_adapters(job: _Job) -> list[str]:
    """Write the adapters that are kept; returns warnings for people."""
    warnings: list[str] = []
    for adapter in job.kept:
        job.progress.step(f"writing the adapter {adapter.name}")
        adapter.write(job.folder)
        warnings += adapter.tokenizer_warning(job.folder)
    return warnings


def _serialize(built: BuiltModel) -> bytes:
    proto: bytes = ir.to_proto(built.ir).SerializeToString()
    return proto


def try_package(
    folder: Path, config: LlamaConfig, adapters: Sequence[str] = (), *, exact: bool = False
) -> None:
    """Open the graph in `folder` and run a prefill of four tokens and a decode step: of the base,
    then with each of `adapters` (files of the package) in turn.

    `exact`: in float32, where there are no kernels here for what the graph computes in.

    Raises `PackageError` when ONNX Runtime refuses the graph or a value is not finite. Bounded
    memory: the whole graph is opened without its weights, then run piece by piece.
    """
    ids = np.arange(1, 6, dtype=np.int64) % config.vocab_size  # [5]
    program = decode([Passage(ids, prompt=4)])
    logits: dict[str, Any] = {}
    model = folder / MODEL_FILE
    try:
        if not exact:
            open_graph(model)
        for file in (None, *adapters):
            active = read_parameters(folder / file) if file else None
            for label, steps in run_segments(model, program, config, exact=exact, adapter=active):
                for outputs in steps:
                    _require_finite(outputs, f"{label}, {file}" if file else label)
                    logits = outputs
    except Exception as error:
        if isinstance(error, LlamaOnnxError):
            raise
        raise PackageError(f"ONNX Runtime does not run the finished graph: {error}") from error
    if logits["logits"].shape != (1, 1, config.vocab_size):
        raise PackageError(f"the finished graph gives logits of {logits['logits'].shape}.")


def _require_finite(outputs: dict[str, Any], label: str) -> None:
    for name, value in outputs.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise PackageError(
                f"a test step gives NaN or infinity in {name} ({label}): the weights overflow."
            )


def _write_manifest(job: _Job, data_sha256: str) -> None:
    # onnxruntime's distribution has another name in each flavour.
    tools = ("llama-onnx", "onnx-ir", "onnxscript", "numpy")
    checkpoint = job.checkpoint
    origin = hub_origin(checkpoint.path)
    content = {
        "created_with": {name: version(name) for name in tools}
        | {"onnxruntime": onnxruntime.__version__},
        "target": job.target.name,
        "precision": job.plan.recipe.precision,
        "recipe": job.plan.recipe.to_json(),
        "source": {
            "format": checkpoint.format,
            "name": source_name(checkpoint.path),
            **({"commit": origin.commit} if origin else {}),
            "adapters": [folder.name for folder in adapters_of(checkpoint)],
            "files": checkpoint.fingerprint(),
            "hashes": job.hashes,
        },
        "adapters": {adapter.name: adapter.describe() for adapter in job.kept},
        "config": asdict(checkpoint.config),
        "graph": graph_costs(job.plan.built),
        "structure": job.plan.structure.to_json() if job.plan.structure else None,
    }
    write_manifest(job.folder, content, {DATA_FILE: data_sha256})


def _publish(partial: Path, out: Path) -> None:
    """Give the finished folder its name; an older package goes only when the new one stands.

    The journal goes last of all: until the name is changed, --resume can still finish.
    """
    if out.exists():
        previous = Path(tempfile.mkdtemp(prefix=f"{out.name}.previous-", dir=out.parent))
        out.rename(previous / out.name)
        try:
            partial.rename(out)
        except OSError:
            (previous / out.name).rename(out)
            previous.rmdir()
            raise
        shutil.rmtree(previous, ignore_errors=True)
    else:
        partial.rename(out)
    remove_working_files(out)


def _disk_error(error: OSError, partial: Path) -> LlamaOnnxError:
    """What was written stays: whatever is wrong with the disk may be mended."""
    kept = f"what was written is kept in {partial}: repeat the call with --resume, or delete it"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"the disk is full; free some space, {kept}.")
    return ResourceError(f"{error.filename or partial}: {error.strerror or error}; {kept}.")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

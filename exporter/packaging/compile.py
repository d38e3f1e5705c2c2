"""Fills a folder with everything a package has, tests the graph and writes the manifest."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from llama_onnx.exporter.calibration.store import Calibrated
from llama_onnx.exporter.checkpoints.folded import FoldedCheckpoint, write_channel_scales
from llama_onnx.exporter.checkpoints.lora import tokenizer_home
from llama_onnx.exporter.formats.tensor import Float32
from llama_onnx.exporter.graph.layout import PlacedSlot
from llama_onnx.exporter.graph.model import BuiltModel
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.exporter.packaging.calibrating import (
    measure_cache,
    remove_calibration,
    run_calibration,
)
from llama_onnx.exporter.packaging.genai_config import check_search, genai_config
from llama_onnx.exporter.packaging.job import Job
from llama_onnx.exporter.packaging.journal import (
    JOURNAL_FILE,
    DataWriter,
    read_journal,
    write_header,
)
from llama_onnx.exporter.packaging.manifest import manifest_content
from llama_onnx.exporter.packaging.plan import require_disk
from llama_onnx.exporter.packaging.provenance import copy_licences
from llama_onnx.exporter.packaging.stream import Array, slot_arrays
from llama_onnx.exporter.packaging.trial import WITHOUT_KERNELS, try_package
from llama_onnx.exporter.quantize.registry import plain_quantizer
from llama_onnx.exporter.tokenizer.finish import finish_tokenizer
from llama_onnx.targets.errors import CheckpointError
from llama_onnx.targets.package import DATA_FILE, MODEL_FILE, write_manifest


@dataclass(frozen=True)
class Compiled:
    """What filling the folder took: bytes already there, seconds, and warnings for people."""

    resumed_bytes: int
    write_seconds: float
    warnings: tuple[str, ...]


def compile_package(job: Job, *, resuming: bool) -> Compiled:
    """Make `job.folder` a complete package, with the journal still in it.

    Small files are written first, so that a source without a usable tokenizer is refused at once
    and not after hours of writing weights. `resuming` keeps the weights already written.
    """
    journal, identity = job.folder / JOURNAL_FILE, job.identity()
    require_disk(job.plan, job.folder, _size(job.folder / DATA_FILE))
    if not (resuming and journal.exists()):  # it may have been killed before there was one
        write_header(journal, identity)
    entries = read_journal(journal, identity)
    warnings = _write_small_files(job)
    started = time.perf_counter()
    calibrated, notes = _calibrate(job)
    measured, more = _measure_cache(job, calibrated)
    notes = tuple(dict.fromkeys((*notes, *more)))
    with DataWriter(job.folder, DATA_FILE) as writer:
        total = job.plan.data_bytes
        writer.recover(entries, lambda n: job.progress.update("checking", n, total, "bytes"))
        resumed = writer.position
        _write_slots(writer, job, calibrated, measured)
        job.progress.step("flushing to disk")
        writer.sync()
        data_sha256 = writer.sha256()
    seconds = time.perf_counter() - started
    job.progress.step("running a step")
    kept = [adapter.file for adapter in job.kept]
    exact = job.plan.recipe.activations in WITHOUT_KERNELS
    remove_calibration(job.folder)
    try_package(job.folder, job.checkpoint.config, kept, exact=exact)
    write_manifest(job.folder, manifest_content(job), {DATA_FILE: data_sha256})
    return Compiled(resumed, seconds, (*warnings, *notes))


def _calibrate(job: Job) -> tuple[Calibrated | None, tuple[str, ...]]:
    """Choose codes by what the model reads, if the quantizer does; return warnings for people."""
    wanted = job.plan.calibration
    if wanted is None:
        return None, ()
    calibrated, warnings = run_calibration(
        job.checkpoint,
        job.plan.recipe.quantizer,
        wanted,
        job.folder,
        job.workers,
        job.progress,
    )
    if calibrated.scales.exponents:
        write_channel_scales(calibrated.scales, job.folder)
    return calibrated, warnings


def _measure_cache(
    job: Job, calibrated: Calibrated | None
) -> tuple[Mapping[str, Float32], tuple[str, ...]]:
    """Return the scales of a cache in int8, by the names of their slots, and warnings."""
    if job.plan.cache is None:
        return {}, ()
    folded = _folded(job.checkpoint, calibrated)
    return measure_cache(folded, job.plan.cache, job.folder, job.progress)


def _folded(checkpoint: Checkpoint, calibrated: Calibrated | None) -> Checkpoint:
    return checkpoint if calibrated is None else FoldedCheckpoint(checkpoint, calibrated.scales)


def _write_slots(
    writer: DataWriter, job: Job, calibrated: Calibrated | None, measured: Mapping[str, Float32]
) -> None:
    done = set(writer.finished)
    folded = _folded(job.checkpoint, calibrated)
    quantize = plain_quantizer(job.plan.recipe.quantizer).quantize
    with ThreadPoolExecutor(job.workers) as pool:
        for placed in job.plan.placed:
            slot = placed.slot
            if slot.name not in done:
                if slot.name in measured:
                    slot = replace(slot, table=measured[slot.name])
                # What keeps the source's codes was not rescaled.
                source = job.checkpoint if slot.keeps_codes else folded
                arrays = slot_arrays(slot, source, quantize, pool, job.workers, calibrated)
                _write_slot(writer, placed, job, arrays)


def _write_slot(
    writer: DataWriter, placed: PlacedSlot, job: Job, arrays: Iterator[Iterator[Array]]
) -> None:
    name, total = placed.slot.name, job.plan.data_bytes
    for place, parts in zip(placed.places, arrays, strict=True):
        writer.pad_to(place.offset)
        job.progress.update(name, writer.position, total, "bytes")
        for part in parts:
            # `<` because the file is little-endian on every machine.
            data = np.ascontiguousarray(part, dtype=part.dtype.newbyteorder("<"))
            writer.write(data.view(np.uint8).data.cast("B"))
            job.progress.update(name, writer.position, total, "bytes")
        assert writer.position == place.end, f"{place.initializer.name} has the wrong size"
    writer.finish_slot(name)


def _write_small_files(job: Job) -> tuple[str, ...]:
    """Write everything but the weights and the manifest; return warnings for people."""
    tokenizer = write_settings(job)
    licences = [file for adapter in job.kept for file in adapter.licence_files()]
    warnings = copy_licences(job.checkpoint, job.folder, licences)
    return (*tokenizer, *warnings, *_write_adapters(job))


def write_settings(job: Job) -> list[str]:
    """Write the graph, its settings and the tokenizer, with which a text can be read; return
    warnings for people."""
    folder, checkpoint = job.folder, job.checkpoint
    config = checkpoint.config
    (folder / MODEL_FILE).write_bytes(_serialize(job.plan.built))
    search = check_search(checkpoint.search_defaults(), str(checkpoint.path))
    shared = job.target.session.shared_buffer and job.plan.recipe.operators.fused_attention
    session = replace(job.target.session, shared_buffer=shared)
    settings = genai_config(config, search, session, MODEL_FILE, job.plan.recipe.cache_type)
    _write_json(folder / "genai_config.json", settings)
    _write_json(folder / "config.json", config.to_huggingface())
    return _write_tokenizer(job) if job.tokenizer else []


def _write_tokenizer(job: Job) -> list[str]:
    """Write the tokenizer; return warnings for people."""
    checkpoint, folder = job.checkpoint, job.folder
    try:
        checkpoint.write_tokenizer(folder)
        return finish_tokenizer(folder, tokenizer_home(checkpoint), checkpoint.config.vocab_size)
    except CheckpointError as error:
        reason = str(error).removesuffix(".")
        raise type(error)(
            f"{reason}; or pass --no-tokenizer for a package that takes token ids only."
        ) from error


def _write_adapters(job: Job) -> list[str]:
    """Write the kept adapters; return warnings for people."""
    warnings: list[str] = []
    for adapter in job.kept:
        job.progress.step(f"writing the adapter {adapter.name}")
        adapter.write(job.folder)
        warnings += adapter.tokenizer_warning(job.folder)
    return warnings


def _serialize(built: BuiltModel) -> bytes:
    proto: bytes = ir.to_proto(built.ir).SerializeToString()
    return proto


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""Checkpoint -> package, one matrix at a time.

Everything happens in `OUT.partial`. Only when the finished package has been opened and has run a
step does it take its name.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from llama_onnx.exporter.checkpoints import Checkpoint, open_checkpoint
from llama_onnx.exporter.checkpoints.base import has_licence
from llama_onnx.exporter.config import LlamaConfig
from llama_onnx.exporter.genai import genai_config
from llama_onnx.exporter.graph.model import BuiltModel
from llama_onnx.exporter.journal import (
    JOURNAL_FILE,
    DataWriter,
    read_journal,
    write_header,
)
from llama_onnx.exporter.layout import DATA_FILE, PlacedSlot
from llama_onnx.exporter.plan import Options, Plan, make_plan, require_disk
from llama_onnx.exporter.segments import open_graph, run_segments
from llama_onnx.exporter.stream import slot_arrays
from llama_onnx.targets.errors import LlamaOnnxError, PackageError, ResourceError, UsageError
from llama_onnx.targets.package import MANIFEST, PARTIAL_SUFFIX, write_manifest
from llama_onnx.targets.target import Target

MODEL_FILE = "model.onnx"


class Progress(Protocol):
    """Told what happens; the command line draws it."""

    def start(self, total_bytes: int, done_bytes: int) -> None:
        """The data file will have `total_bytes`, `done_bytes` of which are there already."""

    def advance(self, slot: str, num_bytes: int) -> None:
        """`num_bytes` more of `slot` were written."""

    def step(self, text: str) -> None:
        """Something other than writing weights begins."""


class Silent:
    """A `Progress` that says nothing."""

    def start(self, total_bytes: int, done_bytes: int) -> None:
        """Say nothing."""

    def advance(self, slot: str, num_bytes: int) -> None:
        """Say nothing."""

    def step(self, text: str) -> None:
        """Say nothing."""


@dataclass(frozen=True)
class ExportResult:
    """A finished package. Times in seconds, sizes in bytes."""

    package: Path
    plan: Plan
    package_bytes: int
    resumed_bytes: int
    write_seconds: float
    total_seconds: float
    warnings: tuple[str, ...]

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
    source: Path,
    out: Path,
    target: Target,
    options: Options,
    *,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> ExportResult:
    """Export the checkpoint at `source` to a package at `out`.

    Raises `UsageError` when `out` is taken or the options do not fit, `CheckpointError` for a bad
    source, `ResourceError` when the disk is full. An export that was killed or ran out of disk
    leaves `out.partial`, which `resume` continues; any other failure leaves nothing.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    partial = out.with_name(out.name + PARTIAL_SUFFIX)
    check_destination(out, partial, resume=resume, force=force)
    workers = os.cpu_count() or 1
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint, target, options, workers)
    identity = _identity(checkpoint, target, options, plan)
    resuming = resume and (partial / JOURNAL_FILE).exists()
    if not resuming:
        _fresh_folder(partial)
        write_header(partial / JOURNAL_FILE, identity)
    try:
        require_disk(plan, partial, _size(partial / DATA_FILE))
        with DataWriter(partial, DATA_FILE) as writer:
            resumed = _recover(writer, partial, identity) if resuming else 0
            progress.start(plan.data_bytes, resumed)
            write_started = time.perf_counter()
            _write_slots(writer, plan, checkpoint, workers, progress)
            progress.step("flushing to disk")
            writer.sync()
            data_sha256 = writer.sha256()
        write_seconds = time.perf_counter() - write_started
        warnings = _write_rest(partial, checkpoint, target, plan)
        progress.step("running a step")
        try_package(partial, checkpoint.config)
        (partial / JOURNAL_FILE).unlink()
        _manifest(partial, checkpoint, target, plan, data_sha256)
    except OSError as error:
        raise _disk_error(error, partial) from error
    except (LlamaOnnxError, ValueError):
        if not resuming:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    _publish(partial, out)
    return ExportResult(
        package=out,
        plan=plan,
        package_bytes=sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
        resumed_bytes=resumed,
        write_seconds=write_seconds,
        total_seconds=time.perf_counter() - started,
        warnings=warnings,
    )


def check_destination(out: Path, partial: Path, *, resume: bool, force: bool) -> None:
    """Refuse an `out` that is taken, before anything is read. Raises `UsageError`."""
    if resume and force:
        raise UsageError("--resume continues an export and --force starts it over: give one.")
    if out.exists() or out.is_symlink():
        if resume:
            raise UsageError(f"{out} exists already: there is nothing to resume.")
        if not force:
            raise UsageError(
                f"{out} exists already: choose another name, or replace it by --force."
            )
        if not (out.is_dir() and ((out / MANIFEST).exists() or not any(out.iterdir()))):
            raise UsageError(
                f"{out} is not a package, so --force does not replace it: choose another name."
            )
    if partial.exists() and not (resume or force):
        raise UsageError(
            f"{partial} is an unfinished export: continue it with --resume, or start over with "
            "--force."
        )
    if partial.exists() and not partial.is_dir():
        raise UsageError(f"{partial} is in the way: remove it.")


def _fresh_folder(partial: Path) -> None:
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        raise UsageError(
            f"cannot write to {partial.parent}: {error.strerror or error}. Choose another place."
        ) from None


def _identity(
    checkpoint: Checkpoint, target: Target, options: Options, plan: Plan
) -> dict[str, Any]:
    """What must be the same when an export is resumed; the keys stand in the message."""
    return {
        "version": version("llama-onnx"),
        "source": checkpoint.fingerprint(),
        "target": target.name,
        "options": plan.recipe.to_json(),
        "config": asdict(checkpoint.config),
    }


def _recover(writer: DataWriter, partial: Path, identity: dict[str, Any]) -> int:
    for _ in writer.recover(read_journal(partial / JOURNAL_FILE, identity)):
        pass
    return writer.position


def _write_slots(
    writer: DataWriter, plan: Plan, checkpoint: Checkpoint, workers: int, progress: Progress
) -> None:
    done = set(writer.finished)
    with ThreadPoolExecutor(workers) as pool:
        for placed in plan.placed:
            if placed.slot.name not in done:
                _write_slot(writer, placed, checkpoint, pool, workers, progress)


def _write_slot(
    writer: DataWriter,
    placed: PlacedSlot,
    checkpoint: Checkpoint,
    pool: ThreadPoolExecutor,
    workers: int,
    progress: Progress,
) -> None:
    name = placed.slot.name
    arrays = slot_arrays(placed.slot, checkpoint, pool, workers)
    for place, parts in zip(placed.places, arrays, strict=True):
        progress.advance(name, place.offset - writer.position)
        writer.pad_to(place.offset)
        for part in parts:
            # `<` because the file is little-endian whatever the machine is.
            data = np.ascontiguousarray(part, dtype=part.dtype.newbyteorder("<"))
            writer.write(data.view(np.uint8).data.cast("B"))
            progress.advance(name, data.nbytes)
        assert writer.position == place.end, f"{place.initializer.name} has the wrong size"
    writer.finish_slot(name)


def _write_rest(
    folder: Path, checkpoint: Checkpoint, target: Target, plan: Plan
) -> tuple[str, ...]:
    """Write everything that is small; returns warnings for people."""
    config = checkpoint.config
    (folder / MODEL_FILE).write_bytes(_serialize(plan.built))
    settings = genai_config(config, checkpoint.search_defaults(), target.session, MODEL_FILE)
    _write_json(folder / "genai_config.json", settings)
    _write_json(folder / "config.json", config.to_huggingface())
    checkpoint.write_tokenizer(folder)
    warnings = []
    licences = checkpoint.licence_files()
    for file in licences:
        # A model card is kept, but not as the package's own README.
        name = "MODEL_CARD.md" if file.name == "README.md" else file.name
        shutil.copyfile(file, folder / name)
    if not has_licence(licences):
        warnings.append(
            f"{checkpoint.path} has no licence file, so the package has none: add the model's "
            "licence before you pass the package on."
        )
    return tuple(warnings)


def _serialize(built: BuiltModel) -> bytes:
    proto: bytes = ir.to_proto(built.ir).SerializeToString()
    return proto


def try_package(folder: Path, config: LlamaConfig) -> None:
    """Open the graph in `folder` and run a prefill of four tokens and a decode step.

    Raises `PackageError` when ONNX Runtime refuses the graph or a value is not finite. Bounded
    memory: the whole graph is opened without its weights, then run piece by piece.
    """
    ids = np.arange(1, 6, dtype=np.int64)[None] % config.vocab_size  # [1, 5]
    prefill = {"input_ids": ids[:, :4], "attention_mask": np.ones((1, 4), np.int64)}
    decode = {"input_ids": ids[:, 4:], "attention_mask": np.ones((1, 5), np.int64)}
    try:
        open_graph(folder / MODEL_FILE)
        logits: list[dict[str, Any]] = []
        for label, results in run_segments(folder / MODEL_FILE, [prefill, decode], config):
            for outputs in results:
                _require_finite(outputs, label)
            logits = results
    except Exception as error:
        if isinstance(error, LlamaOnnxError):
            raise
        raise PackageError(f"ONNX Runtime does not run the finished graph: {error}") from error
    if logits[-1]["logits"].shape != (1, 1, config.vocab_size):
        raise PackageError(f"the finished graph gives logits of {logits[-1]['logits'].shape}.")


def _require_finite(outputs: dict[str, Any], label: str) -> None:
    for name, value in outputs.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise PackageError(
                f"a test step gives NaN or infinity in {name} ({label}): the weights overflow."
            )


def _manifest(
    folder: Path, checkpoint: Checkpoint, target: Target, plan: Plan, data_sha256: str
) -> None:
    tools = ("llama-onnx", "onnxruntime", "onnx-ir", "onnxscript", "numpy")
    write_manifest(
        folder,
        {
            "created_with": {name: version(name) for name in tools},
            "target": target.name,
            "precision": plan.recipe.precision,
            "recipe": plan.recipe.to_json(),
            "source": {
                "format": checkpoint.format,
                "name": checkpoint.path.name,
                "files": checkpoint.fingerprint(),
            },
            "config": asdict(checkpoint.config),
        },
        hashes={DATA_FILE: data_sha256},
    )


def _publish(partial: Path, out: Path) -> None:
    """Give the finished folder its name; an older package goes only when the new one stands."""
    previous = out.with_name(out.name + ".previous")
    if out.exists():
        shutil.rmtree(previous, ignore_errors=True)
        out.rename(previous)
    partial.rename(out)
    shutil.rmtree(previous, ignore_errors=True)


def _disk_error(error: OSError, partial: Path) -> LlamaOnnxError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(
            f"the disk is full; what was written is kept in {partial}: free some space and repeat "
            "the call with --resume, or delete the folder."
        )
    where = error.filename or partial
    return ResourceError(f"{where}: {error.strerror or error}.")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

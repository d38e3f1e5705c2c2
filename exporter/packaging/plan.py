"""What an export will make and need, computed from headers only."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llama_onnx.exporter.checkpoints.lora import adapters_of
from llama_onnx.exporter.graph.kernels import Structure, check_structure
from llama_onnx.exporter.graph.layout import PlacedSlot, attach, lay_out
from llama_onnx.exporter.graph.model import BuiltModel, build_model
from llama_onnx.exporter.graph.slots import Slot
from llama_onnx.exporter.model.checkpoint import Checkpoint, HoldsCodes, check_tensors
from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.model.recipe import Recipe, check_storages
from llama_onnx.exporter.model.storage import RowBlocks
from llama_onnx.exporter.packaging.adapters import WRITING_MEMORY, KeptAdapter, swappable_kinds
from llama_onnx.exporter.packaging.budget import Chosen, Decision
from llama_onnx.exporter.packaging.calibrating import (
    CacheRequest,
    CalibrationRequest,
    calibrated_storages,
    check_zero_points,
)
from llama_onnx.exporter.packaging.calibration_cost import calibration_memory, calibration_seconds
from llama_onnx.exporter.packaging.choose_recipe import choose_recipe
from llama_onnx.exporter.packaging.effect import check_effect
from llama_onnx.exporter.packaging.genai_config import cache_bytes_per_token, default_max_length
from llama_onnx.exporter.packaging.goal import Goal, check_goal, goal_of
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.packaging.presets import with_preset
from llama_onnx.exporter.packaging.recipe_file import read_recipe
from llama_onnx.exporter.packaging.stream import CHUNK_VALUES, slot_sources, source_arrays
from llama_onnx.exporter.quantize.documents import check_text_file
from llama_onnx.exporter.quantize.registry import CORRELATING, plain_quantizer
from llama_onnx.exporter.quantize.source_codes import innermost
from llama_onnx.exporter.tokenizer.source import JSON, tokenizer_kind
from llama_onnx.targets.errors import ResourceError
from llama_onnx.targets.folder_files import file_inside
from llama_onnx.targets.target import Target

BASE_MEMORY = 360 << 20
"""Resident memory of Python with numpy, onnx and onnxruntime loaded; measured, rounded up."""

FIXED_SECONDS = 2.0
"""Loading the libraries, opening the finished package and running a step, for a small model."""

TORCH_MEMORY = 240 << 20
"""What torch adds if a checkpoint's format needs it; measured, rounded up."""

SAMPLE_VALUES = 1 << 24
"""Weights converted to estimate the time."""

RESERVE = 64 << 20
"""Disk needed besides the data file: for graph, tokenizer and journal, with a margin."""


@dataclass(frozen=True)
class Plan:
    """A planned export. Sizes in bytes. `quantized` describes how the source is quantized and how
    its matrices are stored; None for a source of floats. `structure` is what can be told about the
    graph on the target's provider without a session there. `tokenizer` is where the source has its
    tokenizer; None if an export needs `--no-tokenizer`. `goal` is what a budget asks for, and
    `decision` what each matrix got, once that is known. `warnings` say what the package leaves out
    or does other than the source says."""

    recipe: Recipe
    built: BuiltModel
    placed: tuple[PlacedSlot, ...]
    source_bytes: int
    parameters: int
    peak_memory: int
    cache_per_token: int
    max_length: int
    quantized: str | None
    adapter_bytes: int = 0
    structure: Structure | None = None
    tokenizer: str | None = None
    calibration: CalibrationRequest | None = None
    cache: CacheRequest | None = None
    goal: Goal | None = None
    decision: Decision | None = None
    warnings: tuple[str, ...] = ()

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The matrices of the graph, in the order of their bytes."""
        return tuple(placed.slot for placed in self.placed)

    @property
    def data_bytes(self) -> int:
        """Size of the external data file."""
        return self.placed[-1].end

    @property
    def disk_bytes(self) -> int:
        """Free space that an export needs. A calibration's codes are beside the data file until
        that is complete."""
        codes = 0 if self.calibration is None else self.data_bytes
        return self.data_bytes + codes + self.adapter_bytes + RESERVE

    @property
    def bits_per_weight(self) -> float:
        """Bits of the data file per parameter of the model."""
        return 8 * self.data_bytes / self.parameters

    def to_json(self) -> dict[str, Any]:
        """Return the figures, for scripts."""
        return {
            "precision": self.recipe.precision,
            "recipe": self.recipe.to_json(),
            "source_quantized": self.quantized,
            "parameters": self.parameters,
            "source_bytes": self.source_bytes,
            "data_bytes": self.data_bytes,
            "adapter_bytes": self.adapter_bytes,
            "disk_bytes": self.disk_bytes,
            "bits_per_weight": round(self.bits_per_weight, 3),
            "peak_memory_bytes": self.peak_memory,
            "cache_bytes_per_token": self.cache_per_token,
            "max_length": self.max_length,
            "cache_bytes_at_max_length": self.cache_per_token * self.max_length,
            "structure": self.structure.to_json() if self.structure else None,
            "tokenizer": self.tokenizer,
            "calibration": self.calibration.to_json() if self.calibration else None,
            "budget": self.decision.to_json() if self.decision else None,
            "warnings": list(self.warnings),
        }


def make_plan(
    checkpoint: Checkpoint,
    target: Target,
    options: Options,
    workers: int,
    kept: Sequence[KeptAdapter] = (),
    explicit: Collection[str] = (),
    *,
    with_tokenizer: bool = True,
    chosen: Chosen | None = None,
) -> Plan:
    """Check the checkpoint's tensors, build the graph, lay out the data file. Reads no weights.

    With a budget, all matrices have one storage until `chosen` says how each tensor is stored.

    What the adapters in `kept` change is swappable in the graph. `with_tokenizer`: the package gets
    a tokenizer, so a text can be read with it. Raises `UsageError` for options that do not fit, and
    for one of `explicit` that has no effect.
    """
    config = checkpoint.config
    wish = read_recipe(Path(options.recipe)) if options.recipe else None
    options = with_preset(wish.options(options) if wish else options)
    goal = goal_of(options, config.num_parameters())
    if goal and options.quantizer is None:
        options = replace(options, quantizer="best")
    tokenizer = _find_tokenizer(checkpoint)
    reads = with_tokenizer and tokenizer is not None
    found = choose_recipe(checkpoint, target, options, reads=reads, adapters=bool(kept))
    check_effect(explicit, found.recipe)
    recipe = wish.applied(found.recipe, config) if wish else found.recipe
    check_goal(goal, recipe, target)
    check_tensors(checkpoint)
    recipe = replace(recipe, swappable=swappable_kinds(kept), chosen=chosen or recipe.chosen)
    check_storages(recipe, target.name)
    built = build_model(config, recipe)
    placed = lay_out(built.slots)
    attach(built, placed)
    calibration = _calibration(options, recipe, built, config, kept)
    return Plan(
        recipe=recipe,
        built=built,
        placed=placed,
        source_bytes=sum(checkpoint.tensor(name).nbytes for name in config.tensor_shapes()),
        parameters=config.num_parameters(),
        peak_memory=max(
            _peak_memory(placed, workers, kept) + _read_whole(checkpoint, built),
            calibration_memory(config, calibration) if calibration else 0,
        ),
        cache_per_token=cache_bytes_per_token(config, recipe.cache_type),
        max_length=default_max_length(config, recipe.cache_type),
        quantized=_quantization(checkpoint, recipe),
        adapter_bytes=sum(adapter.nbytes for adapter in kept),
        structure=check_structure(built.ir, target),
        tokenizer=tokenizer,
        calibration=calibration,
        cache=CacheRequest(calibration_text(options)) if recipe.cache else None,
        goal=goal,
        warnings=(
            *found.warnings,
            *checkpoint.warnings(),
            *(text for one in kept for text in one.warnings),
        ),
    )


def _find_tokenizer(checkpoint: Checkpoint) -> str | None:
    """Return where `checkpoint`, or an adapter merged into it, has a tokenizer; None if nowhere."""
    if any(file_inside(folder, JSON) for folder in adapters_of(checkpoint)):
        return JSON
    return tokenizer_kind(checkpoint.path)


def _calibration(
    options: Options,
    recipe: Recipe,
    built: BuiltModel,
    config: LlamaConfig,
    kept: Sequence[KeptAdapter],
) -> CalibrationRequest | None:
    """Return what the recipe's quantizer needs; None if it needs no tokens."""
    storages = calibrated_storages(built.slots, recipe, tied=config.tie_word_embeddings)
    if options.recipe:
        check_zero_points(built.slots, storages)
    if not storages:
        return None
    from llama_onnx.exporter.quantize.calibration_text import wanted_tokens

    text = calibration_text(options)
    correlates = recipe.quantizer in CORRELATING
    tokens = wanted_tokens(config, options.calibration_tokens, correlates=correlates)
    # An adapter that is swapped at run time was trained on the channels as they were.
    return CalibrationRequest(storages, text, tokens, not kept, recipe.quantizer)


def calibration_text(options: Options) -> Path | None:
    """Return the file that the user calibrates on; None for the one that is shipped."""
    if options.calibration is None:
        return None
    file = Path(options.calibration)
    check_text_file(file)
    return file


def require_disk(plan: Plan, folder: Path, already_written: int = 0) -> None:
    """Raise `ResourceError` when the disk under `folder` cannot hold what is yet to be written."""
    free = shutil.disk_usage(folder).free
    needed = plan.disk_bytes - already_written
    if free < needed:
        raise ResourceError(
            f"the disk at {folder} has {free / 1e9:.2f} GB free, but the package needs "
            f"{needed / 1e9:.2f} GB: free some space or choose another disk."
        )


def _peak_memory(placed: tuple[PlacedSlot, ...], workers: int, kept: Sequence[KeptAdapter]) -> int:
    # Writing holds a few chunks per thread (float32 rows, two temporaries, codes) and one matrix's
    # scales; running a step at the end holds the largest piece of the model, mapped and packed,
    # and one adapter. Adapters are written one by one, before the weights.
    chunks = 2 * workers * 4 * (4 * CHUNK_VALUES)
    scales = max(_bytes_besides_codes(slot) for slot in placed)
    layer: dict[str, int] = {}
    for slot in placed:
        piece = ".".join(slot.slot.name.split(".")[:3])
        layer[piece] = layer.get(piece, 0) + slot.slot.nbytes
    # A matrix whose rows are scattered over the file is assembled first, with one byte per code.
    together = max(slot.slot.storage.joined_values(slot.slot.shape) for slot in placed)
    base = BASE_MEMORY + (TORCH_MEMORY if "torch" in sys.modules else 0)
    adapter = max((adapter.nbytes for adapter in kept), default=0)
    writing = int(WRITING_MEMORY * adapter)
    return base + max(chunks + scales + together, writing, 2 * max(layer.values()) + 2 * adapter)


def _bytes_besides_codes(slot: PlacedSlot) -> int:
    """Return the bytes of a quantized matrix's scales and other tables, or of a whole float one."""
    places = slot.places[1:] or slot.places
    return sum(place.initializer.nbytes for place in places)


def _read_whole(checkpoint: Checkpoint, built: BuiltModel) -> int:
    """Return the largest number of bytes that a slot reads at once, not row by row: its codes."""
    source = innermost(checkpoint)
    if not isinstance(source, HoldsCodes) or not source.reads_whole:
        return 0
    return max(
        sum(source.tensor(name).nbytes for name in slot.sources if source.bits_of(name))
        for slot in built.slots
    )


def _quantization(checkpoint: Checkpoint, recipe: Recipe) -> str | None:
    source = innermost(checkpoint)
    if not isinstance(source, HoldsCodes):
        return None
    names = checkpoint.config.tensor_shapes()
    matrices = sum(source.bits_of(name) is not None for name in names)
    taken = len(recipe.source_codes)
    counts = {"taken over code by code": taken, "dequantized": matrices - taken}
    parts = [
        f"{count} {'matrix' if count == 1 else 'matrices'} {what}"
        for what, count in counts.items()
        if count
    ]
    return f"{source.describe()}: {', '.join(parts)}"


def estimate_seconds(plan: Plan, checkpoint: Checkpoint) -> float:
    """Estimate the seconds an export takes here, by converting some of the model's own weights.

    Writing the result to disk is not measured: on a slow disk an export takes longer.
    Raises `CheckpointError` when those weights are damaged.
    """
    workers = os.cpu_count() or 1
    slots = [placed.slot for placed in plan.placed if placed.slot.sources]
    largest = _without_zero_points(max(slots, key=lambda slot: slot.nbytes))
    quantizer = plain_quantizer(plan.recipe.quantizer)
    source = slot_sources(largest, checkpoint, quantizer.quantize)[0]
    width = source.shape[1] if len(source.shape) > 1 else 1
    rows = min(source.shape[0], max(1, SAMPLE_VALUES // width))
    sample = replace(source, shape=(rows, *source.shape[1:]))
    started = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        for arrays in source_arrays([sample], largest.storage, pool, workers):
            for array in arrays:
                hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data)
    elapsed = time.perf_counter() - started
    writing = FIXED_SECONDS + elapsed * plan.parameters / (rows * width)
    if plan.calibration is None:
        return writing
    return writing + calibration_seconds(checkpoint.config, plan.calibration, workers)


def _without_zero_points(slot: Slot) -> Slot:
    """Return `slot` in a storage that can be filled without a calibration, in as much time."""
    if not isinstance(slot.storage, RowBlocks) or slot.keeps_codes:
        return slot
    return replace(slot, storage=replace(slot.storage, zero_points=False, stored_scales="plain"))

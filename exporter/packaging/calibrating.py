"""What an export's plan asks of a calibration, and running it."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_onnx.exporter.graph.names import EMBEDDING
from llama_onnx.exporter.graph.slots import Slot
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.exporter.model.recipe import Recipe
from llama_onnx.exporter.model.storage import Blocks, ColumnBlocks, RowBlocks
from llama_onnx.exporter.quantize.registry import CALIBRATED
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.listing import CALIBRATION_FOLDER
from llama_onnx.targets.progress import Progress

if TYPE_CHECKING:
    from llama_onnx.exporter.calibration.store import Calibrated
    from llama_onnx.exporter.formats.tensor import Float32

WEIGHTS_FOLDER = "weights"
"""In the calibration's folder: how much each token matters."""


@dataclass(frozen=True)
class CalibrationRequest:
    """`storages` of the tensors that get their codes from a calibration, by Hugging Face name; the
    `text` (None: the one that is shipped); how many `tokens` of it; whether channels are rescaled
    first; the name of the `quantizer`."""

    storages: Mapping[str, Blocks]
    text: Path | None
    tokens: int
    rescales: bool
    quantizer: str

    def to_json(self) -> dict[str, Any]:
        """Return it for the manifest and the journal."""
        return {
            "text": self.text.name if self.text else None,
            "tokens": self.tokens,
            "rescales": self.rescales,
            "matrices": len(self.storages),
        }


@dataclass(frozen=True)
class CacheRequest:
    """The text that the scales of a cache in int8 are measured on (None: the one that is shipped),
    and how many tokens of it."""

    text: Path | None
    tokens: int = 2048

    def to_json(self) -> dict[str, Any]:
        """Return it for the manifest and the journal."""
        return {"text": self.text.name if self.text else None, "tokens": self.tokens}


def calibrated_storages(slots: Iterable[Slot], recipe: Recipe, *, tied: bool) -> dict[str, Blocks]:
    """Return the storage of each tensor that a calibration chooses codes for: of quantized matrices
    whose inputs it sees. That of a separate embedding are token ids; 8 bits of one that is tied to
    the head lose next to nothing either way."""
    if recipe.quantizer not in CALIBRATED:
        return {}
    found: dict[str, Blocks] = {}
    for slot in slots:
        storage = slot.storage
        if not isinstance(storage, RowBlocks | ColumnBlocks) or slot.keeps_codes:
            continue
        if slot.name == EMBEDDING and not (tied and storage.bits < 8):
            continue
        found |= dict.fromkeys(slot.sources, storage)
    return found


def check_zero_points(slots: Iterable[Slot], calibrated: Collection[str]) -> None:
    """Raise `UsageError` if a recipe asks for zero points of a matrix that is rounded to nearest,
    as its codes are neither the source's nor in `calibrated`: rounding chooses none."""
    for slot in slots:
        storage = slot.storage
        if not isinstance(storage, RowBlocks) or slot.keeps_codes or slot.sources[0] in calibrated:
            continue
        if storage.zero_points:
            raise UsageError(
                f"the recipe stores {slot.sources[0]} with zero points, but its codes are rounded "
                "to nearest, which chooses none: set zero_points to false there, or take the "
                "quantizer and the model that the recipe was made for."
            )


def run_calibration(
    checkpoint: Checkpoint,
    quantizer_name: str,
    wanted: CalibrationRequest,
    folder: Path,
    workers: int,
    progress: Progress,
) -> tuple[Calibrated, tuple[str, ...]]:
    """Return the codes that `wanted` asks for, and warnings for people. `folder` is the package in
    the making, which has its tokenizer already."""
    from llama_onnx.exporter.calibration.calibrate import Task, calibrate
    from llama_onnx.exporter.calibration.token_weights import weigh
    from llama_onnx.exporter.quantize.base import CalibratedQuantizer
    from llama_onnx.exporter.quantize.calibration_text import (
        calibration_tokens,
        perplexity_warnings,
    )
    from llama_onnx.exporter.quantize.registry import get_quantizer

    text = calibration_tokens(folder, checkpoint.config, wanted.text, tokens=wanted.tokens)
    quantizer = get_quantizer(quantizer_name)
    assert isinstance(quantizer, CalibratedQuantizer), "only these are calibrated"
    place, weights = folder / CALIBRATION_FOLDER, None
    if quantizer.weighs:
        weights = place / WEIGHTS_FOLDER
        weigh(checkpoint, text.sequences, weights, progress)
    task = Task(checkpoint, quantizer, wanted.storages, wanted.rescales, weights)
    unknown = text.letters_per_token is not None
    found = calibrate(task, text.sequences, place, workers, progress, likelihood=unknown)
    return found, (*text.warnings, *perplexity_warnings(text, found.nll))


def measure_cache(
    checkpoint: Checkpoint, wanted: CacheRequest, folder: Path, progress: Progress
) -> tuple[Mapping[str, Float32], tuple[str, ...]]:
    """Return the scales of a cache in int8 by the names of their slots, and warnings for people.
    `checkpoint` has the weights of the package, channel scales included."""
    from llama_onnx.exporter.calibration.cache import cache_scales
    from llama_onnx.exporter.quantize.calibration_text import calibration_tokens

    text = calibration_tokens(folder, checkpoint.config, wanted.text, tokens=wanted.tokens)
    file = folder / CALIBRATION_FOLDER / "cache.safetensors"
    return cache_scales(checkpoint, text.sequences, file, progress), text.warnings


def remove_calibration(folder: Path) -> None:
    """Remove what a calibration kept in the unfinished package `folder`."""
    shutil.rmtree(folder / CALIBRATION_FOLDER, ignore_errors=True)

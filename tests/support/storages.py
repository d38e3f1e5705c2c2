"""Packages whose matrices are stored in ways that no option of `export` asks for yet, and the
quantizer that fills them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np

from llama_onnx.exporter.formats.tensor import Float32
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.model.recipe import Recipe
from llama_onnx.exporter.model.storage import Blocks, Quantized, RowBlocks
from llama_onnx.exporter.packaging import choose_recipe
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.quantize import registry
from llama_onnx.targets.registry import get_target
from tests.support import tiny

Chosen = Mapping[str, RowBlocks]


class Asymmetric:
    """Rounds to nearest: from a block's lowest value to its highest, or with the zero point in the
    middle; scales are positive, and such as the storage can hold."""

    name, calibrates = "asymmetric", False

    def quantize(self, rows: Float32, storage: Blocks) -> Quantized:
        blocks, top = storage.num_blocks(rows.shape[1]), (1 << storage.bits) - 1
        wide = np.pad(rows, ((0, 0), (0, blocks * storage.block_size - rows.shape[1])))
        values = wide.reshape(len(rows), blocks, storage.block_size)
        low, high = np.minimum(values.min(axis=2), 0), np.maximum(values.max(axis=2), 0)
        free = isinstance(storage, RowBlocks) and storage.zero_points
        spans = (high - low) / top if free else np.maximum(high, -low) / (top >> 1)
        scales = spans.astype(np.float32)
        if isinstance(storage, RowBlocks):
            scales = storage.representable(scales)
        steps = np.where(scales > 0, scales, np.float32(1))
        middle = np.full(scales.shape, (top + 1) / 2)
        zeros = np.clip(np.rint(-low / steps), 0, top) if free else middle
        codes = np.clip(np.rint(values / steps[..., None]) + zeros[..., None], 0, top)
        codes = codes.reshape(len(rows), -1).astype(np.uint8)
        return Quantized(codes, scales, zeros.astype(np.uint8) if free else None)


def matrices(config: LlamaConfig) -> list[str]:
    """Return the names of all matrices of a checkpoint."""
    return [name for name, shape in config.tensor_shapes().items() if len(shape) == 2]


def everywhere(storage: RowBlocks) -> Callable[[LlamaConfig], Chosen]:
    """Return a function that chooses `storage` for every matrix."""
    return lambda config: dict.fromkeys(matrices(config), storage)


FORMS = {
    "zero points": RowBlocks(4, 32, zero_points=True),
    "fp16 scales": RowBlocks(4, 32, stored_scales="fp16"),
    "uint8 scales": RowBlocks(4, 32, stored_scales="uint8"),
    "uint8 scales, zero points": RowBlocks(4, 32, zero_points=True, stored_scales="uint8"),
    "int8, uint8 scales, zero points": RowBlocks(8, 64, zero_points=True, stored_scales="uint8"),
    "int2, fp16 scales, zero points": RowBlocks(2, 32, zero_points=True, stored_scales="fp16"),
}
"""Some storages, by name."""


@contextmanager
def storing(choose: Callable[[LlamaConfig], Chosen]) -> Iterator[None]:
    """Make plans with the matrices of each model stored as `choose` says."""

    def keep(checkpoint: Checkpoint, recipe: Recipe, chosen: Collection[str]) -> Recipe:
        return replace(recipe, chosen=choose(checkpoint.config), quantizer=Asymmetric.name)

    with (
        patch.object(choose_recipe, "keep_source_codes", keep),
        patch.dict(registry.QUANTIZERS, {Asymmetric.name: Asymmetric}),
    ):
        yield


def make_chosen(
    folder: Path,
    choose: Callable[[LlamaConfig], Chosen],
    config: LlamaConfig = tiny.GQA,
    options: Options = Options("int4"),  # noqa: B008
    target: str = "cpu",
) -> tuple[Path, Path]:
    """Export a tiny model to a package with its matrices stored as `choose` says; return the
    package and the checkpoint."""
    source = tiny.write_huggingface(folder / "source", config)
    with storing(choose):
        result = export_package(source, folder / "package", get_target(target), options)
    return result.package, source

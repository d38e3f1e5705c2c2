"""What a calibration needs: memory from the model's sizes, time from samples of its work."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import prod

import numpy as np

from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.model.storage import RowBlocks
from llama_onnx.exporter.packaging.calibrating import CalibrationRequest
from llama_onnx.exporter.quantize.registry import CORRELATING, WEIGHING

LIBRARIES = 950_000_000
"""Bytes of Python with PyTorch, transformers and ONNX Runtime loaded, and of one sequence's
activations; measured at 7B geometry, rounded up."""

_TRIES = 8 * 256
"""Rows of each group of matrices that are quantized to choose its channel scales."""

_GPTQ = 4.0
"""Time of GPTQ's columns, as a multiple of the search for ranges; measured on a matrix of 1536."""

_BACKWARD = 3.0
"""Time of a pass forward and backward, as a multiple of one forward."""

_SAMPLE, _SIDE, _REPEATS = (256, 2048), 1024, 4


def calibration_memory(config: LlamaConfig, wanted: CalibrationRequest) -> int:
    """Return the bytes that `wanted` takes at most: one layer in float32 beside the hidden states
    of all tokens, or the products of channels and the factors of the largest."""
    hidden, inner = config.hidden_size, config.intermediate_size
    states = 4 * wanted.tokens * hidden
    products = factors = 0
    if wanted.quantizer in CORRELATING:
        products, factors = 4 * (3 * hidden**2 + inner**2), 4 * 4 * max(hidden, inner) ** 2
    layer = 4 * _layer_values(config)
    return LIBRARIES + states + products + max(layer, states + factors)


def calibration_seconds(config: LlamaConfig, wanted: CalibrationRequest, workers: int) -> float:
    """Estimate the seconds of `wanted` here, from a sample of the search and of a product."""
    values = config.num_hidden_layers * _layer_values(config)
    widths = 3 * config.hidden_size + config.intermediate_size
    tried = config.num_hidden_layers * _TRIES * widths
    search, product = _seconds_per_weight(), _seconds_per_product()
    passing = values * wanted.tokens * product
    if wanted.quantizer in WEIGHING:
        passing *= 1 + _BACKWARD
    chosen = (values + tried) * search / workers
    if wanted.quantizer in CORRELATING:
        widest = max(config.hidden_size, config.intermediate_size)
        chosen += _GPTQ * values * search / workers + values * widest * product
        passing += wanted.tokens * config.num_hidden_layers * widths * widest * product
    return passing + chosen


def _layer_values(config: LlamaConfig) -> int:
    prefix = "model.layers.0."
    shapes = config.tensor_shapes()
    return sum(prod(shape) for name, shape in shapes.items() if name.startswith(prefix))


def _seconds_per_weight() -> float:
    from llama_onnx.exporter.quantize.ranges import search_grid

    rows = np.random.default_rng(0).standard_normal(_SAMPLE, np.float32)
    squares = np.ones(_SAMPLE[1], np.float32)
    storage = RowBlocks(4, 32, zero_points=True)
    return _least_time(lambda: search_grid(rows, squares, storage)) / rows.size


def _seconds_per_product() -> float:
    """Return the seconds of one multiplication and addition in a large product of matrices."""
    square = np.ones((_SIDE, _SIDE), np.float32)
    return _least_time(lambda: np.matmul(square, square)) / _SIDE**3


def _least_time(work: Callable[[], object]) -> float:
    """Return the seconds of `work` when nothing disturbs it."""
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)

"""Whether this processor's products of int8 are exact, as ONNX Runtime computes them.

On processors with AVX2 and without VNNI it adds up two products in 16 bits, where they stop at the
largest number:
https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html#when-and-why-do-i-need-to-try-u8u8

Windows does not report VNNI, so this computes the products that would be too large.
"""

from __future__ import annotations

import numpy as np

from llama_onnx.runtime import ort
from llama_onnx.runtime.tuning import onnx_wire
from llama_onnx.targets.onnx_file import FLOAT, UINT8

_INT8 = 3  # TensorProto.DataType
_ROWS, _DEPTH, _COLUMNS = 16, 128, 32
_MIDDLE = 128  # stands for zero in uint8


def are_exact() -> bool:
    """Return whether the largest products that there are add up to what they must.

    >>> are_exact() in (True, False)
    True
    """
    random = np.random.default_rng(0)
    left = random.integers(0, 256, (_ROWS, _DEPTH)).astype(np.uint8)
    right = random.integers(-127, 128, (_DEPTH, _COLUMNS)).astype(np.int8)
    left[: _ROWS // 2], right[:, : _COLUMNS // 2] = 255, 127
    session = ort.create_session(_graph(right))
    (found,) = session.run(None, {"left": left})
    # Below 2^24, so that float32 has every sum.
    expected = (left.astype(np.int64) - _MIDDLE) @ right.astype(np.int64)
    return bool(np.array_equal(found, expected))


def _graph(right: np.ndarray) -> bytes:
    inputs = ("left", "right", "one", "one", "middle", "zero")
    product = onnx_wire.node("MatMulIntegerToFloat", inputs, "sums", domain="com.microsoft")
    tensors = (
        onnx_wire.tensor("right", _INT8, right.shape, right.tobytes()),
        onnx_wire.tensor("one", FLOAT, (), np.float32(1).tobytes()),
        onnx_wire.tensor("middle", UINT8, (), np.uint8(_MIDDLE).tobytes()),
        onnx_wire.tensor("zero", _INT8, (), np.int8(0).tobytes()),
    )
    return onnx_wire.model(
        [product],
        tensors,
        {"left": (UINT8, (_ROWS, _DEPTH))},
        {"sums": (FLOAT, (_ROWS, _COLUMNS))},
    )

"""Parts of ONNX files as bytes, so that writing a graph needs no onnx library.

The numbers are those of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod

from llama_onnx.targets.protobuf import BYTES, VARINT, encode, encode_text

_IR_VERSION = 10
_OPSETS = (("", 21), ("com.microsoft", 1))


def node(
    operator: str,
    inputs: Collection[str],
    output: str,
    attributes: Mapping[str, int] | None = None,
    domain: str = "",
) -> bytes:
    """Return a NodeProto, which is called like its output."""
    parts = [encode_text(1, name) for name in inputs]
    parts += [encode_text(2, output), encode_text(3, output), encode_text(4, operator)]
    for name, value in (attributes or {}).items():  # name = 1, i = 3, type = 20: INT
        integer = encode_text(1, name) + encode(3, VARINT, value) + encode(20, VARINT, 2)
        parts.append(encode(5, BYTES, integer))
    if domain:
        parts.append(encode_text(7, domain))
    return b"".join(parts)


def tensor(name: str, kind: int, dims: Collection[int], raw: bytes) -> bytes:
    """Return a TensorProto with its values, `kind` being TensorProto.DataType."""
    assert len(raw) >= prod(dims)
    return _head(name, kind, dims) + encode(9, BYTES, raw)


def external_tensor(
    name: str, kind: int, dims: Collection[int], file: str, start: int, length: int
) -> bytes:
    """Return a TensorProto whose values are `length` bytes of `file`, from `start` on."""
    places = {"location": file, "offset": str(start), "length": str(length)}
    entries = (encode_text(1, key) + encode_text(2, value) for key, value in places.items())
    data = b"".join(encode(13, BYTES, entry) for entry in entries)
    return _head(name, kind, dims) + data + encode(14, VARINT, 1)


def _head(name: str, kind: int, dims: Collection[int]) -> bytes:
    """Return the start of a TensorProto: dims = 1, data_type = 2, name = 8."""
    lengths = b"".join(encode(1, VARINT, dim) for dim in dims)
    return lengths + encode(2, VARINT, kind) + encode_text(8, name)


def model(
    nodes: Collection[bytes],
    tensors: Collection[bytes],
    inputs: Mapping[str, tuple[int, Collection[int]]],
    outputs: Mapping[str, tuple[int, Collection[int]]],
) -> bytes:
    """Return a ModelProto; inputs and outputs are names -> TensorProto.DataType and shape."""
    graph = [encode(1, BYTES, each) for each in nodes]
    graph += [encode_text(2, "graph"), *(encode(5, BYTES, each) for each in tensors)]
    graph += [encode(11, BYTES, _value(name, *of)) for name, of in inputs.items()]
    graph += [encode(12, BYTES, _value(name, *of)) for name, of in outputs.items()]
    opsets = (encode_text(1, name) + encode(2, VARINT, version) for name, version in _OPSETS)
    return b"".join(
        [
            encode(1, VARINT, _IR_VERSION),
            encode(7, BYTES, b"".join(graph)),
            *(encode(8, BYTES, opset) for opset in opsets),
        ]
    )


def _value(name: str, kind: int, dims: Collection[int]) -> bytes:
    """Return a ValueInfoProto: name = 1, type = 2, in which tensor_type = 1."""
    shape = b"".join(encode(1, BYTES, encode(1, VARINT, dim)) for dim in dims)
    described = encode(1, VARINT, kind) + encode(2, BYTES, shape)
    return encode_text(1, name) + encode(2, BYTES, encode(1, BYTES, described))

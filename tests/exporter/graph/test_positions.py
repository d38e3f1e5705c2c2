"""Positions and padding of new tokens, against what numpy counts from the rows themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnxscript import GraphBuilder

from llama_onnx.exporter.graph.model import IR_VERSION
from llama_onnx.exporter.graph.positions import counted_places, shaped_places

Array = npt.NDArray[Any]

# Per row: positions in the cache, padding before the new tokens, new tokens, padding after them.
CASES = {
    "a prompt": [(0, 0, 5, 0)],
    "one step": [(7, 0, 1, 0)],
    "several tokens after a cache": [(7, 0, 4, 0)],
    "a batch padded on the left": [(0, 3, 2, 0), (0, 0, 5, 0)],
    "a batch padded on the right": [(0, 0, 2, 3), (0, 0, 5, 0)],
    "padded on both sides": [(0, 1, 3, 1), (0, 0, 5, 0), (0, 4, 1, 0)],
}


@pytest.mark.parametrize("rows", CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    ("counted", "spare"),
    [(True, 0), (True, 6), (False, 0)],
    ids=["counted", "counted, with a longer mask", "shaped"],
)
def test_places(rows: list[tuple[int, int, int, int]], counted: bool, spare: int) -> None:
    ids, mask = inputs(rows, spare)
    found = compute(ids, mask, counted=counted)
    for number, (past, before, valid, after) in enumerate(rows):
        size = before + valid + after
        assert found["seqlens_k"][number] == past + valid - 1
        assert found["last"][number] == valid - 1
        front = found["front"][number]
        assert list(front[:valid]) == list(range(before, before + valid))
        assert sorted(front) == list(range(size))
        assert list(front[found["back"][number]]) == list(range(size))
        assert list(found["position_ids"][number, :valid]) == list(range(past, past + valid))
    assert found["back"].dtype == found["last"].dtype == np.int64


def test_steps_after_a_padded_batch() -> None:
    """Each row's mask keeps the padding of its prompt, in front of or after its tokens."""
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 0, 0, 1], [1, 1, 1, 1, 1]])
    for spare in (0, 4):
        longer = np.pad(mask, ((0, 0), (0, spare)))
        found = compute(np.full((3, 1), 9), longer, counted=True)
        assert found["position_ids"].ravel().tolist() == [2, 2, 4]
        assert found["seqlens_k"].tolist() == [2, 2, 4]
        assert found["last"].ravel().tolist() == found["back"].ravel().tolist() == [0, 0, 0]


def inputs(rows: list[tuple[int, int, int, int]], spare: int) -> tuple[Array, Array]:
    """Return token ids [B, S] and the mask [B, T], `spare` columns longer than the tokens."""
    pieces = [(1, 0, 1, 0, 0)] * len(rows)
    mask = [np.repeat(bits, (*row, spare)) for bits, row in zip(pieces, rows, strict=True)]
    return np.full((len(rows), sum(rows[0][1:])), 9), np.stack(mask)


def compute(ids: Array, mask: Array, *, counted: bool) -> dict[str, Array]:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 21}, name="places")
    builder = GraphBuilder(graph)
    given = builder.input("input_ids", ir.DataType.INT64, ["B", "S"])
    seen = builder.input("attention_mask", ir.DataType.INT64, ["B", "T"])
    op = builder.op
    places = counted_places(op, given, seen, 32) if counted else shaped_places(op, given, seen)
    named = {name: value for name, value in vars(places).items() if value is not None}
    for name, value in named.items():
        builder.add_output(value, name)
    proto = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION)).SerializeToString()
    session = ort.InferenceSession(proto, providers=["CPUExecutionProvider"])
    feeds = {"input_ids": ids.astype(np.int64), "attention_mask": mask.astype(np.int64)}
    return dict(zip(named, session.run(list(named), feeds), strict=True))

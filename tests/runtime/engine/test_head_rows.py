"""A graph that computes the last logits only: the same logits as the graph on disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.runtime.engine.bound_graph import BoundGraph
from llama_onnx.runtime.engine.cache_layout import CacheLayout
from llama_onnx.runtime.engine.head_rows import LOGITS_FROM, choose_rows
from llama_onnx.runtime.placement.session import OpenSession, open_session
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.providers import CPU
from llama_onnx.targets.registry import get_target
from tests.support import tiny

KINDS = {
    "fp32": ("cpu", Options("fp32")),
    "int4": ("cpu", Options("int4", quantizer="rtn")),
    "int8": ("cpu", Options("int8", quantizer="rtn")),
    "fp16": ("cuda", Options("fp16")),
    "portable": ("portable", Options("fp32")),
}
PROMPT = np.random.default_rng(0).integers(3, 200, 40)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_huggingface(tmp_path_factory.mktemp("head") / "source")


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, source: Path) -> Path:
    target, options = KINDS[request.param]
    out = source.with_name(f"Käse {request.param}")
    return export_package(source, out, get_target(target), options).package / "model.onnx"


def feeds(opened: OpenSession, ids: Any) -> dict[str, Any]:
    buffers = CacheLayout.of(opened.session).buffers(1, 64 if opened.shares_buffer else 0)
    return {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int64), **buffers}


@pytest.mark.parametrize("first", [0, 17, 38])
def test_the_logits_are_those_of_the_graph_on_disk(model: Path, first: int) -> None:
    whole = open_session(model, CPU, threads=1)
    chosen = open_session(model, CPU, threads=1, edit=choose_rows)
    (expected,) = whole.session.run(["logits"], feeds(whole, PROMPT))
    given = {**feeds(chosen, PROMPT), LOGITS_FROM: np.array([first])}
    (found,) = chosen.session.run(["logits"], given)
    assert found.shape == (1, len(PROMPT) - first, expected.shape[-1])
    np.testing.assert_array_equal(found, expected[:, first:])


def test_nothing_else_of_the_graph_changes(model: Path) -> None:
    before = onnx.load(model, load_external_data=False)
    after = onnx.load_from_string(choose_rows(model.read_bytes()))
    (added,) = [node for node in after.graph.node if LOGITS_FROM in node.input]
    head = next(node for node in after.graph.node if "logits" in node.output)
    head.input[0] = added.input[0]
    after.graph.node.remove(added)
    del after.graph.input[-1], after.graph.initializer[-2:]
    (logits,) = [output for output in after.graph.output if output.name == "logits"]
    (old,) = [output for output in before.graph.output if output.name == "logits"]
    logits.CopyFrom(old)
    assert after == before


def test_a_prompt_keeps_few_logits(model: Path) -> None:
    """All of them were 100 MB for 512 tokens of a vocabulary of 49,152."""
    opened = open_session(model, CPU, threads=1, edit=choose_rows)
    if not opened.shares_buffer:
        pytest.skip("this graph's cache is not bound")
    bound = BoundGraph(opened.session, {})
    bound.bind(CacheLayout.of(opened.session).buffers(1, 64))
    mask = np.ones((1, len(PROMPT)), np.int64)
    few = bound.run(PROMPT[None], mask, last=2).copy()
    assert few.shape[1] == 2
    np.testing.assert_array_equal(few, bound.run(PROMPT[None], mask)[:, -2:])


@pytest.mark.parametrize("options", [Options("fp32", logits="last")])
def test_a_head_that_computes_one_row_stays_as_it_is(
    source: Path, tmp_path: Path, options: Options
) -> None:
    package = export_package(source, tmp_path / "out", get_target("cpu"), options).package
    content = (package / "model.onnx").read_bytes()
    assert choose_rows(content) == content


def test_logits_that_are_no_product_stay_as_they_are(model: Path) -> None:
    graph = onnx.load(model, load_external_data=False)
    head = next(node for node in graph.graph.node if "logits" in node.output)
    head.output[0] = "before"
    graph.graph.node.append(onnx.helper.make_node("Identity", ["before"], ["logits"]))
    content = graph.SerializeToString()
    assert choose_rows(content) == content


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200))
def test_what_is_no_graph_stays_as_it_is(content: bytes) -> None:
    assert choose_rows(content) == content


def test_a_graph_that_does_not_open_is_named(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model.parent, tmp_path / "copy")
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    graph.graph.node[0].input[0] = "nothing makes this"
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(PackageError, match=f"onnxruntime refuses the graph of .*{folder.name}"):
        open_session(folder / "model.onnx", CPU, threads=1, edit=choose_rows)

"""Names of a graph: what is built is what ONNX Runtime and genai find, and is parsed again."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from llama_onnx.exporter.graph import names
from llama_onnx.exporter.graph.model import build_model
from llama_onnx.exporter.model.recipe import make_recipe
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.targets import graph_names
from llama_onnx.targets.registry import get_target
from tests.support import tiny


@pytest.mark.parametrize("module", [names, graph_names])
def test_the_examples_hold(module: object) -> None:
    found = doctest.testmod(module)  # type: ignore[arg-type]
    assert found.attempted and not found.failed


def test_genai_finds_the_inputs_and_outputs_it_is_told_of(tmp_path: Path) -> None:
    source, out = tiny.write_huggingface(tmp_path / "source"), tmp_path / "out"
    export_package(source, out, get_target("cpu"), Options("fp32"))
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    decoder = json.loads((out / "genai_config.json").read_text())["model"]["decoder"]
    layers = range(tiny.GQA.num_hidden_layers)
    for side, values in (("inputs", graph.input), ("outputs", graph.output)):
        told = {
            name % layer if "%d" in name else name
            for name in decoder[side].values()
            for layer in layers
        }
        assert told == {value.name for value in values}


def test_every_node_of_a_layer_is_told_by_its_name() -> None:
    graph = build_model(tiny.GQA, make_recipe("int4", tied=False)).ir.graph
    layers = [names.layer_of(node.name or "") for node in graph]
    assert {layer for layer in layers if layer is not None} == {0, 1, 2}
    attention = [n for n in graph if n.op_type == "GroupQueryAttention"]
    assert [names.layer_of(str(node.name)) for node in attention] == [0, 1, 2]
    assert {names.module_in_layer(str(node.name)) for node in attention} == {"self_attn"}


def test_caches_pair_up() -> None:
    graph = build_model(tiny.GQA, make_recipe("fp32", tied=False)).ir.graph

    def called(values: list[ir.Value]) -> list[str]:
        return [str(value.name) for value in values]

    past = [name for name in called(list(graph.inputs)) if graph_names.is_past(name)]
    present = [name for name in called(list(graph.outputs)) if graph_names.is_present(name)]
    assert len(past) == 6
    assert [graph_names.present_of(name) for name in past] == present
    assert [graph_names.past_of(name) for name in present] == past

"""The check of a stranger's graph, against our own exporter and against onnx's own reader."""

from __future__ import annotations

import onnx
import pytest
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_onnx.targets.graph_file import check_graph
from llama_onnx.targets.graph_operators import OPERATORS
from llama_onnx.targets.onnx_file import GraphError
from tests.support.folded_graphs import HOSTILE_FOLDS, SOUND_FOLDS, folded_graph
from tests.support.hostile_packages import SOUND
from tests.support.written_graphs import written_graphs

DATA_FILE = "model.onnx.data"
SOUND_GRAPH = (SOUND / "model.onnx").read_bytes()
SOUND_SIZE = (SOUND / DATA_FILE).stat().st_size


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, int]]:
    """Every kind of graph that the exporter writes, by name: the file, and the size of its data."""
    return written_graphs(tmp_path_factory)


def test_the_list_has_what_the_exporter_writes_and_no_more(
    graphs: dict[str, tuple[bytes, int]],
) -> None:
    """If you changed the graph: read what graph_operators.py says before you add an operator."""
    written: dict[str, set[str]] = {}
    for content, _ in graphs.values():
        for node in onnx.ModelProto.FromString(content).graph.node:
            written.setdefault(node.domain, set()).add(node.op_type)
    assert written == {domain: set(names) for domain, names in OPERATORS.items()}


def test_every_graph_of_the_exporter_passes_and_reads_as_onnx_reads_it(
    graphs: dict[str, tuple[bytes, int]],
) -> None:
    assert len(graphs) > 50
    for name, (content, size) in graphs.items():
        facts = check_graph(content, DATA_FILE, size)
        graph = onnx.ModelProto.FromString(content).graph
        for ours, theirs in ((facts.inputs, graph.input), (facts.outputs, graph.output)):
            assert ours == {
                value.name: tuple(
                    dim.dim_value if dim.HasField("dim_value") else dim.dim_param
                    for dim in value.type.tensor_type.shape.dim
                )
                for value in theirs
            }, name
        places = {
            tensor.name: {entry.key: entry.value for entry in tensor.external_data}
            for tensor in graph.initializer
            if tensor.external_data
        }
        assert {w.name: (w.start, w.end) for w in facts.weights} == {
            tensor: (int(place["offset"]), int(place["offset"]) + int(place["length"]))
            for tensor, place in places.items()
        }, name
        assert (facts.layers, facts.vocab_size) == (3, 288)


@given(data=st.data())
@settings(max_examples=300)
def test_what_passes_is_harmless_by_onnx_s_own_reader(data: st.DataObject) -> None:
    """Bytes changed at random: refused with a `GraphError`, or still only what is on the list."""
    content = bytearray(SOUND_GRAPH)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        start = data.draw(st.integers(0, len(content) - 1))
        length = data.draw(st.integers(1, 64))
        content[start:start] = content[start : start + length]
    try:
        facts = check_graph(bytes(content), DATA_FILE, SOUND_SIZE)
    except GraphError:
        return
    try:
        model = onnx.ModelProto.FromString(bytes(content))
    except DecodeError:  # in a part that we do not look into, such as shapes inside the graph
        return
    assert not (model.functions or model.training_info or model.metadata_props)
    assert not model.graph.sparse_initializer
    assert {value.name for value in model.graph.input} == facts.inputs.keys()
    for node in model.graph.node:
        assert node.op_type in OPERATORS[node.domain]
        assert not any(a.HasField("g") or a.HasField("t") or a.graphs for a in node.attribute)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            assert entry.key != "location" or entry.value == DATA_FILE


def test_cut_and_random_bytes_are_refused() -> None:
    for end in range(0, len(SOUND_GRAPH) - 1, 97):
        with pytest.raises(GraphError):
            check_graph(SOUND_GRAPH[:end], DATA_FILE, SOUND_SIZE)


def test_a_field_that_a_library_does_not_see_is_refused() -> None:
    """A text in a field of fixed size is unknown to onnx; a reader that took it for the text would
    check another graph than the one that runs."""
    node = bytes([0x11]) + b"12345678"  # field 2 of a node, an output, as 64 bits
    graph = bytes([0x0A, len(node)]) + node
    model = bytes([0x3A, len(graph)]) + graph
    assert onnx.ModelProto.FromString(model).graph.node[0].output == []
    with pytest.raises(GraphError, match="a number of fixed size in a node"):
        check_graph(model, DATA_FILE, 0)


@pytest.mark.parametrize("name", SOUND_FOLDS)
def test_weights_are_converted_as_the_exporter_converts_them(name: str) -> None:
    content, size = folded_graph(*SOUND_FOLDS[name])
    check_graph(content, DATA_FILE, size)


@pytest.mark.parametrize("name", HOSTILE_FOLDS)
def test_nothing_else_works_on_weights_alone(name: str) -> None:
    """ONNX Runtime would compute it while it opens the graph, whatever time and memory it takes."""
    wrong, parts = HOSTILE_FOLDS[name]
    content, size = folded_graph(*parts)
    with pytest.raises(GraphError, match=wrong):
        check_graph(content, DATA_FILE, size)


def test_an_attribute_has_no_other_text_than_the_exporter_writes(
    graphs: dict[str, tuple[bytes, int]],
) -> None:
    content, size = graphs["int8 cache"]
    check_graph(content, DATA_FILE, size)
    model = onnx.ModelProto.FromString(content)
    node = next(n for n in model.graph.node if n.op_type == "GroupQueryAttention")
    attribute = next(a for a in node.attribute if a.name == "k_quant_type")
    attribute.s = b"PER_TENSOR"
    with pytest.raises(GraphError, match="an attribute with a text that no export writes"):
        check_graph(model.SerializeToString(), DATA_FILE, size)
    attribute.s, attribute.strings[:] = b"PER_CHANNEL", [b"PER_CHANNEL"]
    with pytest.raises(GraphError, match="has field 9 of ONNX's attribute"):
        check_graph(model.SerializeToString(), DATA_FILE, size)

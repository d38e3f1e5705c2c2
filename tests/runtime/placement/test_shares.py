"""Where the nodes of a graph run, and what they cost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_onnx.exporter.graph.costs import CONTEXT, graph_costs
from llama_onnx.exporter.graph.layout import attach, lay_out
from llama_onnx.exporter.graph.model import build_model
from llama_onnx.exporter.graph.names import COS_CACHE, FREQUENCIES, POSITIONS, SIN_CACHE
from llama_onnx.exporter.packaging.choose_recipe import resolve
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.runtime.placement import session as session_module
from llama_onnx.runtime.placement.profile import profile_step, read_profile, step_feeds
from llama_onnx.runtime.placement.session import open_session
from llama_onnx.runtime.placement.shares import (
    AssignedNode,
    Cost,
    GraphCosts,
    Placement,
    percent,
    read_costs,
)
from llama_onnx.targets.errors import PackageError, ProviderError, UsageError
from llama_onnx.targets.package import MANIFEST
from llama_onnx.targets.providers import CPU, CUDA
from llama_onnx.targets.registry import get_target
from tests.support import tiny
from tests.support.pytorch import reference

CPU_NAME, CUDA_NAME = CPU.ort_name, CUDA.ort_name


# What nodes cost


ROTARY = {f"{name}.weight" for name in (COS_CACHE, SIN_CACHE, POSITIONS, FREQUENCIES)}


def external_bytes(model: onnx.ModelProto) -> dict[str, int]:
    """Initializer -> bytes it takes in the data file, the rotary tables left out."""
    return {
        tensor.name: next(int(e.value) for e in tensor.external_data if e.key == "length")
        for tensor in model.graph.initializer
        if tensor.external_data and tensor.name not in ROTARY
    }


def folded(graph: onnx.GraphProto) -> Iterator[str]:
    """Yield the names of the nodes that compute with weights alone."""
    known = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if known.issuperset(node.input):
            known |= set(node.output)
            yield node.name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_costs_are_those_of_the_graph_that_is_written(precision: str, tied: bool) -> None:
    config = replace(tiny.GQA, tie_word_embeddings=tied)
    recipe = resolve(Options(precision=precision), get_target("cpu"), tied=tied)
    built = build_model(config, recipe)
    attach(built, lay_out(built.slots))
    costs = graph_costs(built)
    model = ir.to_proto(built.ir)

    assert costs["nodes"] == len(model.graph.node)
    # Every weight is somebody's: a tied matrix that is stored as a float is one initializer of two
    # readers, the others are read once.
    nbytes = external_bytes(model)
    head = nbytes["model.embed_tokens.weight"] if tied and precision.startswith("fp") else 0
    scales = nbytes["model.embed_tokens.scales"] if tied and precision.startswith("int") else 0
    expected = sum(nbytes.values()) + head + scales
    assert sum(cost["weight_bytes"] for cost in costs["costs"].values()) == expected
    # A token meets every value of every matrix once, and CONTEXT keys and values in each layer.
    shapes = config.tensor_shapes()
    linear = [shape for name, shape in shapes.items() if len(shape) == 2 and "embed" not in name]
    matrices = sum(rows * columns for rows, columns in linear)
    if tied:
        matrices += config.vocab_size * config.hidden_size
    attention = config.num_hidden_layers * 2 * config.q_size * CONTEXT
    macs = sum(cost["macs_per_token"] for cost in costs["costs"].values())
    assert macs == matrices + attention


def test_the_package_s_table_names_the_nodes_that_onnx_runtime_assigns(package: Path) -> None:
    placement = open_session(package / "model.onnx", CPU).placement
    model = onnx.load(package / "model.onnx", load_external_data=False)
    assert placement.unplaced == ()
    # What makes scales and rotary tables of weights is done before, and has no place.
    nodes = {node.name for node in model.graph.node} - set(folded(model.graph))
    assert {node.name for node in placement.nodes} == nodes
    assert placement.costs is not None
    heavy = {node.op_type for node in placement.nodes if placement.is_heavy(node)}
    assert heavy >= {"MatMulNBits", "GroupQueryAttention", "GatherBlockQuantized"}
    assert heavy.isdisjoint({"Shape", "Cast", "QuickGelu", "Mul"})
    (share,) = placement.shares
    assert (share.provider, share.nodes) == (CPU_NAME, len(nodes))


def test_casts_that_are_folded_leave_no_weight_unplaced(package_fp16: Path) -> None:
    placement = open_session(package_fp16 / "model.onnx", CPU).placement
    assert placement.unplaced == ()


def without_table(package: Path, out: Path, table: Any = None) -> Path:
    shutil.copytree(package, out)
    manifest = json.loads((out / MANIFEST).read_text("utf-8"))
    del manifest["graph"]
    if table is not None:
        manifest["graph"] = table
    (out / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    return out


def test_an_older_package_has_shares_of_nodes_alone(package: Path, tmp_path: Path) -> None:
    old = without_table(package, tmp_path / "an öld 日本 package")
    placement = open_session(old / "model.onnx", CPU).placement
    (share,) = placement.shares
    assert (share.weight_bytes, share.macs_per_token) == (None, None)
    assert share.nodes == len(placement.nodes) > 50
    assert "weights and work unknown" in str(placement)
    operators = {node.op_type for node in placement.nodes if placement.is_heavy(node)}
    assert operators == {"MatMulNBits", "GroupQueryAttention", "GatherBlockQuantized"}


@pytest.mark.parametrize("table", [[], {}, {"context": 1, "costs": {"a": {}}}, {"costs": {}}])
def test_a_table_that_makes_no_sense_is_refused(package: Path, tmp_path: Path, table: Any) -> None:
    broken = without_table(package, tmp_path / "broken", table)
    with pytest.raises(PackageError, match=r'manifest\.json is damaged: "graph"'):
        open_session(broken / "model.onnx", CPU)


def test_a_graph_that_is_no_package_has_no_table(tmp_path: Path) -> None:
    assert read_costs(tmp_path / "model.onnx") is None


# Shares

GRAPH = {"embed": Cost(100, 0), "q": Cost(60, 30), "attention": Cost(0, 50), "head": Cost(40, 20)}


def placement(**providers: str) -> Placement:
    nodes = tuple(AssignedNode(name, "Op", provider) for name, provider in providers.items())
    return Placement(CUDA_NAME, nodes, GraphCosts(1024, GRAPH))


def test_shares_of_a_partial_assignment() -> None:
    found = placement(embed=CPU_NAME, q=CUDA_NAME, attention=CUDA_NAME, shape=CPU_NAME)
    first, second = found.to_json()["providers"]
    assert first["provider"] == CUDA_NAME
    assert first["fraction"] == {"nodes": 0.5, "weight_bytes": 0.3, "macs_per_token": 0.8}
    assert second["fraction"] == {"nodes": 0.5, "weight_bytes": 0.5, "macs_per_token": 0.0}
    assert found.unplaced == ("head",)
    assert [node.name for node in found.elsewhere] == ["embed", "shape"]
    assert [node.name for node in found.heavy_elsewhere] == ["embed"]
    assert "30.0 % of the weights, 80.0 % of the work" in str(found)
    json.dumps(found.to_json())


@given(st.dictionaries(st.sampled_from([*GRAPH, "x", "y"]), st.sampled_from([CPU_NAME, CUDA_NAME])))
def test_nothing_is_counted_twice_or_lost(providers: dict[str, str]) -> None:
    found = placement(**providers)
    assert sum(share.nodes for share in found.shares) == len(providers)
    missing = sum(GRAPH[name].weight_bytes for name in found.unplaced)
    assert sum(share.weight_bytes or 0 for share in found.shares) + missing == 200
    assert set(found.heavy_elsewhere) <= set(found.elsewhere)


@pytest.mark.parametrize(
    ("fraction", "text"),
    [
        (None, "-"),
        (0.0, "0.0 %"),
        (1e-6, "< 0.1 %"),
        (0.5, "50.0 %"),
        (0.9999, "> 99.9 %"),
        (1.0, "100.0 %"),
    ],
)
def test_a_rounded_share_does_not_claim_all_or_nothing(fraction: float | None, text: str) -> None:
    assert percent(fraction) == text


# Opening, with ONNX Runtime's answers played by a stand-in


@dataclass
class FakeNode:
    name: str
    op_type: str


@dataclass
class FakeSubgraph:
    ep_name: str
    nodes: Sequence[FakeNode]

    def get_nodes(self) -> Sequence[FakeNode]:
        return self.nodes


class FakeSession:
    """An `InferenceSession` that is on `started`, and assigned `subgraphs`."""

    def __init__(self, started: Sequence[str], subgraphs: Sequence[FakeSubgraph]) -> None:
        self.started, self.subgraphs = started, subgraphs
        self.asked: list[Any] = []

    def __call__(self, path: str, options: Any, providers: list[Any], **flags: Any) -> FakeSession:
        assert flags == {"enable_fallback": 0}, "onnxruntime would fall back by itself"
        self.asked.append([p if isinstance(p, str) else p[0] for p in providers])
        return self

    def get_providers(self) -> Sequence[str]:
        return self.started

    def get_provider_graph_assignment_info(self) -> Sequence[FakeSubgraph]:
        return self.subgraphs


def play(monkeypatch: pytest.MonkeyPatch, session: Any) -> None:
    monkeypatch.setattr(session_module, "require", lambda provider: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)


MATMUL, SHAPE = FakeNode("a/MatMulNBits", "MatMulNBits"), FakeNode("Shape_1", "Shape")


def test_small_nodes_on_the_cpu_are_normal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    subgraphs = [FakeSubgraph(CUDA_NAME, [MATMUL]), FakeSubgraph(CPU_NAME, [SHAPE])]
    fake = FakeSession([CUDA_NAME, CPU_NAME], subgraphs)
    play(monkeypatch, fake)
    opened = open_session(tmp_path / "model.onnx", CUDA)
    assert fake.asked == [[CUDA_NAME, CPU_NAME]]
    assert opened.fallback is None
    assert [node.name for node in opened.placement.elsewhere] == ["Shape_1"]


def test_a_heavy_node_on_the_cpu_is_an_error_and_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    subgraphs = [FakeSubgraph(CPU_NAME, [MATMUL, MATMUL]), FakeSubgraph(CUDA_NAME, [SHAPE])]
    play(monkeypatch, FakeSession([CUDA_NAME, CPU_NAME], subgraphs))
    with pytest.raises(
        ProviderError, match=r"cuda does not run all of .*: 2 MatMulNBits \(on CPUExec.*--allow"
    ):
        open_session(tmp_path / "model.onnx", CUDA)
    opened = open_session(tmp_path / "model.onnx", CUDA, allow_fallback=True)
    assert opened.fallback is None, "it runs, in part"
    assert len(opened.placement.heavy_elsewhere) == 2


def test_a_provider_that_onnx_runtime_dropped_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = FakeSession([CPU_NAME], [FakeSubgraph(CPU_NAME, [MATMUL])])
    play(monkeypatch, fake)
    with pytest.raises(ProviderError, match="ONNX Runtime could not start it"):
        open_session(tmp_path / "model.onnx", CUDA)
    opened = open_session(tmp_path / "model.onnx", CUDA, allow_fallback=True)
    assert fake.asked[-1] == [CPU_NAME]
    assert opened.fallback is not None and "could not start it" in opened.fallback


NO_DEVICE = (
    "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:154 std::conditional_t<THRW, "
    "void, Status> onnxruntime::CudaCall(ERRTYPE, const char*) [with ERRTYPE = cudaError; bool "
    "THRW = true; std::conditional_t<THRW, void, common::Status> = void] CUDA failure 100: no "
    "CUDA-capable device is detected ; GPU=-1 ; hostname=vm ; expr=cudaSetDevice(info_.device_id); "
)
"""What onnxruntime-gpu 1.31.1 says on a machine with the driver's library and without a GPU."""

NO_ADAPTER = (
    "/onnxruntime_src/onnxruntime/core/providers/webgpu/webgpu_context.cc:65 onnxruntime::webgpu::"
    "WebGpuContext::Initialize(...)::<lambda()> status == wgpu::RequestAdapterStatus::Success was "
    "false. Failed to get a WebGPU adapter: No supported adapters\n"
)
"""What onnxruntime-webgpu 1.27.0 says without a GPU."""


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (NO_DEVICE, "CUDA failure 100: no CUDA-capable device is detected"),
        (NO_ADAPTER, "Failed to get a WebGPU adapter: No supported adapters"),
        ("[ONNXRuntimeError] : 1 : FAIL : a\nb.", "[ONNXRuntimeError] : 1 : FAIL : a b"),
    ],
)
def test_a_provider_that_fails_is_an_error_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str, reason: str
) -> None:
    def fail(path: str, options: Any, providers: list[Any], **flags: Any) -> FakeSession:
        if len(providers) > 1:
            raise RuntimeError(said)
        return FakeSession([CPU_NAME], [])

    play(monkeypatch, fail)
    model = tmp_path / "model.onnx"
    sentence = f"{model} does not open on cuda: {reason}; pass --provider cpu to use the CPU."
    with pytest.raises(ProviderError) as caught:
        open_session(model, CUDA)
    assert str(caught.value) == sentence
    assert open_session(model, CUDA, allow_fallback=True).fallback == sentence


# Opening, for real


def test_a_graph_that_onnx_runtime_refuses(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(PackageError, match="onnxruntime refuses"):
        open_session(tmp_path / "model.onnx", CPU)


def test_a_session_that_is_open_computes(package_fp32: Path) -> None:
    expected = reference(tiny.GQA, np.arange(4)[None])
    for prepack in (True, False):
        session = open_session(package_fp32 / "model.onnx", CPU, prepack=prepack).session
        logits = session.run(["logits"], step_feeds(session, 4))[0]
        assert np.abs(logits - expected).max() < 1e-4


@pytest.mark.usefixtures("default_threads")
@pytest.mark.parametrize(("threads", "count"), [(1, 1), (3, 3), (None, 0)])
def test_the_number_of_threads(package: Path, threads: int | None, count: int) -> None:
    session = open_session(package / "model.onnx", CPU, threads=threads).session
    assert session.get_session_options().intra_op_num_threads == count


def test_no_threads_are_a_wrong_call(package: Path) -> None:
    with pytest.raises(UsageError, match=r"must be 1 to \d+, not 0"):
        open_session(package / "model.onnx", CPU, threads=0)


@pytest.mark.skipif(
    CUDA_NAME in onnxruntime.get_available_providers(), reason="CUDA's wheel is installed here"
)
def test_cuda_without_its_wheel(package: Path) -> None:
    model = package / "model.onnx"
    with pytest.raises(ProviderError, match=r"needs the wheel onnxruntime-gpu, and onnxruntime "):
        open_session(model, CUDA)
    opened = open_session(model, CUDA, allow_fallback=True)
    assert opened.fallback is not None and "onnxruntime-gpu" in opened.fallback
    assert [share.provider for share in opened.placement.shares] == [CPU_NAME]
    assert opened.placement.elsewhere == opened.placement.nodes


# What really ran


def test_a_profile_of_a_step(package: Path) -> None:
    opened, profile = profile_step(package / "model.onnx", CPU)
    (kernels,) = profile.kernels
    assert kernels.provider == CPU_NAME
    assert kernels.count == len(opened.placement.nodes)
    assert (kernels.copies, profile.moved) == (0, {})
    assert kernels.microseconds > 0
    json.dumps(profile.to_json())


def event(name: str, op: str, provider: str, microseconds: int = 10) -> dict[str, Any]:
    arguments = {"op_name": op, "provider": provider}
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": microseconds, "args": arguments}


def test_a_node_that_ran_elsewhere_than_assigned_is_named() -> None:
    events = [
        {"cat": "Session", "name": "model_run", "dur": 99, "args": {}},
        {"cat": "Node", "name": "q_fence_before", "dur": 1, "args": {}},
        event("q", "Op", CPU_NAME, 20),
        event("head", "Op", CUDA_NAME),
        event("Memcpy_token_1", "MemcpyToHost", CUDA_NAME),
    ]
    profile = read_profile(events, placement(q=CUDA_NAME, head=CUDA_NAME))
    assert profile.moved == {"q": CPU_NAME}
    cpu, cuda = profile.kernels
    assert (cpu.provider, cpu.count, cpu.copies, cpu.microseconds) == (CPU_NAME, 1, 0, 20)
    assert (cuda.provider, cuda.count, cuda.copies, cuda.microseconds) == (CUDA_NAME, 2, 1, 20)

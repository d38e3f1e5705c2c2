"""A real second provider: OpenVINO takes most nodes and leaves attention to the CPU provider.

`nox -s openvino` runs these; onnxruntime-openvino excludes the wheel that the other tests use.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from llama_onnx.runtime.placement.profile import profile_step, step_feeds
from llama_onnx.runtime.placement.session import open_session
from llama_onnx.targets.errors import ProviderError
from llama_onnx.targets.provider import Provider
from tests.support import tiny

OPENVINO = Provider(
    name="openvino",
    ort_name="OpenVINOExecutionProvider",
    genai_name="OpenVINO",
    device="OpenVINO",
    wheel="onnxruntime-openvino",
    genai_wheel=None,
    extra="openvino",
    platforms=("linux", "win32"),
    provider_options={"device_type": "CPU"},
)
"""A provider the project does not offer, described as the others are."""

pytestmark = pytest.mark.skipif(
    OPENVINO.ort_name not in onnxruntime.get_available_providers(),
    reason="onnxruntime-openvino is not installed: nox -s openvino",
)


def test_a_partial_fallback_is_refused_and_its_nodes_named(package: Path) -> None:
    with pytest.raises(ProviderError, match="openvino does not run all of") as caught:
        open_session(package / "model.onnx", OPENVINO)
    layers = tiny.GQA.num_hidden_layers
    assert f"{layers} GroupQueryAttention" in str(caught.value)
    assert "(on CPUExecutionProvider)" in str(caught.value)


def test_an_allowed_partial_fallback_has_shares_that_add_up(package: Path) -> None:
    opened = open_session(package / "model.onnx", OPENVINO, allow_fallback=True)
    placement = opened.placement
    assert opened.fallback is None
    openvino, cpu = placement.shares
    assert (openvino.provider, cpu.provider) == (OPENVINO.ort_name, "CPUExecutionProvider")
    assert openvino.nodes > cpu.nodes > 0
    assert placement.unplaced == ()
    assert placement.costs is not None
    weights = sum(cost.weight_bytes for cost in placement.costs.nodes.values())
    assert (openvino.weight_bytes or 0) + (cpu.weight_bytes or 0) == weights
    assert {node.op_type for node in placement.heavy_elsewhere} >= {"GroupQueryAttention"}


def test_what_ran_agrees_with_what_was_assigned(package_fp32: Path) -> None:
    opened, profile = profile_step(package_fp32 / "model.onnx", OPENVINO, allow_fallback=True)
    kernels = {kernels.provider: kernels for kernels in profile.kernels}
    assert kernels.keys() == {share.provider for share in opened.placement.shares}
    # OpenVINO compiles each of its subgraphs to one kernel; the CPU runs node by node.
    assert kernels["CPUExecutionProvider"].count == opened.placement.shares[1].nodes
    assert 0 < kernels[OPENVINO.ort_name].count < opened.placement.shares[0].nodes
    assert profile.moved == {}


def test_it_computes_what_the_cpu_computes(package_fp32: Path) -> None:
    from llama_onnx.targets.providers import CPU

    opened = [
        open_session(package_fp32 / "model.onnx", provider, allow_fallback=True).session
        for provider in (OPENVINO, CPU)
    ]
    mixed, plain = (session.run(["logits"], step_feeds(session, 4))[0] for session in opened)
    assert np.abs(mixed - plain).max() < 1e-3

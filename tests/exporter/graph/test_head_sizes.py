"""Models whose heads GroupQueryAttention refuses: other operators compute them, in every situation
and in onnxruntime-genai."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from llama_onnx.exporter.graph.rotary import rotary_tables
from llama_onnx.exporter.packaging.export import ExportResult, export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.parity.prove import prove
from llama_onnx.exporter.reference.walk import reference_config
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.targets.errors import UnsupportedError
from llama_onnx.targets.registry import get_target
from tests.support import tiny
from tests.support.packages import greedy
from tests.support.pytorch import oracle

SIZES = {
    # stories260K of llama2.c
    8: replace(
        tiny.GQA,
        head_dim=8,
        intermediate_size=172,
        num_attention_heads=8,
        num_key_value_heads=4,
    ),
    # OpenLLaMA 3B: 3200 / 32
    100: replace(
        tiny.GQA,
        head_dim=100,
        hidden_size=400,
        intermediate_size=432,
        num_hidden_layers=2,
        num_key_value_heads=4,
    ),
    # no size is a multiple of 8
    6: replace(
        tiny.GQA,
        head_dim=6,
        hidden_size=18,
        intermediate_size=51,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    ),
}
OPERATORS = {8: "GroupQueryAttention", 100: "Attention", 6: "Attention"}
WARNED = {8: "outside the fused attention", 100: "instead of the fused one", 6: "instead of"}

Export = Callable[..., ExportResult]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    root = tmp_path_factory.mktemp("heads")

    def make(size: int, precision: str, target: str = "cpu") -> ExportResult:
        source = root / str(size)
        if not source.exists():
            tiny.write_huggingface(source, SIZES[size])
        out = root / f"{size}-{precision}-{target}"
        return export_package(source, out, get_target(target), Options(precision), force=True)

    return make


@pytest.mark.parametrize("size", SIZES)
def test_the_answer_in_genai_is_that_of_transformers(export: Export, size: int) -> None:
    result = export(size, "fp32")
    assert [WARNED[size] in warning for warning in result.warnings] == [True]
    nodes = {
        node.op_type
        for node in onnx.load(result.package / "model.onnx", load_external_data=False).graph.node
    }
    assert {"GroupQueryAttention", "Attention"} & nodes == {OPERATORS[size]}
    assert "SkipSimplifiedLayerNormalization" in nodes, "the other operators stay fused"
    prompt = [3, 77, 150, 9, 200]
    model: Any = oracle(SIZES[size])
    with torch.no_grad():
        expected = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, 5:].tolist()
    assert greedy(result.package, prompt, 24)[-24:] == expected


@pytest.mark.parametrize(("size", "precision"), [(8, "int4"), (100, "fp32"), (6, "int4")])
def test_the_package_is_proved(export: Export, size: int, precision: str) -> None:
    result = export(size, precision)
    report = prove(result.package, open_checkpoint(result.source), tokens=16, longest=40)
    assert report.passed


@pytest.mark.parametrize("target", ["cuda", "directml", "webgpu"])
def test_a_target_without_another_operator_refuses_by_name(export: Export, target: str) -> None:
    message = f"head_dim 100 is not a multiple of 16, .* the target {target} has no other"
    with pytest.raises(UnsupportedError, match=message):
        export(100, "int4", target)


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6, 12739596.78])
@pytest.mark.parametrize("size", [6, 8, 16, 64, 96, 100, 128])
def test_the_tables_are_transformers_bit_by_bit(size: int, theta: float) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = replace(tiny.GQA, head_dim=size, rope_theta=theta, max_position_embeddings=300)
    cos, sin = rotary_tables(config)
    rotary: Any = LlamaRotaryEmbedding(reference_config(config))
    angles = torch.arange(300).float()[:, None] * rotary.inv_freq[None]
    np.testing.assert_allclose(cos, angles.cos().numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(sin, angles.sin().numpy(), rtol=0, atol=1e-6)

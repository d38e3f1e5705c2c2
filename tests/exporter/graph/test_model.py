"""The graph in ONNX Runtime against PyTorch running the same weights: rounding level, always."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
import torch
import transformers

from llama_onnx.exporter.graph.rotary import rotary_tables
from llama_onnx.exporter.model.config import config_from_huggingface
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.targets.cpu import TARGET
from tests.support import tiny
from tests.support.pytorch import reference

Array = npt.NDArray[Any]

MHA = dataclasses.replace(tiny.GQA, num_key_value_heads=4)
VARIANTS = {
    "gqa": tiny.GQA,
    "mha": MHA,
    "gqa tied": dataclasses.replace(tiny.GQA, tie_word_embeddings=True),
    "mha tied": dataclasses.replace(MHA, tie_word_embeddings=True),
    "head_dim stated": dataclasses.replace(tiny.GQA, head_dim=32),
    "theta and eps": dataclasses.replace(tiny.GQA, rope_theta=5e5, rms_norm_eps=1e-6),
    **{
        kind: dataclasses.replace(tiny.GQA, rope_scaling=scaling)
        for kind, scaling in tiny.ROPE_SCALINGS.items()
    },
}
MAX_ABS, RELATIVE = 1e-3, 1e-5


class Package:
    """An exported tiny model in an ORT session."""

    def __init__(self, path: Path) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self.session = ort.InferenceSession(
            path / "model.onnx", options, providers=["CPUExecutionProvider"]
        )
        self.names = [output.name for output in self.session.get_outputs()]
        self.empty = {
            feed.name: np.zeros((1, feed.shape[1], 0, feed.shape[3]), np.float32)
            for feed in self.session.get_inputs()
            if feed.name.startswith("past_key_values.")
        }

    def __call__(
        self, ids: Array, mask: Array | None = None, past: dict[str, Array] | None = None
    ) -> tuple[Array, dict[str, Array]]:
        batch = len(ids)
        past = past or {k: np.repeat(v, batch, axis=0) for k, v in self.empty.items()}
        length = ids.shape[1] + next(iter(past.values())).shape[2]
        mask = np.ones((batch, length), np.int64) if mask is None else mask
        outputs = self.session.run(None, {"input_ids": ids, "attention_mask": mask, **past})
        cache = dict(zip(self.names[1:], outputs[1:], strict=True))
        return outputs[0], {k.replace("present", "past_key_values"): v for k, v in cache.items()}


def assert_close(found: Array, expected: Array) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= MAX_ABS
    assert np.linalg.norm(found - expected) <= RELATIVE * np.linalg.norm(expected)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("graphs")

    @cache
    def make(variant: str, options: Options = Options(precision="fp32")) -> Package:  # noqa: B008
        config = VARIANTS[variant]
        source = tiny.write_huggingface(root / variant / "source", config)
        out = root / variant / f"package {abs(hash(options))}"
        export_package(source, out, TARGET, options)
        return Package(out)

    return make


IDS = np.random.default_rng(0).integers(3, 288, (1, 40))


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill(packages: Any, variant: str) -> None:
    assert_close(packages(variant)(IDS)[0], reference(VARIANTS[variant], IDS))


@pytest.mark.parametrize("variant", VARIANTS)
def test_token_by_token(packages: Any, variant: str) -> None:
    package, steps = packages(variant), []
    past = None
    for position in range(12):
        logits, past = package(IDS[:, position : position + 1], past=past)
        steps.append(logits)
    assert_close(np.concatenate(steps, axis=1), reference(VARIANTS[variant], IDS[:, :12]))


def test_chunks(packages: Any) -> None:
    package, past, parts = packages("gqa"), None, []
    for start, stop in ((0, 7), (7, 8), (8, 29), (29, 40)):
        logits, past = package(IDS[:, start:stop], past=past)
        parts.append(logits)
    assert_close(np.concatenate(parts, axis=1), reference(tiny.GQA, IDS))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(packages: Any, side: str) -> None:
    """Rows of 10, 7 and 1 tokens, then two decode steps: each as if it were alone."""
    package, lengths, width = packages("gqa"), (10, 7, 1), 10
    ids, mask = np.zeros((3, width), np.int64), np.zeros((3, width), np.int64)
    spans = []
    for row, length in enumerate(lengths):
        start = width - length if side == "left" else 0
        spans.append(slice(start, start + length))
        ids[row, spans[row]] = IDS[0, :length]
        mask[row, spans[row]] = 1
    logits, past = package(ids, mask)
    for row, length in enumerate(lengths):
        assert_close(logits[row, spans[row]][None], reference(tiny.GQA, IDS[:, :length]))
    for step in range(2):
        mask = np.concatenate([mask, np.ones((3, 1), np.int64)], axis=1)
        following = np.array([[IDS[0, length + step]] for length in lengths])
        logits, past = package(following, mask, past)
        for row, length in enumerate(lengths):
            expected = reference(tiny.GQA, IDS[:, : length + step + 1])
            assert_close(logits[row][None], expected[:, -1:])


@pytest.mark.parametrize("variant", ["gqa", *tiny.ROPE_SCALINGS])
def test_up_to_the_last_position_of_the_context(packages: Any, variant: str) -> None:
    ids = np.random.default_rng(1).integers(3, 288, (1, tiny.GQA.max_position_embeddings))
    package, expected = packages(variant), reference(VARIANTS[variant], ids)
    prefill, past = package(ids[:, :-1])
    assert_close(prefill, expected[:, :-1])
    last, _ = package(ids[:, -1:], past=past)
    assert_close(last, expected[:, -1:])


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_a_scaling_is_not_the_plain_model(kind: str) -> None:
    plain, scaled = (reference(config, IDS) for config in (tiny.GQA, VARIANTS[kind]))
    assert np.abs(plain - scaled).max() > 100 * MAX_ABS


def test_gate_and_up_fused(packages: Any) -> None:
    fused = packages("gqa", Options(precision="fp32", fuse_gate_up=True))
    assert_close(fused(IDS)[0], reference(tiny.GQA, IDS))


def test_logits_of_the_last_position_only(packages: Any) -> None:
    last = packages("gqa", Options(precision="fp32", logits="last"))
    assert_close(last(IDS)[0], reference(tiny.GQA, IDS)[:, -1:])
    ids, mask = IDS[:, :8].repeat(2, axis=0), np.ones((2, 8), np.int64)
    ids[1], mask[1, 5:] = np.concatenate([IDS[0, :5], [0, 0, 0]]), 0
    logits, _ = last(ids, mask)
    assert_close(logits[1][None], reference(tiny.GQA, IDS[:, :5])[:, -1:])


ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512},
    "yarn, no original length": {"rope_type": "yarn", "factor": 8.0},
    "yarn, attention factor": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "attention_factor": 0.7,
        "beta_fast": 20,
        "beta_slow": 2,
        "truncate": False,
    },
    "yarn, mscale": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "mscale": 1.5,
        "mscale_all_dim": 0.8,
    },
    "yarn, a ramp of no width": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 600,
        "beta_slow": 400,
    },
}


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("rope", ROPES)
def test_rotary_tables_are_those_of_transformers(rope: str, theta: float) -> None:
    parameters = {"rope_theta": theta, **ROPES[rope]}
    raw = tiny.GQA.to_huggingface() | {
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "rope_parameters": parameters,
    }
    settings = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
        rope_parameters=dict(parameters),
    )
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(settings)
    cos, sin = rotary(torch.zeros(1, 1, 64), torch.arange(4096)[None])
    found = rotary_tables(config_from_huggingface(raw, "config.json"))
    for table, expected in zip(found, (cos, sin), strict=True):
        # One unit in the last place of an angle of 4095 is 2.4e-4.
        assert np.abs(table - expected[0, :, :32].numpy()).max() <= 2.5e-4
        assert np.abs(table - expected[0, :, :32].numpy()).mean() <= 1e-6

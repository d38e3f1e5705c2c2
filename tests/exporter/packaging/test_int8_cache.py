"""A KV cache in int8: its scales against the keys and values that transformers computes, and what
onnxruntime, genai and `validate` make of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaForCausalLM

import llama_onnx
from llama_onnx.exporter.calibration import cache
from llama_onnx.exporter.checkpoints.package.matrices import read_initializer
from llama_onnx.exporter.checkpoints.package.package import load_model
from llama_onnx.exporter.cli import main
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.job import Job
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.packaging.plan import make_plan
from llama_onnx.exporter.quantize.calibration_text import calibration_tokens
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.genai import og
from llama_onnx.runtime.measure.graph_session import GraphSession
from llama_onnx.targets.errors import CheckpointError, UsageError
from llama_onnx.targets.progress import SILENT
from llama_onnx.targets.registry import get_target
from tests.support import adapters, tiny

IDS = np.arange(20, 60)


def export(source: Path, out: Path, **options: Any) -> Path:
    cpu = get_target("cpu")
    return export_package(source, out, cpu, Options(kv_cache="int8", **options)).package


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and packages of it with a cache in int8. Read only."""
    made = tmp_path_factory.mktemp("cache")
    tiny.write_huggingface(made / "source")
    export(made / "source", made / "fp32", precision="fp32")
    export(made / "source", made / "awq", precision="int4", quantizer="awq")
    return made


def stored(package: Path, layer: int, part: str) -> Any:
    name = f"model.layers.{layer}.self_attn.{part}_cache.weight"
    found = next(i for i in load_model(package).graph.initializer if i.name == name)
    return read_initializer(package, found).rows(0, tiny.GQA.num_key_value_heads)


def keys_and_values(source: Path, ids: Any) -> list[tuple[Any, Any]]:
    """Return what transformers caches of each layer for `ids` [S], [kv_heads, S, head_dim]."""
    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.inference_mode():
        kept = model(torch.from_numpy(ids)[None], use_cache=True).past_key_values
    return [(layer.keys[0].numpy(), layer.values[0].numpy()) for layer in kept.layers]


def test_a_scale_is_the_largest_value_of_its_channel(folder: Path) -> None:
    text = calibration_tokens(folder / "fp32", tiny.GQA, tokens=2048)
    layers = [keys_and_values(folder / "source", ids) for ids in text.sequences]
    for layer in range(tiny.GQA.num_hidden_layers):
        for index, part in enumerate(("key", "value")):
            largest = np.max([np.abs(found[layer][index]).max(1) for found in layers], axis=0)
            np.testing.assert_allclose(
                stored(folder / "fp32", layer, part), largest / 127, rtol=1e-4
            )


def test_onnxruntime_keeps_keys_and_values_rounded_to_them(folder: Path) -> None:
    _, kept = GraphSession.open(folder / "fp32").step(IDS)
    expected = keys_and_values(folder / "source", IDS)
    for index, part in enumerate(("key", "value")):
        codes = kept[f"past_key_values.0.{part}"][0]
        scales = stored(folder / "fp32", 0, part)[:, None]
        assert codes.dtype == np.int8
        rounded = np.clip(np.rint(expected[0][index] / scales), -128, 127)
        assert np.abs(codes - rounded).max() <= 1 and (codes == rounded).mean() > 0.99


def test_values_that_awq_rescales_fit_their_scales(folder: Path) -> None:
    _, kept = GraphSession.open(folder / "awq").step(IDS)
    values = kept["past_key_values.1.value"][0].astype(int)
    # Scales of the original values would cut off channels, or leave them a few codes.
    assert (np.abs(values) == 127).mean() < 0.05 and np.abs(values).max(1).min() > 20


def test_the_logits_are_near_those_with_a_float_cache(folder: Path, tmp_path: Path) -> None:
    plain = export_package(
        folder / "source", tmp_path / "plain", get_target("cpu"), Options(precision="fp32")
    ).package
    ours, theirs = (GraphSession.open(p).step(IDS)[0] for p in (folder / "fp32", plain))
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    assert 1e-4 < error < 0.05


def test_validate_passes_and_the_graph_itself_is_exact(folder: Path) -> None:
    report = llama_onnx.validate(folder / "fp32", folder / "source")
    assert report.passed
    found = {
        measure: [c for c in report.checks if c.threshold.measure == measure]
        for measure in ("graph", "shipped")
    }
    assert found["graph"] and all(check.value < 1e-3 for check in found["graph"])
    # Rounding is counted as one of activations, and is seen.
    assert {check.threshold.activations for check in found["shipped"]} == {"int8"}
    assert max(check.value for check in found["shipped"]) > 1e-4


def test_genai_generates_the_same_with_it(folder: Path) -> None:
    """genai has one buffer for past and present, our session a cache that grows."""
    model = og.Model(str(folder / "fp32"))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(IDS) + 12, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(IDS.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    theirs = [int(token) for token in generator.get_sequence(0)[len(IDS) :]]
    assert theirs and theirs == GraphSession.open(folder / "fp32").greedy(IDS, 12)[: len(theirs)]


def test_it_takes_a_quarter_of_the_memory(folder: Path) -> None:
    checkpoint, cpu = open_checkpoint(folder / "source"), get_target("cpu")
    plain, small = (
        make_plan(checkpoint, cpu, Options("fp32", kv_cache=kind), 1) for kind in (None, "int8")
    )
    assert plain.cache_per_token == 4 * small.cache_per_token == 4 * 2 * 3 * 2 * 16
    said = CliRunner().invoke(main, ["plan", str(folder / "source"), "--kv-cache", "int8"])
    assert said.exit_code == 0 and "int8, 192 bytes per token" in said.output


def test_the_same_export_twice_has_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = export(folder / "source", tmp_path / "again", precision="fp32")
    for name in ("model.onnx", "model.onnx.data"):
        assert (again / name).read_bytes() == (folder / "fp32" / name).read_bytes()
    assert not (again / "calibration").exists()


def test_what_was_measured_is_read_when_an_export_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(folder / "source")
    first = cache.cache_scales(checkpoint, [IDS], tmp_path / "c" / "cache.safetensors")
    monkeypatch.setattr(cache, "_measure", None)
    again = cache.cache_scales(checkpoint, [IDS], tmp_path / "c" / "cache.safetensors")
    assert first.keys() == again.keys() and len(first) == 6
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_keys_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    tensors = tiny.weights(tiny.GQA)
    tensors["model.layers.1.self_attn.k_proj.weight"][0, 0] = np.inf
    source = tiny.write_huggingface(tmp_path / "source", tensors=tensors)
    with pytest.raises(CheckpointError, match="layer 1: keys or values are NaN or infinite"):
        cache.cache_scales(open_checkpoint(source), [IDS], tmp_path / "cache.safetensors")


def test_where_it_is_not_to_be_had_it_is_refused(folder: Path, tmp_path: Path) -> None:
    for target in ("cuda", "directml", "webgpu", "portable"):
        with pytest.raises(UsageError, match=f"not available for the target {target}"):
            make_plan(
                open_checkpoint(folder / "source"),
                get_target(target),
                Options(kv_cache="int8"),
                1,
            )
    odd = replace(tiny.GQA, head_dim=12)
    source = tiny.write_huggingface(tmp_path / "odd", odd)
    with pytest.raises(UsageError, match="refuses this model's heads"):
        make_plan(open_checkpoint(source), get_target("cpu"), Options(kv_cache="int8"), 1)
    changed = [m for layer in range(3) for m in adapters.attention(layer, *"qkvo")]
    lora = adapters.write_adapter(tmp_path / "lora", adapters.factors(dict.fromkeys(changed, 4)))
    with pytest.raises(UsageError, match="scales that fit the base"):
        export_package(
            folder / "source",
            tmp_path / "out",
            get_target("cpu"),
            Options(kv_cache="int8"),
            kept={"x": lora},
        )


def test_without_a_tokenizer_it_needs_token_ids(folder: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(folder / "source", tmp_path / "source"))
    (source / "tokenizer.json").unlink()
    cpu, out = get_target("cpu"), tmp_path / "out"
    options = Options(precision="fp32", kv_cache="int8")
    with pytest.raises(UsageError, match="needs the model's tokenizer"):
        export_package(source, out, cpu, options, tokenizer=False)
    ids = tmp_path / "ids.jsonl"
    ids.write_text(json.dumps({"ids": [i % 288 for i in range(3000)]}), encoding="utf-8")
    options = replace(options, calibration=str(ids))
    made = export_package(source, out, cpu, options, tokenizer=False)
    assert made.warnings == ()
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["kv_cache"] == {"text": "ids.jsonl", "tokens": 2048}


def test_an_export_does_not_go_on_with_another_text(folder: Path, tmp_path: Path) -> None:
    jobs, text = [], tmp_path / "text.txt"
    for content in ("a text", "another one"):
        text.write_text(content, encoding="utf-8")
        checkpoint, cpu = open_checkpoint(folder / "source"), get_target("cpu")
        plan = make_plan(
            checkpoint, cpu, Options("fp32", kv_cache="int8", calibration=str(text)), 1
        )
        jobs.append(Job(checkpoint, (), None, cpu, plan, tmp_path, 1, SILENT).identity())
    assert {key for key in jobs[0] if jobs[0][key] != jobs[1][key]} == {"kv_cache"}

"""Codes of GGUF files in a package: its weights have the bits that the `gguf` package reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_onnx.exporter.checkpoints.gguf import GGUFCheckpoint, QuantizedGGUF
from llama_onnx.exporter.checkpoints.gguf_codes import CODINGS, package_blocks
from llama_onnx.exporter.checkpoints.lora import open_adapter
from llama_onnx.exporter.checkpoints.package.package import PackageCheckpoint
from llama_onnx.exporter.commands.describe import describe_recipe
from llama_onnx.exporter.model.checkpoint import HoldsCodes
from llama_onnx.exporter.packaging.choose_recipe import choose_recipe
from llama_onnx.exporter.packaging.export import ExportResult, export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.packaging.plan import Plan, make_plan
from llama_onnx.exporter.parity.measure.weights import compare_weights
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.measure.graph_session import GraphSession
from llama_onnx.targets.cpu import TARGET
from llama_onnx.targets.errors import CheckpointError, UsageError
from llama_onnx.targets.progress import SILENT
from llama_onnx.targets.registry import get_target
from tests.support import adapters, tiny
from tests.support.gguf_files import K_TYPES, gguf_name, random_blocks, write
from tests.support.pytorch import run_whole, whole_model
from tests.support.quantized_cases import run, whole

TIED = replace(tiny.GQA, tie_word_embeddings=True)
WIDE = replace(tiny.GQA, hidden_size=256, intermediate_size=512, head_dim=64)
"""Rows of whole blocks of 256, as K-quants need them."""


def plan_of(path: Path, options: Options = Options(), target: Any = TARGET) -> Plan:  # noqa: B008
    return make_plan(open_checkpoint(path), target, options, 2)


def export(path: Path, out: Path, options: Options = Options()) -> ExportResult:  # noqa: B008
    return export_package(path, out, TARGET, options, tokenizer=False)


def assert_same_bits(package: Path, source: Path, *, but: tuple[str, ...] = ()) -> None:
    """Compare all weights of `package` with those that the `gguf` package reads, by their bits."""
    found, original = PackageCheckpoint.open(package), dequantized(source)
    for name in found.config.tensor_shapes():
        if not any(part in name for part in but):
            # A package reads a tied matrix under two names.
            expected = original.get(name, original["model.embed_tokens.weight"])
            bits = whole(found, name).view(np.uint32)
            np.testing.assert_array_equal(bits, expected.view(np.uint32), name)


def dequantized(path: Path) -> dict[str, np.ndarray]:
    """Return the file's tensors by Hugging Face name, read and dequantized by the `gguf` package,
    query and key rows in Hugging Face's order."""
    config = GGUFCheckpoint.open(path).config
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found: dict[str, np.ndarray] = {}
    for name, shape in config.tensor_shapes().items():
        tensor = stored[gguf_name(name)]
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        part = name.split(".")[-2]
        if part in heads:  # [heads, half, 2] -> [heads, 2, half]
            split = values.reshape(heads[part], -1, 2, shape[1]).swapaxes(1, 2)
            values = split.reshape(shape)
        found[name] = np.ascontiguousarray(values, np.float32)
    return found


@settings(max_examples=30)
@given(data=st.data(), kind=st.sampled_from(sorted(CODINGS)))
def test_codes_and_scales_give_the_values_of_any_bytes(data: st.DataObject, kind: Type) -> None:
    """NaN and infinite scales too: they reach the check of the scales."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = data.draw(st.binary(min_size=6 * size, max_size=6 * size))
    rows = np.frombuffer(raw, np.uint8).reshape(2, 3 * size)
    coding = CODINGS[kind]
    with np.errstate(invalid="ignore"):
        codes, scales = package_blocks(rows, kind)
        flat = codes.reshape(2, -1)
        if coding.bits == 4:
            flat = np.stack([flat & 15, flat >> 4], axis=-1).reshape(2, -1)
        wide = np.repeat(scales, coding.block_size, axis=1)
        values = (flat.astype(np.float32) - (1 << (coding.bits - 1))) * wide
        expected = gguf.dequantize(rows, kind)
    assert values.shape == (2, 3 * block)
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("config", [tiny.GQA, TIED], ids=["own head", "tied"])
@pytest.mark.parametrize(("kind", "precision"), [(Type.Q4_0, "int4"), (Type.Q8_0, "int8")])
def test_the_package_is_the_source_bit_for_bit(
    tmp_path: Path, kind: Type, precision: str, config: Any
) -> None:
    source = write(tmp_path / "m.gguf", config, kind)
    result = export(source, tmp_path / "out")
    assert result.plan.recipe.precision == precision
    assert result.plan.recipe.packs([f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkv"])
    count = 3 * 7 + (1 if config is TIED else 2)
    assert result.plan.quantized == (
        f"GGUF with {count} {kind.name}: {count} matrices taken over code by code"
    )
    assert not [text for text in result.warnings if "second time" in text]
    forms = {storage.stored_scales for storage in result.plan.recipe.source_codes.values()}
    assert forms == {"fp16"}  # as in the file: half the space of float32, and exact
    assert_same_bits(tmp_path / "out", source)
    assert (
        compare_weights(
            PackageCheckpoint.open(tmp_path / "out"), open_checkpoint(source), SILENT
        ).steps.value
        == 0
    )


@pytest.mark.parametrize("kind", [Type.Q5_0, Type.Q6_K], ids=lambda kind: kind.name)
def test_codes_of_five_and_six_bits_become_eight_bits(tmp_path: Path, kind: Type) -> None:
    source = write(tmp_path / "m.gguf", WIDE, kind)
    result = export(source, tmp_path / "out")
    assert result.plan.recipe.precision == "int8"
    assert_same_bits(tmp_path / "out", source)


def test_logits_are_those_of_transformers_on_the_dequantized_weights(tmp_path: Path) -> None:
    source = write(tmp_path / "m.gguf", TIED, Type.Q4_0)
    export(source, tmp_path / "out", Options(accuracy_level=1))
    ids = np.random.default_rng(0).integers(3, TIED.vocab_size, 17)
    logits, _ = GraphSession.open(tmp_path / "out").step(ids)
    expected = run_whole(whole_model(TIED, dequantized(source)), ids)
    assert np.linalg.norm(logits - expected) <= 1e-5 * np.linalg.norm(expected)


def test_a_mixed_file_keeps_what_a_package_can_hold(tmp_path: Path) -> None:
    """As llama.cpp mixes them: v in more bits, some matrices with minima, a Q6_K head."""
    mixed = {"attn_v": Type.Q8_0, "ffn_down": Type.Q4_1, "output": Type.Q6_K}
    source = write(tmp_path / "m.gguf", WIDE, Type.Q4_0, kinds=mixed)
    result = export(source, tmp_path / "out")
    recipe = result.plan.recipe
    assert recipe.precision == "int4"
    assert recipe.to_json()["taken_over"] == [
        {"bits": 4, "block_size": 32, "reordered": False, "tensors": 16, "in_layers": 15},
        {"bits": 8, "block_size": 16, "reordered": False, "tensors": 1, "in_layers": 0},
        {"bits": 8, "block_size": 32, "reordered": False, "tensors": 3, "in_layers": 3},
    ]
    assert result.plan.quantized == (
        "GGUF with 16 Q4_0, 3 Q8_0, 3 Q4_1, 1 Q6_K: "
        "20 matrices taken over code by code, 3 matrices dequantized"
    )
    sentence = (
        f"{source}: 3 matrices stored as Q4_1 are quantized a second time, because their blocks "
        "have minima, which a package cannot hold: pass --precision int8 to stay closer to the "
        "source."
    )
    assert sentence in result.warnings and sentence in result.plan.warnings
    assert_same_bits(tmp_path / "out", source, but=("down_proj",))
    error = compare_weights(
        PackageCheckpoint.open(tmp_path / "out"), open_checkpoint(source), SILENT
    )
    assert 0 < error.steps.value <= 1.01 and "down_proj" in error.steps.tensor


def test_what_the_command_says(tmp_path: Path) -> None:
    source = write(tmp_path / "m.gguf", WIDE, Type.Q4_K, kinds={"attn_v": Type.Q6_K})
    said = run("export", source, tmp_path / "out", "--no-tokenizer")
    assert "are quantized a second time, because their blocks have minima" in said.stderr
    assert "Source: GGUF with 20 Q4_K, 3 Q6_K: 3 matrices taken over" in said.output
    recipe = json.loads(run("inspect", tmp_path / "out", "--json").stdout)["recipe"]
    assert dict(describe_recipe(recipe)) | {"graph": "", "arithmetic": ""} == {
        "weights": "embedding int8 in blocks of 32, head int4 in blocks of 32, "
        "other matrices int8 in blocks of 16 and int4 in blocks of 32",
        "quantizer": "rtn; 3 matrices keep the source's codes",
        "graph": "",
        "arithmetic": "",
    }


@pytest.mark.parametrize("kind", [Type.Q4_1, Type.Q5_1, *K_TYPES[:2]], ids=lambda kind: kind.name)
def test_blocks_with_minima_are_quantized_a_second_time(tmp_path: Path, kind: Type) -> None:
    source = write(tmp_path / "m.gguf", WIDE, kind)
    result = export(source, tmp_path / "out")
    assert result.plan.recipe.source_codes == {}
    assert result.plan.recipe.precision == ("int8" if "5" in kind.name else "int4")
    (sentence,) = [text for text in result.warnings if "second time" in text]
    assert f"23 matrices stored as {kind.name} are quantized a second time" in sentence
    package = PackageCheckpoint.open(tmp_path / "out")
    assert 0 < compare_weights(package, open_checkpoint(source), SILENT).steps.value <= 1.01


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16], ids=lambda kind: kind.name)
def test_a_file_of_floats_holds_no_codes(tmp_path: Path, kind: Type) -> None:
    path = write(tmp_path / "m.gguf", tiny.GQA, kind)
    assert not isinstance(open_checkpoint(path), HoldsCodes)
    assert plan_of(path).quantized is None


def test_quantized_only_outside_the_layers(tmp_path: Path) -> None:
    """The target decides the precision; the embedding keeps its codes where it is int8 anyway."""
    source = write(tmp_path / "m.gguf", TIED, Type.F16, kinds={"token_embd": Type.Q8_0})
    checkpoint = open_checkpoint(source)
    assert isinstance(checkpoint, QuantizedGGUF) and checkpoint.native_bits is None
    plan = plan_of(source)
    assert plan.recipe.precision == TARGET.graph.default_precision
    assert list(plan.recipe.source_codes) == ["model.embed_tokens.weight"]
    assert plan_of(source, Options(embedding="fp16")).recipe.source_codes == {}


def test_another_precision_dequantizes_without_a_warning(tmp_path: Path) -> None:
    source = write(tmp_path / "m.gguf", tiny.GQA, Type.Q8_0)
    plan = plan_of(source, Options("int4", quantizer="rtn"))
    kept = {"model.embed_tokens.weight"}  # int8 beside int4 matrices
    assert plan.recipe.source_codes.keys() == kept
    assert not [text for text in plan.warnings if "second time" in text]
    assert plan_of(source, Options("fp16")).recipe.source_codes == {}


def test_a_budget_shares_out_an_embedding_that_alone_has_codes_to_keep(tmp_path: Path) -> None:
    source = write(tmp_path / "m.gguf", WIDE, Type.Q4_1, kinds={"token_embd": Type.Q8_0})
    checkpoint, options = open_checkpoint(source), Options("int4", quantizer="best")
    for budget, kept in ((None, {"model.embed_tokens.weight"}), ("5bpw", set[str]())):
        given = replace(options, budget=budget)
        chosen = choose_recipe(checkpoint, TARGET, given, reads=True, adapters=False)
        assert chosen.recipe.source_codes.keys() == kept


def test_a_storage_that_was_asked_for_is_used(tmp_path: Path) -> None:
    source = write(tmp_path / "m.gguf", tiny.GQA, Type.Q4_0)
    kept = plan_of(source).recipe.source_codes.keys()
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= kept
    recipe = plan_of(source, Options(embedding="int8", head="fp16")).recipe
    assert not {"model.embed_tokens.weight", "lm_head.weight"} & recipe.source_codes.keys()
    assert (recipe.embedding.name, recipe.head.name) == ("int8", "fp16")


def test_targets_of_standard_operators_quantize_a_second_time(tmp_path: Path) -> None:
    source = write(tmp_path / "m.gguf", tiny.GQA, Type.Q4_0)
    plan = plan_of(source, target=get_target("portable"))
    assert plan.recipe.source_codes == {} and plan.recipe.precision == "int4"
    assert any("ONNX's own operators read codes in another layout" in w for w in plan.warnings)


def test_scales_that_a_target_would_round_are_not_taken(tmp_path: Path) -> None:
    """The scale of 16 codes of Q6_K is a product that needs float32; that of Q8_0 is fp16."""
    source = write(tmp_path / "m.gguf", WIDE, Type.Q8_0, kinds={"ffn_down": Type.Q6_K})
    plan = plan_of(source, target=get_target("cuda"))
    assert plan.recipe.activations == "fp16" and plan.recipe.precision == "int8"
    assert not any("down_proj" in name for name in plan.recipe.source_codes)
    assert "model.layers.0.mlp.up_proj.weight" in plan.recipe.source_codes
    assert any("3 matrices stored as Q6_K" in text for text in plan.warnings)


def test_plan_counts_no_whole_matrix_in_memory(tmp_path: Path) -> None:
    """Rows are read as they are needed, unlike those of GPTQ's layout. fp16 scales take less."""
    sizes = []
    for kind in (Type.F16, Type.Q8_0):
        source = write(tmp_path / f"{kind.name}.gguf", tiny.GQA, kind)
        sizes.append(plan_of(source, Options("int8")).peak_memory)
    assert sizes[1] <= sizes[0]


def test_a_scale_that_is_not_finite_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "m.gguf", tiny.GQA, Type.Q4_0)
    reader = gguf.GGUFReader(source, "r+")
    block = next(t for t in reader.tensors if t.name == "blk.1.ffn_up.weight").data
    block[5, :2] = np.array([np.nan], np.float16).view(np.uint8)
    del block, reader
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight, rows .*NaN"):
        export(source, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_merging_an_adapter_into_codes_that_would_be_kept(tmp_path: Path) -> None:
    changes = adapters.factors({f"model.layers.{layer}.mlp.down_proj": 4 for layer in range(3)})
    adapter = adapters.write_adapter(tmp_path / "adapter", changes)
    source = write(tmp_path / "m.gguf", tiny.GQA, Type.Q4_0)
    with pytest.raises(UsageError, match="quantize it a second time"):
        make_plan(open_adapter(open_checkpoint(source), adapter), TARGET, Options(), 2)
    minima = write(tmp_path / "minima.gguf", tiny.GQA, Type.Q4_1)
    plan = make_plan(open_adapter(open_checkpoint(minima), adapter), TARGET, Options(), 2)
    assert plan.recipe.source_codes == {}


def test_random_blocks_are_not_all_alike() -> None:
    """The K-quants above come from them."""
    assert len(np.unique(random_blocks((64, 256), Type.Q6_K))) > 30

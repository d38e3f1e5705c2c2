"""compressed-tensors checkpoints: the weights that this library dequantizes, kept code by code.

Checkpoints and expected values come from the library itself (`tests/support/compressed.py`), but
for act-order by group, which its current version no longer has: there its result is permuted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from llama_onnx.exporter.checkpoints.package.package import PackageCheckpoint
from llama_onnx.exporter.checkpoints.quantized.compressed_config import (
    Targets,
    read_compressed_config,
)
from llama_onnx.exporter.checkpoints.quantized.folder import QuantizedCheckpoint
from llama_onnx.exporter.model.checkpoint import check_tensors
from llama_onnx.exporter.packaging.export import ExportResult, export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.packaging.plan import make_plan
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.measure.graph_session import GraphSession
from llama_onnx.targets.cpu import TARGET
from llama_onnx.targets.errors import CheckpointError, UnsupportedError
from llama_onnx.targets.registry import get_target
from tests.support import compressed, tiny
from tests.support.compressed import Compressed, compress_model, group, write
from tests.support.parity import missed, report_on
from tests.support.pytorch import run_whole, whole_model
from tests.support.quantized_cases import EXACT, HEAD, LAYER, PARTIAL, QKV, whole

W4 = QuantizationArgs(num_bits=4, strategy="group", group_size=32)
W4_ASYMMETRIC = QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=False)
W8 = QuantizationArgs(num_bits=8, strategy="channel")
PACKED, INT, NAIVE = "pack-quantized", "int-quantized", "naive-quantized"
STRATEGIES = [("group", 32), ("channel", None), ("tensor", None)]


def export(source: Path, out: Path, options: Options = EXACT, target: Any = TARGET) -> ExportResult:
    return export_package(source, out, target, options)


def simple(folder: Path, args: QuantizationArgs, kind: str, **how: Any) -> Any:
    """Write a checkpoint with one scheme; return its folder and matrices."""
    matrices = compress_model(args, kind)
    return write(folder, matrices, {"group_0": group(args, kind)}, **how), matrices


def assert_same(path: Path, matrices: dict[str, Compressed], *, package: bool = False) -> None:
    opened = PackageCheckpoint.open(path) if package else open_checkpoint(path)
    for module, matrix in matrices.items():
        found = whole(opened, f"{module}.weight")
        np.testing.assert_array_equal(found.view(np.uint32), matrix.weight.view(np.uint32), module)


@pytest.mark.parametrize("kind", [PACKED, INT])
@pytest.mark.parametrize(
    ("bits", "symmetric", "strategy"), itertools.product([4, 8], [True, False], STRATEGIES)
)
def test_every_weight_is_the_one_that_the_library_dequantizes(
    tmp_path: Path, kind: str, bits: int, symmetric: bool, strategy: tuple[str, int | None]
) -> None:
    args = QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy=strategy[0], group_size=strategy[1]
    )
    source, matrices = simple(tmp_path / "ä ü", args, kind)
    checkpoint = open_checkpoint(source)
    check_tensors(checkpoint)
    assert_same(source, matrices)
    rows = checkpoint.tensor(f"{LAYER}.weight").rows(5, 23)
    np.testing.assert_array_equal(rows, matrices[LAYER].weight[5:23])
    norm = whole(checkpoint, "model.norm.weight")
    np.testing.assert_array_equal(norm, compressed.dequantized({})["model.norm.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_types_and_rows_that_fill_no_word(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    config = replace(PARTIAL, hidden_size=84, intermediate_size=72)
    args = QuantizationArgs(num_bits=4, strategy="channel", symmetric=False)
    matrices = compress_model(args, PACKED, config, dtype=dtype)
    source = write(tmp_path / "s", matrices, {"group_0": group(args, PACKED)}, config=config)
    assert_same(source, matrices)
    export(source, tmp_path / "out")
    assert_same(tmp_path / "out", matrices, package=True)


@pytest.mark.parametrize(
    ("kind", "args", "precision", "described"),
    [
        (PACKED, W4, "int4", "4-bit, groups of 32, symmetric, format pack-quantized"),
        (PACKED, W4_ASYMMETRIC, "int4", "4-bit, groups of 32, asymmetric, format pack-quantized"),
        (INT, W8, "int8", "8-bit, one group per row, symmetric, format int-quantized"),
        (
            NAIVE,
            QuantizationArgs(num_bits=8, strategy="tensor", symmetric=False),
            "int8",
            "8-bit, one scale per matrix, asymmetric, format naive-quantized",
        ),
    ],
)
def test_a_package_keeps_the_codes(
    tmp_path: Path, kind: str, args: QuantizationArgs, precision: str, described: str
) -> None:
    source, matrices = simple(tmp_path / "source", args, kind)
    result = export(source, tmp_path / "out")
    assert result.plan.recipe.precision == precision
    assert result.plan.quantized == (
        f"compressed-tensors {described}: 21 matrices taken over code by code"
    )
    kept = set(result.plan.recipe.source_codes.values())
    assert {storage.zero_points for storage in kept} == {not args.symmetric}
    assert_same(tmp_path / "out", matrices, package=True)
    assert missed(report_on(tmp_path / "out", source)) == set()


def test_logits_are_those_of_transformers_on_the_dequantized_weights(tmp_path: Path) -> None:
    source, matrices = simple(tmp_path / "source", W4_ASYMMETRIC, PACKED)
    export(source, tmp_path / "out")
    ids = np.random.default_rng(0).integers(3, tiny.GQA.vocab_size, 17)
    logits, _ = GraphSession.open(tmp_path / "out").step(ids)
    expected = run_whole(whole_model(tiny.GQA, compressed.dequantized(matrices)), ids)
    assert np.linalg.norm(logits - expected) <= 1e-5 * np.linalg.norm(expected)


def test_act_order_by_group(tmp_path: Path) -> None:
    """The channels of a group are not adjacent; -1 in g_idx means that they are."""
    matrices = compress_model(W4_ASYMMETRIC, INT)
    rng = np.random.default_rng(1)
    for layer in range(3):
        for module in (f"model.layers.{layer}.mlp.{part}_proj" for part in ("gate", "up", "down")):
            width = matrices[module].weight.shape[1]
            matrices[module] = compressed.reordered(matrices[module], rng.permutation(width), 32)
    nothing = {f"{QKV[0]}.weight_g_idx": torch.full((64,), -1, dtype=torch.int32)}
    groups = {"group_0": group(W4_ASYMMETRIC, INT)}
    groups["group_0"]["weights"]["actorder"] = "group"
    source = write(tmp_path / "source", matrices, groups, extra=nothing)
    assert_same(source, matrices)
    export(source, tmp_path / "out")
    assert_same(tmp_path / "out", matrices, package=True)
    damaged = {f"{LAYER}.weight_g_idx": torch.zeros(96, dtype=torch.int32)}
    damaged[f"{LAYER}.weight_g_idx"][5] = 1
    source = write(tmp_path / "damaged", matrices, groups, extra=damaged)
    with pytest.raises(CheckpointError, match="does not put 32 input channels into each group"):
        assert_same(source, matrices)


def test_several_schemes_and_modules_left_out(tmp_path: Path) -> None:
    """A name comes before an expression, and that before a class; `ignore` before them all."""
    eight = QuantizationArgs(num_bits=8, strategy="group", group_size=16)
    args = {"": W4, "v_proj": W8, "down_proj": eight}
    skip = ("model.layers.0.self_attn.q_proj", HEAD)
    matrices = compress_model(args, PACKED, skip=skip)
    matrices[LAYER] = compressed.compress(tiny.weights(tiny.GQA)[f"{LAYER}.weight"], W4, PACKED)
    groups = {
        "group_0": group(W4, PACKED, "Linear", LAYER),
        "group_1": group(W8, PACKED, "re:.*v_proj$"),
        "group_2": group(eight, PACKED, "re:.*mlp[.]down_proj"),
    }
    settings = {"ignore": ["re:.*lm_head", skip[0]], "format": "mixed-precision"}
    source = write(tmp_path / "source", matrices, groups, settings=settings)
    assert_same(source, matrices)
    result = export(source, tmp_path / "out")
    assert_same(tmp_path / "out", matrices, package=True)
    assert result.plan.recipe.precision == "int4"
    ways = result.plan.recipe.to_json()["taken_over"]
    assert [(way["bits"], way["block_size"], way["tensors"]) for way in ways] == [
        (4, 32, 15),
        (8, 16, 2),
        (8, 128, 3),
    ]


def test_a_quantized_head_is_kept(tmp_path: Path) -> None:
    matrices = compress_model(W4, PACKED, extra=(HEAD,))
    groups = {"group_0": group(W4, PACKED)}
    source = write(tmp_path / "source", matrices, groups, settings={"ignore": []})
    export(source, tmp_path / "out", replace(EXACT, head=None))
    assert_same(tmp_path / "out", matrices, package=True)


def test_quantized_activations_and_cache_are_left_out_by_name(tmp_path: Path) -> None:
    activations = QuantizationArgs(num_bits=8, strategy="token", dynamic=True)
    groups = {"group_0": group(W8, INT, input_activations=activations.model_dump(mode="json"))}
    cache = QuantizationArgs(num_bits=8, strategy="tensor").model_dump(mode="json")
    matrices = compress_model(W8, INT)
    extra = {
        f"{QKV[0]}.input_scale": torch.ones(1),
        "model.layers.1.self_attn.k_scale": torch.ones(1),
        "model.layers.1.self_attn.v_scale": torch.ones(1),
    }
    settings = {"kv_cache_scheme": cache}
    source = write(tmp_path / "source", matrices, groups, settings=settings, extra=extra)
    result = export(source, tmp_path / "out")
    assert_same(tmp_path / "out", matrices, package=True)
    first, second = (text for text in result.warnings if str(source) in text)
    assert "input_activations are quantized in the source: the package has its weights" in first
    assert "kv_cache_scheme quantizes the KV cache" in second


def test_other_precisions_and_targets_dequantize(tmp_path: Path) -> None:
    source, _ = simple(tmp_path / "source", W4_ASYMMETRIC, PACKED)
    result = export(source, tmp_path / "fp32", Options("fp32"))
    assert result.plan.quantized is not None
    assert result.plan.quantized.endswith("21 matrices dequantized")
    assert missed(report_on(tmp_path / "fp32", source)) == set()
    portable = make_plan(open_checkpoint(source), get_target("portable"), Options(), 2)
    assert portable.recipe.source_codes == {} and portable.recipe.precision == "int4"
    assert "21 matrices stored as INT4/32 are quantized a second time" in portable.warnings[-1]


def test_headers_are_enough_for_a_plan(tmp_path: Path) -> None:
    """As for a model on the hub, of which it has headers and holes."""
    source, _ = simple(tmp_path, W4_ASYMMETRIC, PACKED)
    file = source / "model.safetensors"
    size, header = file.stat().st_size, 8 + int.from_bytes(file.read_bytes()[:8], "little")
    with file.open("r+b") as opened:
        opened.truncate(header)
        opened.truncate(size)
    plan = make_plan(open_checkpoint(source), TARGET, Options(), 2)
    assert len(plan.recipe.source_codes) == 21


def test_settings_inside_settings(tmp_path: Path) -> None:
    """As some versions of transformers save them."""
    matrices = compress_model(W4, PACKED)
    groups = {"group_0": group(W4, PACKED)}
    inner = {"quantization_config": {"config_groups": groups, "format": PACKED}}
    settings = {"config_groups": None, "format": None, **inner}
    source = write(tmp_path / "source", matrices, groups, settings=settings)
    assert_same(source, matrices)


Change = Callable[[dict[str, Any]], None]


def _weights(**keys: Any) -> Change:
    return lambda raw: raw["config_groups"]["group_0"]["weights"].update(keys)


def _group(**keys: Any) -> Change:
    return lambda raw: raw["config_groups"]["group_0"].update(keys)


def _settings(**keys: Any) -> Change:
    return lambda raw: raw.update(keys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_group(format="float-quantized"), "the format 'float-quantized', but only integers in"),
        (_group(format="nvfp4-pack-quantized"), "the format 'nvfp4-pack-quantized'"),
        (_group(format="marlin-24"), "the format 'marlin-24'"),
        (_group(format=None, weights=None), "no scheme in .* is for model"),
        (_settings(format=None), "no format"),
        (_weights(type="float"), "weights of the type 'float', but only integers"),
        (_weights(num_bits=3), "weights of 3 bits, which are not supported, only those of 4 and 8"),
        (_weights(num_bits=True), "weights of True bits"),
        (_weights(num_bits=8), r"weight_scale is F16 \[64, 3\] instead of .* 64 x 2"),
        (_weights(strategy="block"), "the strategy 'block', which is not supported"),
        (_weights(strategy="tensor_group"), "the strategy 'tensor_group'"),
        (_weights(group_size=0), "group_size must be a positive number, not 0"),
        (_weights(group_size=16), r"weight_scale is F16 \[64, 3\] instead of .* 64 x 6"),
        (_weights(symmetric=False), "no model.*weight_zero_point, which the scheme"),
        (_weights(symmetric="yes"), "symmetric must be true or false, not 'yes'"),
        (_group(weights=4), "weights must be an object, not 4"),
        (_group(targets="Linear"), "targets must be a list of names"),
        (_group(targets=["re:("]), "the target '\\(' is not a valid regular expression"),
        (_group(targets=["re:(a+)+[.]x"]), "no scheme in .* is for model"),
        (_group(targets=["re:(?:[a-z]|[a-z.0-9_]+)+\\\\$"]), "takes too long to match"),
        (_settings(config_groups={}), "config_groups must be an object with schemes"),
        (_settings(config_groups={"W4A16": ["Linear"]}), "'W4A16' .* is not a scheme but"),
        (_settings(ignore=["x"] * 30_000), "names 30,001 targets, more than 20,000"),
        (_settings(ignore=[1]), r"ignore must be a list of names, not \[1\]"),
        (_settings(ignore=["Linear"]), "no scheme in .* is for model"),
        (_settings(transform_config={"config_groups": {"u": {}}}), "transform_config is set"),
        (_settings(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config is set"),
    ],
)
def test_settings_that_are_refused(
    packed: dict[str, Compressed], tmp_path: Path, change: Change, message: str
) -> None:
    raw = {"config_groups": {"group_0": group(W4, PACKED)}, "format": PACKED}
    change(raw)
    if message == "no format":
        message = "the format None"
        raw["config_groups"]["group_0"]["format"] = None
    groups = {"group_0": group(W4, PACKED)}
    source = write(tmp_path / "source", packed, groups, settings=raw | {"format": raw["format"]})
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint = open_checkpoint(source)
        check_tensors(checkpoint)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def packed() -> dict[str, Compressed]:
    return compress_model(W4, PACKED)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight_packed", None, "has .*weight_scale, but no .*weight_packed"),
        ("weight_packed", torch.zeros(64, 11, dtype=torch.int32), r"has shape \[64, 88\], but"),
        ("weight_packed", torch.zeros(64, 12), "weight_packed is F32"),
        ("weight_shape", None, "no model.*weight_shape"),
        ("weight_shape", torch.tensor([64, 95]), r"weight_shape is \[64, 95\], but"),
        ("weight_shape", torch.tensor([64]), r"weight_shape is I64 \[1\]"),
        ("weight_scale", torch.ones(64, 3, dtype=torch.int32), "weight_scale is I32"),
        ("weight_scale", torch.full((64, 3), torch.nan), "down_proj.weight, rows .* hold NaN"),
        ("weight_zero_point", torch.ones(64, 3, dtype=torch.int8), "is not zero, but the scheme"),
        ("weight_g_idx", torch.zeros(3, dtype=torch.int32), r"weight_g_idx is I32 \[3\]"),
        ("weight", torch.zeros(64, 96), "as floats and as codes: remove one of them"),
    ],
)
def test_damaged_tensors_are_named(
    packed: dict[str, Compressed],
    tmp_path: Path,
    name: str,
    value: torch.Tensor | None,
    message: str,
) -> None:
    groups, extra = {"group_0": group(W4, PACKED)}, {f"{LAYER}.{name}": value}
    source = write(tmp_path / "source", packed, groups, extra=extra)
    with pytest.raises(CheckpointError, match=message) as caught:
        export(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_codes_of_more_bits_than_stated(tmp_path: Path) -> None:
    extra = {f"{LAYER}.weight": torch.full((64, 96), 9, dtype=torch.int8)}
    source, _ = simple(tmp_path / "source", W4, INT, extra=extra)
    with pytest.raises(CheckpointError, match=r"down_proj.weight has codes beyond 4 bits"):
        export(source, tmp_path / "out")


def test_settings_without_codes_and_codes_of_the_embedding(tmp_path: Path) -> None:
    groups = {"group_0": group(W4, PACKED)}
    with pytest.raises(CheckpointError, match=r"no tensor .* is quantized"):
        open_checkpoint(write(tmp_path / "floats", {}, groups))
    matrices = compress_model(W4, PACKED, extra=("model.embed_tokens",))
    with pytest.raises(UnsupportedError, match="the embedding quantized"):
        open_checkpoint(write(tmp_path / "embedding", matrices, groups))


def test_a_name_comes_before_an_expression_and_that_before_a_class(tmp_path: Path) -> None:
    """As the library's match_targets sorts them."""
    eight = QuantizationArgs(num_bits=8, strategy="channel")
    raw = {
        "quant_method": "compressed-tensors",
        "config_groups": {
            "class": group(eight, INT, "Linear"),
            "expression": group(W4, PACKED, "re:model.layers.*q_proj"),
            "name": group(W4_ASYMMETRIC, PACKED, "model.layers.0.self_attn.q_proj"),
        },
    }
    config = read_compressed_config(tmp_path, {"quantization_config": raw})
    assert config is not None
    targets = Targets(config)
    found = [
        targets.scheme_of(f"model.layers.{m}") for m in ("0.self_attn.q_proj", "1.q_proj", "o")
    ]
    assert [(s.bits, s.symmetric) for s in found if s] == [(4, False), (4, True), (8, True)]


def test_the_checkpoint_describes_all_its_schemes(tmp_path: Path) -> None:
    args = {"": W4, "v_proj": W8}
    matrices = compress_model(args, PACKED)
    groups = {"a": group(W4, PACKED), "b": group(W8, PACKED, "re:.*v_proj")}
    checkpoint = open_checkpoint(write(tmp_path, matrices, groups))
    assert isinstance(checkpoint, QuantizedCheckpoint)
    assert checkpoint.describe() == (
        "compressed-tensors 4-bit, groups of 32, symmetric, format pack-quantized; "
        "8-bit, one group per row, symmetric, format pack-quantized"
    )

"""GPTQ and AWQ checkpoints: the same codes, scales and zero points in the package, the same logits.

Expected values come from `tests/support/quantized.py`, which quantizes and packs from the formats'
definitions. Its words have been compared with those that AutoGPTQ 0.7.1 and AutoAWQ 0.2.9 pack, and
its weights with those that they and GPT-QModel 7.7.0 dequantize.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from llama_onnx.exporter.checkpoints.lora import open_adapter
from llama_onnx.exporter.checkpoints.package.package import PackageCheckpoint
from llama_onnx.exporter.checkpoints.quantized import awq, gptq
from llama_onnx.exporter.model.checkpoint import Checkpoint, check_tensors
from llama_onnx.exporter.model.storage import pack, unpack
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.packaging.plan import make_plan
from llama_onnx.exporter.parity.measure.weights import Worst, compare_weights
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.measure.graph_session import GraphSession
from llama_onnx.targets.cpu import TARGET
from llama_onnx.targets.errors import CheckpointError, UnsupportedError, UsageError
from llama_onnx.targets.package import DATA_FILE, MODEL_FILE
from llama_onnx.targets.progress import SILENT, Silent, Unit
from llama_onnx.targets.registry import get_target
from tests.support import adapters, quantized
from tests.support.faults import edit
from tests.support.parity import missed, report_on
from tests.support.pytorch import run_whole, whole_model
from tests.support.quantized import Quantized, quantize_model, write
from tests.support.quantized_cases import (
    CASES,
    EXACT,
    HEAD,
    LAYER,
    QKV,
    export,
    make,
    run,
    whole,
)

Array = npt.NDArray[Any]


def initializers(package: Path) -> dict[str, Array]:
    model = onnx.load(package / "model.onnx")
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


# Reading


@pytest.mark.parametrize("name", CASES)
def test_every_weight_is_the_one_the_format_defines(tmp_path: Path, name: str) -> None:
    source, matrices = make(tmp_path / "ä ü 日本", name)
    checkpoint = open_checkpoint(source)
    check_tensors(checkpoint)
    for tensor, expected in quantized.dequantized(matrices, CASES[name][2]).items():
        np.testing.assert_array_equal(whole(checkpoint, tensor), expected)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Checkpoint, Any]]:
    found = {}
    for name in ("gptq act-order", "awq"):
        source, matrices = make(tmp_path_factory.mktemp("rows") / name, name)
        found[name] = open_checkpoint(source), matrices
    return found


@settings(max_examples=50)
@given(data=st.data())
def test_any_rows_are_those_of_the_whole(
    opened: dict[str, tuple[Checkpoint, dict[str, Quantized]]], data: st.DataObject
) -> None:
    checkpoint, matrices = opened[data.draw(st.sampled_from(sorted(opened)))]
    module = data.draw(st.sampled_from(sorted(matrices)))
    expected = matrices[module].weight()
    stop = data.draw(st.integers(1, len(expected)))
    start = data.draw(st.integers(0, stop - 1))
    rows = checkpoint.tensor(f"{module}.weight").rows(start, stop)
    np.testing.assert_array_equal(rows, expected[start:stop])


@st.composite
def code_matrices(draw: st.DrawFn, bits: st.SearchStrategy[int]) -> tuple[Array, int, int, int]:
    """Codes [K, N] (K and N fill whole words), their bits, and a range of columns."""
    width = draw(bits)
    fields = 32 // width
    shape = (fields * draw(st.integers(1, 6)), fields * draw(st.integers(1, 6)))
    seed = draw(st.integers(0, 2**32 - 1))
    codes = np.random.default_rng(seed).integers(0, 1 << width, shape, np.uint8)
    stop = draw(st.integers(1, shape[1]))
    return codes, width, draw(st.integers(0, stop - 1)), stop


@given(case=code_matrices(st.sampled_from([4, 8])))
def test_gptq_words_are_unpacked(case: tuple[Array, int, int, int]) -> None:
    codes, bits, start, stop = case
    words = quantized.pack_words(codes, bits).view(np.uint32)
    rows = unpack(gptq.weight_rows(words, start, stop, bits), bits)
    np.testing.assert_array_equal(rows, codes.T[start:stop])
    across = np.ascontiguousarray(quantized.pack_words(codes.T, bits).T).view(np.uint32)
    np.testing.assert_array_equal(gptq.unpack_words(across, bits), codes)


@given(case=code_matrices(st.just(4)))
def test_awq_words_are_unpacked(case: tuple[Array, int, int, int]) -> None:
    codes, bits, start, stop = case
    words = quantized.pack_awq(codes).view(np.uint32)
    rows = unpack(awq.weight_rows(words, start, stop, bits), bits)
    np.testing.assert_array_equal(rows, codes.T[start:stop])


@given(case=code_matrices(st.sampled_from([4, 8])), odd=st.booleans())
def test_packing_bytes_is_undone_by_unpacking(case: tuple[Array, int, int, int], odd: bool) -> None:
    codes, bits = case[0][:, int(odd) :], case[1]
    packed = pack(codes, bits)
    assert packed.shape == (len(codes), -(-codes.shape[1] * bits // 8))
    np.testing.assert_array_equal(unpack(packed, bits)[:, : codes.shape[1]], codes)


# The package


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers_on_the_dequantized_weights(
    tmp_path: Path, name: str
) -> None:
    source, matrices = make(tmp_path / "source", name)
    config = CASES[name][2]
    # What is not quantized in the source stays exact too, but for the mixed ones' few matrices.
    weights = quantized.dequantized(matrices, config)
    options = replace(EXACT, head=None) if HEAD in matrices else EXACT
    result = export(source, tmp_path / "out", options)
    package = PackageCheckpoint.open(tmp_path / "out")
    for module in matrices:
        expected = matrices[module].weight()
        np.testing.assert_array_equal(whole(package, f"{module}.weight"), expected)
    for tensor in weights.keys() - {f"{module}.weight" for module in matrices}:
        if tensor in package.config.tensor_shapes():
            weights[tensor] = whole(package, tensor)
    taken = sum(entry["tensors"] for entry in result.plan.recipe.to_json()["taken_over"])
    assert taken == len(matrices)
    model = whole_model(config, weights)
    session = GraphSession.open(tmp_path / "out")
    ids = np.random.default_rng(0).integers(3, config.vocab_size, 33)
    expected = run_whole(model, ids)
    logits, cache = session.step(ids[:-1])
    last, _ = session.step(ids[-1:], cache)
    found = np.concatenate([logits, last])
    assert np.abs(found - expected).max() <= 1e-3
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("kept", [True, False])
def test_weights_have_to_be_equal_only_where_the_package_keeps_the_codes(
    tmp_path: Path, kept: bool
) -> None:
    """ONNX's own operators read other codes, so that there all matrices are quantized anew."""
    source, matrices = make(tmp_path / "source", "gptq")
    target = get_target("cpu" if kept else "portable")
    options = Options("int4", quantizer="rtn")
    result = export_package(source, tmp_path / "out", target, options)
    assert bool(result.plan.recipe.source_codes) == kept
    package, reference = PackageCheckpoint.open(tmp_path / "out"), open_checkpoint(source)
    error = compare_weights(package, reference, SILENT)
    assert error.steps.value <= 1.01
    module = next(iter(matrices))
    assert (whole(package, f"{module}.weight") == matrices[module].weight()).all() == kept
    if kept:  # then one code off by one is one too many
        damage(tmp_path / "out")
        damaged = PackageCheckpoint.open(tmp_path / "out")
        error = compare_weights(damaged, reference, SILENT)
        assert error.steps.value == np.inf


def damage(package: Path) -> None:
    """Change the lowest bit of one code of the first decoder matrix."""
    graph = onnx.load(package / MODEL_FILE, load_external_data=False).graph
    codes = next(i for i in graph.initializer if i.name == "model.layers.0.mlp.down_proj.qweight")
    offset = int({entry.key: entry.value for entry in codes.external_data}["offset"])
    with (package / DATA_FILE).open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("name", ["gptq", "gptq 8 bits", "awq"])
def test_the_package_has_the_very_codes_scales_and_zero_points(tmp_path: Path, name: str) -> None:
    source, matrices = make(tmp_path / "source", name)
    export(source, tmp_path / "out")
    stored = initializers(tmp_path / "out")
    slots = {QKV[0].replace("q_proj", "qkv_proj"): QKV, LAYER: [LAYER]}
    for slot, modules in slots.items():
        parts = [matrices[module] for module in modules]
        codes, zeros, scales = (
            np.concatenate([getattr(part, key) for part in parts])
            for key in ("codes", "zeros", "scales")
        )
        np.testing.assert_array_equal(
            _nibbles(stored[f"{slot}.qweight"], parts[0].bits)[:, : codes.shape[1]], codes
        )
        np.testing.assert_array_equal(
            _nibbles(stored[f"{slot}.zero_points"], parts[0].bits)[:, : zeros.shape[1]], zeros
        )
        np.testing.assert_array_equal(stored[f"{slot}.scales"], scales.astype(np.float32))


def _nibbles(array: Array, bits: int) -> Array:
    flat = array.reshape(len(array), -1)
    if bits == 8:
        return flat
    found = np.empty((len(flat), 2 * flat.shape[1]), np.uint8)
    found[:, ::2], found[:, 1::2] = flat % 16, flat // 16
    return found


def test_a_mixed_model_keeps_each_matrix_as_it_is(tmp_path: Path) -> None:
    source, matrices = make(tmp_path / "source", "gptq mixed")
    export(source, tmp_path / "out")
    package = PackageCheckpoint.open(tmp_path / "out")
    kinds = {module: package.tensor(f"{module}.weight").dtype for module in matrices}
    assert kinds[QKV[2]] == "INT8/32" and kinds[QKV[1]] == "INT4/32" and kinds[LAYER] == "INT4/16"
    assert package.tensor(f"{QKV[0]}.weight").dtype == "INT4/32"  # rounded by the recipe
    assert "model.layers.1.self_attn.qkv_proj.qweight" not in initializers(tmp_path / "out")


def test_one_order_for_matrices_of_one_input_keeps_them_together(tmp_path: Path) -> None:
    together, _ = make(tmp_path / "a", "gptq act-order")
    apart, _ = make(tmp_path / "b", "gptq act-order apart")
    export(together, tmp_path / "together")
    export(apart, tmp_path / "apart")
    name = "model.layers.1.self_attn.qkv_proj.order"
    assert name in initializers(tmp_path / "together")
    assert name not in initializers(tmp_path / "apart")


@pytest.mark.parametrize("name", ["gptq act-order", "awq", "gptq mixed"])
def test_validate_passes_and_holds_the_codes_equal(tmp_path: Path, name: str) -> None:
    source, _ = make(tmp_path / "source", name)
    export(source, tmp_path / "out", Options())
    assert missed(report_on(tmp_path / "out", source)) == set()

    def one_step_of_one_code(array: Array) -> None:
        array[5, 0, 3] ^= 1

    edit(tmp_path / "out", f"{LAYER}.qweight", one_step_of_one_code)
    report = report_on(tmp_path / "out", source)
    assert missed(report) == {"weights"}
    assert report.weights.steps == Worst(np.inf, f"{LAYER}.weight")


@pytest.mark.parametrize("precision", ["int8", "fp16", "fp32"])
def test_other_precisions_dequantize(tmp_path: Path, precision: str) -> None:
    source, _ = make(tmp_path / "source", "gptq act-order")
    result = export(source, tmp_path / "out", Options(precision=precision))
    assert result.plan.quantized is not None
    assert result.plan.quantized.endswith("21 matrices dequantized")
    assert missed(report_on(tmp_path / "out", source)) == set()


def test_at_eight_bits_a_mixed_models_eight_bits_stay(tmp_path: Path) -> None:
    source, _ = make(tmp_path / "source", "gptq mixed")
    result = export(source, tmp_path / "out", Options(precision="int8"))
    assert result.plan.recipe.source_codes.keys() == {
        f"model.layers.{layer}.self_attn.v_proj.weight" for layer in range(3)
    }
    assert missed(report_on(tmp_path / "out", source)) == set()


@pytest.mark.parametrize(("name", "precision"), [("gptq 8 bits", "int8"), ("gptq", "int4")])
def test_the_precision_is_the_sources_own_by_default(
    tmp_path: Path, name: str, precision: str
) -> None:
    source, _ = make(tmp_path, name)
    plan = make_plan(open_checkpoint(source), TARGET, Options(), 2)
    assert plan.recipe.precision == precision
    assert len(plan.recipe.source_codes) == 21


def test_a_head_goes_its_own_way_when_asked(tmp_path: Path) -> None:
    source, _ = make(tmp_path / "source", "gptq head")
    plan = make_plan(open_checkpoint(source), TARGET, Options(head="int8"), 2)
    assert "lm_head.weight" not in plan.recipe.source_codes
    plan = make_plan(open_checkpoint(source), TARGET, Options(), 2)
    assert "lm_head.weight" in plan.recipe.source_codes


def test_plan_and_inspect_say_what_it_is(tmp_path: Path) -> None:
    source, _ = make(tmp_path, "gptq act-order")
    facts = json.loads(run("inspect", source, "--json").stdout)
    assert facts["quantization"] == "GPTQ 4-bit, groups of 32, act-order yes, layout gptq"
    assert facts["dtypes"] == {"INT4/32": 21, "F16": 9}
    assert facts["problem"] == "none"
    plan = json.loads(run("plan", source, "--json").stdout)
    assert plan["source_quantized"].endswith(": 21 matrices taken over code by code")
    assert "GPTQ 4-bit" in run("plan", source).stdout
    described = {name: open_checkpoint(make(tmp_path / name, name)[0]) for name in ("awq", "gptq")}
    assert [checkpoint.describe() for checkpoint in described.values()] == [  # type: ignore[attr-defined]
        "AWQ 4-bit, groups of 32, layout gemm",
        "GPTQ 4-bit, groups of 32, act-order no, layout gptq",
    ]


@pytest.mark.parametrize("name", ["gptq", "gptq act-order", "awq"])
def test_plan_reads_headers_and_can_do_without_the_rest(tmp_path: Path, name: str) -> None:
    """As for a model on the hub, of which it has headers and holes."""
    source, _ = make(tmp_path, name)
    file = source / "model.safetensors"
    size, header = file.stat().st_size, 8 + int.from_bytes(file.read_bytes()[:8], "little")
    with file.open("r+b") as opened:
        opened.truncate(header)
        opened.truncate(size)
    plan = run("plan", source)
    assert plan.exit_code == 0, plan.output
    assert "int4 in blocks of 32" in plan.stdout


class Stop(Silent):
    """Breaks the export off when `what` is being written."""

    def __init__(self, what: str) -> None:
        self.what = what

    def update(self, what: str, done: int, total: int, unit: Unit = "steps") -> None:
        if what == self.what:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptq act-order", "awq"])
def test_interrupted_and_resumed_gives_the_same_bytes(tmp_path: Path, name: str) -> None:
    source, _ = make(tmp_path / "source", name)
    export(source, tmp_path / "unbroken")
    with pytest.raises(KeyboardInterrupt):
        export(source, tmp_path / "out", progress=Stop(LAYER))
    assert export(source, tmp_path / "out", resume=True).resumed_bytes > 0
    hashes = [
        hashlib.sha256((tmp_path / folder / "model.onnx.data").read_bytes()).hexdigest()
        for folder in ("unbroken", "out")
    ]
    assert hashes[0] == hashes[1]


# Adapters


def _adapter(folder: Path) -> tuple[Path, Any]:
    changes = adapters.factors({LAYER.replace("1", str(layer)): 4 for layer in range(3)})
    return adapters.write_adapter(folder, changes), changes


def test_an_adapter_is_not_merged_into_codes(tmp_path: Path) -> None:
    source, _ = make(tmp_path / "source", "gptq")
    adapter, _ = _adapter(tmp_path / "adapter")
    with pytest.raises(UsageError, match="quantize it a second time"):
        export(source, tmp_path / "out", Options(), adapters=[adapter])
    assert not list(tmp_path.glob("out*"))


def test_an_adapter_is_merged_into_dequantized_weights(tmp_path: Path) -> None:
    source, matrices = make(tmp_path / "source", "gptq act-order")
    adapter, changes = _adapter(tmp_path / "adapter")
    merged = adapters.merged(quantized.dequantized(matrices), changes, 2.0)
    checkpoint = open_adapter(open_checkpoint(source), adapter)
    np.testing.assert_allclose(whole(checkpoint, f"{LAYER}.weight"), merged[f"{LAYER}.weight"],
                               rtol=1e-4, atol=1e-5)  # fmt: skip
    export(source, tmp_path / "out", Options(precision="fp32"), adapters=[adapter])
    package = PackageCheckpoint.open(tmp_path / "out")
    np.testing.assert_array_equal(
        whole(package, f"{LAYER}.weight"), whole(checkpoint, f"{LAYER}.weight")
    )


# What the tools write besides


def test_a_g_idx_of_zeros_is_no_order(tmp_path: Path) -> None:
    """Kernels for GPTQ take it so, and some tools write it."""
    matrices = quantize_model()
    zeros = {f"{LAYER}.g_idx": np.zeros(96, np.int32)}
    source = write(tmp_path, matrices, extra=zeros)
    rows = whole(open_checkpoint(source), f"{LAYER}.weight")
    np.testing.assert_array_equal(rows, matrices[LAYER].weight())


def test_biases_of_zero_are_no_biases(tmp_path: Path) -> None:
    """AutoGPTQ gave every layer one."""
    bias = {f"{QKV[0]}.bias": np.zeros(64, np.float16)}
    source = write(tmp_path / "source", quantize_model(), extra=bias)
    export(source, tmp_path / "out")
    bias[f"{QKV[0]}.bias"][3] = 1e-3
    source = write(tmp_path / "biased", quantize_model(), extra=bias)
    with pytest.raises(UnsupportedError, match=r"q_proj\.bias, which is not zero"):
        export(source, tmp_path / "biased out")
    assert not list(tmp_path.glob("biased out*"))


@pytest.mark.parametrize(
    ("method", "side_file", "content"),
    [
        ("gptq", "quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False}),
        ("awq", "quant_config.json", {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}),
    ],
)
def test_a_configuration_beside_config_json(
    tmp_path: Path, method: str, side_file: str, content: dict[str, Any]
) -> None:
    matrices = quantize_model()
    name = "gptq_model-4bit-32g.safetensors" if method == "gptq" else "model.safetensors"
    source = write(tmp_path, matrices, method=method, file=name)
    raw = json.loads((source / "config.json").read_text())
    del raw["quantization_config"]
    (source / "config.json").write_text(json.dumps(raw))
    (source / side_file).write_text(json.dumps(content))
    rows = whole(open_checkpoint(source), f"{LAYER}.weight")
    np.testing.assert_array_equal(rows, matrices[LAYER].weight())


def test_a_zero_point_of_zero_in_the_first_layout(tmp_path: Path) -> None:
    """GPT-QModel subtracts 0x11111111 from the whole word, so that a 0 borrows from the next
    field: undone for its checkpoints, refused for others, where it is lost."""
    matrices = quantize_model()
    zeros = matrices[LAYER].zeros.copy()
    zeros[10, 1] = 0
    matrices[LAYER] = replace(matrices[LAYER], zeros=zeros)
    words = quantized.pack_words(zeros, 4).view(np.uint32) - np.uint32(0x11111111)
    stored = {f"{LAYER}.qzeros": np.ascontiguousarray(words.T).view(np.int32)}
    source = write(tmp_path / "source", matrices, extra=stored)
    with pytest.raises(CheckpointError, match=r"zero point of 0.*gptq_v2"):
        export(source, tmp_path / "out")
    made_by = {"meta": {"quantizer": ["gptqmodel:1.9.0"]}}
    source = write(tmp_path / "gptqmodel", matrices, extra=stored, quantization=made_by)
    rows = whole(open_checkpoint(source), f"{LAYER}.weight")
    np.testing.assert_array_equal(rows, matrices[LAYER].weight())

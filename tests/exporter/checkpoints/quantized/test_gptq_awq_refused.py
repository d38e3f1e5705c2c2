"""GPTQ and AWQ checkpoints that are damaged, contradict themselves or cannot be kept: one
sentence each, and nothing left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch

from llama_onnx.exporter.checkpoints.package.package import PackageCheckpoint
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.targets.errors import (
    CheckpointError,
    PackageError,
    UnsupportedError,
    UsageError,
)
from tests.support import quantized, tiny
from tests.support.faults import edit
from tests.support.quantized import Quantized, quantize_model, write
from tests.support.quantized_cases import EXACT, HEAD, LAYER, export, make, run, whole

Array = npt.NDArray[Any]

Change = Callable[[dict[str, Quantized]], Mapping[str, Any]]


def _cut(part: str, index: Any) -> Change:
    """`part` of one module cut to `index`."""

    def change(matrices: dict[str, Quantized]) -> Mapping[str, Any]:
        name = f"{LAYER}.{part}"
        tensor = quantized.gptq_tensors(LAYER, matrices[LAYER])[name]
        return {"extra": {name: np.ascontiguousarray(tensor[index])}}

    return change


def _replaced(part: str, value: Array | None) -> Change:
    return lambda matrices: {"extra": {f"{LAYER}.{part}": value}}


def _says(**keys: Any) -> Change:
    return lambda matrices: {"quantization": keys}


BAD: dict[str, tuple[Change, str]] = {
    "truncated zero points": (_cut("qzeros", np.s_[:, :-1]), r"qzeros is I32 \[3, 7\] instead of"),
    "zero points of fewer groups": (_cut("qzeros", np.s_[:-1]), r"instead of I32 3 x 8"),
    "scales of fewer groups": (_cut("scales", np.s_[:-1]), "2 groups for 96 input channels"),
    "scales of fewer outputs": (_cut("scales", np.s_[:, :-8]), r"scales is F16 \[3, 56\]"),
    "codes of fewer inputs": (_cut("qweight", np.s_[:-1]), "3.66667 bits per weight, not 4"),
    "codes of fewer outputs": (_cut("qweight", np.s_[:, :-8]), r"\[3, 64\] instead of"),
    "codes of one dimension": (_cut("qweight", np.s_[0]), r"qweight is I32 \[64\]"),
    "no groups": (_cut("scales", np.s_[:0]), r"scales is F16 \[0, 64\]"),
    "scales of integers": (_replaced("scales", np.ones((3, 64), np.int32)), "scales is I32"),
    "codes of floats": (_replaced("qweight", np.ones((12, 64), np.float16)), "qweight is F16"),
    "no zero points": (_replaced("qzeros", None), "but no model.layers.1.mlp.down_proj.qzeros"),
    "no codes": (_replaced("qweight", None), r"lacks the tensor .*down_proj\.weight"),
    "floats beside codes": (
        _replaced("weight", np.ones((64, 96), np.float16)),
        "remove one of them",
    ),
    "a bias of another size": (_replaced("bias", np.zeros(3, np.float16)), r"bias is F16 \[3\]"),
    "scales that are not finite": (
        _replaced("scales", np.full((3, 64), np.nan, np.float16)),
        "down_proj.weight, rows 0 to 63: the weights hold NaN",
    ),
    "a group of other size": (
        _replaced("g_idx", np.array([0] * 33 + [1] * 31 + [2] * 32, np.int32)),
        "g_idx does not put 32 input channels into each group",
    ),
    "a group that is none": (_replaced("g_idx", np.full(96, -5, np.int32)), "g_idx does not put"),
    "an order that is not announced": (
        _replaced("g_idx", np.arange(96, dtype=np.int32)[::-1].copy() // 32),
        "does not set desc_act: set it to true",
    ),
    "an order that is announced wrongly": (_says(group_size=16), "but group_size in .* is 16"),
    "a g_idx of floats": (_replaced("g_idx", np.zeros(96, np.float16)), "g_idx is F16"),
    "another group size": (_says(group_size=64), "3 groups for 96 input channels, but .* is 64"),
    "another width": (_says(bits=8), "4 bits per weight, not 8"),
    "three bits": (_says(bits=3), "GPTQ with 3 bits is not supported, only with 4 and 8"),
    "two bits": (_says(bits=2), "GPTQ with 2 bits"),
    "no bits": (_says(bits=None), "bits must be a number, not None"),
    "no group size": (_says(group_size=None), "group_size must be a positive number"),
    "a group size of zero": (_says(group_size=0), "not 0"),
    "marlin": (_says(checkpoint_format="marlin"), "GPTQ layout 'marlin' is not supported"),
    "marlin, as AutoGPTQ said it": (_says(is_marlin_format=True), "is_marlin_format is True"),
    "planar": (_says(checkpoint_format="gptq_p"), "'gptq_p'"),
    "an adapter that belongs to it": (_says(adapter={"rank": 8}), "adapter is"),
    "another method": (_says(quant_method="bitsandbytes"), "quantized with 'bitsandbytes'"),
    "no method": (_says(quant_method=None), "quantized with None"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    change, message = BAD[name]
    matrices = quantize_model()
    source = write(tmp_path / "source", matrices, **change(matrices))
    with pytest.raises(CheckpointError, match=message) as caught:
        export(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_a_refusal_is_a_failure_of_the_command(tmp_path: Path) -> None:
    source = write(tmp_path / "source", quantize_model(), quantization={"bits": 3})
    result = run("export", source, tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.strip().startswith("Error: ") and result.stderr.count("\n") <= 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"version": "gemv"}, "AWQ layout 'gemv' is not supported, only 'gemm'"),
        ({"version": "marlin"}, "'marlin'"),
        ({"bits": 8}, "AWQ with 8 bits is not supported, only with 4"),
    ],
)
def test_awq_refused_by_name(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    source = write(tmp_path, quantize_model(), method="awq", quantization=keys)
    with pytest.raises(UnsupportedError, match=message):
        open_checkpoint(source)


def test_a_name_instead_of_a_configuration(tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path, config_json={"quantization_config": "fp8"})
    with pytest.raises(UnsupportedError, match="'fp8'"):
        open_checkpoint(source)


def test_a_configuration_without_codes(tmp_path: Path) -> None:
    raw = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    source = tiny.write_huggingface(tmp_path, config_json={"quantization_config": raw})
    with pytest.raises(CheckpointError, match=r"no tensor .* is quantized"):
        open_checkpoint(source)


def test_pickled_codes(tmp_path: Path) -> None:
    source = write(tmp_path, quantize_model())
    tensors = {"a.qweight": torch.zeros(8, 8, dtype=torch.int32)}
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="read from safetensors only"):
        open_checkpoint(source)


def test_groups_of_no_block_size(tmp_path: Path) -> None:
    source = write(tmp_path / "source", quantize_model(group_size=24))
    with pytest.raises(UnsupportedError, match=r"groups of 24.*fp16 or fp32"):
        export(source, tmp_path / "out")
    export(source, tmp_path / "out", Options(precision="fp16"))


def test_what_a_package_reads_as_codes_cannot_be_the_embedding(tmp_path: Path) -> None:
    module = "model.embed_tokens"
    source = write(tmp_path, quantize_model(extra=(module,)))
    with pytest.raises(UnsupportedError, match="the embedding quantized"):
        open_checkpoint(source)


def test_a_tied_head_as_codes(tmp_path: Path) -> None:
    head = quantized.gptq_tensors(HEAD, quantize_model(extra=(HEAD,))[HEAD])
    tied = replace(tiny.GQA, tie_word_embeddings=True)
    source = write(tmp_path, quantize_model(), config=tied, extra=head)
    with pytest.raises(UnsupportedError, match="tied to the embedding quantized"):
        open_checkpoint(source)


def test_gate_and_up_of_different_blocks_are_not_fused(tmp_path: Path) -> None:
    sizes = {"": 32, "up_proj": 16}
    dynamic = {"dynamic": {".*up_proj": {"group_size": 16}}}
    source = write(tmp_path / "source", quantize_model(group_size=sizes), quantization=dynamic)
    with pytest.raises(UsageError, match="remove --fuse-gate-up"):
        export(source, tmp_path / "out", replace(EXACT, fuse_gate_up=True))
    plain, matrices = make(tmp_path / "plain", "gptq act-order")
    export(plain, tmp_path / "fused", replace(EXACT, fuse_gate_up=True))
    package = PackageCheckpoint.open(tmp_path / "fused")
    name = "model.layers.2.mlp.up_proj"
    np.testing.assert_array_equal(whole(package, f"{name}.weight"), matrices[name].weight())


def test_codes_cut_short_after_they_were_opened(tmp_path: Path) -> None:
    source, _ = make(tmp_path / "source", "awq")
    checkpoint = open_checkpoint(source)
    with (source / "model.safetensors").open("r+b") as file:
        file.truncate(60_000)
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        for name in checkpoint.names():
            whole(checkpoint, name)


def test_a_package_whose_zero_points_do_not_fit_is_named(tmp_path: Path) -> None:
    source, _ = make(tmp_path / "source", "gptq")
    export(source, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "bad")
    model = onnx.load(tmp_path / "bad" / "model.onnx", load_external_data=False)
    zeros = next(t for t in model.graph.initializer if t.name == f"{LAYER}.zero_points")
    zeros.dims[1] = 1
    onnx.save(model, tmp_path / "bad" / "model.onnx")
    with pytest.raises(PackageError, match=f"{LAYER}.zero_points.* shape does not fit"):
        PackageCheckpoint.open(tmp_path / "bad")


@pytest.mark.parametrize("channel", [0, 96, -1])
def test_a_damaged_order_in_a_package_is_named(tmp_path: Path, channel: int) -> None:
    source, _ = make(tmp_path / "source", "gptq act-order")
    export(source, tmp_path / "out")

    def damage(order: Array) -> None:
        order[:2] = channel

    edit(tmp_path / "out", f"{LAYER}.order", damage)
    with pytest.raises(PackageError, match="is not an order of 96 channels"):
        whole(PackageCheckpoint.open(tmp_path / "out"), f"{LAYER}.weight")

"""Hugging Face folders: every row as it was written, every defect in one sentence."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_onnx.exporter.formats.tensor import widen
from llama_onnx.exporter.model.checkpoint import check_tensors
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.targets.errors import CheckpointError, UnsupportedError
from tests.support import tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_huggingface(tmp_path_factory.mktemp("ä ü 日本") / "a model", shards=3)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None
)
@given(data=st.data())
def test_any_rows_are_those_written(source: Path, data: st.DataObject) -> None:
    checkpoint = open_checkpoint(source)
    weights = tiny.weights(tiny.GQA)
    name = data.draw(st.sampled_from(sorted(weights)))
    stop = data.draw(st.integers(1, len(weights[name])))
    start = data.draw(st.integers(0, stop - 1))
    rows = checkpoint.tensor(name).rows(start, stop)
    np.testing.assert_array_equal(rows, weights[name][start:stop])


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_is_widened_exactly(tmp_path: Path, dtype: str) -> None:
    checkpoint = open_checkpoint(tiny.write_huggingface(tmp_path, dtype=dtype))
    name = "model.layers.0.mlp.up_proj.weight"
    expected = tiny.weights(tiny.GQA)[name].astype(tiny._NUMPY_DTYPES[dtype]).astype(np.float32)
    tensor = checkpoint.tensor(name)
    np.testing.assert_array_equal(tensor.rows(0, tensor.shape[0]), expected)


def test_all_tensors_of_a_sound_checkpoint_pass(source: Path) -> None:
    check_tensors(open_checkpoint(source))


def test_missing_shard(tmp_path: Path) -> None:
    tiny.write_huggingface(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00003\.safetensors"):
        open_checkpoint(tmp_path)


def test_truncated_shard(tmp_path: Path) -> None:
    tiny.write_huggingface(tmp_path)
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is truncated"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 2) + b"no",
        struct.pack("<Q", 2) + b"[]",
    ],
)
def test_garbage_instead_of_safetensors(tmp_path: Path, content: bytes) -> None:
    tiny.write_huggingface(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is not a (whole )?safetensors file"):
        open_checkpoint(tmp_path)


@given(noise=st.binary(min_size=8, max_size=60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_a_damaged_header_never_escapes_as_a_traceback(tmp_path: Path, noise: bytes) -> None:
    tiny.write_huggingface(tmp_path)
    shard = tmp_path / "model.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:20] + noise + data[20 + len(noise) :])
    try:
        check_tensors(open_checkpoint(tmp_path))
    except CheckpointError as error:
        assert "\n" not in str(error)


def test_more_layers_than_tensors(tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path, config_json={"num_hidden_layers": 4000})
    with pytest.raises(CheckpointError, match="4000 layers"):
        check_tensors(open_checkpoint(source))


@pytest.mark.parametrize("layers", [4097, 10**9, 2**63])
def test_more_layers_than_any_model_has_are_refused_at_once(tmp_path: Path, layers: int) -> None:
    source = tiny.write_huggingface(tmp_path, config_json={"num_hidden_layers": layers})
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is .*, more than 4,096"):
        open_checkpoint(source)


def test_a_file_cut_short_after_it_was_opened(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny.write_huggingface(tmp_path))
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(20_000)
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        for name in checkpoint.names():
            checkpoint.tensor(name).rows(0, 4)


def test_wrong_shape(tmp_path: Path) -> None:
    weights = tiny.weights(tiny.GQA)
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1]
    tiny.write_huggingface(tmp_path, tensors=weights)
    with pytest.raises(CheckpointError, match=r"model.norm.weight has shape \[63\].*\[64\]"):
        check_tensors(open_checkpoint(tmp_path))


def test_missing_tensor(tmp_path: Path) -> None:
    weights = tiny.weights(tiny.GQA)
    del weights["model.layers.1.self_attn.q_proj.weight"]
    tiny.write_huggingface(tmp_path, tensors=weights)
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.layers\.1"):
        check_tensors(open_checkpoint(tmp_path))


def test_a_bias_is_refused_not_dropped(tmp_path: Path) -> None:
    weights = tiny.weights(tiny.GQA)
    weights["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
    tiny.write_huggingface(tmp_path, tensors=weights)
    with pytest.raises(UnsupportedError, match=r"q_proj\.bias"):
        check_tensors(open_checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", r"json is not a JSON object: download it again or restore it from the source\.$"),
        ("\xff", "not UTF-8"),
    ],
)
def test_config_that_is_no_config(tmp_path: Path, content: str, message: str) -> None:
    tiny.write_huggingface(tmp_path)
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json, params\.json or \.gguf"):
        open_checkpoint(tmp_path)


def test_a_template_inside_tokenizer_config_becomes_a_file(source: Path, tmp_path: Path) -> None:
    assert "chat_template" in json.loads((source / "tokenizer_config.json").read_text())
    written = open_checkpoint(source).write_tokenizer(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == tiny.CHAT_TEMPLATE
    assert set(written) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def test_every_float16_is_widened_exactly() -> None:
    """All 65536 of them: subnormals, zeros of both signs, infinities and every NaN."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    for halves in (
        bits.view(np.float16),
        bits[np.isfinite(bits.view(np.float16))].view(np.float16),
    ):
        found, expected = widen(halves), halves.astype(np.float32)
        np.testing.assert_array_equal(found, expected)
        assert (np.signbit(found) == np.signbit(expected)).all()


def test_a_package_is_not_a_checkpoint(package_fp32: Path) -> None:
    message = "is a package, not a checkpoint: pass the checkpoint that it was made from"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(package_fp32)

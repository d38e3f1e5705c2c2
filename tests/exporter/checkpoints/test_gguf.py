from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig as LlamaHFConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llama_onnx.exporter.checkpoints.gguf import GGUFCheckpoint
from llama_onnx.exporter.model.checkpoint import Checkpoint, check_tensors
from llama_onnx.exporter.model.rope import RopeScaling
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.targets.errors import CheckpointError, UnsupportedError
from tests.support import tiny
from tests.support.gguf_files import (
    EXACT,
    K_TYPES,
    QUANTIZED,
    encoded,
    metadata,
    permuted,
    write,
)

TIED = replace(tiny.GQA, tie_word_embeddings=True)
# Rows of 256 and 512: the K types store blocks of 256.
WIDE = replace(
    tiny.GQA,
    vocab_size=40,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=1,
    head_dim=64,
    num_key_value_heads=2,
)


def yarn(**keys: Any) -> dict[str, Any]:
    """Metadata of yarn's scaling; `keys` overrides it (None removes)."""
    values = {"type": "yarn", "factor": 4.0, "original_context_length": 64} | keys
    return {f"llama.rope.scaling.{key}": value for key, value in values.items()}


def whole(checkpoint: Checkpoint, name: str) -> np.ndarray:
    tensor = checkpoint.tensor(name)
    return tensor.rows(0, tensor.shape[0])


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> GGUFCheckpoint:
    return GGUFCheckpoint.open(write(tmp_path_factory.mktemp("gguf") / "exact.gguf"))


@pytest.mark.parametrize("config", [tiny.GQA, TIED], ids=["gqa", "tied"])
def test_config_comes_from_the_metadata(tmp_path: Path, config: Any) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", config))
    check_tensors(checkpoint)
    assert checkpoint.config == config
    assert checkpoint.format == "gguf"


def test_every_tensor_equals_the_original(exact: GGUFCheckpoint) -> None:
    for name, weight in tiny.weights(tiny.GQA).items():
        assert np.array_equal(whole(exact, name), weight), name


@given(data=st.data())
@settings(deadline=None)
def test_any_range_of_rows(exact: GGUFCheckpoint, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(exact.names())))
    tensor = exact.tensor(name)
    start = data.draw(st.integers(0, tensor.shape[0] - 1))
    stop = data.draw(st.integers(start, tensor.shape[0]))
    rows = tensor.rows(start, stop)
    assert rows.dtype == np.float32
    assert rows.shape == (stop - start, *tensor.shape[1:])
    assert np.array_equal(rows, tiny.weights(tiny.GQA)[name][start:stop])


@pytest.mark.parametrize("kind", [*EXACT, *QUANTIZED, *K_TYPES], ids=lambda kind: kind.name)
def test_every_type_dequantizes_as_the_gguf_package_does(tmp_path: Path, kind: Any) -> None:
    checkpoint = GGUFCheckpoint.open(write(tmp_path / "m.gguf", WIDE, kind))
    check_tensors(checkpoint)
    heads = {"q_proj": WIDE.num_attention_heads, "k_proj": WIDE.num_key_value_heads}
    for name, weight in tiny.weights(WIDE).items():
        part = name.split(".")[-2]
        stored = permuted(weight, heads[part]) if part in heads else weight
        expected = gguf.dequantize(*encoded(stored, kind))
        found = whole(checkpoint, name)
        assert np.array_equal(permuted(found, heads[part]) if part in heads else found, expected)
        if weight.ndim == 2:
            assert checkpoint.tensor(name).dtype == kind.name
            assert np.array_equal(checkpoint.tensor(name).rows(3, 37), found[3:37])


def test_a_path_with_spaces_and_letters_of_any_language(tmp_path: Path) -> None:
    folder = tmp_path / "mein Modell ä 日本"
    folder.mkdir()
    (folder / "LICENSE").write_text("a licence", encoding="utf-8")
    checkpoint = open_checkpoint(write(folder / "modèle 1.gguf").parent)
    assert whole(checkpoint, "model.norm.weight").shape == (64,)
    assert [path.name for path in checkpoint.licence_files()] == ["LICENSE"]
    assert list(checkpoint.fingerprint()) == ["modèle 1.gguf"]
    assert checkpoint.search_defaults() == {}


def test_defaults_and_variants_of_the_metadata(tmp_path: Path) -> None:
    keys = {
        "llama.rope.freq_base": None,
        "llama.rope.dimension_count": None,
        "llama.attention.key_length": 16,
        "llama.attention.head_count_kv": [2, 2, 2],
        "llama.vocab_size": 288,
        "llama.rope.scaling.type": "none",
        "split.count": 0,
        "tokenizer.ggml.eot_token_id": 7,
        "tokenizer.ggml.eom_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
    }
    config = GGUFCheckpoint.open(write(tmp_path / "m.gguf", keys=keys)).config
    assert config == replace(tiny.GQA, eos_token_ids=(2, 7), pad_token_id=0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (yarn(yarn_attn_factor=0.5), "yarn_attn_factor 0.5 is not supported"),
        (yarn(yarn_log_multiplier=0.1), "yarn_log_multiplier 0.1"),
        (yarn(type="longrope"), "rope type 'longrope' is not supported"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"split.count": 3}, "one of 3 parts of a split model"),
        ({"llama.attention.head_count_kv": [2, 1, 2]}, "head_count_kv differs between layers"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count differs"),
        ({"llama.attention.value_length": 32}, "llama.attention.value_length differs"),
    ],
)
def test_features_beyond_plain_llama_are_refused_by_name(
    tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "m.gguf", keys=keys)
    with pytest.raises(UnsupportedError, match=message) as caught:
        GGUFCheckpoint.open(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blk.0.attn_q.bias", "blk.0.attn_q.bias; biases are not supported"),
    ],
)
def test_tensors_beyond_plain_llama_are_refused_by_name(
    tmp_path: Path, name: str, message: str
) -> None:
    path = write(tmp_path / "m.gguf", extra={name: np.ones(64, np.float32)})
    with pytest.raises(UnsupportedError, match=message):
        GGUFCheckpoint.open(path)


def test_a_tensor_nobody_knows_is_not_dropped(tmp_path: Path) -> None:
    extra = {"blk.0.attn_extra.weight": np.ones(64, np.float32)}
    checkpoint = GGUFCheckpoint.open(write(tmp_path / "m.gguf", extra=extra))
    with pytest.raises(UnsupportedError, match=r"blk\.0\.attn_extra\.weight"):
        check_tensors(checkpoint)


def test_other_architectures_and_types_are_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", arch="qwen2")
    with pytest.raises(UnsupportedError, match=r"general\.architecture is 'qwen2'"):
        GGUFCheckpoint.open(path)
    path = write(tmp_path / "t.gguf", WIDE, Type.TQ1_0)
    with pytest.raises(UnsupportedError, match=r"token_embd\.weight is stored as TQ1_0"):
        GGUFCheckpoint.open(path)


@pytest.mark.parametrize("key", [key for key in metadata(tiny.GQA) if "length" in key])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "m.gguf", keys={key: None})
    with pytest.raises(CheckpointError, match=f"lacks the metadata key '{key}'"):
        GGUFCheckpoint.open(path)


def test_a_key_of_the_wrong_type_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", keys={"llama.block_count": "three"})
    with pytest.raises(CheckpointError, match=r"llama\.block_count must be a positive integer"):
        GGUFCheckpoint.open(path)


def test_more_layers_than_tensors_are_not_counted_through(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", keys={"llama.block_count": 2**32 - 1})
    with pytest.raises(CheckpointError, match=r"block_count is 4,294,967,295, more than 4,096"):
        GGUFCheckpoint.open(path)
    path = write(tmp_path / "m.gguf", keys={"llama.block_count": 4000})
    with pytest.raises(CheckpointError, match="block_count is 4,000, but the file has 30"):
        GGUFCheckpoint.open(path)


def test_a_missing_tensor_is_named(exact: GGUFCheckpoint) -> None:
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.layers\.9"):
        exact.tensor("model.layers.9.input_layernorm.weight")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a GGUF file"),
        (b"GGUF", "is truncated: it has 4 bytes"),
        (b"GGUF" + struct.pack("<I", 3), "is truncated: it has 8 bytes"),
        (b"<html>404 Not Found, and some more text</html>", "is a web page"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "is GGUF version 1"),
        (b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "is GGUF version 99"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**62), "is truncated or damaged"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**62, 0), "is truncated or damaged"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63), "is truncated or damaged"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77), "unknown type 77"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 2**60), "truncated"),
        (b"GGUF" + struct.pack("<IQQQ1s", 3, 0, 1, 1, b"\xff"), "is not UTF-8"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"t", 9), "t has 9 dimensions"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 8, 999, 0), "ggml type 999"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 8, 2, 0), "blocks of 32"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 8, 0, 0), "is truncated: t"),
    ],
)
def test_what_is_no_whole_gguf_file_is_said_in_one_sentence(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        GGUFCheckpoint.open(path)
    assert str(path) in str(caught.value)


@given(
    share=st.floats(0, 0.999),
    noise=st.none() | st.tuples(st.integers(4, 2000), st.binary(max_size=8)),
)
@settings(deadline=None)
def test_truncation_and_damage_never_escape_as_another_error(
    exact: GGUFCheckpoint,
    tmp_path_factory: pytest.TempPathFactory,
    share: float,
    noise: tuple[int, bytes] | None,
) -> None:
    content = bytearray(exact.path.read_bytes())
    if noise is not None:
        content[noise[0] : noise[0] + len(noise[1])] = noise[1]
    path = exact.path.with_name("cut.gguf")
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError):
        GGUFCheckpoint.open(path)


def test_a_file_cut_short_after_it_was_opened(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    checkpoint = GGUFCheckpoint.open(path)
    with path.open("r+b") as file:
        file.truncate(20_000)
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        for name in checkpoint.names():
            whole(checkpoint, name)


def test_without_a_tokenizer_only_the_tokenizer_fails(
    exact: GGUFCheckpoint, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        exact.write_tokenizer(tmp_path)


def test_an_infinite_number_is_refused_as_in_config_json(tmp_path: Path) -> None:
    keys = {"llama.attention.layer_norm_rms_epsilon": float("inf")}
    with pytest.raises(CheckpointError, match="epsilon must be a positive number"):
        GGUFCheckpoint.open(write(tmp_path / "m.gguf", keys=keys))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (yarn(type="linear", original_context_length=None), tiny.ROPE_SCALINGS["linear"]),
        ({"llama.rope.scaling.factor": 4.0}, tiny.ROPE_SCALINGS["linear"]),
        ({"llama.rope.scale_linear": 4.0}, tiny.ROPE_SCALINGS["linear"]),
        (yarn(), tiny.ROPE_SCALINGS["yarn"]),
        (
            yarn(yarn_beta_fast=16.0, yarn_beta_slow=2.0, yarn_ext_factor=1.0),
            replace(tiny.ROPE_SCALINGS["yarn"], beta_fast=16.0, beta_slow=2.0),
        ),
        (yarn(type="none"), None),
        (yarn(type="linear", factor=1.0), None),
        (yarn(factor=1.0), None),
    ],
)
def test_rope_scaling_in_the_metadata(
    tmp_path: Path, keys: dict[str, Any], expected: RopeScaling | None
) -> None:
    checkpoint = GGUFCheckpoint.open(write(tmp_path / "m.gguf", keys=keys))
    assert checkpoint.config.rope_scaling == expected


def llama3_divisors(head_dim: int, **settings: float) -> np.ndarray:
    """What the frequencies of Llama 3.1 are divided by, as transformers computes them."""
    parameters = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0} | {
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        **settings,
    }
    config = LlamaHFConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        rope_parameters=parameters,
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, None)
    plain = 500000.0 ** -(np.arange(0, head_dim, 2) / head_dim)
    divisors: np.ndarray = plain / scaled.double().numpy()
    return divisors.astype(np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_scaling_of_llama_3_is_found_again(tmp_path: Path, factor: float) -> None:
    divisors = llama3_divisors(64, factor=factor)
    assert len({*divisors.round(4)}) > 3, "quick, slow and those between"
    keys = {"llama.rope.freq_base": 500000.0}
    path = write(tmp_path / "m.gguf", WIDE, keys=keys, extra={"rope_freqs.weight": divisors})
    checkpoint = GGUFCheckpoint.open(path)
    check_tensors(checkpoint)
    assert checkpoint.config.rope_scaling == RopeScaling(
        "llama3",
        factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )


@pytest.mark.parametrize(
    ("divisors", "keys", "message"),
    [
        (llama3_divisors(64, original_max_position_embeddings=4096), {}, "cannot be identified"),
        (llama3_divisors(64), yarn(), "both rope_freqs.weight and 'yarn' rope scaling"),
        (llama3_divisors(32), {}, r"rope_freqs.weight is F32 \[16\], not F32 \[32\]"),
        (np.full(32, np.nan, np.float32), {}, "cannot be identified"),
    ],
)
def test_other_frequencies_are_refused(
    tmp_path: Path, divisors: np.ndarray, keys: dict[str, Any], message: str
) -> None:
    keys = {"llama.rope.freq_base": 500000.0, **keys}
    path = write(tmp_path / "m.gguf", WIDE, keys=keys, extra={"rope_freqs.weight": divisors})
    with pytest.raises(CheckpointError, match=message):
        GGUFCheckpoint.open(path)


def test_a_damaged_factor(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", keys=yarn(factor="x"))
    with pytest.raises(CheckpointError, match="factor must be a positive number, not 'x'"):
        GGUFCheckpoint.open(path)


def test_frequencies_divided_by_one_are_plain(tmp_path: Path) -> None:
    extra = {"rope_freqs.weight": np.ones(32, np.float32)}
    checkpoint = GGUFCheckpoint.open(write(tmp_path / "m.gguf", WIDE, extra=extra))
    assert checkpoint.config.rope_scaling is None

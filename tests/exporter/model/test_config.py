"""LlamaConfig: reads what it knows, refuses by name what it does not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import transformers

from llama_onnx.exporter.model.config import config_from_huggingface
from llama_onnx.exporter.model.rope import RopeScaling
from llama_onnx.targets.errors import CheckpointError, UnsupportedError
from tests.support.tiny import GQA, ROPE_SCALINGS

RAW = GQA.to_huggingface()
LLAMA3 = ROPE_SCALINGS["llama3"].to_huggingface()


def test_round_trip_through_config_json() -> None:
    assert config_from_huggingface(RAW, "config.json") == GQA


def test_reads_rope_theta_as_transformers_4_wrote_it() -> None:
    raw = {k: v for k, v in RAW.items() if k != "rope_parameters"} | {"rope_theta": 5e5}
    assert config_from_huggingface(raw, "config.json").rope_theta == 5e5


def test_transformers_5_rope_parameters_win() -> None:
    raw = RAW | {"rope_parameters": {"rope_theta": 7e5, "rope_type": "default"}}
    assert config_from_huggingface(raw, "config.json").rope_theta == 7e5


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in RAW.items() if key not in keys}


@pytest.mark.parametrize("kind", ROPE_SCALINGS)
def test_rope_scaling_is_read_in_both_forms(kind: str) -> None:
    scaling = ROPE_SCALINGS[kind]
    config = dataclasses.replace(GQA, rope_theta=7e5, rope_scaling=scaling)
    block = scaling.to_huggingface()
    four = without("rope_parameters") | {"rope_theta": 7e5, "rope_scaling": block}
    older = block | {"type": kind}
    del older["rope_type"]
    five = without("rope_theta", "rope_scaling") | {"rope_parameters": block | {"rope_theta": 7e5}}
    for raw in (four, four | {"rope_scaling": older}, five, config.to_huggingface()):
        assert config_from_huggingface(raw, "config.json") == config


@pytest.mark.parametrize("kind", ROPE_SCALINGS)
@pytest.mark.parametrize("missing", ["rope_parameters", "rope_scaling", "nothing"])
def test_transformers_reads_the_scaling_that_was_written(kind: str, missing: str) -> None:
    config = dataclasses.replace(GQA, rope_theta=7e5, rope_scaling=ROPE_SCALINGS[kind])
    raw = {key: v for key, v in config.to_huggingface().items() if key != missing}
    read: Any = transformers.LlamaConfig.from_dict(raw).rope_parameters
    assert read == config.rope_parameters()


def test_rope_scaling_wins_over_rope_parameters_as_in_transformers() -> None:
    raw = RAW | {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 3e4}
    config = config_from_huggingface(raw, "config.json")
    read: Any = transformers.LlamaConfig.from_dict(raw).rope_parameters
    assert (config.rope_theta, config.rope_scaling) == (3e4, RopeScaling("linear", 2.0))
    assert (read["rope_theta"], read["rope_type"], read["factor"]) == (3e4, "linear", 2.0)


def test_the_original_length_beside_the_block_wins_as_in_transformers() -> None:
    raw = RAW | {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32}
    config = config_from_huggingface(raw, "config.json")
    read: Any = transformers.LlamaConfig.from_dict(raw)
    read.standardize_rope_params()  # as every rotary embedding does that is made from it
    assert config.rope_parameters()["original_max_position_embeddings"] == 32
    assert dict(read.rope_parameters or {})["original_max_position_embeddings"] == 32


def test_head_dim_and_kv_heads_are_derived_when_absent() -> None:
    raw = {k: v for k, v in RAW.items() if k not in ("head_dim", "num_key_value_heads")}
    config = config_from_huggingface(raw, "config.json")
    assert (config.head_dim, config.num_key_value_heads) == (16, 4)


def test_a_stated_head_dim_may_differ_from_the_quotient() -> None:
    assert config_from_huggingface(RAW | {"head_dim": 32}, "c").q_size == 128


def test_generation_config_gives_the_end_tokens() -> None:
    config = config_from_huggingface(RAW, "config.json", {"eos_token_id": [2, 5]})
    assert config.eos_token_ids == (2, 5)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "mixtral"}, "mixtral"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"type": "su"}}, "su"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "partial_rotary_factor": 0.5}}, "partial_rotary"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"max_position_embeddings": 10**10}, "context of 10000000000"),
        ({"max_position_embeddings": 3}, "context of 3"),
    ],
)
def test_features_outside_plain_llama_are_refused_by_name(
    change: dict[str, Any], word: str
) -> None:
    with pytest.raises(UnsupportedError, match=word):
        config_from_huggingface(RAW | change, "config.json")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"hidden_size": None}, "lacks the key 'hidden_size'"),
        ({"num_hidden_layers": "three"}, "num_hidden_layers must be a positive integer"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a positive number"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be a positive number"),
        ({"rope_scaling": {"factor": 8.0}}, "a factor but no type"),
        ({"rope_scaling": {"type": "linear"}}, "'linear'.* lacks the key 'factor'"),
        ({"rope_scaling": {"type": "dynamic", "factor": "2"}}, "factor must be a positive number"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, "lacks the key 'low_freq_factor'"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1}}, "high_freq_factor must be above"),
        (
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": None}},
            "lacks the key 'original_max_position_embeddings'",
        ),
    ],
)
def test_bad_values_are_named(change: dict[str, Any], word: str) -> None:
    with pytest.raises(CheckpointError, match=word):
        config_from_huggingface(RAW | change, "config.json")


def test_parameters_count_tied_embeddings_once() -> None:
    tied = dataclasses.replace(GQA, tie_word_embeddings=True)
    assert GQA.num_parameters() - tied.num_parameters() == GQA.vocab_size * GQA.hidden_size

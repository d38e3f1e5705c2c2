"""Every key of every JSON file and of GGUF's metadata, with values that nobody expects there.

Each gives a `LlamaOnnxError` of one sentence or is accepted; never anything else. `nox -s tests`
tries one value of each key, `nox -s slow` a tenth of them and no key at all, `nox -s fuzz` all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_onnx.targets.errors import LlamaOnnxError
from tests.support import gguf_files
from tests.support.fuzz.mutate import TEXTS, VALUES
from tests.support.fuzz.readers import READERS, SMALL_SPM
from tests.support.fuzz.run import check_sentence
from tests.support.vocabularies import model_named, spm_metadata

# Keys that are read if they are there, beside those of the valid files.
MORE = {
    ("huggingface", "config.json"): (
        *("head_dim", "num_key_value_heads", "rope_theta", "rope_scaling", "rope_parameters"),
        *("rope_scaling.factor", "rope_scaling.type", "rope_scaling.rope_type", "hidden_act"),
        *("rope_parameters.rope_theta", "rope_parameters.rope_type", "partial_rotary_factor"),
        *("attention_bias", "mlp_bias", "quantization_config", "bos_token_id", "pad_token_id"),
        *("original_max_position_embeddings", "tie_word_embeddings", "transformers_weights"),
        *("model_type", "architectures", "eos_token_id", "sliding_window", "rope_ratio"),
        *("rope_condense_ratio", "torch_dtype", "quantization_config.quant_method", "layer_types"),
    ),
    ("huggingface", "generation_config.json"): (
        *("bos_token_id", "pad_token_id", "top_k", "repetition_penalty", "no_repeat_ngram_size"),
        *("num_beams", "max_length", "max_new_tokens"),
    ),
    ("huggingface", "tokenizer_config.json"): (
        *("bos_token", "eos_token", "unk_token", "pad_token", "add_bos_token", "add_eos_token"),
        *("chat_template", "added_tokens_decoder", "additional_special_tokens", "legacy"),
        *("tokenizer_class", "model_max_length", "clean_up_tokenization_spaces"),
        *("extra_special_tokens", "added_tokens_decoder.300", "added_tokens_decoder.²"),
    ),
    ("model-file", "tokenizer_config.json"): (
        *("eos_token", "unk_token", "pad_token", "add_eos_token", "chat_template", "legacy"),
        *("added_tokens_decoder", "added_tokens_decoder.1", "added_tokens_decoder.²"),
        *("added_tokens_decoder.1.content", "added_tokens_decoder.-1", "bos_token.content"),
        *("additional_special_tokens", "sp_model_kwargs", "add_prefix_space"),
    ),
    ("model-file", "special_tokens_map.json"): ("bos_token", "additional_special_tokens"),
    ("model-file", "added_tokens.json"): ("<s>", "x", ""),
    ("gptq", "config.json"): tuple(
        f"quantization_config.{key}"
        for key in (
            *("quant_method", "bits", "group_size", "desc_act", "checkpoint_format", "format"),
            *("dynamic", "meta", "is_marlin_format", "adapter", "sym", "version", "w_bit"),
        )
    ),
    ("compressed", "config.json"): (
        *(f"quantization_config.{key}" for key in ("format", "config_groups", "ignore")),
        *(f"quantization_config.{key}" for key in ("kv_cache_scheme", "transform_config")),
        *(f"quantization_config.config_groups.group_0.{key}" for key in ("targets", "weights")),
        *(
            f"quantization_config.config_groups.group_0.weights.{key}"
            for key in ("num_bits", "type", "symmetric", "strategy", "group_size", "actorder")
        ),
    ),
    ("adapter", "adapter/adapter_config.json"): (
        *("r", "lora_alpha", "target_modules", "exclude_modules", "modules_to_save", "bias"),
        *("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "peft_type"),
        *("init_lora_weights", "use_rslora", "use_dora", "base_model_name_or_path"),
        *("rank_pattern.(a+)+$", "alpha_pattern.(", "ensure_weight_tying", "fan_in_fan_out"),
    ),
    ("meta", "params.json"): (
        *("dim", "n_heads", "n_layers", "n_kv_heads", "norm_eps", "rope_theta", "vocab_size"),
        *("multiple_of", "ffn_dim_multiplier", "use_scaled_rope", "quantization_args", "moe"),
    ),
    ("package", "config.json"): ("rope_scaling", "eos_token_id", "rms_norm_eps"),
    ("package", "manifest.json"): (
        *("files", "adapters", "target", "precision", "recipe", "source", "format_version"),
        *("tokenizer", "config", "created_with", "files.model.onnx", "recipe.taken_over"),
        *("source.name", "source.commit", "source.adapters", "adapters.fox", "recipe.quantizer"),
    ),
}
GGUF_KEYS = (
    *gguf_files.metadata(SMALL_SPM),
    *spm_metadata(model_named("plain")),
    *("general.alignment", "general.architecture", "llama.vocab_size", "llama.expert_count"),
    *("llama.attention.key_length", "llama.attention.value_length", "split.count"),
    *("llama.rope.scale_linear", "llama.rope.scaling.factor", "llama.rope.scaling.type"),
    *("llama.rope.scaling.original_context_length", "tokenizer.ggml.padding_token_id"),
    *("tokenizer.ggml.add_bos_token", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.pre"),
    *("tokenizer.chat_template", "tokenizer.ggml.merges", "tokenizer.ggml.token_type"),
    *("tokenizer.ggml.remove_extra_whitespaces", "tokenizer.ggml.unknown_token_id"),
)
GGUF_VALUES = (True, 0, 1, 2**32 - 1, -0.5, 1e30, float("nan"), "", "²", "x" * 100_000, "\x00")
LISTS = ([0], [2**31 - 1], [""], ["a b", "c"], [1.5, float("inf")], [True, False])

NO_OBJECTS = (b"[]", b"1", b"null", b"", b"\xff\xfe", b"{", b"[" * 100_000)

FILES = [
    (reader, file)
    for reader, found in READERS.items()
    for file, kind in found.files.items()
    if kind == "json" and file != "tokenizer.json"
]


ALL = "LLAMA_ONNX_FUZZ_ALL" in os.environ
"""Set by `nox -s fuzz`: all values for each key, not some of them."""


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name in {reader for reader, _ in FILES}:
        made[name] = tmp_path_factory.mktemp(name)
        READERS[name].make(made[name])
    return made


@pytest.mark.parametrize(("reader", "file"), FILES)
def test_a_value_of_any_key(reader: str, file: str, valid: dict[str, Path]) -> None:
    READERS[reader].read(valid[reader])
    changes = _replaced(
        json.loads((valid[reader] / file).read_bytes()), MORE.get((reader, file), ()), 26
    )
    _try_all(reader, file, valid[reader], [*changes, *NO_OBJECTS])


@pytest.mark.slow
@pytest.mark.parametrize(("reader", "file"), FILES)
def test_any_value_of_any_key(reader: str, file: str, valid: dict[str, Path]) -> None:
    keys, value = MORE.get((reader, file), ()), json.loads((valid[reader] / file).read_bytes())
    changes = [*_left_out(value, keys), *_replaced(value, keys, 1 if ALL else 10)]
    _try_all(reader, file, valid[reader], changes)


def _try_all(reader: str, file: str, folder: Path, contents: Iterable[bytes]) -> None:
    path = folder / file
    original = path.read_bytes()
    refused = 0
    try:
        for content in contents:
            path.write_bytes(content)
            refused += _refused(reader, folder, content)
    finally:
        path.write_bytes(original)
    assert refused or file == "special_tokens_map.json"  # read only beside a tokenizer.model


def _refused(reader: str, folder: Path, content: bytes) -> bool:
    try:
        READERS[reader].read(folder)
    except LlamaOnnxError as error:
        check_sentence(str(error))
        return True
    except Exception as error:
        pytest.fail(f"{content[:300]!r}: {error!r}")
    return False


Keys = Iterable[tuple[str, ...]]


def _keys(value: dict[str, Any], more: tuple[str, ...]) -> Keys:
    return dict.fromkeys([*((key,) for key in value), *(tuple(key.split(".", 1)) for key in more)])


def _left_out(value: dict[str, Any], more: tuple[str, ...]) -> Iterator[bytes]:
    """Yield the file without each key."""
    for key in _keys(value, more):
        yield json.dumps({name: item for name, item in value.items() if name != key[0]}).encode()


def _replaced(value: dict[str, Any], more: tuple[str, ...], every: int) -> Iterator[bytes]:
    """Yield the file with each key, and each inner key, replaced by one value in `every`."""
    texts = [json.dumps(text).encode() for text in VALUES] + list(TEXTS)
    for number, key in enumerate(_keys(value, more)):
        inner = value.get(key[0], {})
        for text in texts[7 * number % every :: every]:
            changed: Any = "MARK"
            if len(key) == 2:
                changed = {**(inner if isinstance(inner, dict) else {}), key[1]: "MARK"}
            whole = json.dumps({**value, key[0]: changed}).encode()
            yield whole.replace(b'"MARK"', text)


@pytest.mark.parametrize("key", GGUF_KEYS)
def test_any_value_of_any_gguf_key(key: str, tmp_path: Path) -> None:
    keys = spm_metadata(model_named("plain"))
    every = 1 if ALL else 4
    for value in (None, *GGUF_VALUES, *LISTS)[GGUF_KEYS.index(key) % every :: every]:
        if key == "general.architecture" and not isinstance(value, str):
            continue  # the writer writes it itself
        arch = value if key == "general.architecture" else "llama"
        changed = {} if key == "general.architecture" else {key: value}
        path = tmp_path / "model.gguf"
        gguf_files.write(path, SMALL_SPM, arch=str(arch), keys={**keys, **changed})
        _refused("gguf", tmp_path, repr((key, value)).encode())

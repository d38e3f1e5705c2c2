"""Checkpoints as people find them: the weights are those that transformers loads, and what is left
out is named."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import save_file as save_torch
from tokenizers import Tokenizer

from llama_onnx.exporter.checkpoints.lora import open_adapter
from llama_onnx.exporter.cli import main
from llama_onnx.exporter.model.checkpoint import Checkpoint, check_tensors
from llama_onnx.exporter.model.special_tokens import special_tokens
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.measure.graph_session import GraphSession
from llama_onnx.targets.cpu import TARGET
from llama_onnx.targets.errors import CheckpointError, UnsupportedError
from tests.support import field, gguf_files, tiny, vocabularies
from tests.support.adapters import PREFIX, attention, factors, write_adapter
from tests.support.pytorch import reference

IDS = np.random.default_rng(0).integers(3, tiny.GQA.vocab_size, 40)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """transformers warns of what the tests are about."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def loaded(folder: Path) -> Any:
    """Return transformers' model of `folder`, whose weights were all found in it."""
    auto: Any = transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    return model.eval()


def logits(model: Any, ids: np.ndarray = IDS) -> np.ndarray:
    with torch.inference_mode():
        found: np.ndarray = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    return found


def exported(folder: Path, out: Path, **options: Any) -> Path:
    return export_package(folder, out, TARGET, Options("fp32", **options)).package


def assert_weights_of(checkpoint: Checkpoint, model: Any) -> None:
    """Every matrix that the package will hold is the one in transformers' model, bit for bit."""
    check_tensors(checkpoint)
    expected = {name: value.numpy() for name, value in model.state_dict().items()}
    names = checkpoint.config.tensor_shapes()
    assert expected.keys() - names.keys() <= {field.HEAD}
    if field.HEAD not in names:
        np.testing.assert_array_equal(expected[field.HEAD], expected[field.EMBEDDING])
    for name in names:
        tensor = checkpoint.tensor(name)
        np.testing.assert_array_equal(tensor.rows(0, tensor.shape[0]), expected[name], name)


@pytest.mark.parametrize("situation", field.AS_TRANSFORMERS)
def test_the_weights_are_those_that_transformers_loads(tmp_path: Path, situation: str) -> None:
    field.AS_TRANSFORMERS[situation](tmp_path)
    assert_weights_of(open_checkpoint(tmp_path), loaded(tmp_path))


WARNED = {
    "older shards and their index": "model-00001-of-00002.safetensors and 2 more are not read",
    "the index of older shards": "model.safetensors.index.json is not read",
    "a file that config.json names": "read from other.safetensors; model.safetensors is not read",
    "a pickle of another training": "pytorch_model.bin is not read",
    "tied, the head differs": "the saved head is used, as in transformers 5",
    "tied, the head alone": "only lm_head.weight was saved",
    "no prefix, in shards": "transformers 4 does not load them",
    "the prefix twice": "transformers 4 does not load them",
    "an index that names few tensors": "the index does not name 28 of the 30 tensors",
    "settings of bitsandbytes": "the weights are floats",
}


@pytest.mark.parametrize("situation", field.AS_TRANSFORMERS)
def test_what_is_not_read_is_named_in_a_warning(tmp_path: Path, situation: str) -> None:
    field.AS_TRANSFORMERS[situation](tmp_path)
    (found,) = open_checkpoint(tmp_path).warnings() or ("",)
    assert WARNED.get(situation, "") in found
    assert bool(found) == (situation in WARNED)


def test_the_logits_of_a_tied_model_with_another_head(tmp_path: Path) -> None:
    source = tmp_path / "source"
    field.head_differs(source)
    result = export_package(source, tmp_path / "out", TARGET, Options("fp32"))
    assert any("saved head" in warning for warning in result.warnings)
    found = GraphSession.open(result.package).step(IDS)[0]
    assert np.abs(found - logits(loaded(source))).max() < 1e-3


@pytest.mark.parametrize("make", [field.one_shard, field.shards_without_index])
def test_a_complete_set_of_shards_needs_no_index(tmp_path: Path, make: Any) -> None:
    make(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    check_tensors(checkpoint)
    for name, expected in tiny.weights(tiny.GQA).items():
        np.testing.assert_array_equal(checkpoint.tensor(name).rows(0, len(expected)), expected)
    assert "transformers does not load it without the index" in checkpoint.warnings()[0]
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        loaded(tmp_path)


def test_a_tensor_that_differs_between_shards_is_named(tmp_path: Path) -> None:
    """transformers takes the last one, whatever the index says."""
    field.in_two_shards(tmp_path)
    second = tmp_path / field.shard_name(2, 2)
    weights = tiny.weights(tiny.GQA)
    part = {name: weights[name] for name in list(weights)[1::2]}
    field.save({**part, field.NORM: tiny.weights(tiny.GQA, 7)[field.NORM]}, second)
    np.testing.assert_array_equal(  # what transformers does instead
        loaded(tmp_path).model.norm.weight.detach().numpy(), tiny.weights(tiny.GQA, 7)[field.NORM]
    )
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is in two shards"):
        open_checkpoint(tmp_path)


# --- refused, with the way out --------------------------------------------------------------


def renamed(file: str) -> Any:
    return lambda folder: (folder / field.SINGLE).rename(folder / file)


def prefixed(prefix: str) -> Any:
    def write(folder: Path) -> None:
        weights = {prefix + name: value for name, value in tiny.weights(tiny.GQA).items()}
        tiny.write_huggingface(folder, tensors=weights)

    return write


def wrapped_inside(folder: Path) -> None:
    """A model in which only the inner part, or each layer, was compiled."""
    weights = {
        name.replace("layers.1.", "layers.1._orig_mod."): value
        for name, value in tiny.weights(tiny.GQA).items()
    }
    tiny.write_huggingface(folder, tensors=weights)


def instead_of(name: str, content: bytes) -> Any:
    def write(folder: Path) -> None:
        tiny.write_huggingface(folder, pickled=name.endswith(".bin"))
        (folder / name).write_bytes(content)

    return write


def dangling(name: str) -> Any:
    def write(folder: Path) -> None:
        tiny.write_huggingface(folder)
        (folder / name).unlink()
        (folder / name).symlink_to("../../blobs/0123")

    return write


LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"


def unmerged(folder: Path) -> None:
    weights = {f"{PREFIX}{name}": value for name, value in tiny.weights(tiny.GQA).items()}
    weights[f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.default.weight"] = np.ones((4, 64))
    tiny.write_huggingface(folder, tensors=weights)


def one_of_two(folder: Path) -> None:
    field.shards_without_index(folder)
    (folder / field.shard_name(3, 3)).unlink()


REFUSED = {
    "torch.compile": (prefixed("_orig_mod."), "begin with '_orig_mod.', which torch.compile adds"),
    "torch.compile of a layer": (
        wrapped_inside,
        r"such as model\.layers\.1\._orig_mod\..* contain '_orig_mod\.', which torch\.compile adds",
    ),
    "a pointer of Git LFS": (
        instead_of(field.SINGLE, LFS_POINTER),
        "safetensors is .*git lfs pull",
    ),
    "a pointer for pickles": (
        instead_of("pytorch_model.bin", LFS_POINTER),
        r"pytorch_model\.bin is a pointer of Git LFS",
    ),
    "a pointer for the config": (
        instead_of("config.json", LFS_POINTER),
        "config.json is a pointer",
    ),
    "a web page": (instead_of(field.SINGLE, PAGE), "safetensors is a web page"),
    "a link that leads nowhere": (dangling(field.SINGLE), "safetensors is a link .* nowhere"),
    "a config elsewhere": (dangling("config.json"), "config.json is a link that leads nowhere"),
    "DataParallel": (prefixed("module."), "begin with 'module.'"),
    "PEFT": (prefixed(PREFIX), "begin with 'base_model.model.', which PEFT adds"),
    "a model of several kinds": (prefixed("language_model."), "begin with 'language_model.'"),
    "an adapter's tensors": (unmerged, "tensors of an adapter .*--adapter"),
    "a variant": (renamed("model.fp16.safetensors"), "only as the variant 'fp16'"),
    "another name": (renamed("weights.safetensors"), "rename it to model.safetensors"),
    "another format": (renamed("tf_model.h5"), "has tf_model.h5, .*save it again"),
    "adapter weights": (renamed("adapter_model.safetensors"), "weights of an adapter.*--adapter"),
    "one shard missing": (one_of_two, "not one complete set: download the index and all shards"),
}


@pytest.mark.parametrize("situation", REFUSED)
def test_refusals_say_what_to_do(tmp_path: Path, situation: str) -> None:
    make, message = REFUSED[situation]
    if message and make.__name__ == "<lambda>":
        tiny.write_huggingface(tmp_path)
    make(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        check_tensors(open_checkpoint(tmp_path))


def test_an_adapter_as_the_source_points_at_the_option(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", factors(dict.fromkeys(attention(0, "q"), 4)))
    with pytest.raises(CheckpointError, match=r"pass its base \(somebody/some-llama\) as SOURCE"):
        open_checkpoint(folder)
    result = CliRunner().invoke(main, ["export", str(folder), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert f"--adapter {folder}" in result.output


def test_a_model_or_a_file_as_the_adapter(tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "source")
    with pytest.raises(CheckpointError, match="is a model, not an adapter: pass it as SOURCE"):
        open_checkpoint(source, [source])
    with pytest.raises(CheckpointError, match="is a file, not a folder"):
        open_checkpoint(source, [source / field.SINGLE])


def test_an_adapter_beside_the_weights_is_named(tmp_path: Path) -> None:
    write_adapter(tmp_path, factors(dict.fromkeys(attention(0, "q"), 4)))
    tiny.write_huggingface(tmp_path)
    assert any(
        "not merged: pass it with --adapter" in w for w in open_checkpoint(tmp_path).warnings()
    )


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "pytorch_model.bin"])
def test_one_file_of_a_folder_as_the_source(tmp_path: Path, file: str) -> None:
    tiny.write_huggingface(tmp_path)
    (tmp_path / file).touch()
    with pytest.raises(CheckpointError, match=f"pass its folder, {tmp_path}"):
        open_checkpoint(tmp_path / file)


def test_8_bit_floats_are_refused_alike_by_plan_inspect_and_export(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny.write_huggingface(source)
    weights = {name: torch.from_numpy(value) for name, value in tiny.weights(tiny.GQA).items()}
    eighth = {name: v.to(torch.float8_e4m3fn) for name, v in weights.items() if "proj" in name}
    save_torch(weights | eighth, source / field.SINGLE, metadata={"format": "pt"})
    sentence = "self_attn.q_proj.weight is stored as F8_E4M3, which is not supported"
    for call in (["plan", source], ["export", source, tmp_path / "out"], ["inspect", source]):
        result = CliRunner().invoke(main, [*map(str, call), *["--json"][: call[0] == "inspect"]])
        assert sentence in result.output.replace("\n", " "), call
        assert result.exit_code == (0 if call[0] == "inspect" else 1)
    assert not (tmp_path / "out").exists()


def test_codes_of_bitsandbytes_are_refused(tmp_path: Path) -> None:
    field.bitsandbytes_left_over(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight.absmax"
    field.save({**tiny.weights(tiny.GQA), name: np.ones(96, np.float32)}, tmp_path / field.SINGLE)
    with pytest.raises(UnsupportedError, match="quantized with 'bitsandbytes'"):
        open_checkpoint(tmp_path)


# --- special tokens -------------------------------------------------------------------------


def test_tokens_beyond_the_vocabulary_are_left_out_with_a_warning(tmp_path: Path) -> None:
    tiny.write_huggingface(tmp_path / "source")
    settings = {"bos_token_id": 1, "eos_token_id": [2, 300], "pad_token_id": 288}
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps(settings))
    loaded(tmp_path / "source")
    result = export_package(
        tmp_path / "source", tmp_path / "out", TARGET, Options("int4", quantizer="rtn")
    )
    assert [w.partition(": ")[2] for w in result.warnings] == [
        "the end token 300 is beyond the vocabulary of 288 tokens, so it is left out.",
        "the padding token 288 is beyond the vocabulary of 288 tokens, so it is left out.",
    ]
    model = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]
    assert (model["pad_token_id"], model["eos_token_id"]) == (2, 2)


def test_no_end_token_left() -> None:
    found = special_tokens([9], [9], [], 8, "config.json")
    assert (found.bos, found.eos, found.pad) == (None, (), None)
    assert "an answer ends only at its maximum length" in found.warnings[-1]


# --- GGUF -----------------------------------------------------------------------------------


def test_the_converter_of_llama2_c_writes_the_largest_number_for_none(tmp_path: Path) -> None:
    none = 4294967295
    keys = {f"tokenizer.ggml.{name}_token_id": none for name in ("seperator", "padding")}
    path = tmp_path / "model.gguf"
    gguf_files.write(path, keys=keys)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.pad_token_id is None
    assert checkpoint.config.eos_token_ids == (2,)
    assert f"the padding token {none} is beyond" in checkpoint.warnings()[0]


def test_the_whole_file_of_that_converter(tmp_path: Path) -> None:
    """It has no general.file_type and no tokenizer.ggml.pre either."""
    model = vocabularies.model_named("plain")
    keys = vocabularies.spm_metadata(model)
    none = dict.fromkeys(("seperator", "padding"), 4294967295)
    keys |= {f"tokenizer.ggml.{name}_token_id": value for name, value in none.items()}
    keys["tokenizer.ggml.pre"] = None
    config = replace(tiny.GQA, vocab_size=len(keys["tokenizer.ggml.tokens"]))
    gguf_files.write(tmp_path / "model.bin", config, keys=keys)
    package = exported(tmp_path / "model.bin", tmp_path / "out")
    found = GraphSession.open(package).step(IDS)[0]
    assert np.abs(found - reference(config, IDS[None])[0]).max() < 1e-3
    text = "the quick brown fox"
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = Tokenizer.from_file(str(package / "tokenizer.json"))
    assert tokenizer.encode(text).ids == [processor.bos_id(), *processor.encode(text)]


@pytest.mark.parametrize("name", ["sha256-7ab6e6", "model.bin", "blob"])
def test_a_gguf_without_its_suffix_is_known_by_its_first_bytes(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    gguf_files.write(path)
    assert open_checkpoint(path).format == "gguf"


def test_a_gguf_in_capitals_is_found_in_its_folder(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "MODEL.GGUF")
    assert open_checkpoint(tmp_path).path == tmp_path / "MODEL.GGUF"
    (tmp_path / "other.gguf").write_bytes((tmp_path / "MODEL.GGUF").read_bytes())
    with pytest.raises(CheckpointError, match=r"several GGUF files \(MODEL\.GGUF, other\.gguf\)"):
        open_checkpoint(tmp_path)


def test_a_pointer_in_place_of_a_gguf_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(LFS_POINTER)
    with pytest.raises(CheckpointError, match=r"model\.gguf is a pointer of Git LFS"):
        open_checkpoint(tmp_path / "model.gguf")


def test_an_adapter_on_a_folder_with_warnings_repeats_them(tmp_path: Path) -> None:
    field.head_differs(tmp_path / "base")
    folder = write_adapter(tmp_path / "adapter", factors(dict.fromkeys(attention(0, "q"), 4)))
    base = open_checkpoint(tmp_path / "base")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"target_modules": r".*layers\.0\.self_attn\.q_proj"})
    )
    assert open_adapter(base, folder).warnings() == base.warnings()

"""Everything that reads a stranger's files, each with a small valid input.

A reader may refuse an input with a `LlamaOnnxError`, or accept it; anything else is a fault.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from llama_onnx.exporter.checkpoints.checklist import has_checklist, verify_checklists
from llama_onnx.exporter.checkpoints.package.package import PackageCheckpoint
from llama_onnx.exporter.commands.inspect import checkpoint_facts, package_facts
from llama_onnx.exporter.model.checkpoint import Checkpoint, check_tensors
from llama_onnx.exporter.packaging.genai_config import check_search
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.packaging.plan import make_plan
from llama_onnx.exporter.packaging.provenance import copy_licences, source_hashes
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.exporter.tokenizer.files import check_tokenizer
from llama_onnx.exporter.tokenizer.source import source_codec
from llama_onnx.runtime.measure.certificate import read_certificate
from llama_onnx.targets.cpu import TARGET
from llama_onnx.targets.package import ModelPackage
from tests.support import adapters, gguf_files, meta_files, packages, quantized, storages, tiny
from tests.support.vocabularies import bytelevel_metadata, model_named, spm_metadata

SMALL = replace(tiny.GQA, num_hidden_layers=1, hidden_size=32, num_attention_heads=2)
"""Small files, so that most bytes are ones that mean something."""

SMALL_SPM = replace(SMALL, vocab_size=520)


@dataclass(frozen=True)
class Reader:
    """`make` writes a valid input into a folder; `read` reads it. `files` are those to change, by
    kind."""

    make: Callable[[Path], object]
    read: Callable[[Path], object]
    files: Mapping[str, str]


def read_checkpoint(path: Path, *adapter_folders: Path) -> None:
    """Do with the checkpoint what `inspect`, `plan` and `export` do before the weights."""
    facts = checkpoint_facts(path)
    json.dumps(facts).encode("utf-8")
    checkpoint = open_checkpoint(path, adapter_folders)
    check_tensors(checkpoint)
    for name in checkpoint.config.tensor_shapes():
        if name in checkpoint.names():
            tensor = checkpoint.tensor(name)
            tensor.rows(0, min(3, tensor.shape[0]))
    check_search(checkpoint.search_defaults(), str(path))
    make_plan(checkpoint, TARGET, Options("int4"), workers=1)
    if has_checklist(path):
        verify_checklists(path, lambda _: None)
    source_hashes(checkpoint, {}, read=True, step=lambda _: None)
    _write_small_files(checkpoint)


def _write_small_files(checkpoint: Checkpoint) -> None:
    with tempfile.TemporaryDirectory() as written:
        copy_licences(checkpoint, Path(written))
        checkpoint.write_tokenizer(Path(written))
        file = Path(written, "tokenizer.json")
        check_tokenizer(file, checkpoint.config.vocab_size, str(checkpoint.path))
    codec = source_codec(checkpoint.path)
    if codec is not None:
        codec.encode("the quick brown fox, 12 times")
        codec.vocabulary()


def read_gguf(folder: Path) -> None:
    """Read the file in `folder`."""
    read_checkpoint(folder / "model.gguf")


def read_adapter(folder: Path) -> None:
    """Read the base and the adapter in `folder`."""
    read_checkpoint(folder / "base", folder / "adapter")


def read_package(folder: Path) -> None:
    """Do with the package what `inspect`, `certify` and `verify` do before it runs."""
    json.dumps(package_facts(folder))
    package = ModelPackage.open(folder)
    package.verify()
    package.unlisted()
    checkpoint = PackageCheckpoint.open(folder)
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        tensor.rows(0, min(3, tensor.shape[0]))
    if (folder / "certificate.json").exists():
        read_certificate(folder)


def _huggingface(folder: Path) -> None:
    tiny.write_huggingface(folder, SMALL, shards=2)
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 3]}
    (folder / "generation_config.json").write_text(json.dumps(settings), "utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>"}), "utf-8")


def _pickled(folder: Path) -> None:
    tiny.write_huggingface(folder, SMALL, pickled=True)


def _model_file(folder: Path) -> None:
    tiny.write_huggingface(folder, SMALL_SPM)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(model_named("plain"))
    settings = {
        "bos_token": {"content": "<s>"},
        "add_bos_token": True,
        "added_tokens_decoder": {"1": {"content": "<s>", "special": True}},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    (folder / "added_tokens.json").write_text(json.dumps({"</s>": 2}), "utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}), "utf-8")


def _compressed(folder: Path) -> None:
    from compressed_tensors.quantization import QuantizationArgs

    from tests.support import compressed

    args = QuantizationArgs(num_bits=4, strategy="group", group_size=16, symmetric=False)
    matrices = compressed.compress_model(args, "pack-quantized", SMALL)
    groups = {"group_0": compressed.group(args, "pack-quantized")}
    compressed.write(folder, matrices, groups, config=SMALL)


def _gptq(folder: Path) -> None:
    matrices = quantized.quantize_model(SMALL, bits=4, group_size=16)
    quantized.write(folder, matrices, config=SMALL)


def _adapter(folder: Path) -> None:
    tiny.write_huggingface(folder / "base", SMALL)
    names = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj")
    adapters.write_adapter(
        folder / "adapter",
        adapters.factors(dict.fromkeys(names, 4), SMALL),
        target_modules=r".*(q_proj|up_proj)",
        rank_pattern={"q_proj": 4},
        alpha_pattern={"up_proj": 16},
    )


def _meta(folder: Path) -> None:
    meta_files.write_meta(folder, model_named("plain"))
    meta_files.write_checklist(folder)


def _gguf(folder: Path) -> None:
    keys = spm_metadata(model_named("plain"))
    gguf_files.write(folder / "model.gguf", SMALL_SPM, keys=keys)


def _gguf_bytes(folder: Path) -> None:
    keys = bytelevel_metadata(folder=folder)
    config = replace(SMALL, vocab_size=len(keys["tokenizer.ggml.tokens"]))
    gguf_files.write(folder / "model.gguf", config, keys=keys)


def _package(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as aside:
        made = packages.make_package(Path(aside), "int4")
        for file in made.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())


def _stored(folder: Path) -> None:
    storage = storages.FORMS["uint8 scales, zero points"]
    with tempfile.TemporaryDirectory() as aside:
        made, _ = storages.make_chosen(Path(aside), storages.everywhere(storage), SMALL)
        for file in made.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())


READERS: Mapping[str, Reader] = {
    "huggingface": Reader(
        _huggingface,
        read_checkpoint,
        {
            "config.json": "json",
            "generation_config.json": "json",
            "special_tokens_map.json": "json",
            "tokenizer_config.json": "json",
            "tokenizer.json": "json",
            "model.safetensors.index.json": "json",
            "model-00001-of-00002.safetensors": "safetensors",
        },
    ),
    "pickled": Reader(_pickled, read_checkpoint, {"pytorch_model.bin": "torch"}),
    "model-file": Reader(
        _model_file,
        read_checkpoint,
        {
            "tokenizer.model": "bytes",
            "tokenizer_config.json": "json",
            "special_tokens_map.json": "json",
            "added_tokens.json": "json",
        },
    ),
    "gptq": Reader(
        _gptq, read_checkpoint, {"config.json": "json", "model.safetensors": "safetensors"}
    ),
    "compressed": Reader(
        _compressed, read_checkpoint, {"config.json": "json", "model.safetensors": "safetensors"}
    ),
    "adapter": Reader(
        _adapter,
        read_adapter,
        {
            "adapter/adapter_config.json": "json",
            "adapter/adapter_model.safetensors": "safetensors",
        },
    ),
    "meta": Reader(
        _meta,
        read_checkpoint,
        {
            "params.json": "json",
            "consolidated.00.pth": "torch",
            "tokenizer.model": "bytes",
            "checklist.chk": "bytes",
        },
    ),
    "gguf": Reader(_gguf, read_gguf, {"model.gguf": "header"}),
    "gguf-bytes": Reader(_gguf_bytes, read_gguf, {"model.gguf": "header"}),
    "package": Reader(
        _package,
        read_package,
        {
            "manifest.json": "json",
            "config.json": "json",
            "genai_config.json": "json",
            "model.onnx": "bytes",
        },
    ),
    "package-stored": Reader(_stored, read_package, {"model.onnx": "bytes"}),
}

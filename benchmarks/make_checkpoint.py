"""Write a checkpoint of a real model's geometry with random float16 weights, shard by shard.

    python benchmarks/make_checkpoint.py 1.1b work/1.1b
    python benchmarks/make_checkpoint.py 7b work/7b
    python benchmarks/make_checkpoint.py 7b work/7b-3 --layers 3
    python benchmarks/make_checkpoint.py 70b work/70b --sparse
    python benchmarks/make_checkpoint.py 70b work/70b-meta --sparse --meta

Memory is limited to the largest tensor. Values are slices of one block of normal numbers, scaled so
that activations keep their size; speed and size depend only on the geometry. `--sparse` writes
headers and leaves holes for the weights: they read as zeros and take no disk space. `--meta` writes
them in the form of Meta's download: params.json, the same number of consolidated.NN.pth files, and
a tokenizer.model of the same size.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).parent.parent))

from llama_onnx.exporter.model.config import LlamaConfig
from tests.support.meta_files import AXES, meta_name

META: dict[str, tuple[int, dict[str, Any]]] = {
    "7b": (1, {"multiple_of": 256}),
    "13b": (2, {"multiple_of": 256}),
    "70b": (8, {"multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_kv_heads": 8}),
}
"""Shards of Meta's download, and the keys of its params.json apart from the sizes."""

POOL = np.random.default_rng(0).standard_normal(1 << 24, dtype=np.float32)
SHARD_BYTES = 4 << 30


def geometry(**numbers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_ids=(2,),
        **numbers,  # type: ignore[arg-type]
    )


GEOMETRIES = {
    "1.1b": geometry(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
    ),
    "7b": geometry(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=4096,
    ),
    "13b": geometry(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
        head_dim=128,
        max_position_embeddings=4096,
    ),
    "70b": geometry(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=4096,
    ),
    # Six layers of 7B, for benchmarks with two models in memory at once.
    "7b-6": geometry(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=6,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=4096,
    ),
}


def random_tensor(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    count = int(np.prod(shape))
    if len(shape) == 1:
        return np.ones(shape, np.float16)
    values = np.resize(np.roll(POOL, int(rng.integers(POOL.size))), count)
    return (values * np.float32(1 / np.sqrt(shape[1]))).astype(np.float16).reshape(shape)


def write_shard(
    path: Path, names: list[str], config: LlamaConfig, seed: int, *, sparse: bool
) -> None:
    shapes, header, offset = config.tensor_shapes(), {}, 0
    for name in names:
        end = offset + 2 * int(np.prod(shapes[name]))
        entry = {"dtype": "F16", "shape": list(shapes[name]), "data_offsets": [offset, end]}
        header[name], offset = entry, end
    encoded = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        if sparse:
            file.truncate(8 + len(encoded) + offset)
            return
        for name in names:
            random_tensor(shapes[name], rng).tofile(file)


def split(config: LlamaConfig) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in config.tensor_shapes().items():
        nbytes = 2 * int(np.prod(shape))
        if size + nbytes > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_meta(out: Path, name: str) -> int:
    """Write the geometry `name` as holes in Meta's form; returns the number of shards."""
    import torch

    config, (count, extra) = GEOMETRIES[name], META[name]
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": -1,
        **extra,
    }
    (out / "params.json").write_text(json.dumps(params))
    shapes = {meta_name(name): list(shape) for name, shape in config.tensor_shapes().items()}
    for name, shape in shapes.items():
        axis = AXES.get(name.split(".")[-2])
        if axis is not None:
            shape[axis] //= count
    for index in range(count):
        # Never written to, so they take no memory; skip_data leaves them out of the file.
        tensors = {name: torch.empty(*shape, dtype=torch.float16) for name, shape in shapes.items()}
        with torch.serialization.skip_data():
            torch.save(tensors, out / f"consolidated.{index:02}.pth")
    (out / "tokenizer.model").write_bytes(sentencepiece_model(config.vocab_size))
    return count


def sentencepiece_model(size: int) -> bytes:
    """Return a tokenizer.model of bytes and single characters, in the format of Llama's."""
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2
    model = proto.ModelProto()
    kinds = proto.ModelProto.SentencePiece
    for piece, kind in (("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)):
        model.pieces.add(piece=piece, type=kind)
    for byte in range(256):
        model.pieces.add(piece=f"<0x{byte:02X}>", type=kinds.BYTE)
    for index in range(size - len(model.pieces)):
        model.pieces.add(piece=chr(0x4E00 + index), score=-float(index))
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.remove_extra_whitespaces = False
    made: bytes = model.SerializeToString()
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("geometry", choices=GEOMETRIES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sparse", action="store_true", help="holes instead of weights")
    parser.add_argument("--layers", type=int, help="fewer layers than the geometry has")
    parser.add_argument("--meta", action="store_true", help="Meta's format; needs --sparse")
    arguments = parser.parse_args()
    config, out = GEOMETRIES[arguments.geometry], arguments.out
    if arguments.layers:
        config = replace(config, num_hidden_layers=arguments.layers)
    out.mkdir(parents=True, exist_ok=True)
    if arguments.meta:
        if not arguments.sparse or arguments.geometry not in META:
            parser.error(f"--meta needs --sparse and one of {', '.join(META)}")
        count = write_meta(out, arguments.geometry)
        print(f"{out}: {2 * config.num_parameters() / 1e9:.2f} GB in {count} shards")
        return
    (out / "config.json").write_text(json.dumps(config.to_huggingface() | {"dtype": "float16"}))
    write_tokenizer(out)
    shards = split(config)
    weight_map = {}
    for index, names in enumerate(shards):
        name = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        write_shard(out / name, names, config, index, sparse=arguments.sparse)
        weight_map |= dict.fromkeys(names, name)
    index_json = {"metadata": {}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index_json))
    print(f"{out}: {2 * config.num_parameters() / 1e9:.2f} GB in {len(shards)} shards")


if __name__ == "__main__":
    main()

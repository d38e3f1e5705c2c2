"""Checkpoints as people find them: one writer for each situation that was reported in public.

The weights are the tiny ones; what is peculiar is how they are saved. What is right is decided by
transformers, which loads the same folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from tests.support import tiny

Tensors = dict[str, npt.NDArray[Any]]
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
TIED = replace(tiny.GQA, tie_word_embeddings=True)
SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"


def shard_name(number: int, count: int, suffix: str = "safetensors") -> str:
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    return f"{stem}-{number:05}-of-{count:05}.{suffix}"


def save(tensors: Mapping[str, npt.NDArray[Any]], path: Path) -> None:
    save_file(dict(tensors), path, metadata={"format": "pt"})


def without_weights(folder: Path, **config: Any) -> Path:
    """Write a folder that has everything but weights."""
    tiny.write_huggingface(folder, config_json=config)
    (folder / SINGLE).unlink()
    return folder


def in_shards(folder: Path, tensors: Mapping[str, npt.NDArray[Any]], count: int = 2) -> list[str]:
    """Save `tensors` in turn in `count` shards; return their names."""
    names = [shard_name(i + 1, count) for i in range(count)]
    for i, name in enumerate(names):
        save({key: tensors[key] for key in list(tensors)[i::count]}, folder / name)
    return names


def write_index(folder: Path, places: Mapping[str, str]) -> None:
    content = {"metadata": {"total_size": 1}, "weight_map": dict(places)}
    (folder / INDEX).write_text(json.dumps(content), encoding="utf-8")


def old_shards(folder: Path, *, removed: bool) -> None:
    """model.safetensors (seed 7) beside the index of older shards (seed 0), and beside these."""
    without_weights(folder)
    old = tiny.weights(tiny.GQA)
    names = in_shards(folder, old)
    write_index(folder, {key: names[i % 2] for i, key in enumerate(old)})
    save(tiny.weights(tiny.GQA, 7), folder / SINGLE)
    for name in names if removed else ():
        (folder / name).unlink()


def named_in_config(folder: Path) -> None:
    """config.json names another file than the usual one."""
    tiny.write_huggingface(folder, config_json={"transformers_weights": "other.safetensors"})
    save(tiny.weights(tiny.GQA, 7), folder / "other.safetensors")


def pickled_too(folder: Path) -> None:
    """Both formats, as on many pages of the hub, of different trainings."""
    tiny.write_huggingface(folder, pickled=True, seed=7)
    tiny.write_huggingface(folder)


def head_differs(folder: Path) -> None:
    """The config says tied; a trainer saved a head of its own."""
    weights = tiny.weights(tiny.GQA)
    tiny.write_huggingface(folder, TIED, tensors=weights)


def head_equal(folder: Path) -> None:
    weights = tiny.weights(TIED)
    tiny.write_huggingface(folder, TIED, tensors={**weights, HEAD: weights[EMBEDDING]})


def head_alone(folder: Path) -> None:
    """A tied model of which the one matrix was saved under the head's name."""
    weights = tiny.weights(TIED)
    weights[HEAD] = weights.pop(EMBEDDING)
    tiny.write_huggingface(folder, TIED, tensors=weights)


def without_prefix(folder: Path) -> None:
    """Saved from LlamaModel, without the head."""
    weights = {key.removeprefix("model."): value for key, value in tiny.weights(TIED).items()}
    tiny.write_huggingface(
        folder, TIED, tensors=weights, config_json={"architectures": ["LlamaModel"]}
    )


def without_prefix_in_shards(folder: Path) -> None:
    without_weights(folder)
    weights = {key.removeprefix("model."): value for key, value in tiny.weights(tiny.GQA).items()}
    names = in_shards(folder, weights)
    write_index(folder, {key: names[i % 2] for i, key in enumerate(weights)})


def prefix_twice(folder: Path) -> None:
    weights = {f"model.{key}": value for key, value in tiny.weights(tiny.GQA).items()}
    tiny.write_huggingface(folder, tensors=weights)


def in_two_shards(folder: Path) -> None:
    """Every norm in both shards, as merges of shards leave it."""
    without_weights(folder)
    weights = tiny.weights(tiny.GQA)
    norms = {key: value for key, value in weights.items() if "norm" in key}
    places: dict[str, str] = {}
    for i in range(2):
        part = {key: weights[key] for key in list(weights)[i::2]}
        save({**norms, **part}, folder / shard_name(i + 1, 2))
        places |= dict.fromkeys(part, shard_name(i + 1, 2))
    write_index(folder, places)


def index_names_few(folder: Path) -> None:
    """An index that does not name every tensor of its shards."""
    without_weights(folder)
    names = in_shards(folder, tiny.weights(tiny.GQA))
    write_index(folder, {NORM: names[0], HEAD: names[1]})


def buffers_saved(folder: Path) -> None:
    weights = tiny.weights(tiny.GQA)
    buffer = np.ones(8, np.float32)
    weights |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": buffer for i in range(3)}
    tiny.write_huggingface(folder, tensors=weights)


def bitsandbytes_left_over(folder: Path) -> None:
    """A merged QLoRA: float weights, and the settings of the loading that came before."""
    settings = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": False,
        "load_in_8bit": False,
        "llm_int8_threshold": 6.0,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16",
        "llm_int8_skip_modules": None,
    }
    tiny.write_huggingface(folder, config_json={"quantization_config": settings})


def one_shard(folder: Path) -> None:
    """One file with the name of a shard, and no index, as tools that join shards leave it."""
    tiny.write_huggingface(folder)
    (folder / SINGLE).rename(folder / shard_name(1, 1))


def shards_without_index(folder: Path) -> None:
    without_weights(folder)
    in_shards(folder, tiny.weights(tiny.GQA), count=3)


AS_TRANSFORMERS: dict[str, Callable[[Path], None]] = {
    "older shards and their index": lambda folder: old_shards(folder, removed=False),
    "the index of older shards": lambda folder: old_shards(folder, removed=True),
    "a file that config.json names": named_in_config,
    "a pickle of another training": pickled_too,
    "tied, the head differs": head_differs,
    "tied, the head is equal": head_equal,
    "tied, the head alone": head_alone,
    "no prefix": without_prefix,
    "no prefix, in shards": without_prefix_in_shards,
    "the prefix twice": prefix_twice,
    "norms in two shards": in_two_shards,
    "an index that names few tensors": index_names_few,
    "buffers among the weights": buffers_saved,
    "settings of bitsandbytes": bitsandbytes_left_over,
}
"""Situations in which transformers loads a folder, by name."""


def copied(folder: Path, to: Path) -> Path:
    """Return a copy of `folder` at `to`."""
    return Path(shutil.copytree(folder, to))

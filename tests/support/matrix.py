"""The cases of the parity matrix: storages x sources x architectures, and a cover of their pairs.

All combinations would take an hour. A fault that needs three particular values at once is rare; the
chosen cases contain every possible pair of values at least once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations, product
from pathlib import Path

from gguf import GGMLQuantizationType

from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.model.rope import RopeScaling
from llama_onnx.exporter.packaging.options import Options
from tests.support import gguf_files, meta_files, tiny
from tests.support.adapters import attention, factors, write_adapter
from tests.support.vocabularies import model_named, spm_metadata

LONG = "long context"

STORAGES: Mapping[str, Options] = {
    "fp32": Options("fp32"),
    "fp16": Options("fp16"),
    "int8": Options("int8"),
    "int4, 16": Options("int4", block_size=16),
    "int4, 32": Options("int4"),
    "int4, 128, exact": Options("int4", block_size=128, accuracy_level=1, fuse_gate_up=True),
}

VARIANTS: Mapping[str, LlamaConfig] = {
    "MHA": replace(tiny.GQA, num_key_value_heads=tiny.GQA.num_attention_heads),
    "GQA": tiny.GQA,
    "tied": replace(tiny.GQA, tie_word_embeddings=True),
    "partial block": replace(tiny.GQA, hidden_size=80, intermediate_size=72),
    **{f"rope {k}": replace(tiny.GQA, rope_scaling=v) for k, v in tiny.ROPE_SCALINGS.items()},
    LONG: replace(tiny.GQA, max_position_embeddings=2304, rope_scaling=RopeScaling("linear", 4.0)),
}


@dataclass(frozen=True)
class Made:
    """A checkpoint that was written, and the adapters to merge into it."""

    path: Path
    adapters: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Source:
    """`write` puts a checkpoint of a config into a folder; `variants` are those it can express."""

    write: Callable[[Path, LlamaConfig], Made]
    variants: Sequence[str] = tuple(VARIANTS)


@dataclass(frozen=True)
class Case:
    """One value of each axis, by name."""

    storage: str
    source: str
    variant: str

    @property
    def thorough(self) -> bool:
        """Whether to measure up to the end of the context."""
        return self.variant == LONG


def _safetensors(folder: Path, config: LlamaConfig) -> Made:
    return Made(tiny.write_huggingface(folder, config))


def _shards(folder: Path, config: LlamaConfig) -> Made:
    return Made(tiny.write_huggingface(folder, config, shards=3, dtype="bf16"))


def _pickled(folder: Path, config: LlamaConfig) -> Made:
    return Made(tiny.write_huggingface(folder, config, pickled=True))


def _adapted(folder: Path, config: LlamaConfig) -> Made:
    modules = [attention(layer, "q", "v") for layer in range(config.num_hidden_layers)]
    ranks = dict.fromkeys(chain(*modules), 4)
    base = tiny.write_huggingface(folder / "base", config)
    return Made(base, (write_adapter(folder / "adapter", factors(ranks, config)),))


def _meta(shards: int) -> Callable[[Path, LlamaConfig], Made]:
    def write(folder: Path, config: LlamaConfig) -> Made:
        # Meta's files have other sizes, made for eight shards; the heads are those of the variant.
        grouped = config.num_key_value_heads < config.num_attention_heads
        sizes = meta_files.CONFIG
        heads = sizes.num_key_value_heads if grouped else sizes.num_attention_heads
        own = replace(sizes, num_key_value_heads=heads)
        params = {"n_kv_heads": heads if grouped else None}
        tokenizer = model_named("plain")
        return Made(meta_files.write_meta(folder, tokenizer, own, shards=shards, params=params))

    return write


def _gguf(kind: GGMLQuantizationType) -> Callable[[Path, LlamaConfig], Made]:
    def write(folder: Path, config: LlamaConfig) -> Made:
        folder.mkdir(parents=True)
        own = replace(config, vocab_size=meta_files.CONFIG.vocab_size, rope_scaling=None)
        keys = spm_metadata(model_named("plain"))
        return Made(gguf_files.write(folder / "model.gguf", own, kind, keys=keys))

    return write


# GGUF stores blocks of 32 and heads that divide the hidden size; its rope scaling is refused.
_PLAIN = ("MHA", "GQA", "tied", LONG)

SOURCES: Mapping[str, Source] = {
    "safetensors": Source(_safetensors),
    "safetensors, bf16": Source(_shards),
    "pytorch_model.bin": Source(_pickled),
    "LoRA, merged": Source(_adapted),
    "Meta, 1 shard": Source(_meta(1), ("MHA", "GQA")),
    "Meta, 2 shards": Source(_meta(2), ("MHA", "GQA")),
    "GGUF F32": Source(_gguf(GGMLQuantizationType.F32), _PLAIN),
    "GGUF Q8_0": Source(_gguf(GGMLQuantizationType.Q8_0), _PLAIN),
    "GGUF Q4_0": Source(_gguf(GGMLQuantizationType.Q4_0), _PLAIN),
}


def all_cases() -> Iterator[Case]:
    """Yield every possible combination."""
    for storage, (name, source) in product(STORAGES, SOURCES.items()):
        yield from (Case(storage, name, variant) for variant in source.variants)


def pairs(case: Case) -> set[tuple[str, str]]:
    """Return the pairs of values in `case`."""
    return set(combinations((case.storage, case.source, case.variant), 2))


def cover(cases: Sequence[Case]) -> list[Case]:
    """Return a few of `cases` with every pair: next is always the case that adds the most pairs."""
    missing = set().union(*map(pairs, cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(pairs(case) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return sorted(chosen, key=lambda case: list(STORAGES).index(case.storage))

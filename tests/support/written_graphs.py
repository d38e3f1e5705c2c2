"""Every kind of graph that the exporter writes."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

from llama_onnx.exporter.packaging.adapters import open_kept
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.packaging.plan import make_plan
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.targets.registry import TARGETS
from llama_onnx.targets.target import Target
from tests.support import adapters, storages, tiny
from tests.support.once import make_once, shared_folder
from tests.support.parity import EXPORTS

_WINDOW = replace(tiny.GQA, sliding_window=7)
_HEADS = {
    "window": _WINDOW,
    "window, rotated outside": replace(_WINDOW, head_dim=8),
    "window, ONNX's Attention": replace(_WINDOW, head_dim=12),
    "heads of 8": replace(tiny.GQA, head_dim=8),
    "heads of 6": replace(tiny.GQA, head_dim=6),
    "heads of 100": replace(tiny.GQA, head_dim=100),
}


Written = tuple[bytes, int]
"""A graph, and the size of its data."""


def written_graphs(factory: pytest.TempPathFactory) -> dict[str, Written]:
    """Return every kind of graph by name, made once for all workers."""

    def make(file: Path) -> None:
        file.write_bytes(pickle.dumps(dict(_written_graphs(factory.mktemp("graphs")))))

    file = make_once(shared_folder(factory) / "graphs.pickle", make)
    graphs: dict[str, Written] = pickle.loads(file.read_bytes())
    return graphs


def _written_graphs(folder: Path) -> Iterator[tuple[str, Written]]:

    def build(
        name: str, source: Path, target: Target, options: Options, kept: Path | None = None
    ) -> tuple[str, Written]:
        checkpoint = open_checkpoint(source)
        swapped = open_kept(checkpoint, {"x": kept} if kept else {})
        plan = make_plan(checkpoint, target, options, 1, swapped, ())
        return name, (ir.to_proto(plan.built.ir).SerializeToString(), plan.data_bytes)

    for name, (config, options) in EXPORTS.items():
        source = tiny.write_huggingface(folder / name, config)
        yield build(name, source, TARGETS["cpu"], options)
    source = tiny.write_huggingface(folder / "source")
    tied = tiny.write_huggingface(folder / "tied", replace(tiny.GQA, tie_word_embeddings=True))
    lora = adapters.write_adapter(
        folder / "lora",
        adapters.factors(
            {
                **{m: 4 for layer in range(3) for m in adapters.attention(layer, *"qkvo")},
                **{
                    f"model.layers.{layer}.mlp.{part}_proj": 4
                    for layer in range(3)
                    for part in ("gate", "up", "down")
                },
            }
        ),
    )
    for target in TARGETS.values():
        for precision in target.graph.precisions:
            for activations in target.graph.activations:
                options = Options(precision=precision, activations=activations)
                name = f"{target.name} {precision} {activations}"
                yield build(name, source, target, options)
                yield build(f"{name} tied", tied, target, options)
    for precision in TARGETS["cpu"].graph.precisions:
        yield build(f"lora {precision}", source, TARGETS["cpu"], Options(precision), lora)
    yield build("int8 cache", source, TARGETS["cpu"], Options("int4", kv_cache="int8"))
    for name, storage in storages.FORMS.items():
        with storages.storing(storages.everywhere(storage)):
            yield build(name, source, TARGETS["cpu"], Options("int4"))
            yield build(f"{name}, tied", tied, TARGETS["cpu"], Options("int4"))
    for name, config in _HEADS.items():
        source = tiny.write_huggingface(folder / name, config)
        for target_name in ("cpu", "portable"):
            yield build(f"{target_name} {name}", source, TARGETS[target_name], Options("int4"))

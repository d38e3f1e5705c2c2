"""The cost of a swappable adapter: the plain base, one with inputs for adapters, one with an
active adapter.

    python benchmarks/adapters.py work/7b-6 --work work/adapters

Exports SOURCE to int4 twice, without adapters and with random ones of every linear layer, and
times onnxruntime-genai. Contenders take turns every few decode steps, so that other loads on the
machine affect all of them; prints medians, and ratios to the plain package.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from llama_onnx.exporter.model.config import MATRICES, LlamaConfig
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.genai import og
from llama_onnx.runtime.placement.genai_model import open_model
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.providers import CPU
from llama_onnx.targets.registry import get_target
from tests.support.adapters import factors, write_adapter

BLOCK = 8

Contender = tuple[Any, Any, str | None]
"""A model, its adapters, and the name of the one that is active."""


def make_adapter(folder: Path, config: LlamaConfig, rank: int) -> Path:
    layers = range(config.num_hidden_layers)
    ranks = {f"model.layers.{layer}.{name}": rank for layer in layers for name in MATRICES}
    settings = {"r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    return write_adapter(folder, factors(ranks, config), dtype="bf16", **settings)


def export(source: Path, work: Path, ranks: list[int]) -> tuple[Path, Path]:
    plain, kept = work / "plain", work / "kept"
    target, options = get_target("cpu"), Options("int4", quantizer="rtn")
    if not plain.exists():
        export_package(source, plain, target, options)
    if not kept.exists():
        config = open_checkpoint(source).config
        made = {f"rank {r}": make_adapter(work / f"rank-{r}", config, r) for r in ranks}
        export_package(source, kept, target, options, kept=made)
    return plain, kept


def contenders(plain: Path, kept: Path) -> dict[str, Contender]:
    package = ModelPackage.open(kept)
    models = [open_model(folder, CPU).model for folder in (plain, kept)]
    adapters = og.Adapters(models[1])
    for name in package.adapters:
        adapters.load(str(package.adapter_path(name)), name)
    return {
        "plain": (models[0], None, None),
        "none active": (models[1], None, None),
        **{name: (models[1], adapters, name) for name in package.adapters},
    }


def start(contender: Contender, prompt: list[int], new: int) -> tuple[Any, float]:
    model, adapters, name = contender
    params = og.GeneratorParams(model)
    length = len(prompt) + new + 1
    params.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, params)
    if name:
        generator.set_active_adapter(adapters, name)
    started = time.perf_counter()
    generator.append_tokens(prompt)
    generator.generate_next_token()
    return generator, time.perf_counter() - started


def steps(generator: Any, count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        generator.generate_next_token()
        seconds.append(time.perf_counter() - started)
    return seconds


def rotated(names: list[str], number: int) -> Iterator[str]:
    first = number % len(names)
    return iter(names[first:] + names[:first])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--work", type=Path, default=Path("work/adapters"))
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--prompt", type=int, default=256, help="tokens of prefill")
    parser.add_argument("--new", type=int, default=32, help="tokens of decode")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    plain, kept = export(arguments.source, arguments.work, arguments.ranks)
    running = contenders(plain, kept)
    names = list(running)
    prompt = np.random.default_rng(0).integers(3, 290, arguments.prompt).tolist()
    prefill: dict[str, list[float]] = {name: [] for name in names}
    decode: dict[str, list[float]] = {name: [] for name in names}
    for number in range(arguments.rounds + 1):
        generators = {}
        for name in rotated(names, number):
            generators[name], seconds = start(running[name], prompt, arguments.new)
            prefill[name].append(seconds)
        for block in range(arguments.new // BLOCK):
            for name in rotated(names, block):
                # The first step competes with the previous session's threads, which still spin.
                decode[name] += steps(generators[name], BLOCK)[1:]
        if number == 0:  # the first round warms up
            prefill, decode = ({name: [] for name in names} for _ in range(2))
    report(arguments.prompt, prefill, decode, ModelPackage.open(kept))


def report(
    tokens: int,
    prefill: dict[str, list[float]],
    decode: dict[str, list[float]],
    package: ModelPackage,
) -> None:
    files = package.manifest["files"]
    sizes = {name: files[entry["file"]]["size"] for name, entry in package.adapters.items()}
    base = [statistics.median(times["plain"]) for times in (prefill, decode)]
    print(f"data file {files['model.onnx.data']['size'] / 1e6:.0f} MB")
    print(f"{'':12} {'MB':>7} {'prefill/s':>10} {'ratio':>6} {'decode/s':>9} {'ratio':>6}")
    for name in prefill:
        first, step = statistics.median(prefill[name]), statistics.median(decode[name])
        print(
            f"{name:12} {sizes.get(name, 0) / 1e6:7.1f} {tokens / first:10.1f} "
            f"{base[0] / first:6.2f} {1 / step:9.2f} {base[1] / step:6.2f}"
        )


if __name__ == "__main__":
    main()

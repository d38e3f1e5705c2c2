"""Prefill and decode speed of several models side by side: interleaved rounds, medians, ratios.

    python benchmarks/speed.py ours=work/1.1b-int4 builder=work/1.1b-builder [llama=work/q4_0.gguf]

onnxruntime-genai opens a folder, llama-cpp-python a .gguf file. The others are compared with the
first contender. All use the same number of threads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

Round = Callable[[list[int], int], tuple[float, float]]


def genai(path: Path, threads: int) -> Round:
    import onnxruntime_genai as og

    config = og.Config(str(path))
    settings = {"intra_op_num_threads": threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": settings}}}))
    model = og.Model(config)

    def run(prompt: list[int], new: int) -> tuple[float, float]:
        params = og.GeneratorParams(model)
        length = len(prompt) + new + 1
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, params)
        start = time.perf_counter()
        generator.append_tokens(prompt)
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(new):
            generator.generate_next_token()
        return first - start, time.perf_counter() - first

    return run


def llama_cpp(path: Path, threads: int) -> Round:
    """Use the C API: the Python class would also copy the logits of every position."""
    import llama_cpp as lib

    silence = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(silence, None)
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    settings = lib.llama_context_default_params()
    settings.n_ctx = settings.n_batch = 2048
    settings.n_threads = settings.n_threads_batch = threads
    context = lib.llama_init_from_model(model, settings)
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def step(tokens: list[int]) -> int:
        ids = (lib.llama_token * len(tokens))(*tokens)
        if lib.llama_decode(context, lib.llama_batch_get_one(ids, len(tokens))):
            raise SystemExit("llama.cpp could not decode a batch.")
        logits = lib.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax())

    def run(prompt: list[int], new: int, _keep: object = silence) -> tuple[float, float]:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        start = time.perf_counter()
        token = step(prompt)
        first = time.perf_counter()
        for _ in range(new):
            token = step([token])
        return first - start, time.perf_counter() - first

    return run


def size(path: Path) -> int:
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    return sum(file.stat().st_size for file in files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contenders", nargs="+", metavar="NAME=PATH")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of prefill")
    parser.add_argument("--new", type=int, default=32, help="tokens of decode")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    paths = {name: Path(path) for name, path in (c.split("=", 1) for c in arguments.contenders)}
    runs: dict[str, Round] = {}
    for name, path in paths.items():
        opener = llama_cpp if path.suffix == ".gguf" else genai
        runs[name] = opener(path, arguments.threads)
    prompt = np.random.default_rng(0).integers(3, 290, arguments.prompt).tolist()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in paths}
    for number in range(arguments.rounds + 1):
        # Every round starts with another contender: one that follows a runtime whose threads still
        # spin is a few percent slower.
        first = number % len(runs)
        order = [*runs][first:] + [*runs][:first]
        for name in order:
            result = runs[name](prompt, arguments.new)
            if number:  # the first round warms up
                times[name].append(result)
    speeds = {
        name: (
            arguments.prompt / statistics.median(prefill for prefill, _ in measured),
            arguments.new / statistics.median(decode for _, decode in measured),
        )
        for name, measured in times.items()
    }
    base = speeds[next(iter(speeds))]
    print(f"prefill {arguments.prompt}, decode {arguments.new}, {arguments.threads} threads,")
    print(f"medians of {arguments.rounds} interleaved rounds; ratios to {next(iter(speeds))}")
    print(f"{'':24} {'MB':>8} {'prefill/s':>10} {'ratio':>6} {'decode/s':>9} {'ratio':>6}")
    for name, (prefill, decode) in speeds.items():
        print(
            f"{name:24} {size(paths[name]) / 1e6:8.0f} {prefill:10.1f} {prefill / base[0]:6.2f} "
            f"{decode:9.2f} {decode / base[1]:6.2f}"
        )


if __name__ == "__main__":
    main()

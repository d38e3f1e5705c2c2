"""A peer of benchmarks/serving.py: reads a list of prompts a line, answers all, prints tokens/s.

    python serving_peer.py openvino MODEL THREADS     OpenVINO GenAI's continuous batching
    python serving_peer.py genai PACKAGE THREADS      onnxruntime-genai, one answer after the other

Runs in the peer's own environment and imports nothing of this project for OpenVINO.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence

NEW_TOKENS = 96


def openvino(model: str, threads: int) -> Callable[[Sequence[str]], int]:
    """Return what answers several prompts together."""
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 2
    scheduler.max_num_seqs = 8
    settings = {"INFERENCE_NUM_THREADS": threads}
    pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", settings)
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos = NEW_TOKENS, True

    def answer(prompts: Sequence[str]) -> int:
        pipeline.generate(list(prompts), [config] * len(prompts))
        return NEW_TOKENS * len(prompts)

    return answer


def genai(package: str, threads: int) -> Callable[[Sequence[str]], int]:
    """Return what answers one prompt after the other."""
    from llama_onnx.runtime.llama.model import Llama

    model = Llama.load(package, engine="genai", threads=threads)

    def answer(prompts: Sequence[str]) -> int:
        return sum(model.measure(model.encode(text), NEW_TOKENS).new_tokens for text in prompts)

    return answer


def main() -> None:
    """Answer each line."""
    kind, model, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    answer = {"openvino": openvino, "genai": genai}[kind](model, threads)
    print("ready", flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        count = answer(json.loads(line))
        print(count / (time.perf_counter() - started), flush=True)


if __name__ == "__main__":
    main()

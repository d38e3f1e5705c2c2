"""A peer of benchmarks/serving.py: reads prompts, answers them, prints tokens a second.

    python serving_peer.py openvino MODEL THREADS     OpenVINO GenAI's continuous batching
    python serving_peer.py genai PACKAGE THREADS      onnxruntime-genai, one answer after the other

A line has the token ids of all prompts. Runs in the peer's own environment.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence

NEW_TOKENS = 96


Prompts = Sequence[Sequence[int]]


def openvino(model: str, threads: int) -> Callable[[Prompts], int]:
    """Return what answers several prompts together."""
    import numpy as np
    import openvino_genai
    from openvino import Tensor

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 2
    scheduler.max_num_seqs = 8
    settings = {"INFERENCE_NUM_THREADS": threads}
    pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", settings)
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos = NEW_TOKENS, True
    config.set_eos_token_id(2)  # it checks that there is one, and ignores it

    def answer(prompts: Prompts) -> int:
        tensors = [Tensor(np.array([ids], np.int64)) for ids in prompts]
        pipeline.generate(tensors, [config] * len(prompts))
        return NEW_TOKENS * len(prompts)

    return answer


def genai(package: str, threads: int) -> Callable[[Prompts], int]:
    """Return what answers one prompt after the other."""
    from llama_onnx.runtime.llama.model import Llama

    model = Llama.load(package, engine="genai", threads=threads)

    def answer(prompts: Prompts) -> int:
        return sum(model.measure(ids, NEW_TOKENS).new_tokens for ids in prompts)

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

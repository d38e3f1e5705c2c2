"""Measure how fast an open graph reads a prompt and generates tokens, in wall-clock time."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

from llama_onnx.runtime.measure.graph_session import GraphSession, GrowingCache, SharedBuffer
from llama_onnx.runtime.measure.metrics import Ids


@dataclass(frozen=True)
class Speed:
    """Rates, in tokens per second, of a pass over `prompt_tokens` and of `new_tokens` steps."""

    prompt_tokens: int
    new_tokens: int
    prefill_rate: float
    decode_rate: float


def measure_speed(graph: GraphSession, ids: Ids, prompt: int) -> Speed:
    """Time `graph` on `ids` [N]: the first `prompt` in one pass, the rest (1 or more) one by one.

    The cache is one buffer, as in onnxruntime-genai, if the graph allows it. An untimed
    pass warms up first.
    """
    for _ in range(2):
        buffer = SharedBuffer(graph, len(ids)) if graph.shares_buffer else GrowingCache(graph)
        started = perf_counter()
        buffer.step(ids[:prompt])
        filled = perf_counter()
    for position in range(prompt, len(ids)):
        buffer.step(ids[position : position + 1])
    done = perf_counter()
    new = len(ids) - prompt
    return Speed(prompt, new, prompt / (filled - started), new / (done - filled))
